"""gather_few: what each device has, where that is a few numbers."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Shaped

from pallas_kernels.target import current_target
from sharding.mesh import AXES


def gather_few(x: Shaped[Array, " k"]) -> Shaped[Array, "W k"]:
    """Gathers a few numbers of all W devices, node by node; to be called inside `jax.shard_map`.

    On TPUs they travel by all-to-all: a gather of few numbers becomes an all-reduce there (14 of a device do, 1,024 do
    not), and a small all-reduce is synchronous (of 32 KB, not of 148), so that the device computes nothing meanwhile.
    """
    if current_target().platform != "tpu":
        return jax.lax.all_gather(x, AXES)
    copies = jnp.broadcast_to(x, (jax.lax.axis_size(AXES), *x.shape))
    return jax.lax.all_to_all(copies, AXES, split_axis=0, concat_axis=0, tiled=True)
