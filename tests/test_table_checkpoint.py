"""Tables to disk and back, bit for bit; and what is refused."""

import dataclasses
import json
import re
from pathlib import Path

import jax
import numpy as np
import pytest

from sharding import FeatureSpec, InputError, ShardedTables, TableSpec, TableState
from sharding.checkpoint import read_optimizer_state, read_table, restore_tables, save_tables
from sharding.line_files import LineArray, line_arrays
from sharding.manifest import MANIFEST, read_manifest
from sharding.mesh import BY_DEVICE, sharding_on

TABLES = (
    TableSpec(name="user", num_rows=203, dim=16, optimizer="partial_rowwise_adam"),
    TableSpec(name="item", num_rows=77, dim=5, optimizer="partial_rowwise_adam"),
    TableSpec(name="text", num_rows=31, dim=300, optimizer="adam"),
    TableSpec(name="half", num_rows=50, dim=30, optimizer="adagrad", dtype="bfloat16"),
    TableSpec(name="fixed", num_rows=3, dim=8, frozen=True, dtype="float16"),
)


def tables_of(specs: tuple[TableSpec, ...] = TABLES) -> ShardedTables:
    return ShardedTables(specs, [FeatureSpec(name=spec.name, table=spec.name) for spec in specs])


def noise(tables: ShardedTables) -> TableState:
    """A state whose every element of a row differs from what a new one has."""
    random = np.random.default_rng(0)

    def lines(array: LineArray) -> jax.Array:
        values = random.normal(size=(array.lines_per_device, array.line_elements)).astype(array.dtype)
        # No device uses what lies behind its last row, and nobody saves it.
        values[array.end(0) :] = 0
        return jax.device_put(values, sharding_on(tables.mesh, BY_DEVICE))

    return jax.tree.map(lines, line_arrays(tables.layout))


@pytest.fixture
def small_chunks(monkeypatch) -> None:
    """Chunks of 6 lines, each of two parts: every store takes several, and tables begin and end within one."""
    monkeypatch.setattr("sharding.line_files.CHUNK_BYTES", 7 * 512)
    monkeypatch.setattr("sharding.line_files.INNER_LINES", 3)
    monkeypatch.setattr("sharding.reshard.WINDOW_BYTES", 4000)


@pytest.fixture
def saved(tmp_path: Path, small_chunks: None) -> Path:
    tables = tables_of()
    save_tables(tables, noise(tables), tmp_path / "tables")
    return tmp_path / "tables"


def chunks_of(store: Path) -> list[Path]:
    return sorted(path for path in (store / "c").rglob("*") if path.is_file())


def assert_same(one: TableState, other: TableState) -> None:
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        assert a.dtype == b.dtype
        assert a.sharding == b.sharding
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def test_tables_restored_then_equal_those_saved_bit_for_bit(saved: Path) -> None:
    tables = tables_of()
    assert_same(restore_tables(tables, saved), noise(tables))
    assert len(chunks_of(saved / "weights.float32.adam")) > 5


def test_tables_of_one_chunk_then_restored_bit_for_bit(tmp_path: Path) -> None:
    tables = tables_of(TABLES[:2])
    save_tables(tables, noise(tables), tmp_path / "tables")
    assert_same(restore_tables(tables, tmp_path / "tables"), noise(tables))


def test_tables_of_zeros_then_their_chunks_are_on_disk_like_any(tmp_path: Path, small_chunks: None) -> None:
    # A chunk that is not there is an error.
    tables = tables_of(TABLES[3:])
    zeros = jax.tree.map(np.zeros_like, noise(tables))
    save_tables(tables, zeros, tmp_path / "tables")
    assert not read_table(tmp_path / "tables", "half").any()


@pytest.mark.parametrize("spec", TABLES, ids=lambda spec: spec.name)
def test_read_table_then_the_rows_that_the_model_sees(saved: Path, spec: TableSpec) -> None:
    tables = tables_of()
    rows = tables.read_rows(noise(tables), spec.name, range(spec.num_rows))
    last = spec.num_rows - 1
    for wanted in (
        None,
        slice(1, last),
        slice(None, None, -2),
        slice(0, 0),
        np.array([last, 0, last, 1]),
        np.array([]),
    ):
        result = read_table(saved, spec.name, wanted)
        expected = rows if wanted is None else rows[wanted if isinstance(wanted, slice) else wanted.astype(int)]
        assert result.dtype == rows.dtype
        np.testing.assert_array_equal(result, expected)


@pytest.mark.parametrize("spec", TABLES, ids=lambda spec: spec.name)
def test_read_optimizer_state_then_what_the_model_sees(saved: Path, spec: TableSpec) -> None:
    tables, rows = tables_of(), [2, 0, 1]
    expected = tables.read_optimizer_state(noise(tables), spec.name, rows)
    result = read_optimizer_state(saved, spec.name, np.array(rows))
    assert list(result) == list(expected)
    for name, values in expected.items():
        assert result[name].dtype == values.dtype
        np.testing.assert_array_equal(result[name], values)


def assert_refused(message: str, call, *arguments) -> None:
    with pytest.raises(InputError, match=re.escape(message)) as error:
        call(*arguments)
    assert "\n" not in str(error.value)


def test_read_table_of_a_table_or_row_that_is_not_there_then_refused(saved: Path) -> None:
    assert_refused(f"{saved}: no table 'x'; it holds [", read_table, saved, "x")
    for row in (203, -1):
        message = f"{saved}: table 'user' has no row {row}; its rows are 0 to 202"
        assert_refused(message, read_table, saved, "user", np.array([0, row]))
    message = f"rows of {saved}: table 'user' are given as float64 of shape (1,)"
    assert_refused(message, read_table, saved, "user", [1.9])


def test_tables_saved_to_a_folder_that_tensorstore_would_take_for_another_then_refused(tmp_path: Path) -> None:
    tables = tables_of()
    assert_refused("takes a backslash for a slash", save_tables, tables, tables.init(), tmp_path / "a\\b")
    assert not any(tmp_path.iterdir())


def test_a_folder_without_manifest_then_not_complete(saved: Path) -> None:
    (saved / MANIFEST).rename(saved / (MANIFEST + ".partial"))
    for call in (read_manifest, lambda folder: restore_tables(tables_of(), folder), lambda f: read_table(f, "user")):
        assert_refused(f"{saved / MANIFEST}: not a complete folder of tables (", call, saved)


@pytest.mark.parametrize("text", ["{", "[]", '{"tables": {}}'])
def test_a_manifest_that_is_none_then_not_complete(saved: Path, text: str) -> None:
    (saved / MANIFEST).write_text(text)
    assert_refused(f"{saved / MANIFEST}: not a complete folder of tables (", restore_tables, tables_of(), saved)


def test_a_folder_that_exists_then_never_written_over(saved: Path) -> None:
    tables = tables_of()
    with pytest.raises(FileExistsError):
        save_tables(tables, noise(tables), saved)


def test_a_store_that_is_missing_then_refused(saved: Path) -> None:
    store = saved / "weights.float32.adam"
    store.rename(saved / "elsewhere")
    assert_refused(f"{store}: cannot be opened (", restore_tables, tables_of(), saved)
    assert_refused(f"{store}: cannot be opened (", read_table, saved, "text")


@pytest.mark.parametrize("damage", ["missing", "shorter", "changed"])
def test_a_damaged_chunk_then_refused(saved: Path, damage: str) -> None:
    store = saved / "weights.float32.adam"
    chunk = chunks_of(store)[1]
    content = bytearray(chunk.read_bytes())
    if damage == "missing":
        chunk.unlink()
    elif damage == "shorter":
        chunk.write_bytes(content[:-100])
    else:
        content[100] ^= 1
        chunk.write_bytes(content)
    assert_refused(f"{store}: is damaged (", restore_tables, tables_of(), saved)
    assert_refused(f"{store}: is damaged (", read_table, saved, "text")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dim": 15}, "table 'user' has dim 16 in the checkpoint, but 15 in the model"),
        ({"num_rows": 202}, "table 'user' has num_rows 203 in the checkpoint, but 202 in the model"),
        ({"dtype": "bfloat16"}, "table 'user' has store float32.partial_rowwise_adam in the checkpoint, but bfloat16."),
        ({"name": "visitor"}, "table 'user' is in the checkpoint, but not in the model"),
    ],
)
def test_tables_of_another_layout_then_refused_by_table_and_field(saved: Path, changes: dict, message: str) -> None:
    other = tables_of((dataclasses.replace(TABLES[0], **changes), *TABLES[1:]))
    assert_refused(f"{saved}: {message}", restore_tables, other, saved)


def test_tables_of_another_rule_then_refused(saved: Path) -> None:
    other = tables_of((*TABLES[:2], dataclasses.replace(TABLES[2], optimizer="sgd"), *TABLES[3:]))
    message = "table 'text' has store float32.adam in the checkpoint, but float32.sgd in the model"
    assert_refused(message, restore_tables, other, saved)


def test_a_model_with_one_more_table_then_refused(saved: Path) -> None:
    other = tables_of((*TABLES, TableSpec(name="new", num_rows=3, dim=8)))
    assert_refused("table 'new' is in the model, but not in the checkpoint", restore_tables, other, saved)


def test_a_manifest_of_another_version_then_refused(saved: Path) -> None:
    manifest = json.loads((saved / MANIFEST).read_text())
    del manifest["format"]
    (saved / MANIFEST).write_text(json.dumps(manifest))
    message = f"{saved / MANIFEST}: was made by another version of this program (its format is None"
    assert_refused(message, restore_tables, tables_of(), saved)
    assert_refused(message, read_table, saved, "user")


def test_files_of_other_shapes_than_the_manifest_says_then_refused(saved: Path) -> None:
    manifest = json.loads((saved / MANIFEST).read_text())
    manifest["stores"]["float32.adam"]["lines_per_device"] += 1
    (saved / MANIFEST).write_text(json.dumps(manifest))
    assert_refused(f"{saved / 'weights.float32.adam'}: has shape (1, ", restore_tables, tables_of(), saved)


def test_files_of_another_dtype_than_the_manifest_says_then_refused(saved: Path) -> None:
    # Of as many bits, so that it has the same shape.
    metadata = saved / "weights.bfloat16.adagrad" / "zarr.json"
    metadata.write_text(metadata.read_text().replace('"bfloat16"', '"float16"'))
    assert_refused(f"{metadata.parent}: has shape (1, ", read_table, saved, "half")


@pytest.mark.parametrize(
    ("table", "field", "value"),
    [("user", "store", "float32.sgd"), ("user", "shards", [{}]), ("user", "num_rows", None), ("user", "shards", 3)],
)
def test_a_manifest_that_was_changed_then_refused(saved: Path, table: str, field: str, value: object) -> None:
    manifest = json.loads((saved / MANIFEST).read_text())
    manifest["tables"][table][field] = value
    (saved / MANIFEST).write_text(json.dumps(manifest))
    assert_refused(f"{saved / MANIFEST}: is damaged (", restore_tables, tables_of(), saved)
