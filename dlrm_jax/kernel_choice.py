"""Whether the implementation of lookups and updates that a config names can serve its tables on its devices."""

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from pallas_kernels.implementations import Implementation, implementation_of
from sharding.errors import InputError
from sharding.layout import Layout

# What every implementation serves on its own devices.
_DTYPE, _WIDTH = jnp.dtype("float32"), 128


def check_kernels(kernels: Implementation | None, mesh: Mesh, layout: Layout | None = None) -> None:
    """Raises InputError unless an implementation serves the devices, and lookups and updates of all groups of tables.

    Else the first compilation would find out, after data has been read.

    Args:
        kernels: The implementation; None, the best for the devices, always serves.
        mesh: The devices.
        layout: Where the tables lie; the devices alone are looked at unless given.
    """
    if kernels is None:
        return
    try:
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            implementation_of(kernels, dtype=_DTYPE, width=_WIDTH)
            if layout is None:
                return
            for group in layout.groups:
                dtype, table = jnp.dtype(group.dtype), group.table
                most = layout.store_of(group).largest_array
                implementation_of(kernels, dtype=dtype, width=group.width, largest_store=most)
                if table.rule is not None:
                    implementation_of(
                        kernels,
                        dtype=dtype,
                        width=group.width,
                        optimizer=table.rule,
                        storage_rounding=table.rounding,
                        largest_store=most,
                    )
    except ValueError as error:
        raise InputError(f"kernels: {error}") from error
