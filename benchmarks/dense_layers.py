"""Dense layers on a host: the `cpu` kernels beside XLA's products in the same dtype, in the same run.

    .venv/bin/python benchmarks/dense_layers.py

Layers with bias and ReLU of the models that `benchmarks/peers.py` trains, forward and all gradients. The sides take
turns: `cpu` and XLA, in bfloat16 by its default options and in float32 by ours. Beside them the memory floor: what each
call has to read and write at least, at the rate of a copy in the same run. In float32 `cpu` serves only with AMX.
"""

import os
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import tyro
from jaxtyping import Array
from rich.console import Console
from rich.table import Table

from benchmarks.kernels import copy_bandwidth
from benchmarks.record import record
from dlrm_jax.host_memory import keep_freed_memory
from pallas_kernels import cpu
from pallas_kernels.linear import linear
from sharding.compiler_options import compiler_options

# Inputs and outputs: Criteo's bottom and top MLP, multi-hot's, and both maps of MLPerf's cross network.
LAYERS = ((13, 512), (512, 256), (256, 64), (367, 512), (512, 512), (1024, 1024), (3456, 512), (512, 3456))
_TIMED_BYTES = 2**29


def _runs(arrays: Sequence[Array], dtype: str, native: bool, options: dict[str, Any]) -> dict[str, Callable[[], Any]]:
    """Functions that run a layer once, forward and backward, compiled by then."""
    x, kernel, bias, cotangent = arrays
    x, cotangent = x.astype(dtype), cotangent.astype(dtype)

    def layer(x, kernel, bias):
        return linear(x, kernel, bias, True)

    with mock.patch.object(cpu, "multiplies", return_value=native):
        forward = jax.jit(layer, compiler_options=options)
        backward = jax.jit(lambda pullback, cotangent: pullback(cotangent), compiler_options=options)
        _, pullback = jax.vjp(layer, x, kernel, bias)
        forward(x, kernel, bias)
        backward(pullback, cotangent)
    return {"forward": lambda: forward(x, kernel, bias), "gradients": lambda: backward(pullback, cotangent)}


def _bytes(samples: int, inputs: int, outputs: int, itemsize: int) -> dict[str, int]:
    """What is read and written at least: activations of an itemsize, parameters in float32."""
    x, y, parameters = itemsize * samples * inputs, itemsize * samples * outputs, 4 * (inputs + 1) * outputs
    return {"forward": x + parameters + y, "gradients": x + y + y + parameters + x + parameters}


def main(
    batch_sizes: tuple[int, ...] = (2048, 16384),
    turns: int = 15,
    out: Path = Path("benchmarks/results/dense_layers.json"),
) -> None:
    """Times layers.

    Args:
        batch_sizes: Samples.
        turns: Turns of each side; medians count.
        out: Where to write the figures.
    """
    dtypes = [dtype for dtype in ("bfloat16", "float32") if cpu.multiplies(jnp.dtype(dtype))]
    if not dtypes:
        # No error: `make bench` goes on to the next.
        print("nothing to time: this processor has neither AMX nor AVX-512 BF16, or the library was not built")
        return
    keep_freed_memory()
    options = {"bfloat16": {}, "float32": compiler_options("cpu", "cpu")}
    copied = copy_bandwidth(_TIMED_BYTES, 5)
    results = []
    table = Table(title="GFLOP a second; in brackets how often cpu is faster, or slower than the memory floor")
    for column in ("samples", "layer", "work", "dtype", "cpu", "xla", "memory floor", "load"):
        table.add_column(column)
    for samples in batch_sizes:
        for inputs, outputs in LAYERS:
            keys = jax.random.split(jax.random.key(0), 4)
            shapes = (samples, inputs), (inputs, outputs), (outputs,), (samples, outputs)
            arrays = [jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True)]
            runs = {
                (dtype, native): _runs(arrays, dtype, native, {} if native else options[dtype])
                for dtype in dtypes
                for native in (True, False)
            }
            for work, factor in (("forward", 1), ("gradients", 2)):
                seconds = _medians({side: run[work] for side, run in runs.items()}, turns)
                gflop, load = factor * 2e-9 * samples * inputs * outputs, os.getloadavg()[0]
                for dtype in dtypes:
                    ours, xla = seconds[dtype, True], seconds[dtype, False]
                    floor = _bytes(samples, inputs, outputs, jnp.dtype(dtype).itemsize)[work] / copied
                    case = {"samples": samples, "inputs": inputs, "outputs": outputs, "work": work, "dtype": dtype}
                    rates = {"cpu_gflops": gflop / ours, "xla_gflops": gflop / xla}
                    results.append({**case, **rates, "ms": 1e3 * ours, "floor_ms": 1e3 * floor, "load": load})
                    rates_shown = f"{gflop / ours:.0f}", f"{gflop / xla:.0f} ({xla / ours:.2f}x)"
                    beside = f"{1e3 * floor:.2f} ms ({ours / floor:.1f}x)"
                    layer = f"{inputs} x {outputs}"
                    table.add_row(str(samples), layer, work, dtype, *rates_shown, beside, f"{load:.1f}")
    Console().print(table)
    sizes = " ".join(map(str, batch_sizes))
    command = f"benchmarks/dense_layers.py --batch_sizes {sizes} --turns {turns}"
    record(out, command, {"copy_gb_s": copied / 1e9, "results": results})


def _medians(runs: dict[Any, Callable[[], Any]], turns: int) -> dict[Any, float]:
    times: dict[Any, list[float]] = {name: [] for name in runs}
    for turn in range(turns + 2):
        for name, run in runs.items():
            started = time.perf_counter()
            jax.block_until_ready(run())
            if turn >= 2:
                times[name].append(time.perf_counter() - started)
    return {name: statistics.median(of_side) for name, of_side in times.items()}


if __name__ == "__main__":
    tyro.cli(main, use_underscores=True)
