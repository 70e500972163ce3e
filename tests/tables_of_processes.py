"""One of two processes that write, save, restore and read the tables of tests/test_reshard.py together.

Run by that test, with the coordinator's address, the process's number and a folder.
"""

import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from test_reshard import TABLES, small_buffers, tables_on

from sharding import ShardedTables, TableState
from sharding.checkpoint import restore_tables, save_tables


def assert_all_read(tables: ShardedTables, state: TableState, rows: dict[str, np.ndarray]) -> None:
    """This process, too, reads all rows."""
    for spec in TABLES:
        np.testing.assert_array_equal(tables.read_rows(state, spec.name, range(spec.num_rows)), rows[spec.name])
        for values in tables.read_optimizer_state(state, spec.name, [0]).values():
            assert not values.any()


def main(coordinator: str, number: int, folder: Path) -> None:
    """Saves on 2 x 4 devices and restores there and on 4 x 2."""
    jax.config.update("jax_num_cpu_devices", 4)
    jax.distributed.initialize(coordinator, 2, number)
    tables = tables_on(2, 4, "mixed")
    state = tables.init()
    rows = {}
    for spec in TABLES:
        state = tables.write_rows(state, spec.name, 0, np.full((spec.num_rows // 2, spec.dim), 3.0, np.float32))
        rows[spec.name] = tables.read_rows(state, spec.name, range(spec.num_rows))
        assert (rows[spec.name][: spec.num_rows // 2] == 3.0).all()
    with pytest.MonkeyPatch.context() as patch:
        small_buffers(patch)
        save_tables(tables, state, folder)
        assert_all_read(tables, restore_tables(tables, folder), rows)
        other = tables_on(4, 2, "grid")
        assert_all_read(other, restore_tables(other, folder), rows)
    with pytest.raises(FileExistsError):
        save_tables(tables, state, folder)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]))
