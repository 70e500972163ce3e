"""Place: what a device has to know of the mesh and of the layout to look up and to update.

Letters: b samples, k vectors of a block, D dim.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int32

from pallas_kernels.implementations import IMPLEMENTATIONS, Implementation
from sharding.assemble import BlockSource
from sharding.codec import Codec, check_codec
from sharding.errors import InputError
from sharding.layout import Layout
from sharding.mesh import check_mesh, device_number
from sharding.plan import ShardingPlan
from sharding.tables import FeatureSpec
from sharding.vectors import Block


class Place(NamedTuple):
    """Layout and mesh.

    Attributes:
        layout: The layout.
        sources: Where the vectors of each block come from.
        means: For each block, the mean that each of its vectors is, among all means; beyond them for one that is none;
            None if none is.
        nodes: Nodes of the mesh.
        kernels: Implementation of the kernels; None for the best that there is.
        forward: How vectors travel home.
        backward: How their gradients travel back.
    """

    layout: Layout
    sources: tuple[BlockSource, ...]
    means: tuple[Int32[np.ndarray, " k"] | None, ...]
    nodes: int
    kernels: Implementation | None
    forward: Codec = "float32"
    backward: Codec = "float32"

    @property
    def device(self) -> Int32[Array, ""]:
        """Number of this device."""
        return device_number() if self.layout.num_devices > 1 else jnp.int32(0)

    def numbers(self, family: str) -> list[int]:
        """Numbers of the groups of a family."""
        return [number for number, group in enumerate(self.layout.groups) if group.family == family]


def check_settings(mesh: Mesh, plan: object, kernels: str | None, forward: str, backward: str) -> None:
    """Raises InputError unless the mesh is one for tables, the plan is one, and kernels and codecs exist.

    Args:
        mesh: The mesh.
        plan: The plan; None will do for one device.
        kernels: Implementation of lookups and updates; None for the best.
        forward: How vectors travel home.
        backward: How their gradients travel back.
    """
    check_mesh(mesh)
    if plan is None and mesh.devices.size > 1:
        raise InputError(
            f"a mesh of {mesh.devices.size} devices needs a plan: make one, as sharding.planner.make_plan(...).plan"
        )
    if not isinstance(plan, ShardingPlan | None):
        raise InputError(f"the plan is a {type(plan).__name__}: give a ShardingPlan, such as make_plan(...).plan")
    check_codec(forward, "forward_codec")
    check_codec(backward, "backward_codec")
    if kernels not in (None, *IMPLEMENTATIONS):
        raise InputError(f"kernels {kernels!r} do not exist; use one of {', '.join(IMPLEMENTATIONS)}, or None")


def divided(
    blocks: Sequence[Float[Array, "b k D"]], divisors: Float[Array, "b means"], place: Place
) -> tuple[Float[Array, "b k D"], ...]:
    """Divides the sums of each mean, or their gradients."""
    return tuple(
        block
        if means is None
        else block / divisors.at[:, jnp.asarray(means)].get(mode="fill", fill_value=1.0)[:, :, None]
        for block, means in zip(blocks, place.means, strict=True)
    )


def means_of(block: Block, means: Sequence[FeatureSpec]) -> Int32[np.ndarray, " k"] | None:
    """Number of the mean that each vector of a block is; beyond all for one that is none. None if none is."""
    numbers = np.array([means.index(f) if f in means else len(means) for f in block.features], np.int32)
    return None if (numbers == len(means)).all() else numbers
