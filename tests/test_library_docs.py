"""docs/library.md and docs/kernels.md: their programs run as they stand, and give the numbers of plain `jax.numpy`."""

import contextlib
import re
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sharding.measure
from pallas_kernels import cpu, pooled_lookup
from sharding import InputError, ShardedTables
from sharding.checkpoint import restore_tables, save_tables
from sharding.topology import preset

ROOT = Path(__file__).parents[1]
# float32, with sums in another order.
assert_close = partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)


def run_blocks(page: str) -> dict[str, Any]:
    """Runs the Python blocks of a page one after the other, as one program; returns its names."""
    names: dict[str, Any] = {}
    with contextlib.redirect_stdout(None):
        for block in re.findall(r"^```python\n(.*?)^```", (ROOT / page).read_text(), re.MULTILINE | re.DOTALL):
            exec(compile(block, page, "exec"), names)
    return names


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    """What docs/library.md names once its program has run; the folder it ran in; how often its step was traced."""
    folder = tmp_path_factory.mktemp("library")
    traced = []
    lookup = ShardedTables.lookup

    def counted(self: ShardedTables, *arguments: Any) -> Any:
        traced.append(self)
        return lookup(self, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        # To measure the host takes seconds; tests/test_topology.py does it.
        patch.setattr(sharding.measure, "topology_of", lambda mesh: preset("h200", *mesh.devices.shape))
        patch.setattr(ShardedTables, "lookup", counted)
        names = run_blocks("docs/library.md")
    return names, folder, len(traced)


def averaging(bags: list[list[int]], num_rows: int) -> np.ndarray:
    """The matrix [bags, rows] that takes a table to the means of its bags."""
    matrix = np.zeros((len(bags), num_rows), np.float32)
    for bag, ids in enumerate(bags):
        np.add.at(matrix[bag], ids, np.float32(1 / max(len(ids), 1)))
    return matrix


@partial(jax.jit, static_argnums=0)
def plain_step(loss_of, tables, moments, params, averages, labels):
    """A step of whole tables: their gradients by autodiff, row-wise AdaGrad on every row, SGD for the model."""

    def loss_of_tables(tables, params):
        return loss_of(params, {name: averages[name] @ tables[name] for name in tables}, labels)

    loss, (sparse, dense) = jax.value_and_grad(loss_of_tables, argnums=(0, 1))(tables, params)
    moments = jax.tree.map(lambda m, g: m + jnp.mean(g**2, axis=1, keepdims=True), moments, sparse)
    tables = jax.tree.map(lambda w, g, m: w - 0.1 * g / (jnp.sqrt(m) + 1e-8), tables, sparse, moments)
    return tables, moments, jax.tree.map(lambda w, g: w - 0.1 * g, params, dense), loss


def test_library_page_when_its_program_runs_then_losses_and_rows_are_those_of_plain_tables(library):
    names, _, _ = library
    sharded, start = names["tables"], names["tables"].init()
    plain = {
        "user": sharded.read_rows(start, "user", range(500)),
        "viewed": sharded.read_rows(start, "item", range(3000)),
    }
    moments = {name: np.zeros((len(table), 1), np.float32) for name, table in plain.items()}
    params = {"weight": np.full(16, 10.0, np.float32), "bias": np.float32(0.0)}
    losses = []
    for bags, labels in names["batches"]:
        averages = {name: averaging(bags[name], len(table)) for name, table in plain.items()}
        plain, moments, params, loss = plain_step(names["loss_of"], plain, moments, params, averages, labels)
        losses.append(float(loss))
    assert_close(names["losses"], losses)
    # The page overwrites two rows afterwards.
    items = np.asarray(plain["viewed"]).copy()
    assert np.abs(items - sharded.read_rows(start, "item", range(3000))).max() > 0.1
    items[10:12] = 0.0
    assert_close(sharded.read_rows(names["state"], "item", range(3000)), items)
    assert_close(sharded.read_rows(names["state"], "user", range(500)), plain["user"])
    assert_close(names["params"]["weight"], params["weight"])


def test_library_page_when_batches_differ_in_ids_then_its_step_is_compiled_once(library):
    names, _, traced = library
    ids = [sum(map(len, bags["viewed"])) for bags, _ in names["batches"]]
    assert len(set(ids)) == len(ids)
    # Room has grown, but for ids at home only: where they arrive, which is all that a step sees, there was enough.
    assert names["capacities"].ids == 64
    assert traced == 1


def test_library_page_when_tables_are_restored_on_another_mesh_then_rows_are_the_same_bits(library):
    names, _, _ = library
    rows = np.arange(3000)
    there = names["tables_of_two"].read_rows(names["state_of_two"], "item", rows)
    np.testing.assert_array_equal(there, names["tables"].read_rows(names["state"], "item", rows))
    np.testing.assert_array_equal(names["some_items"], there[[10, 11, 2999]])
    assert names["tables_of_two"].num_devices == 2


def test_library_page_when_initial_values_are_loaded_then_rows_begin_with_them(library):
    names, _, _ = library
    begun = names["begun"]
    assert (begun.read_rows(names["begun_state"], "item", range(3000)) == np.float32(0.01)).all()
    assert not (begun.read_rows(begun.init(), "item", range(3000)) == np.float32(0.01)).any()


def test_library_page_when_a_save_failed_then_its_folder_is_refused_until_it_is_removed_as_the_page_says(library):
    names, folder, _ = library
    tables, state, remove = names["begun"], names["begun_state"], names["remove_unfinished"]
    failed = folder / "failed"
    save_tables(tables, state, failed)
    (failed / "manifest.json").unlink()
    with pytest.raises(InputError, match="not a complete folder"):
        restore_tables(tables, failed)
    with pytest.raises(FileExistsError):
        save_tables(tables, state, failed)
    remove(failed)
    save_tables(tables, state, failed)
    remove(failed)
    jax.tree.map(np.testing.assert_array_equal, restore_tables(tables, failed), state)


def test_kernels_page_when_its_program_runs_then_rows_are_those_of_plain_arrays():
    names = run_blocks("docs/kernels.md")
    table = np.asarray(0.1 * jax.random.normal(jax.random.key(0), (1000, 64))).copy()
    table[600:, 50:] = 0.0
    moment = np.zeros((1000, 1), np.float32)
    dim, rate = np.full((1000, 1), 64.0, np.float32), np.full((1000, 1), 0.1, np.float32)
    dim[600:], rate[600:] = 50.0, 0.02
    for _ in range(3):
        vectors = [table[[3, 17, 3]].sum(axis=0), table[999], table[[600, 601]].sum(axis=0)]
        loss = 0.5 * sum((vector**2).sum() for vector in vectors)
        gradient = np.zeros_like(table)
        gradient[3], gradient[17], gradient[999] = 2 * vectors[0], vectors[0], vectors[1]
        gradient[[600, 601]] = vectors[2]
        moment += (gradient**2).sum(axis=1, keepdims=True) / dim
        table -= rate * gradient / (np.sqrt(moment) + 1e-8)
    assert_close(float(names["loss"]), loss)
    assert_close(np.asarray(names["stores"].weights).reshape(1000, 64), table)
    state = np.asarray(names["stores"].row_state[0]).reshape(-1)
    assert_close(state[:600], moment[:600, 0])
    assert_close(state[640:1040], moment[600:, 0])


def test_kernels_page_on_what_can_be_differentiated_holds_for_hosts():
    store, offsets, rows = (
        jnp.arange(1024.0).reshape(-1, 128),
        jnp.array([0, 2], jnp.int32),
        jnp.array([3, 5], jnp.int32),
    )

    def first_number(weights, implementation):
        return pooled_lookup(store, rows, offsets, weights, width=64, implementation=implementation)[0, 0]

    gradient = jax.jit(jax.grad(partial(first_number, implementation="xla")))(jnp.ones(2))
    np.testing.assert_array_equal(gradient, [3 * 64, 5 * 64])
    if cpu.available():
        with pytest.raises(ValueError, match="FFI call to `dlrm_pooled_lookup` cannot be differentiated"):
            jax.grad(partial(first_number, implementation="cpu"))(jnp.ones(2))
