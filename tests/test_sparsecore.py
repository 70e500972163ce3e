"""sparsecore beyond the inherited tests: races, shares, and programs for TPUs that are not here."""

import contextlib
import dataclasses
import functools
import itertools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_aot
from hypothesis import given, settings
from hypothesis import strategies as st
from implementation_cases import device_of
from jax.experimental.pallas import tpu as pltpu
from kernel_cases import NOWHERE, NUM_BAGS, NUM_IDS, NUM_ROWS, Batch, batches, lines_of, pooled, table_of
from test_storage_rounding import split_stores
from tpu_programs import SMALL, compiled_for, compiled_lookup, compiled_update, shape_of, update_shapes
from update_cases import ROWS_PER_SHARD, fresh_stores, gradients_of, ids_of, slots_of

from configs.quickstart import quickstart
from dlrm_jax.config import TableConfig
from pallas_kernels import ROW_OPTIMIZERS, Ids, Slots, Stores, sparse_update, sparsecore, xla
from pallas_kernels.implementations import implementation_of
from pallas_kernels.mosaic_tpu.lines import row_shape
from pallas_kernels.mosaic_tpu.units import units_of_rows
from pallas_kernels.rounding import joined
from pallas_kernels.sparsecore import lookup as sparsecore_lookup
from pallas_kernels.sparsecore import update as sparsecore_update
from pallas_kernels.sparsecore import update_call
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
def test_lookup_then_equals_numpys_float32_sum_in_the_order_of_ids(
    racing: None, monkeypatch: pytest.MonkeyPatch, width: int, weighted: bool
) -> None:
    del racing
    # Several chunks of ids a block, and blocks of bags, so that each buffer is used again.
    monkeypatch.setattr(sparsecore_lookup, "_SEGMENTS_OF_CHUNK", 8)
    monkeypatch.setattr(sparsecore_lookup, "_SEGMENTS_OF_BLOCK", 8)
    random = np.random.default_rng(0)
    rows = np.where(random.random(NUM_IDS) < 0.1, random.choice(NOWHERE, NUM_IDS), random.integers(0, NUM_ROWS))
    ids = Batch(
        rows=rows.astype(np.int32),
        offsets=np.sort(np.concatenate([[0], random.integers(0, NUM_IDS - 5, NUM_BAGS)])).astype(np.int32),
        weights=random.normal(size=NUM_IDS).astype(np.float32),
    )
    weights = ids.weights if weighted else None
    look_up = functools.partial(sparsecore.pooled_lookup, width=width, longest_bag=None)
    result = jax.jit(look_up)(lines_of(table_of(width)), ids.rows, ids.offsets, weights)
    np.testing.assert_array_equal(result, pooled(table_of(width), ids, weights, np.float32))


def stores_of(rule: str, width: int, dtype=jnp.float32, storage_rounding: str = "nearest") -> Stores:
    if storage_rounding == "split":
        return split_stores(rule, table_of(width))
    weights = lines_of(table_of(width, dtype=dtype))
    return dataclasses.replace(fresh_stores(rule, table_of(width)), weights=weights)


def both_updates(
    rule: str, width: int, ids: Batch, *, weighted: bool, dtype=jnp.float32, storage_rounding: str = "nearest"
) -> tuple[Stores, ...]:
    """What an update makes of the same stores here and in `xla`."""
    options = {"optimizer": ROW_OPTIMIZERS[rule], "width": width, "storage_rounding": storage_rounding}
    stores = stores_of(rule, width, dtype, storage_rounding)
    arrays = stores, ids_of(ids, ids.weights if weighted else None), gradients_of(width)
    numbers = {
        "slots": slots_of(width, first_column=jnp.array([0, 16, 48], jnp.uint32)),
        "step": jnp.int32(3),
        "seed": jnp.uint32(9),
        "statistics": None,
        "enabled": jnp.bool(True),
    }
    here = functools.partial(sparsecore.sparse_update, **options)
    there = functools.partial(xla.sparse_update, **options)
    return tuple(jax.jit(update)(*arrays, **numbers) for update in (here, there))


def assert_close(arrays: Any, wanted: Any) -> None:
    for array, want in zip(jax.tree.leaves(arrays), jax.tree.leaves(wanted), strict=True):
        # Compilers fuse products and sums of a rule as they please; a few last bits of float32.
        np.testing.assert_allclose(array, want, rtol=2e-6, atol=2e-6)


def hot_ids(num_ids: int, hot: int) -> Batch:
    """Few rows of which one has that many ids, some that do not exist, empty bags, padding."""
    random = np.random.default_rng(1)
    rows = random.integers(0, NUM_ROWS, num_ids)
    rows[: num_ids // 10] = random.choice(NOWHERE, num_ids // 10)
    rows[num_ids - hot :] = 5
    return Batch(
        rows=random.permutation(rows).astype(np.int32),
        offsets=np.sort(np.append(random.integers(0, num_ids, NUM_BAGS - 1), [0, num_ids - 4])).astype(np.int32),
        weights=random.normal(size=num_ids).astype(np.float32),
    )


CHUNK, SHARES = 32, 5
CUTS = tuple(units_of_rows(row_shape(16), jnp.dtype(dtype), 1) for dtype in (jnp.float32, jnp.bfloat16))


@jax.jit
def five_shares(ids: Ids, gradients: jax.Array, slots: Slots) -> Work:
    """Ids shared out for rows with weights in bfloat16, elementwise and row-wise state."""
    options = {"num_rows": NUM_ROWS, "cuts": CUTS, "has_scalars": True, "chunk": CHUNK, "shares": SHARES}
    return share_out(ids, gradients, None, slots, None, jnp.bool(True), **options)[0]


@settings(deadline=None, max_examples=20)
@given(ids=batches(), first_scalar=st.integers(0, 300))
def test_shares_then_no_line_of_weights_or_state_is_of_two(ids: Batch, first_scalar: int) -> None:
    slots = slots_of(16, first_scalar=first_scalar + jnp.arange(3, dtype=jnp.int32) * ROWS_PER_SHARD)
    work = five_shares(ids_of(ids, ids.weights), gradients_of(16), slots)
    fields = np.asarray(work.words).reshape(-1, 6, CHUNK).swapaxes(0, 1).reshape(6, -1)
    bounds = np.asarray(work.bounds)[: SHARES + 1]
    named = np.flatnonzero((ids.rows[: ids.offsets[-1]] >= 0) & (ids.rows[: ids.offsets[-1]] < NUM_ROWS))
    order = named[np.argsort(ids.rows[named], kind="stable")]
    source, tag, line, pair, scalar, weight = fields[:, : len(order)]
    assert (bounds[0], bounds[-1]) == (0, len(order))
    np.testing.assert_array_equal(source, ids.bags[order])
    np.testing.assert_array_equal(weight.view(np.float32), ids.weights[order])
    lines, pairs = (np.asarray(units) for units in work.units)
    np.testing.assert_array_equal(lines[line], ids.rows[order] // 8)
    np.testing.assert_array_equal(pairs[pair] >> 2, ids.rows[order] // 32)
    is_last = (tag & 2) != 0
    np.testing.assert_array_equal(scalar >= 0, is_last)
    # Pairs come with the halves, left and right, that rows lie in.
    touched = {(unit, half) for unit, half in zip(pair, ids.rows[order] // 8 % 2, strict=True)}
    assert touched == {(unit, half) for unit in set(pair) for half in range(2) if pairs[unit] >> half & 1}
    parts = [slice(start, end) for start, end in itertools.pairwise(bounds)]
    for units in (line, pair, (first_scalar + ids.rows[order]) // 128):
        held = [set(units[part].tolist()) for part in parts]
        assert len(set().union(*held)) == sum(len(of_share) for of_share in held)


def test_an_update_when_races_are_looked_for_then_none(racing: None, monkeypatch: pytest.MonkeyPatch) -> None:
    del racing
    # Several chunks of items and blocks of lines a share, so that each buffer is used again.
    monkeypatch.setattr(sparsecore_update, "_SEGMENTS_OF_CHUNK", 8)
    monkeypatch.setattr(update_call, "_LINES_OF_BLOCK", 8)
    monkeypatch.setattr(sparsecore_update, "_SHARES_INTERPRETED", 2)
    assert_close(*both_updates("rowwise_adagrad", 64, hot_ids(48, 8), weighted=True))


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
    ("rule", "width", "storage_rounding", "num_ids"),
    [
        ("adagrad", 32, "stochastic", NUM_IDS),
        # Lines of an odd number, and those of rows that lie on several.
        pytest.param("rowwise_adagrad", 8, "nearest", RUN_BLOCK + 56, marks=pytest.mark.slow),
        pytest.param("partial_rowwise_adam", 128, "stochastic", 4 * RUN_BLOCK, marks=pytest.mark.slow),
        pytest.param("adam", 256, "nearest", NUM_IDS, marks=pytest.mark.slow),
        pytest.param("sgd", 384, "stochastic", NUM_IDS, marks=pytest.mark.slow),
        pytest.param("sgd", 512, "nearest", NUM_IDS, marks=pytest.mark.slow),
        pytest.param("lamb", 64, "stochastic", NUM_IDS, marks=pytest.mark.slow),
        pytest.param("rowwise_adagrad", 8, "split", NUM_IDS, marks=pytest.mark.slow),
        pytest.param("lamb", 384, "split", 4 * RUN_BLOCK, marks=pytest.mark.slow),
    ],
)
def test_an_update_of_bfloat16_then_that_of_xla(rule: str, width: int, storage_rounding: str, num_ids: int) -> None:
    ids, options = hot_ids(num_ids, num_ids // 2), {"dtype": jnp.bfloat16, "storage_rounding": storage_rounding}
    with device_of("sparsecore"):
        results = both_updates(rule, width, ids, weighted=True, **options)
    if storage_rounding == "split":
        results = [
            (joined(new.weights, new.element_state[-1]), new.element_state[:-1], new.row_state) for new in results
        ]
    else:
        here, there = (np.asarray(new.weights) for new in results)
        assert here.dtype == there.dtype
        np.testing.assert_array_equal(here.view(np.uint16), there.view(np.uint16))
        results = [(new.element_state, new.row_state) for new in results]
    assert_close(*results)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rule", "width", "storage_rounding"), [("rowwise_adagrad", 16, "nearest"), ("lamb", 256, "split")]
)
def test_statistics_of_bfloat16_then_those_of_xla(rule: str, width: int, storage_rounding: str) -> None:
    ids = hot_ids(NUM_IDS, NUM_IDS // 2)
    arrays = (
        stores_of(rule, width, jnp.bfloat16, storage_rounding),
        ids_of(ids, ids.weights),
        gradients_of(width),
    )
    options = {"optimizer": ROW_OPTIMIZERS[rule], "width": width, "storage_rounding": storage_rounding}
    numbers = {"slots": slots_of(width), "step": jnp.int32(3)}
    with device_of("sparsecore"):
        here, there = (
            jax.jit(functools.partial(kernels.row_statistics, **options))(*arrays, **numbers)
            for kernels in (sparsecore, xla)
        )
    named = np.flatnonzero((ids.rows >= 0) & (ids.rows < NUM_ROWS) & (np.arange(NUM_IDS) < ids.offsets[-1]))
    np.testing.assert_allclose(here[named], there[named], rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        ({}, None),
        ({"device_kind": "TPU v5 lite"}, "has no SparseCores"),
        ({"device_kind": "TPU7x", "width": 8}, "16 to 512"),
        ({"dtype": jnp.bfloat16}, None),
        ({"dtype": jnp.float16}, "float16 are not served"),
        ({"dtype": jnp.bfloat16, "optimizer": ROW_OPTIMIZERS["sgd"], "storage_rounding": "stochastic"}, None),
        ({"dtype": jnp.bfloat16, "optimizer": ROW_OPTIMIZERS["lamb"], "storage_rounding": "split"}, None),
        ({"width": 1024, "optimizer": ROW_OPTIMIZERS["sgd"]}, "8 to 512"),
        ({"optimizer": ROW_OPTIMIZERS["lamb"]}, None),
    ],
)
def test_unable_then_says_why(call: dict, reason: str | None) -> None:
    said = sparsecore.unable(**({"device_kind": KIND, "dtype": jnp.float32, "width": 64} | call))
    assert (said is None) == (reason is None)
    assert (reason or "") in (said or "")


@pytest.mark.parametrize(("lines", "served"), [(2**25, "sparsecore"), (2**25 + 2, "xla")])
def test_an_update_of_split_weights_when_a_store_has_more_than_16_gib_then_xla_serves(lines: int, served: str) -> None:
    rule, asked = ROW_OPTIMIZERS["sgd"], {"dtype": jnp.dtype(jnp.bfloat16), "width": 64, "storage_rounding": "split"}
    with device_of("sparsecore"):
        chosen = implementation_of(None, **asked, optimizer=rule, largest_store=lines * 512)
        assert chosen.__name__ == f"pallas_kernels.{served}"
        weights, low = (jax.ShapeDtypeStruct((lines, 256), dtype) for dtype in (jnp.bfloat16, jnp.uint16))
        stores = Stores(weights=weights, element_state=(low,))
        asked = {"width": 64, "optimizer": rule, "storage_rounding": "split", "step": 1, "seed": 0}
        ids, gradients = ids_of(hot_ids(NUM_IDS, 8)), gradients_of(64)
        update = functools.partial(sparse_update, **asked)
        assert jax.eval_shape(update, stores, ids, gradients, slots=slots_of(64)).weights.shape == weights.shape
        asked_for = functools.partial(update, implementation="sparsecore")
        with contextlib.nullcontext() if served == "sparsecore" else pytest.raises(ValueError, match="is too large"):
            jax.eval_shape(asked_for, stores, ids, gradients, slots=slots_of(64))


@pytest.mark.parametrize(("lines", "refused"), [(2**25, False), (2**25 + 2, True)])
@pytest.mark.usefixtures("no_compilation_cache")
def test_lookup_for_a_tpu_then_the_compiler_takes_16_gib_and_no_more(lines: int, refused: bool) -> None:
    def look_up(store, rows, offsets):
        return sparsecore.pooled_lookup(store, rows, offsets, None, width=128, longest_bag=None)

    shapes = shape_of(lines, 128), shape_of(64, dtype=jnp.int32), shape_of(9, dtype=jnp.int32)
    with pytest.raises(jax.errors.JaxRuntimeError, match="16 GiB") if refused else contextlib.nullcontext():
        compiled_for("v5p", look_up, shapes)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("width", "dtype"), [(16, jnp.float32), (128, jnp.float32), (384, jnp.float32), (64, jnp.bfloat16)]
)
@pytest.mark.usefixtures("no_compilation_cache")
def test_lookup_for_a_tpu_then_no_copy_of_the_table(kind: str, width: int, dtype) -> None:
    assert compiled_lookup(sparsecore, kind, width, dtype).temp_size_in_bytes < SMALL


@pytest.mark.parametrize(
    ("kind", "rule", "width", "storage"),
    [
        ("v6e", "rowwise_adagrad", 16, "float32"),
        ("v6e", "adagrad", 32, "stochastic"),
        pytest.param("v5p", "partial_rowwise_adam", 8, "float32", marks=pytest.mark.slow),
        pytest.param("v5p", "adam", 128, "float32", marks=pytest.mark.slow),
        pytest.param("v6e", "lamb", 512, "float32", marks=pytest.mark.slow),
        pytest.param("v6e", "adagrad", 384, "float32", marks=pytest.mark.slow),
        pytest.param("7x", "lamb", 512, "float32", marks=pytest.mark.slow),
        pytest.param("7x", "sgd", 64, "float32", marks=pytest.mark.slow),
        pytest.param("v5p", "rowwise_adagrad", 8, "nearest", marks=pytest.mark.slow),
        pytest.param("v5p", "adam", 384, "stochastic", marks=pytest.mark.slow),
        pytest.param("v6e", "lamb", 128, "stochastic", marks=pytest.mark.slow),
        pytest.param("7x", "partial_rowwise_adam", 64, "stochastic", marks=pytest.mark.slow),
        # What takes the most memory of a subcore.
        *(pytest.param(kind, "lamb", width, "split", marks=pytest.mark.slow) for kind in KINDS for width in (128, 384)),
    ],
)
@pytest.mark.usefixtures("no_compilation_cache")
def test_an_update_for_a_tpu_then_in_place(kind: str, rule: str, width: int, storage: str) -> None:
    dtype, rounding = (jnp.float32, "nearest") if storage == "float32" else (jnp.bfloat16, storage)
    program = compiled_update(sparsecore, kind, rule, width, dtype=dtype, storage_rounding=rounding, weighted=True)
    assert program.temp_size_in_bytes < SMALL
    stores = jax.tree.leaves(update_shapes(rule, width, dtype, split=rounding == "split")[0])
    assert program.alias_size_in_bytes >= sum(x.size * x.dtype.itemsize for x in stores)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.usefixtures("no_compilation_cache")
def test_statistics_for_a_tpu_then_no_copy_of_a_table(kind: str, dtype) -> None:
    def statistics(stores: Stores, ids: Ids, gradients, slots: Slots):
        return sparsecore.row_statistics(
            stores,
            ids,
            gradients,
            slots=slots,
            step=jnp.int32(1),
            optimizer=ROW_OPTIMIZERS["lamb"],
            width=32,
            storage_rounding="nearest",
        )

    assert compiled_for(kind, statistics, update_shapes("lamb", 32, dtype)).temp_size_in_bytes < SMALL


@pytest.mark.slow
@pytest.mark.parametrize(
    ("target", "tables", "places"),
    [
        (
            "v6e:1x8",
            (TableConfig(dim=32), TableConfig(dim=128, optimizer="adam", dtype="bfloat16", rounding="stochastic")),
            (
                lambda table: row_wise(table, returns="rows"),
                lambda table: table_row_wise(table, 0, returns="partial_sums"),
            ),
        ),
        (
            "v5p:1x8",
            (TableConfig(dim=32, dtype="bfloat16", rounding="split"), TableConfig(dim=128, optimizer="adam")),
            (lambda table: table_wise(table, 0), data_parallel),
        ),
        (
            "tpu7x:1x8",
            (TableConfig(dim=32), TableConfig(dim=128, optimizer="lamb", dtype="bfloat16")),
            (lambda table: grid(table, [0], returns="rows"), lambda table: column_wise(table, [0, 1])),
        ),
    ],
    ids=["by rows", "whole", "by columns"],
)
@pytest.mark.usefixtures("no_compilation_cache")
def test_the_step_for_tpus_when_asked_for_sparsecores_then_no_copy_of_a_table(
    monkeypatch: pytest.MonkeyPatch,
    target: str,
    tables: tuple[TableConfig, TableConfig],
    places: test_aot.Places,
) -> None:
    on_sparsecores = dataclasses.replace(quickstart(), kernels="sparsecore")
    monkeypatch.setattr(test_aot, "quickstart", lambda: on_sparsecores)
    # A device has a part of the tables only: it is to be large enough for a copy to be seen.
    program, table_bytes = test_aot.compiled_step(target, *tables, places, num_rows=8 * test_aot.NUM_ROWS)
    test_aot.assert_in_place(program, table_bytes)
