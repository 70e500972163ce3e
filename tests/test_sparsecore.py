"""sparsecore beyond the inherited tests: races, shares, and programs for TPUs that are not here."""

import dataclasses
import functools
import itertools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_aot
from hypothesis import given, settings
from hypothesis import strategies as st
from implementation_cases import device_of
from jax.experimental.pallas import tpu as pltpu
from kernel_cases import NOWHERE, NUM_BAGS, NUM_IDS, NUM_ROWS, Ids, batches, lines_of, pooled, table_of
from tpu_programs import NUM_LINES, SMALL, compiled_for, compiled_lookup, compiled_update, update_shapes
from update_cases import ROWS_PER_SHARD, Tables, gradients_of, logical_rows, slots_of, slots_of_ids

from configs.quickstart import quickstart
from dlrm_jax.config import TableConfig
from pallas_kernels import ROW_OPTIMIZERS, Slots, sparsecore, xla
from pallas_kernels.sparsecore.work import Work, share_out
from pallas_kernels.xla import RUN_BLOCK
from sharding.plan import column_wise, data_parallel, grid, row_wise, table_row_wise, table_wise

KIND = "TPU v6 lite"
KINDS = ("v5p", "v6e", "7x")


@pytest.fixture
def racing() -> Iterator[None]:
    """The slow interpreter, which knows when two copies touch the same bytes."""
    with device_of("sparsecore"), pltpu.force_tpu_interpret_mode(pltpu.InterpretParams(detect_races=True)):
        yield


@pytest.mark.parametrize(
    ("width", "weighted"),
    [(16, True), pytest.param(384, False, marks=pytest.mark.slow), pytest.param(128, True, marks=pytest.mark.slow)],
)
def test_lookup_then_equals_numpys_float32_sum_in_the_order_of_ids(racing: None, width: int, weighted: bool) -> None:
    del racing
    random = np.random.default_rng(0)
    rows = np.where(random.random(NUM_IDS) < 0.1, random.choice(NOWHERE, NUM_IDS), random.integers(0, NUM_ROWS))
    ids = Ids(
        rows=rows.astype(np.int32),
        offsets=np.sort(np.concatenate([[0], random.integers(0, NUM_IDS - 5, NUM_BAGS)])).astype(np.int32),
        weights=random.normal(size=NUM_IDS).astype(np.float32),
    )
    weights = ids.weights if weighted else None
    look_up = functools.partial(sparsecore.pooled_lookup, width=width, longest_bag=None)
    result = jax.jit(look_up)(lines_of(table_of(width)), ids.rows, ids.offsets, weights)
    np.testing.assert_array_equal(result, pooled(table_of(width), ids, weights, np.float32))


def both_updates(rule: str, width: int, ids: Ids, *, weighted: bool) -> tuple:
    """What an update makes of the same tables here and in `xla`."""
    tables = Tables.fresh(rule, table_of(width))
    options = {"optimizer": ROW_OPTIMIZERS[rule], "width": width, "storage_rounding": "nearest"}
    arrays = (
        tables.weights,
        tables.element_state,
        tables.row_state,
        ids.rows,
        slots_of_ids(ids.rows),
        ids.offsets,
        gradients_of(width),
        ids.weights if weighted else None,
    )
    numbers = {
        "logical_rows": jnp.asarray(logical_rows(ids.rows)),
        "slots": slots_of(width),
        "step": jnp.int32(3),
        "seed": jnp.uint32(9),
        "statistics": None,
    }
    here = functools.partial(sparsecore.sparse_update, **options)
    there = functools.partial(xla.sparse_update, **options)
    return tuple(jax.jit(update)(*arrays, **numbers) for update in (here, there))


def assert_close(arrays: tuple, wanted: tuple) -> None:
    for array, want in zip(jax.tree.leaves(arrays), jax.tree.leaves(wanted), strict=True):
        # Compilers fuse products and sums of a rule as they please; a few last bits of float32.
        np.testing.assert_allclose(array, want, rtol=2e-6, atol=2e-6)


def hot_ids(num_ids: int, hot: int) -> Ids:
    """Few rows of which one has that many ids, some that do not exist, empty bags, padding."""
    random = np.random.default_rng(1)
    rows = random.integers(0, NUM_ROWS, num_ids)
    rows[: num_ids // 10] = random.choice(NOWHERE, num_ids // 10)
    rows[num_ids - hot :] = 5
    return Ids(
        rows=random.permutation(rows).astype(np.int32),
        offsets=np.sort(np.append(random.integers(0, num_ids, NUM_BAGS - 1), [0, num_ids - 4])).astype(np.int32),
        weights=random.normal(size=num_ids).astype(np.float32),
    )


CHUNK, SHARES = 32, 5


@jax.jit
def five_shares(slots: Slots, rows, slots_of_ids, offsets, gradients, weights) -> Work:
    """Ids shared out for rows with weights and row-wise state."""
    options = {"num_rows": NUM_ROWS, "has_scalars": True, "chunk": CHUNK, "block": 16, "shares": SHARES}
    return share_out(rows, slots_of_ids, offsets, gradients, weights, None, slots, **options)[0]


@settings(deadline=None, max_examples=20)
@given(ids=batches(), first_scalar=st.integers(0, 300))
def test_shares_then_no_line_of_weights_or_state_is_of_two(ids: Ids, first_scalar: int) -> None:
    slots = slots_of(16, first_scalar=first_scalar + jnp.arange(3, dtype=jnp.int32) * ROWS_PER_SHARD)
    work = five_shares(slots, ids.rows, slots_of_ids(ids.rows), ids.offsets, gradients_of(16), ids.weights)
    source, rank, tag, weight, scalar = np.asarray(work.words).reshape(-1, 5, CHUNK).swapaxes(0, 1).reshape(5, -1)
    bounds = np.asarray(work.bounds)[: SHARES + 1]
    named = np.flatnonzero((ids.rows[: ids.offsets[-1]] >= 0) & (ids.rows[: ids.offsets[-1]] < NUM_ROWS))
    order = named[np.argsort(ids.rows[named], kind="stable")]
    assert (bounds[0], bounds[-1]) == (0, len(order))
    np.testing.assert_array_equal(source[: len(order)], ids.bags[order])
    np.testing.assert_array_equal(weight[: len(order)].view(np.float32), ids.weights[order])
    np.testing.assert_array_equal(np.asarray(work.units)[rank[: len(order)]], ids.rows[order] // 8)
    is_last = (tag[: len(order)] & 2) != 0
    np.testing.assert_array_equal(scalar[: len(order)] >= 0, is_last)
    parts = [slice(start, end) for start, end in itertools.pairwise(bounds)]
    for lines in (rank, (first_scalar + ids.rows[order]) // 128):
        held = [set(lines[part].tolist()) for part in parts]
        assert len(set().union(*held)) == sum(len(of_share) for of_share in held)


def test_an_update_when_races_are_looked_for_then_none(racing: None) -> None:
    del racing
    assert_close(*both_updates("rowwise_adagrad", 16, hot_ids(24, 8), weighted=True))


@pytest.mark.parametrize(
    ("rule", "width", "num_ids", "weighted"),
    [
        pytest.param("rowwise_adagrad", 8, RUN_BLOCK + 56, True, marks=pytest.mark.slow),
        pytest.param("partial_rowwise_adam", 64, 4 * RUN_BLOCK, False, marks=pytest.mark.slow),
        pytest.param("lamb", 384, 4 * RUN_BLOCK, True, marks=pytest.mark.slow),
    ],
)
def test_an_update_when_a_row_has_most_ids_then_that_of_xla(
    rule: str, width: int, num_ids: int, weighted: bool
) -> None:
    with device_of("sparsecore"):
        assert_close(*both_updates(rule, width, hot_ids(num_ids, 3 * num_ids // 4), weighted=weighted))


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        ({}, None),
        ({"device_kind": "TPU v5 lite"}, "has no SparseCores"),
        ({"device_kind": "TPU7x", "width": 8}, "16 to 512"),
        ({"dtype": jnp.bfloat16}, None),
        ({"dtype": jnp.float16}, "float16 are not served"),
        ({"dtype": jnp.bfloat16, "optimizer": ROW_OPTIMIZERS["sgd"]}, "updates of bfloat16 are not served"),
        ({"width": 1024, "optimizer": ROW_OPTIMIZERS["sgd"]}, "8 to 512"),
        ({"optimizer": ROW_OPTIMIZERS["lamb"]}, None),
    ],
)
def test_unable_then_says_why(call: dict, reason: str | None) -> None:
    said = sparsecore.unable(**({"device_kind": KIND, "dtype": jnp.float32, "width": 64} | call))
    assert (said is None) == (reason is None)
    assert (reason or "") in (said or "")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("width", "dtype"), [(16, jnp.float32), (128, jnp.float32), (384, jnp.float32), (64, jnp.bfloat16)]
)
@pytest.mark.usefixtures("no_compilation_cache")
def test_lookup_for_a_tpu_then_no_copy_of_the_table(kind: str, width: int, dtype) -> None:
    assert compiled_lookup(sparsecore, kind, width, dtype).temp_size_in_bytes < SMALL


@pytest.mark.parametrize(
    ("kind", "rule", "width"),
    [
        ("v6e", "rowwise_adagrad", 16),
        pytest.param("v5p", "partial_rowwise_adam", 8, marks=pytest.mark.slow),
        pytest.param("v5p", "adam", 128, marks=pytest.mark.slow),
        pytest.param("v6e", "lamb", 512, marks=pytest.mark.slow),
        pytest.param("v6e", "adagrad", 384, marks=pytest.mark.slow),
        pytest.param("7x", "lamb", 512, marks=pytest.mark.slow),
        pytest.param("7x", "sgd", 64, marks=pytest.mark.slow),
    ],
)
@pytest.mark.usefixtures("no_compilation_cache")
def test_an_update_for_a_tpu_then_in_place(kind: str, rule: str, width: int) -> None:
    optimizer = ROW_OPTIMIZERS[rule]
    program = compiled_update(sparsecore, kind, rule, width, weighted=True)
    assert program.temp_size_in_bytes < SMALL
    state_lines = NUM_LINES * len(optimizer.element_state) + (NUM_LINES // width + 1) * len(optimizer.row_state)
    assert program.alias_size_in_bytes >= 512 * (NUM_LINES + state_lines)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.usefixtures("no_compilation_cache")
def test_statistics_for_a_tpu_then_no_copy_of_a_table(kind: str) -> None:
    def statistics(store, element_state, row_state, rows, offsets, gradients, weights, _, slots):
        return sparsecore.row_statistics(
            store,
            element_state,
            row_state,
            rows,
            rows,
            offsets,
            gradients,
            weights,
            slots=slots,
            step=jnp.int32(1),
            optimizer=ROW_OPTIMIZERS["lamb"],
            width=32,
        )

    assert compiled_for(kind, statistics, update_shapes("lamb", 32)).temp_size_in_bytes < SMALL


@pytest.mark.slow
@pytest.mark.parametrize(
    ("target", "places"),
    [
        (
            "v6e:1x8",
            (
                lambda table: row_wise(table, returns="rows"),
                lambda table: table_row_wise(table, 0, returns="partial_sums"),
            ),
        ),
        ("v5p:1x8", (lambda table: table_wise(table, 0), data_parallel)),
        ("tpu7x:1x8", (lambda table: column_wise(table, [0, 1]), lambda table: grid(table, [0], returns="rows"))),
    ],
    ids=["by rows", "whole", "by columns"],
)
@pytest.mark.usefixtures("no_compilation_cache")
def test_the_step_for_tpus_when_asked_for_sparsecores_then_no_copy_of_a_table(
    monkeypatch: pytest.MonkeyPatch, target: str, places: test_aot.Places
) -> None:
    on_sparsecores = dataclasses.replace(quickstart(), kernels="sparsecore")
    monkeypatch.setattr(test_aot, "quickstart", lambda: on_sparsecores)
    tables = TableConfig(dim=32), TableConfig(dim=128, optimizer="adam")
    # A device has a part of the tables only: it is to be large enough for a copy to be seen.
    program, table_bytes = test_aot.compiled_step(target, *tables, places, num_rows=8 * test_aot.NUM_ROWS)
    test_aot.assert_in_place(program, table_bytes)
