"""Tables saved on one plan and mesh, and restored on another: every row and its optimizer state, bit for bit."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sharding import FeatureSpec, ShardedTables, TableSpec, TableState, make_mesh
from sharding.checkpoint import read_optimizer_state, read_table, restore_tables, save_tables
from sharding.line_files import LineArray, line_arrays
from sharding.mesh import BY_DEVICE, sharding_on
from sharding.plan import (
    Placement,
    ShardingPlan,
    column_wise,
    data_parallel,
    grid,
    row_wise,
    table_row_wise,
    table_wise,
)

TABLES = (
    TableSpec(name="user", num_rows=203, dim=32, optimizer="partial_rowwise_adam"),
    TableSpec(name="item", num_rows=77, dim=96, optimizer="partial_rowwise_adam"),
    TableSpec(name="tag", num_rows=500, dim=5, optimizer="partial_rowwise_adam"),
    TableSpec(name="text", num_rows=31, dim=640, optimizer="adam", dtype="bfloat16"),
    TableSpec(name="word", num_rows=300, dim=48, optimizer="adam", dtype="bfloat16", rounding="split"),
    TableSpec(name="colour", num_rows=1, dim=3, optimizer="rowwise_adagrad"),
    TableSpec(name="fixed", num_rows=20, dim=16, frozen=True, dtype="float16"),
)
FEATURES = [FeatureSpec(name=spec.name, table=spec.name) for spec in TABLES]
# One placement of every kind in "mixed", whatever the mesh.
KINDS = ("table_wise", "column_wise", "row_wise", "table_row_wise", "grid", "data_parallel", "mixed")
LAYOUTS = [(1, 1, "table_wise")] + [
    (nodes, chips, kind)
    for (nodes, chips), kinds in {
        (1, 8): ("table_wise", "column_wise", "row_wise", "mixed"),
        (2, 4): ("table_row_wise", "grid", "data_parallel", "mixed"),
        (4, 2): ("grid", "row_wise", "mixed"),
    }.items()
    for kind in kinds
]


def placement(table: TableSpec, kind: str, number: int, nodes: int, chips: int) -> Placement:
    """The placement of a kind or, where the table cannot have it, on one device or on all."""
    kind = KINDS[:-1][(number + nodes) % 6] if kind == "mixed" else kind
    slices = 1 if table.dim % 16 else max(n for n in (1, 2, 3, 5) if table.dim % (16 * n) == 0)
    last = number + slices - 1
    if kind == "column_wise" and 1 < slices <= nodes * chips:
        # The last columns on the first device, so that column order is not device order.
        return column_wise(table, [(last - i) % (nodes * chips) for i in range(slices)])
    if kind == "grid" and 1 < slices <= nodes and table.num_rows >= chips:
        return grid(table, [(last - i) % nodes for i in range(slices)], returns="rows")
    if kind == "row_wise" and table.num_rows >= nodes * chips:
        return row_wise(table, returns="partial_sums")
    if kind in ("table_row_wise", "grid") and table.num_rows >= chips:
        return table_row_wise(table, number % nodes, returns="partial_sums")
    if kind == "table_wise" or number % 2:
        return table_wise(table, (5 * number) % (nodes * chips))
    return data_parallel(table)


@cache
def tables_on(nodes: int, chips: int, kind: str) -> ShardedTables:
    placements = tuple(placement(table, kind, number, nodes, chips) for number, table in enumerate(TABLES))
    plan = ShardingPlan(nodes=nodes, chips=chips, placements=placements)
    return ShardedTables(TABLES, FEATURES, plan=plan, mesh=make_mesh(nodes, chips))


def noise(tables: ShardedTables) -> TableState:
    """A state on one device, every element of which differs, padding included."""
    random = np.random.default_rng(0)

    def lines(array: LineArray) -> jax.Array:
        values = random.normal(size=(array.lines_per_device, array.line_elements))
        values = (2**10 * abs(values) if array.dtype == np.uint16 else values).astype(array.dtype)
        values[::3, ::5] = -0.0
        return jax.device_put(values, sharding_on(tables.mesh, BY_DEVICE))

    return jax.tree.map(lines, line_arrays(tables.layout))


@cache
def truth() -> tuple[dict[str, np.ndarray], dict[str, dict[str, np.ndarray]]]:
    """Rows and optimizer state of all tables."""
    tables = tables_on(1, 1, "table_wise")
    state = noise(tables)
    rows = {spec.name: tables.read_rows(state, spec.name, range(spec.num_rows)) for spec in TABLES}
    numbers = {spec.name: tables.read_optimizer_state(state, spec.name, range(spec.num_rows)) for spec in TABLES}
    return rows, numbers


def as_stored(table: TableSpec, rows: np.ndarray) -> dict[str, np.ndarray]:
    """The arrays that rows of a table are stored in."""
    if table.rounding != "split":
        return {"weights": rows}
    words = rows.view(np.uint32)
    return {
        "weights": (words >> 16).astype(np.uint16).view(jnp.bfloat16),
        "low_halves": (words & 0xFFFF).astype(np.uint16),
    }


def copies(array: LineArray, lines: jax.Array, table: TableSpec) -> Iterator[tuple[slice, np.ndarray]]:
    """Columns and rows of each shard of a table and, if it is replicated, of each copy of it."""
    by_device = np.asarray(lines).reshape(array.store.num_devices, -1)
    row = np.arange(table.num_rows)
    for piece in array.pieces(table.name):
        shard = piece.shard
        parts = by_device[:, piece.first_element : piece.end_element].reshape(len(by_device), -1, piece.width)
        columns = slice(piece.first_column, piece.first_column + piece.num_columns)
        if shard.replicated:
            yield from ((columns, part[:, : piece.num_columns]) for part in parts)
        else:
            place = shard.first_device + row % shard.num_owners, row // shard.num_owners
            yield columns, parts[place][:, : piece.num_columns]


def assert_holds_truth(tables: ShardedTables, state: TableState) -> None:
    """Every copy on every device, and what the tables' own methods read."""
    arrays, (rows, numbers) = line_arrays(tables.layout), truth()
    for spec in TABLES:
        store, _ = tables.layout.shards(spec.name)
        named = numbers[spec.name] | as_stored(spec, rows[spec.name])
        expected = [(arrays[store.name].weights, state[store.name].weights, named["weights"])]
        for kind in ("element_state", "row_state"):
            of_kind = getattr(arrays[store.name], kind), getattr(state[store.name], kind)
            names = [array.name for array in getattr(store, kind)]
            expected += [(*of, named[name]) for *of, name in zip(*of_kind, names, strict=True)]
        for array, lines, values in expected:
            assert lines.dtype == array.dtype
            for columns, found in copies(array, lines, spec):
                wanted = values.reshape(spec.num_rows, -1)[:, columns]
                assert np.ascontiguousarray(found).tobytes() == np.ascontiguousarray(wanted).tobytes(), spec.name
        # Of an odd number of rows, and out of order.
        some = np.random.default_rng(1).integers(spec.num_rows, size=19)
        assert tables.read_rows(state, spec.name, some).tobytes() == rows[spec.name][some].tobytes()
        for name, values in tables.read_optimizer_state(state, spec.name, some).items():
            assert values.tobytes() == numbers[spec.name][name][some].tobytes()


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> dict[tuple[int, int, str], Path]:
    """Folders of the same tables, saved on each layout after they were restored there from one device."""
    folder = tmp_path_factory.mktemp("saved")
    folders = {}
    with pytest.MonkeyPatch.context() as patch:
        small_buffers(patch)
        for layout in LAYOUTS:
            tables = tables_on(*layout)
            state = restore_tables(tables, folders[LAYOUTS[0]]) if folders else noise(tables)
            folders[layout] = folder / "-".join(map(str, layout))
            save_tables(tables, state, folders[layout])
    return folders


def small_buffers(patch: pytest.MonkeyPatch) -> None:
    """So small that every table takes several chunks and windows, which begin and end within it."""
    patch.setattr("sharding.line_files.CHUNK_BYTES", 40 * 512)
    patch.setattr("sharding.line_files.INNER_LINES", 2)
    patch.setattr("sharding.reshard.WINDOW_BYTES", 30_000)


# Each layout to itself or to one device, and to two or three others.
PAIRS = [
    (source, LAYOUTS[(i + ahead) % len(LAYOUTS)])
    for i, source in enumerate(LAYOUTS)
    for ahead in ((0, 3, 7) if i % 2 else (-i, 1, 5, 10))
]


def slow_unless_mixed(*layouts: tuple[int, int, str]) -> Any:
    """A parameter that is slow unless one of the layouts has a table of each kind."""
    mixed = any("mixed" in layout for layout in layouts)
    return pytest.param(*layouts, id="-".join(map(str, layouts)), marks=() if mixed else pytest.mark.slow)


# Those that compile programs of their own for each: one that is not slow.
one_mixed = pytest.mark.parametrize(
    "layout",
    [
        pytest.param(layout, id=str(layout), marks=() if layout == (2, 4, "mixed") else pytest.mark.slow)
        for layout in LAYOUTS
    ],
)


@pytest.mark.parametrize(("source", "target"), [slow_unless_mixed(*pair) for pair in PAIRS])
def test_tables_restored_on_another_plan_and_mesh_then_the_same_rows(saved, monkeypatch, source, target) -> None:
    small_buffers(monkeypatch)
    tables = tables_on(*target)
    assert_holds_truth(tables, restore_tables(tables, saved[source]))


@pytest.mark.parametrize("layout", [slow_unless_mixed(layout) for layout in LAYOUTS])
def test_tables_of_any_plan_read_from_disk_then_their_rows(saved, monkeypatch, layout) -> None:
    monkeypatch.setattr("sharding.reshard.WINDOW_BYTES", 30_000)
    rows, numbers = truth()
    for spec in TABLES:
        for wanted in (None, slice(5, None, 7), np.array([spec.num_rows - 1, 0, spec.num_rows // 2, 0])):
            index = slice(None) if wanted is None else wanted
            assert read_table(saved[layout], spec.name, wanted).tobytes() == rows[spec.name][index].tobytes()
        state = read_optimizer_state(saved[layout], spec.name, slice(1, 20))
        assert {name: values.tobytes() for name, values in state.items()} == {
            name: values[1:20].tobytes() for name, values in numbers[spec.name].items()
        }


def stored(array: LineArray, rows: Mapping[str, np.ndarray]) -> np.ndarray:
    """The lines of an array that holds rows, and zeros beside them."""
    by_device = np.zeros((array.store.num_devices, array.lines_per_device * array.line_elements), array.dtype)
    for piece in array.pieces():
        shard = piece.shard
        of_table = as_stored(shard.table, rows[shard.table.name])["weights"][
            :, piece.first_column : piece.first_column + piece.num_columns
        ]
        for owner, device in enumerate(range(shard.owners.start, shard.owners.stop)):
            mine = of_table if shard.replicated else of_table[owner :: shard.num_owners]
            part = by_device[device, piece.first_element : piece.end_element].reshape(-1, piece.width)
            part[: len(mine), : piece.num_columns] = mine
    return by_device.reshape(-1, array.line_elements)


@one_mixed
def test_initial_rows_on_any_plan_then_those_of_one_device(layout) -> None:
    tables, one = tables_on(*layout), tables_on(1, 1, "table_wise")
    alone = one.init()
    rows = {spec.name: one.read_rows(alone, spec.name, range(spec.num_rows)) for spec in TABLES}
    state = tables.init()
    for name, array in weights_of(tables).items():
        np.testing.assert_array_equal(np.asarray(state[name].weights), stored(array, rows))


@one_mixed
def test_rows_written_then_those_and_nothing_else_change(monkeypatch, layout) -> None:
    monkeypatch.setattr("sharding.rows.BLOCK_BYTES", 8000)
    tables, random = tables_on(*layout), np.random.default_rng(2)
    state = tables.init()
    rows = {spec.name: tables.read_rows(state, spec.name, range(spec.num_rows)) for spec in TABLES}
    for spec in TABLES:
        first = spec.num_rows // 3
        values = random.normal(size=((spec.num_rows - first + 1) // 2, spec.dim)).astype(rows[spec.name].dtype)
        state = tables.write_rows(state, spec.name, first, values)
        rows[spec.name][first : first + len(values)] = values
    for name, array in weights_of(tables).items():
        np.testing.assert_array_equal(np.asarray(state[name].weights), stored(array, rows))


def weights_of(tables: ShardedTables) -> Mapping[str, LineArray]:
    """The arrays of weights, by store."""
    return {name: arrays.weights for name, arrays in line_arrays(tables.layout).items()}


def test_files_of_replicated_tables_then_one_writer(saved) -> None:
    layout = (2, 4, "data_parallel")
    names = {spec.name for number, spec in enumerate(TABLES) if number % 2 == 0}
    shards = json.loads((saved[layout] / "manifest.json").read_text())["tables"]
    assert names == {name for name, entry in shards.items() if entry["shards"][0]["replicated"]}
    # A store of replicated tables alone: one device's lines, in one file.
    assert not (saved[layout] / "weights.float16.frozen").exists()
    metadata = json.loads((saved[layout] / "weights.float16.frozen.replicated" / "zarr.json").read_text())
    assert metadata["shape"][0] == 1


def test_a_large_table_then_saved_and_restored_in_far_less_memory(tmp_path: Path) -> None:
    script = Path(__file__).parent / "table_peak_memory.py"
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, script, tmp_path / "tables"], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    peaks = json.loads(done.stdout)
    # Above the arrays themselves, which are in the memory of the devices where there are any. Compilation is in it.
    assert peaks["saving"] < peaks["table"] / 3
    assert peaks["restoring"] < peaks["table"] / 3


@pytest.mark.slow
def test_two_processes_then_save_and_restore_each_what_its_devices_hold(tmp_path: Path) -> None:
    script = Path(__file__).parent / "tables_of_processes.py"
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        coordinator = f"localhost:{probe.getsockname()[1]}"
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    processes = [
        subprocess.Popen(
            [sys.executable, script, coordinator, str(number), tmp_path / "tables"],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for number in range(2)
    ]
    outputs = [process.communicate(timeout=300)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], "\n".join(outputs)
    # What two processes wrote, one reads.
    one = tables_on(1, 1, "table_wise")
    state = restore_tables(one, tmp_path / "tables")
    initial = one.init()
    for spec in TABLES:
        rows = one.read_rows(initial, spec.name, range(spec.num_rows))
        rows[: spec.num_rows // 2] = 3.0
        np.testing.assert_array_equal(one.read_rows(state, spec.name, range(spec.num_rows)), rows)
