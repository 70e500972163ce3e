"""What only the C++ kernels promise: any number of threads, shared long runs, the dot interaction, split storage."""

import dataclasses
import functools
import os
import re
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from row_oracle import RULES
from update_cases import HYPER, fresh_stores

from pallas_kernels import ROW_OPTIMIZERS, Ids, Slots, Stores, cpu, cpu_layers, scans, xla
from pallas_kernels.bags import bags_of_ids, offsets_of
from pallas_kernels.interaction import dot_interaction
from pallas_kernels.zeros import zeros

pytestmark = pytest.mark.skipif(not cpu.available(), reason="the library of the cpu kernels was not built here")

FLOAT32 = np.dtype(np.float32)
NUM_ROWS, NUM_BAGS, NUM_IDS = 3072, 700, 9000
SCALAR_LINES = NUM_ROWS // 128


def batch(width: int) -> tuple[Ids, np.ndarray]:
    """Ids enough for several threads, a row of thousands of ids, ids of no row, padding; and gradients."""
    random = np.random.default_rng(width)
    rows = random.integers(-3, NUM_ROWS + 3, NUM_IDS).astype(np.int32)
    rows[random.random(NUM_IDS) < 0.4] = 1234
    inner = np.sort(random.integers(0, NUM_IDS - 20, NUM_BAGS - 1))
    offsets = np.concatenate([[0], inner, [NUM_IDS - 20]]).astype(np.int32)
    gradients = random.normal(size=(NUM_BAGS, width)).astype(np.float32)
    ids = Ids(
        rows=rows,
        slots=np.where((rows >= 0) & (rows < NUM_ROWS), rows // (NUM_ROWS // 3), 0).astype(np.int32),
        logical_rows=np.stack([rows, rows > 1500], axis=1).astype(np.uint32),
        offsets=offsets,
        weights=random.normal(size=NUM_IDS).astype(np.float32),
    )
    return ids, gradients


def slots(width: int) -> Slots:
    return Slots(
        first_row=jnp.arange(3, dtype=jnp.int32) * (NUM_ROWS // 3),
        first_scalar=jnp.arange(3, dtype=jnp.int32) * 1024,
        table=jnp.array([101, 7, 2**32 - 1], jnp.uint32),
        first_column=jnp.zeros(3, jnp.uint32),
        dim=jnp.full(3, width, jnp.float32),
        **{name: jnp.array(values, jnp.float32) for name, values in HYPER.items()},
    )


def update(module: ModuleType, rule: str, stores: Stores, width: int, storage_rounding: str = "nearest") -> Stores:
    """One update."""
    call = functools.partial(
        module.sparse_update,
        optimizer=ROW_OPTIMIZERS[rule],
        width=width,
        storage_rounding=storage_rounding,
        statistics=None,
        enabled=jnp.bool(True),
    )
    return jax.jit(call)(stores, *batch(width), slots=slots(width), step=jnp.int32(3), seed=jnp.uint32(11))


def updated(
    module: ModuleType, rule: str, width: int, dtype: np.dtype = FLOAT32, storage_rounding: str = "nearest"
) -> list[np.ndarray]:
    """The arrays after one update, as numpy."""
    table = np.random.default_rng(1).normal(size=(NUM_ROWS, width)).astype(dtype)
    new = update(module, rule, fresh_stores(rule, table, scalar_lines=SCALAR_LINES), width, storage_rounding)
    return [np.asarray(array) for array in jax.tree.leaves(new)]


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
    high = (words >> 16).astype(np.uint16).view(jnp.bfloat16).reshape(-1, 256)
    low = (words & 0xFFFF).astype(np.uint16).reshape(-1, 256)
    fresh = fresh_stores(rule, words.view(np.float32), scalar_lines=SCALAR_LINES)
    fresh = dataclasses.replace(
        fresh, weights=jnp.asarray(high), element_state=(*fresh.element_state, jnp.asarray(low))
    )
    stores = update(cpu, rule, fresh, width, "split")
    halves = np.asarray(stores.weights).view(np.uint16), np.asarray(stores.element_state[-1])
    joined = halves[0].astype(np.uint32) << 16 | halves[1]
    np.testing.assert_array_equal(joined.reshape(-1), exact[0].view(np.uint32).reshape(-1))


OF_THREADS = """
import sys
sys.path[:0] = sys.argv[1:3]
import jax.numpy as jnp
import numpy as np
from test_cpu_kernels import updated
from test_linear import layer_and_gradients
from pallas_kernels import cpu
from pallas_kernels.norm import norm
arrays = updated(cpu, "lamb", 64) + updated(cpu, "rowwise_adagrad", 256)
for dtype in ("bfloat16", "float32"):
    if cpu.multiplies(jnp.dtype(dtype)):
        # Gradients of parameters by columns, and by samples.
        arrays += layer_and_gradients(dtype, 1500) + layer_and_gradients(dtype, 9000)
arrays += [np.asarray(norm([array for array in arrays if array.dtype == np.float32]))]
print(",".join(str(hash(array.tobytes())) for array in arrays))
"""


def test_an_update_or_a_layer_on_one_thread_or_several_then_the_same_bits() -> None:
    here = Path(__file__).resolve().parent
    results = set()
    # XLA sizes its pool by this variable, when a process starts.
    for threads in ("1", "2", "5"):
        environment = {**os.environ, "NPROC": threads, "PYTHONHASHSEED": "0", "JAX_PLATFORMS": "cpu"}
        command = [sys.executable, "-c", OF_THREADS, str(here), str(here.parent)]
        results.add(subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout)
    assert len(results) == 1


WITHOUT_A_THREAD = """
import resource
import jax, jax.numpy as jnp
from pallas_kernels import pooled_lookup
store, rows, offsets = jnp.full((2**18, 128), 2.0), jnp.arange(8, dtype=jnp.int32), jnp.array([0, 8], jnp.int32)
look_up = jax.jit(lambda *a: pooled_lookup(*a, width=128, implementation="cpu")).lower(store, rows, offsets).compile()
jax.block_until_ready(store)
pages = int(open("/proc/self/statm").read().split()[0])
# Less than the stack of one more thread.
resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 2**20, -1))
pooled = look_up(store, rows, offsets)
resource.setrlimit(resource.RLIMIT_AS, (-1, -1))
print(pooled.sum())
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux moves stores to huge pages")
def test_a_lookup_in_a_large_store_when_no_thread_can_be_started_then_its_result() -> None:
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(Path(__file__).resolve().parent.parent)}
    command = [sys.executable, "-c", WITHOUT_A_THREAD]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert (result.stdout, result.returncode) == ("2048.0\n", 0), result.stderr


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only on Linux helpers leave the caller's processor")
def test_kernels_when_they_have_run_often_then_every_thread_may_use_the_processors_that_it_could_before() -> None:
    def processors() -> dict[str, str]:
        return {
            thread.name: (thread / "status").read_text().split("Cpus_allowed_list:")[1].split()[0]
            for thread in Path("/proc/self/task").iterdir()
        }

    x = jnp.ones((2048, 16))
    interact = jax.jit(lambda x: dot_interaction(x, jnp.ones((2048, 26, 16)), False))
    jax.block_until_ready(x)
    before = processors()
    for _ in range(300):
        jax.block_until_ready(interact(x))

    def restricted() -> dict[str, str]:
        after = processors()
        # A new thread has the processors of the one that made it; the calling thread helps nobody.
        everywhere = after[str(threading.get_native_id())]
        return {thread: allowed for thread, allowed in after.items() if allowed != before.get(thread, everywhere)}

    # A helper that has been sent to where another process is at work may use all processors again once it runs there.
    deadline = time.monotonic() + 30.0
    while restricted() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not restricted()


def test_build_when_the_folder_cannot_be_written_then_says_why(tmp_path: Path, monkeypatch) -> None:
    build = cpu._build_module()
    monkeypatch.setattr(build, "FOLDER", tmp_path / "gone")
    monkeypatch.setattr(build, "LIBRARY", tmp_path / "gone" / build.LIBRARY.name)
    assert "No such file or directory" in str(build.build())


@pytest.mark.parametrize(
    ("dtype", "of_embeddings"),
    [(jnp.float32, jnp.float32), (jnp.bfloat16, jnp.bfloat16), (jnp.bfloat16, jnp.float32)],
)
@pytest.mark.parametrize("self_interaction", [False, True])
@pytest.mark.parametrize("has_x", [False, True])
@pytest.mark.parametrize(("batch_size", "num_embeddings", "dim"), [(70, 26, 16), (3, 9, 13), (2, 1, 8), (0, 4, 8)])
def test_dot_interaction_then_equals_float64s_values_and_gradient(
    batch_size: int, num_embeddings: int, dim: int, has_x: bool, self_interaction: bool, dtype, of_embeddings
) -> None:
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (batch_size, dim * has_x), dtype)
    embeddings = jax.random.normal(keys[1], (batch_size, num_embeddings, dim), of_embeddings)
    rounded = embeddings.astype(dtype)
    vectors = np.concatenate([x[:, None], rounded] if has_x else [rounded], axis=1).astype(np.float64)
    i, j = np.tril_indices(vectors.shape[1], 0 if self_interaction else -1)
    given, multiplied = cpu_layers.dot_interaction(x, embeddings, self_interaction=self_interaction, rounded=True)
    assert (given.dtype, multiplied.dtype) == (dtype, dtype)
    np.testing.assert_array_equal(multiplied, rounded)
    # Sums of float32; a bfloat16 result is rounded once more.
    close: dict[str, Any] = {"rtol": 2.0**-8 if dtype == jnp.bfloat16 else 1e-5, "atol": 1e-5}
    pairs = np.einsum("bpd,bpd->bp", vectors[:, i], vectors[:, j])
    np.testing.assert_array_equal(given[:, : x.shape[1]], x)
    np.testing.assert_allclose(np.asarray(given[:, x.shape[1] :], np.float64), pairs, **close)

    cotangent = jax.random.normal(keys[2], given.shape, dtype)
    x_grad, embeddings_grad = cpu_layers.dot_interaction_grad(
        x, multiplied, cotangent, dtype=of_embeddings, self_interaction=self_interaction
    )
    assert (x_grad.dtype, embeddings_grad.dtype) == (dtype, of_embeddings)
    np.testing.assert_array_equal(embeddings_grad, embeddings_grad.astype(dtype).astype(of_embeddings))
    of_x, of_pairs = np.split(np.asarray(cotangent, np.float64), [x.shape[1]], axis=1)
    symmetric = np.zeros((batch_size, vectors.shape[1], vectors.shape[1]))
    symmetric[:, i, j] += of_pairs
    symmetric[:, j, i] += of_pairs
    wanted = symmetric @ vectors
    np.testing.assert_allclose(np.asarray(x_grad, np.float64), of_x + wanted[:, 0] if has_x else of_x, **close)
    np.testing.assert_allclose(np.asarray(embeddings_grad, np.float64), wanted[:, has_x:], **close)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_dot_interaction_when_embeddings_are_pooled_bags_then_nothing_is_transposed_or_rounded_before(dtype) -> None:
    def through_bags(bags):
        x, embeddings = jnp.ones((64, 16), dtype), bags.reshape(26, 64, 16).swapaxes(0, 1)
        return jnp.sum(dot_interaction(x, embeddings, False).astype(jnp.float32) ** 2)

    program = jax.jit(jax.grad(through_bags)).lower(jnp.ones((26 * 64, 16))).compile().as_text()
    assert program is not None
    assert "dlrm_dot_interaction_grad" in program
    assert " transpose(" not in program
    assert " copy(" not in program
    assert re.search(r"= bf16\[(26,64|64,26),16\]\S* (convert|fusion)", program) is None


@pytest.mark.parametrize(
    ("lengths", "num_ids"),
    [
        ([1] * 1000, 1000),
        ([0, 0, 3, 0, 9, 1, 0], 20),
        ([0, 0, 3, 0, 9, 1, 0], 7),
        ([70_000, 0, 1, 40_000], 120_000),
        ([7] * 20_000, 140_000),
        ([], 5),
        ([3], 0),
    ],
)
def test_bags_of_ids_then_those_of_the_reference(lengths: list[int], num_ids: int) -> None:
    offsets = scans.offsets_of(jnp.asarray(lengths, jnp.int32))
    expected = scans.bags_of_ids(offsets, num_ids)
    np.testing.assert_array_equal(bags_of_ids(offsets, num_ids), expected)
    np.testing.assert_array_equal(cpu.bags_of_ids(offsets, num_ids=num_ids), expected)


@pytest.mark.parametrize("num_bags", [0, 1, 1000, 32_768, 32_769, 200_000])
def test_offsets_of_then_those_of_the_reference(num_bags: int) -> None:
    # Also where lengths are nonsense, so that sums leave 32 bits.
    lengths = jax.random.randint(jax.random.key(0), (num_bags,), -(2**31), 2**31 - 1, jnp.int32)
    for given in (lengths, lengths & 7):
        np.testing.assert_array_equal(offsets_of(given), scans.offsets_of(given))
        np.testing.assert_array_equal(cpu.offsets_of(given), scans.offsets_of(given))


def test_bags_of_ids_when_lengths_are_nonsense_then_nothing_breaks() -> None:
    offsets = jnp.array([0, 50, -3, 2**31 - 1, 7, 60], jnp.int32)
    bags = np.asarray(cpu.bags_of_ids(offsets, num_ids=100))
    assert ((bags >= 0) & (bags <= 5)).all()


def test_unable_then_says_what_is_not_served() -> None:
    rule = ROW_OPTIMIZERS["sgd"]
    assert cpu.unable(dtype=jnp.dtype(jnp.bfloat16), width=64, optimizer=rule, storage_rounding="split") is None
    assert "high halves" in str(
        cpu.unable(dtype=jnp.dtype(jnp.float32), width=64, optimizer=rule, storage_rounding="split")
    )
    for width in (24, 192):
        assert f"width of {width}" in str(cpu.unable(dtype=jnp.dtype(jnp.float32), width=width))
    assert "'mine' is not one of" in str(
        cpu.unable(dtype=jnp.dtype(jnp.float32), width=64, optimizer=rule._replace(name="mine"))
    )


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.uint16])
@pytest.mark.parametrize("lines", [0, 3, 40_000])
def test_zeros_then_all_are(lines: int, dtype) -> None:
    given = jax.jit(lambda: zeros((lines, 128), dtype))()
    assert (given.shape, given.dtype) == ((lines, 128), dtype)
    assert not np.any(np.asarray(given))


def test_zeros_of_one_shape_then_two_arrays_that_are_updated_in_place() -> None:
    def two() -> tuple[jax.Array, jax.Array]:
        first, second = zeros((1000, 128), jnp.dtype("float32")), zeros((1000, 128), jnp.dtype("float32"))
        return first.at[0, 0].set(1.0), second.at[0, 0].set(2.0)

    program = jax.jit(two).lower().compile().as_text()
    assert program is not None
    assert program.count('custom_call_target="dlrm_zeros"') == 2
    assert " copy(" not in program
    first, second = jax.jit(two)()
    assert (float(first.sum()), float(second.sum())) == (1.0, 2.0)


HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")


@pytest.mark.skipif(
    not HUGE_PAGES.exists() or "[never]" in HUGE_PAGES.read_text(), reason="the system offers no pages of 2 MB"
)
def test_zeros_when_large_then_they_lie_in_huge_pages_at_once() -> None:
    def huge_megabytes() -> int:
        of_process = Path("/proc/self/smaps_rollup").read_text()
        return int(of_process.split("AnonHugePages:")[1].split()[0]) // 1024

    megabytes, before = 192, huge_megabytes()
    given = jax.block_until_ready(jax.jit(lambda: zeros((megabytes * 2048, 128), jnp.dtype("float32")))())
    huge = huge_megabytes() - before
    # The system may be short of them, in which case it has none of many.
    if huge == 0:
        pytest.skip("the system has no pages of 2 MB left")
    assert huge >= megabytes // 2
    del given
