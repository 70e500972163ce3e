"""Saves and restores one large table on fake devices, and prints how far the process's memory rose above its arrays.

Run by tests/test_reshard.py in a process of its own. Prints JSON: bytes of the table, and of the peaks.
"""

import json
import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import jax
import numpy as np

from sharding import FeatureSpec, ShardedTables, TableSpec, TableState, checkpoint, line_files, make_mesh, reshard
from sharding.plan import Placement, ShardingPlan, column_wise, row_wise

TABLE = TableSpec(name="large", num_rows=2**20, dim=64, optimizer="sgd")
BYTES = 4 * TABLE.num_rows * TABLE.dim


def tables_on(nodes: int, chips: int, placement: Placement) -> ShardedTables:
    """The table on a mesh."""
    plan = ShardingPlan(nodes=nodes, chips=chips, placements=(placement,))
    features = [FeatureSpec(name="f", table=TABLE.name)]
    return ShardedTables([TABLE], features, plan=plan, mesh=make_mesh(nodes, chips))


def resident(field: str) -> int:
    """A line of the process's status: "VmRSS", memory now; "VmHWM", its peak. Bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) * 1024


def rise(call: Callable[[], TableState | None]) -> tuple[int, TableState | None]:
    """How far memory rises above what there was before a call, and what it returns."""
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    result = jax.block_until_ready(call())
    return resident("VmHWM") - before, result


def main(folder: Path) -> None:
    """Measures both."""
    line_files.CHUNK_BYTES = 8 * 2**20
    reshard.WINDOW_BYTES = checkpoint.CACHE_BYTES = 4 * 2**20
    columns = tables_on(1, 8, column_wise(TABLE, [6, 2, 4, 0]))
    rows = tables_on(4, 2, row_wise(TABLE, returns="rows"))
    some = np.random.default_rng(0).integers(TABLE.num_rows, size=1000)
    state = columns.init()
    expected = columns.read_rows(state, TABLE.name, some)
    saving, _ = rise(partial(checkpoint.save_tables, columns, state, folder))
    del state
    restoring, restored = rise(partial(checkpoint.restore_tables, rows, folder))
    assert restored is not None
    np.testing.assert_array_equal(rows.read_rows(restored, TABLE.name, some), expected)
    arrays = sum(leaf.nbytes for leaf in jax.tree.leaves(restored))
    print(json.dumps({"table": BYTES, "saving": saving, "restoring": restoring - arrays}))


if __name__ == "__main__":
    os.environ["JAX_PLATFORMS"] = "cpu"
    jax.config.update("jax_num_cpu_devices", 8)
    main(Path(sys.argv[1]))
