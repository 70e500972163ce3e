"""Bandwidth of lookups and updates, as a share of a copy's in the same run.

    python benchmarks/kernels.py [--table_gb 8] [--torch]

One table, sweeps of width, dtype, pooling factor and skew around width 128, float32, 20 uniform ids a bag. Each case
runs the implementation that is picked for this device and `xla` in turns, and with --torch also torch's EmbeddingBag
with sparse gradients and torch.optim.Adagrad, on the same ids.

The bytes that must move: of a lookup the ids, each *distinct* row once and the pooled vectors; of an update by row-wise
AdaGrad the ids, the gradients of the bags, and each distinct row with its state, read and written. A row that is read
twice counts once. The copy bandwidth is that of reading and writing an array of a quarter of the table.
"""

import dataclasses
import gc
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

from benchmarks.record import record
from dlrm_jax.host_memory import give_back_freed_memory, keep_freed_memory
from pallas_kernels import ROW_OPTIMIZERS, Ids, Slots, Stores, pooled_lookup, sparse_update
from pallas_kernels.implementations import Implementation, implementation_of
from pallas_kernels.lookup import LINE_BYTES
from sharding.compiler_options import compiler_options

_RULE = ROW_OPTIMIZERS["rowwise_adagrad"]
_STATE_LINE = LINE_BYTES // 4
_BATCHES = 3
# Of a vector for each id, on hosts: `xla` holds several such arrays in an update.
_MOST_HOST_BYTES = 2**30


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """One point of the sweep."""

    width: int = 128
    dtype: str = "float32"
    pooling_factor: int = 20
    zipf: float = 0.0
    """Exponent of a Zipf law over rows; 0: uniform."""

    @property
    def name(self) -> str:
        """Short name."""
        ids = f"zipf {self.zipf}" if self.zipf else "uniform"
        return f"{self.width} x {self.dtype}, {self.pooling_factor} ids a bag, {ids}"


def _cases() -> list[Case]:
    base = Case()
    sweeps: dict[str, tuple[Any, ...]] = {
        "width": (16, 32, 64, 256, 512),
        "dtype": ("bfloat16", "float16"),
        "pooling_factor": (1, 5, 80),
        "zipf": (1.05, 1.2),
    }
    return [base] + [dataclasses.replace(base, **{field: v}) for field, values in sweeps.items() for v in values]


@dataclasses.dataclass(frozen=True)
class _Batch:
    rows: np.ndarray
    offsets: np.ndarray
    distinct: int


def _ids(case: Case, num_rows: int, num_ids: int, seed: int) -> _Batch:
    random = np.random.default_rng(seed)
    if case.zipf:
        # Inverse of the law's distribution function, continued to real ranks; then hot rows are strewn over the table.
        power = 1.0 - case.zipf
        rank = ((num_rows**power - 1.0) * random.random(num_ids) + 1.0) ** (1.0 / power) - 1.0
        rows = (rank.astype(np.int64) * 2_654_435_761) % num_rows
    else:
        rows = random.integers(0, num_rows, num_ids)
    offsets = np.arange(0, num_ids + 1, case.pooling_factor)
    return _Batch(rows.astype(np.int32), offsets.astype(np.int32), len(np.unique(rows)))


def _seconds(sides: dict[str, Callable[[int], None]], repetitions: int, warm_s: float) -> dict[str, float]:
    """Median seconds of each side, in turns, after two runs to warm up and as many more as take so long."""
    times: dict[str, list[float]] = {name: [] for name in sides}
    for run in sides.values():
        run(0)
        started = time.perf_counter()
        run(1)
        while time.perf_counter() - started < warm_s:
            run(2)
    for number in range(repetitions):
        for name, run in sides.items():
            started = time.perf_counter()
            run(number % _BATCHES)
            times[name].append(time.perf_counter() - started)
    return {name: statistics.median(of_side) for name, of_side in times.items()}


def copy_bandwidth(num_bytes: int, repetitions: int) -> float:
    """Bytes per second of a copy in place, read and written; the pages of a new result would have to be cleared first.

    Args:
        num_bytes: Bytes of the array.
        repetitions: Copies that are timed; the median counts.
    """
    source = jnp.arange(num_bytes // 4, dtype=jnp.int32)
    # The sign changes, lest the compiler leaves the copy out; the memory is used again.
    negate = jax.jit(jnp.negative, donate_argnums=0)
    held = [source]

    def run(number: int) -> None:
        del number
        held[0] = negate(held[0]).block_until_ready()

    return 2 * num_bytes / _seconds({"copy": run}, repetitions, warm_s=0.0)["copy"]


def _slots(dim: int) -> Slots:
    def number(value: float) -> jax.Array:
        return jnp.full(1, value, jnp.float32)

    return Slots(
        first_row=jnp.zeros(1, jnp.int32),
        first_scalar=jnp.zeros(1, jnp.int32),
        table=jnp.zeros(1, jnp.uint32),
        first_column=jnp.zeros(1, jnp.uint32),
        dim=number(dim),
        learning_rate=number(0.01),
        weight_decay=number(0.0),
        eps=number(1e-8),
        beta1=number(0.9),
        beta2=number(0.999),
    )


class _Ours:
    """Lookups and updates of one table by one implementation."""

    def __init__(self, case: Case, num_lines: int, ids: list[_Batch], implementation: Implementation):
        self._case = case
        self._implementation: Implementation = implementation
        self._ids = [(jnp.asarray(one.rows), jnp.asarray(one.offsets)) for one in ids]
        elements = LINE_BYTES // jnp.dtype(case.dtype).itemsize
        num_rows = num_lines * elements // case.width
        self._stores = Stores(
            weights=jnp.full((num_lines, elements), 0.5, case.dtype),
            row_state=(jnp.zeros((-(-num_rows // _STATE_LINE), _STATE_LINE), jnp.float32),),
        )
        self._gradients = jnp.full((len(ids[0].offsets) - 1, case.width), 1e-3, jnp.float32)
        self._lookup = jax.jit(partial(pooled_lookup, width=case.width, implementation=implementation))
        device = jax.devices()[0]
        options = compiler_options(device.platform, device.device_kind) or None
        self._update = jax.jit(self._updated, donate_argnums=0, compiler_options=options)

    def _updated(self, stores: Stores, rows: jax.Array, offsets: jax.Array, gradients: jax.Array) -> Stores:
        return sparse_update(
            stores,
            Ids(
                rows=rows,
                slots=jnp.zeros_like(rows),
                logical_rows=rows.astype(jnp.uint32)[:, None],
                offsets=offsets,
            ),
            gradients,
            slots=_slots(self._case.width),
            step=jnp.int32(1),
            seed=jnp.uint32(0),
            optimizer=_RULE,
            width=self._case.width,
            implementation=self._implementation,
        )

    def lookup(self, number: int) -> None:
        self._lookup(self._stores.weights, *self._ids[number]).block_until_ready()

    def update(self, number: int) -> None:
        self._stores = self._update(self._stores, *self._ids[number], self._gradients)
        jax.block_until_ready(self._stores)


class _Torch:
    """The same by torch: EmbeddingBag, and sparse Adagrad after a backward pass."""

    def __init__(self, case: Case, num_rows: int, ids: list[_Batch]):
        # Not among this project's packages: whoever asks for it has it.
        import torch  # pyright: ignore[reportMissingImports]

        self._torch, device = torch, "cuda" if jax.default_backend() == "gpu" else "cpu"
        self._ids = [
            (
                torch.from_numpy(one.rows.astype(np.int64)).to(device),
                torch.from_numpy(one.offsets[:-1].astype(np.int64)).to(device),
            )
            for one in ids
        ]
        self._bag = torch.nn.EmbeddingBag(
            num_rows, case.width, mode="sum", sparse=True, device=device, dtype=getattr(torch, case.dtype)
        )
        self._optimizer = torch.optim.Adagrad(self._bag.parameters(), lr=0.01)
        with torch.no_grad():
            shape = self._bag(*self._ids[0]).shape
        self._gradient = torch.full(shape, 1e-3, device=device, dtype=getattr(torch, case.dtype))

    def _wait(self) -> None:
        if self._gradient.is_cuda:
            self._torch.cuda.synchronize()

    def lookup(self, number: int) -> None:
        with self._torch.no_grad():
            self._bag(*self._ids[number])
        self._wait()

    def update(self, number: int) -> None:
        """Forward, backward and optimizer: what an update takes."""
        self._optimizer.zero_grad(set_to_none=True)
        self._bag(*self._ids[number]).backward(self._gradient)
        self._optimizer.step()
        self._wait()


def _measure(
    case: Case, table_bytes: int, num_ids: int, repetitions: int, warm_s: float, torch: bool
) -> Iterator[dict[str, Any]]:
    num_lines = table_bytes // LINE_BYTES
    row_bytes = case.width * jnp.dtype(case.dtype).itemsize
    num_rows = num_lines * LINE_BYTES // row_bytes
    count = num_ids // case.pooling_factor * case.pooling_factor
    ids = [_ids(case, num_rows, count, seed) for seed in range(_BATCHES)]
    distinct = statistics.mean(one.distinct for one in ids)
    vectors = (len(ids[0].offsets) - 1) * (4 * case.width + 4)
    must_move = {
        "lookup": 4 * count + distinct * row_bytes + vectors,
        "update": 4 * count + distinct * 2 * (row_bytes + 4) + vectors,
    }
    for operation, moved in must_move.items():
        rule = _RULE if operation == "update" else None
        chosen = implementation_of(None, dtype=jnp.dtype(case.dtype), width=case.width, optimizer=rule)
        name = cast(Implementation, chosen.__name__.rsplit(".", 1)[-1])
        names: tuple[Implementation, ...] = (name,) if name == "xla" else (name, "xla")
        sides: dict[str, Any] = {side: _Ours(case, num_lines, ids, side) for side in names}
        if torch and case.dtype == "float32":
            sides["torch"] = _Torch(case, num_rows, ids)
        seconds = _seconds({side: getattr(of, operation) for side, of in sides.items()}, repetitions, warm_s)
        yield {
            **dataclasses.asdict(case),
            "case": case.name,
            "operation": operation,
            "implementation": name,
            "num_ids": count,
            "bytes": int(moved),
            "seconds": seconds,
            "bytes_per_second": moved / seconds[name],
            "times_faster_than": {side: s / seconds[name] for side, s in seconds.items() if side != name},
        }


def _draw(results: list[dict[str, Any]], copy: float, path: Path) -> None:
    """A roofline: bandwidth of each case, below that of a copy."""
    figure, axes = plt.subplots(figsize=(9, 0.32 * len(results) + 1.6), layout="constrained")
    labels = [f"{result['operation']}: {result['case']}" for result in results]
    colours = ["#4477aa" if result["operation"] == "lookup" else "#ee6677" for result in results]
    axes.barh(labels, [result["bytes_per_second"] / 1e9 for result in results], color=colours)
    axes.axvline(copy / 1e9, color="black", linestyle="--", label="a copy, in the same run")
    axes.invert_yaxis()
    axes.set_xlabel("bytes that must move over time, GB/s")
    axes.legend(loc="lower right")
    figure.savefig(path)
    plt.close(figure)


def main(
    table_gb: float = 1.0,
    num_ids: int | None = None,
    repetitions: int = 15,
    warm_s: float = 6.0,
    torch: bool = False,
    only: str = "",
    out: Path = Path("benchmarks/results/kernels.json"),
) -> None:
    """Sweeps the kernels.

    Args:
        table_gb: Size of the table; far more than the last-level cache, on an H200 8 at least.
        num_ids: Ids of a call; unless given 2**20 on hosts, elsewhere 2**22, since it takes time to start a call and to
            hear of its end.
        repetitions: Timed runs of each side, in turns.
        warm_s: Seconds of each side before, on hosts: a table moves to pages of 2 MB there while it is first used.
        torch: Whether to run torch's EmbeddingBag too.
        only: Cases whose name has this in it.
        out: Where to write the figures; a picture goes beside it.
    """
    keep_freed_memory()
    on_host = jax.default_backend() == "cpu"
    if not on_host:
        warm_s = 0.0
    num_ids = num_ids or (2**20 if on_host else 2**22)
    table_bytes = int(table_gb * 2**30)
    copy = copy_bandwidth(table_bytes // 4, repetitions)
    print(f"copy: {copy / 1e9:.1f} GB/s")
    results = []
    for case in _cases():
        if only not in case.name:
            continue
        ids_of_case = num_ids
        if on_host:
            ids_of_case = min(num_ids, _MOST_HOST_BYTES // (4 * case.width))
            gc.collect()
            give_back_freed_memory()
        for result in _measure(case, table_bytes, ids_of_case, repetitions, warm_s, torch):
            result["share_of_copy"] = result["bytes_per_second"] / copy
            results.append(result)
            faster = ", ".join(f"{times:.2f}x {side}" for side, times in result["times_faster_than"].items())
            print(
                f"{result['operation']:7} {case.name:45} {result['share_of_copy']:6.1%} of copy   {faster}", flush=True
            )
    record(
        out,
        f"benchmarks/kernels.py --table_gb {table_gb} --num_ids {num_ids} --repetitions {repetitions} --warm_s {warm_s}"
        + " --torch" * torch,
        {"copy_bytes_per_second": copy, "results": results},
    )
    _draw(results, copy, out.with_suffix(".png"))


if __name__ == "__main__":
    # The image of GPU machines has no tyro.
    import argparse

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table_gb", type=float, default=1.0, help="size of the table (default 1)")
    parser.add_argument("--num_ids", type=int, help="ids of a call (default 2**20 on hosts, elsewhere 2**22)")
    parser.add_argument("--repetitions", type=int, default=15, help="timed runs of each side, in turns (default 15)")
    parser.add_argument(
        "--warm_s", type=float, default=6.0, help="seconds of each side before those, on hosts (default 6)"
    )
    parser.add_argument("--torch", action="store_true", help="run torch's EmbeddingBag too")
    parser.add_argument("--only", default="", help="cases whose name has this in it")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/kernels.json"), help="where figures go")
    main(**vars(parser.parse_args()))
