"""What only the C++ kernels promise: any number of threads, shared long runs, the dot interaction, split storage."""

import functools
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kernel_cases import lines_of
from row_oracle import ELEMENT_STATES, ROW_STATES, RULES
from update_cases import HYPER

from pallas_kernels import ROW_OPTIMIZERS, Slots, cpu, xla

pytestmark = pytest.mark.skipif(not cpu.available(), reason="the library of the cpu kernels was not built here")

FLOAT32 = np.dtype(np.float32)
NUM_ROWS, NUM_BAGS, NUM_IDS = 3072, 700, 9000


def batch(width: int):
    """Ids enough for several threads, a row of thousands of ids, ids of no row, padding."""
    random = np.random.default_rng(width)
    rows = random.integers(-3, NUM_ROWS + 3, NUM_IDS).astype(np.int32)
    rows[random.random(NUM_IDS) < 0.4] = 1234
    inner = np.sort(random.integers(0, NUM_IDS - 20, NUM_BAGS - 1))
    offsets = np.concatenate([[0], inner, [NUM_IDS - 20]]).astype(np.int32)
    gradients = random.normal(size=(NUM_BAGS, width)).astype(np.float32)
    return rows, offsets, gradients, random.normal(size=NUM_IDS).astype(np.float32)


def slots(width: int) -> Slots:
    return Slots(
        first_row=jnp.arange(3, dtype=jnp.int32) * (NUM_ROWS // 3),
        first_scalar=jnp.arange(3, dtype=jnp.int32) * 1024,
        table=jnp.array([101, 7, 2**32 - 1], jnp.uint32),
        first_column=jnp.zeros(3, jnp.uint32),
        dim=jnp.full(3, width, jnp.float32),
        **{name: jnp.array(values, jnp.float32) for name, values in HYPER.items()},
    )


def updated(
    module, rule: str, width: int, dtype: np.dtype = FLOAT32, storage_rounding: str = "nearest", low=()
) -> list:
    """The arrays after one update, as numpy."""
    rows, offsets, gradients, weights = batch(width)
    table = np.random.default_rng(1).normal(size=(NUM_ROWS, width)).astype(dtype)
    return [
        np.asarray(array)
        for array in jax.tree.leaves(
            jax.jit(
                functools.partial(
                    module.sparse_update,
                    optimizer=ROW_OPTIMIZERS[rule],
                    width=width,
                    storage_rounding=storage_rounding,
                    statistics=None,
                )
            )(
                lines_of(table),
                tuple(jnp.zeros((table.size // 128, 128)) for _ in range(ELEMENT_STATES[rule])) + tuple(low),
                tuple(jnp.zeros((24, 128)) for _ in range(ROW_STATES[rule])),
                rows,
                np.where((rows >= 0) & (rows < NUM_ROWS), rows // (NUM_ROWS // 3), 0).astype(np.int32),
                offsets,
                gradients,
                weights,
                logical_rows=np.stack([rows, rows > 1500], axis=1).astype(np.uint32),
                slots=slots(width),
                step=jnp.int32(3),
                seed=jnp.uint32(11),
            )
        )
    ]


@pytest.mark.parametrize("width", [8, 64, 256])
@pytest.mark.parametrize("rule", RULES)
def test_an_update_then_equals_xlas_to_one_fused_rounding(rule: str, width: int) -> None:
    ours, reference = updated(cpu, rule, width), updated(xla, rule, width)
    for now, wanted in zip(ours, reference, strict=True):
        np.testing.assert_allclose(now, wanted, rtol=2.0**-22, atol=2.0**-20)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_stochastic_rounding_when_rows_have_two_words_then_equals_xlas(dtype) -> None:
    ours = updated(cpu, "sgd", 128, np.dtype(dtype), "stochastic")[0]
    reference = updated(xla, "sgd", 128, np.dtype(dtype), "stochastic")[0]
    # The same random bits; where the two float32 sums differ in their last bit, a neighbour may be taken.
    assert (ours.view(np.uint16) == reference.view(np.uint16)).mean() > 0.9999


@pytest.mark.parametrize("rule", ["rowwise_adagrad", "lamb"])
def test_split_storage_then_the_bits_of_a_float32_store(rule: str) -> None:
    width = 16
    exact = updated(cpu, rule, width)
    words = np.random.default_rng(1).normal(size=(NUM_ROWS, width)).astype(np.float32).view(np.uint32)
    rows, offsets, gradients, weights = batch(width)
    high = (words >> 16).astype(np.uint16).view(jnp.bfloat16).reshape(-1, 256)
    low = (words & 0xFFFF).astype(np.uint16).reshape(-1, 256)
    stores = jax.jit(
        functools.partial(
            cpu.sparse_update,
            optimizer=ROW_OPTIMIZERS[rule],
            width=width,
            storage_rounding="split",
            statistics=None,
        )
    )(
        jnp.asarray(high),
        (*(jnp.zeros((words.size // 128, 128)) for _ in range(ELEMENT_STATES[rule])), jnp.asarray(low)),
        tuple(jnp.zeros((24, 128)) for _ in range(ROW_STATES[rule])),
        rows,
        np.where((rows >= 0) & (rows < NUM_ROWS), rows // (NUM_ROWS // 3), 0).astype(np.int32),
        offsets,
        gradients,
        weights,
        logical_rows=np.zeros((NUM_IDS, 1), np.uint32),
        slots=slots(width),
        step=jnp.int32(3),
        seed=jnp.uint32(11),
    )
    joined = np.asarray(stores[0]).view(np.uint16).astype(np.uint32) << 16 | np.asarray(stores[1][-1])
    np.testing.assert_array_equal(joined.reshape(-1), exact[0].view(np.uint32).reshape(-1))


OF_THREADS = """
import sys
sys.path[:0] = sys.argv[1:3]
import numpy as np
from test_cpu_kernels import updated
from pallas_kernels import cpu
arrays = updated(cpu, "lamb", 64) + updated(cpu, "rowwise_adagrad", 256)
print(",".join(str(hash(array.tobytes())) for array in arrays))
"""


def test_an_update_on_one_thread_or_several_then_the_same_bits() -> None:
    here = Path(__file__).resolve().parent
    results = set()
    # XLA sizes its pool by this variable, when a process starts.
    for threads in ("1", "2", "5"):
        environment = {**os.environ, "NPROC": threads, "PYTHONHASHSEED": "0", "JAX_PLATFORMS": "cpu"}
        command = [sys.executable, "-c", OF_THREADS, str(here), str(here.parent)]
        results.add(subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout)
    assert len(results) == 1


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("self_interaction", [False, True])
@pytest.mark.parametrize(("batch_size", "num_vectors", "dim"), [(70, 27, 16), (3, 9, 13), (2, 1, 8), (0, 4, 8)])
def test_dot_interaction_then_equals_float64s_values_and_gradient(
    batch_size: int, num_vectors: int, dim: int, self_interaction: bool, dtype
) -> None:
    x = jax.random.normal(jax.random.key(0), (batch_size, num_vectors, dim), jnp.float32).astype(dtype)
    exact = np.asarray(x).astype(np.float64)
    i, j = np.tril_indices(num_vectors, 0 if self_interaction else -1)
    given = cpu.dot_interaction(x, self_interaction=self_interaction)
    assert given.dtype == jnp.float32
    np.testing.assert_allclose(given, np.einsum("bpd,bpd->bp", exact[:, i], exact[:, j]), rtol=1e-5, atol=1e-5)

    cotangent = jax.random.normal(jax.random.key(1), given.shape, jnp.float32)
    grad = cpu.dot_interaction_grad(x, cotangent, self_interaction=self_interaction)
    assert grad.dtype == dtype
    rounded = np.asarray(cotangent.astype(dtype)).astype(np.float64)
    symmetric = np.zeros((batch_size, num_vectors, num_vectors))
    symmetric[:, i, j] += rounded
    symmetric[:, j, i] += rounded
    # Sums of float32; a bfloat16 result is rounded once more.
    tolerance = 2.0**-8 if dtype == jnp.bfloat16 else 1e-5
    np.testing.assert_allclose(np.asarray(grad).astype(np.float64), symmetric @ exact, rtol=tolerance, atol=1e-5)


def test_unable_then_says_what_is_not_served() -> None:
    rule = ROW_OPTIMIZERS["sgd"]
    assert cpu.unable(dtype=jnp.dtype(jnp.bfloat16), width=64, optimizer=rule, storage_rounding="split") is None
    assert "high halves" in str(
        cpu.unable(dtype=jnp.dtype(jnp.float32), width=64, optimizer=rule, storage_rounding="split")
    )
    assert "width of 24" in str(cpu.unable(dtype=jnp.dtype(jnp.float32), width=24))
    assert "'mine' is not one of" in str(
        cpu.unable(dtype=jnp.dtype(jnp.float32), width=64, optimizer=rule._replace(name="mine"))
    )
