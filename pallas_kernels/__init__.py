"""One device: look embedding rows up, update rows in place. Knows arrays and nothing else."""

from pallas_kernels.ids import Ids
from pallas_kernels.lookup import pooled_lookup
from pallas_kernels.row_optimizers import ROW_OPTIMIZERS, RowOptimizer
from pallas_kernels.slots import Slots
from pallas_kernels.stores import Stores
from pallas_kernels.update import row_statistics, sparse_update

__all__ = [
    "ROW_OPTIMIZERS",
    "Ids",
    "RowOptimizer",
    "Slots",
    "Stores",
    "pooled_lookup",
    "row_statistics",
    "sparse_update",
]
