"""Sums of segments as GPUs add them up, here on a host, against numpy's one after the other."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import NUM_IDS, NUM_ROWS, Batch, batches, lines_of, pooled, table_of
from row_oracle import RULES
from update_cases import a_batch, bits_of, fresh_stores, gradients_of, ids_of, slots_of, update

from pallas_kernels import ROW_OPTIMIZERS, pooled_lookup, sparse_update
from pallas_kernels.ordered_sums import segment_sums
from pallas_kernels.target import interpreting
from pallas_kernels.xla import RUN_BLOCK

A100 = "NVIDIA A100-SXM4-40GB"
NUM_SEGMENTS, MOST_IDS, WIDTH = 6, 512, 8


@functools.cache
def compiled(num_ids: int):
    sums = jax.jit(lambda v, of: segment_sums(lambda ids: v[ids], of, NUM_SEGMENTS))
    shapes = jnp.zeros((num_ids, WIDTH)), jnp.zeros(num_ids, jnp.int32)
    with interpreting(A100):
        return sums.lower(*shapes).compile()


def added_one_by_one(vectors: np.ndarray, segments: np.ndarray) -> np.ndarray:
    sums = np.zeros((NUM_SEGMENTS, WIDTH), np.float32)
    for vector, segment in zip(vectors, segments, strict=True):
        if segment < NUM_SEGMENTS:
            sums[segment] += vector
    return sums


def segments_of(lengths: list[int], num_ids: int) -> np.ndarray:
    """Segment of each id; those beyond the last segment have none."""
    given = np.repeat(np.arange(len(lengths)), lengths)[:num_ids]
    return np.pad(given, (0, num_ids - len(given)), constant_values=NUM_SEGMENTS).astype(np.int32)


@pytest.mark.parametrize("num_ids", [1, 40, MOST_IDS])
@settings(deadline=None, max_examples=20)
@given(
    lengths=st.lists(st.sampled_from([0, 1, 2, 3, 7, 8, 9, 31, 32, 33, 200]), min_size=6, max_size=6),
    seed=st.integers(0, 100),
)
def test_sums_of_segments_then_are_those_of_one_vector_after_the_other(num_ids, lengths, seed) -> None:
    vectors = np.random.default_rng(seed).normal(size=(num_ids, WIDTH)).astype(np.float32)
    segments = segments_of(lengths, num_ids)
    np.testing.assert_array_equal(compiled(num_ids)(vectors, segments), added_one_by_one(vectors, segments))


@functools.cache
def compiled_lookup(width: int):
    return jax.jit(functools.partial(pooled_lookup, width=width, implementation="xla"))


@settings(deadline=None, max_examples=12)
@given(ids=batches())
def test_a_lookup_on_an_a100_then_equals_numpys_float32_sum_in_the_order_of_ids(ids: Batch) -> None:
    table = table_of(16)
    for weights in (None, ids.weights):
        with interpreting(A100):
            result = compiled_lookup(16)(lines_of(table), ids.rows, ids.offsets, weights)
        np.testing.assert_array_equal(result, pooled(table, ids, weights, np.float32))


@functools.cache
def compiled_update(rule: str):
    return jax.jit(functools.partial(sparse_update, optimizer=ROW_OPTIMIZERS[rule], width=16, implementation="xla"))


def repeated(times: int) -> Batch:
    """A batch again and again: of the rows that it names, some have more ids than a block."""
    ids = a_batch(num_rows=NUM_ROWS // 8)
    ends = [ids.offsets[1:] + NUM_IDS * number for number in range(times)]
    return Batch(
        rows=np.tile(ids.rows, times),
        offsets=np.concatenate([[0], *ends]).astype(np.int32),
        weights=np.tile(ids.weights, times),
    )


@pytest.mark.parametrize("times", [1, 40])
@pytest.mark.parametrize("rule", [RULES[0], RULES[-1]])
def test_an_update_on_an_a100_then_has_the_bits_of_a_host(rule: str, times: int) -> None:
    ids, stores = repeated(times), fresh_stores(rule, table_of(16))
    longest = np.bincount(ids.rows[: ids.offsets[-1]]).max()
    assert (longest > RUN_BLOCK) == (times > 1)
    gradients = np.tile(gradients_of(16), (times, 1))
    for weights in (None, ids.weights):
        with interpreting(A100):
            found = compiled_update(rule)(
                stores, ids_of(ids, weights), gradients, slots=slots_of(16), step=jnp.int32(1), seed=jnp.uint32(0)
            )
        wanted = update("xla", rule, stores, ids, gradients, weights=weights)
        for mine, theirs in zip(bits_of(found), bits_of(wanted), strict=True):
            np.testing.assert_array_equal(mine, theirs)
