"""XLA's bytes of a compiled step beside the estimate, as a table."""

from rich.table import Table

from dlrm_jax.target_step import DeviceBytes
from sharding.storage import Storage


def bytes_table(storage: Storage, found: DeviceBytes) -> Table:
    """XLA's bytes of a device beside the estimate.

    Args:
        storage: The estimate.
        found: XLA's.
    """
    table = Table("memory of a device", "estimate, GB", "XLA, GB", "estimate / XLA", title="estimate and program")
    rows = (
        # Arguments hold the dense part's parameters and optimizer state, and the batch, which the estimate has below.
        ("tables and their optimizer state | arguments", storage.stores, found.arguments),
        ("buffers and dense part | temporary", storage.buffers + storage.dense, found.temporary),
        ("results beside the state", None, found.outputs - found.reused),
        ("all", storage.total, found.total),
    )
    for name, estimate, real in rows:
        estimated = "" if estimate is None else f"{estimate / 1e9:.3f}"
        ratio = "" if estimate is None or not real else f"{estimate / real:.3f}"
        table.add_row(name, estimated, f"{real / 1e9:.3f}", ratio)
    return table
