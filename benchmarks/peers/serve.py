"""The loop of a side's process: it builds the model, then takes orders from stdin and answers in lines of JSON.

Standard library and numpy only, since every environment imports it.
"""

import abc
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from benchmarks.peers.case import Case, CaseBatch, batches

# Of the square matrices whose product gives the matmul rate: about those of the models here.
MATMUL_SIZE = 1024
PRODUCTS = 3


class Side(Protocol):
    """A trainer of a case. Making it builds the model with weights of its own."""

    def load(self) -> None:
        """Overwrites all weights with those of the case."""
        ...

    def losses(self, steps: int) -> list[float]:
        """Trains for some steps and returns their losses."""
        ...

    def run(self, steps: int) -> None:
        """Trains for some steps, and returns when the last is done."""
        ...

    def matmul(self) -> None:
        """Multiplies two square float32 matrices of `MATMUL_SIZE`, and returns when that is done."""
        ...


class StepByStep(abc.ABC):
    """A side that starts one step after the other; the rest of `Side` is for its own class."""

    def __init__(self, case: Case):
        """Makes the batches.

        Args:
            case: The workload.
        """
        self._batches = batches(case)
        self._step = 0

    @abc.abstractmethod
    def _train(self, batch: CaseBatch) -> Any:
        """Trains on a batch and returns its loss, a number or an array of one."""

    def losses(self, steps: int) -> list[float]:
        """See `Side`."""
        return [float(self._next()) for _ in range(steps)]

    def run(self, steps: int) -> None:
        """See `Side`."""
        for _ in range(steps - 1):
            self._next()
        # Steps follow each other: once this loss can be read, all are done.
        float(self._next())

    def _next(self) -> Any:
        batch = self._batches[self._step % len(self._batches)]
        self._step += 1
        return self._train(batch)


def serve(make: Callable[[Case], Side]) -> None:
    """Serves one case until stdin ends.

    The process is given the case and the time when it was started, both as JSON. It answers with the seconds until the
    model was built; then `losses N` with losses and the seconds of the first step; `run N` with the milliseconds of a
    step, by the clock and of the processors, and the matmul rate in GFLOP/s, likewise; `memory` with the most bytes
    that the process has had.

    Args:
        make: Makes the side.
    """
    case, started = read_case(sys.argv[1]), json.loads(sys.argv[2])
    side = make(case)
    _answer({"start_s": time.time() - started})
    side.load()
    _answer({"loaded": True})
    for line in sys.stdin:
        order, *count = line.split()
        if order == "memory":
            _answer({"peak_bytes": peak_bytes()})
        elif order == "losses":
            begun = time.perf_counter()
            first = side.losses(1)
            first_step_s = time.perf_counter() - begun
            _answer({"losses": first + side.losses(int(count[0]) - 1), "first_step_s": first_step_s})
        else:
            _answer(_timed(side, int(count[0])))


def _timed(side: Side, steps: int) -> dict[str, float]:
    processors, begun = time.process_time(), time.perf_counter()
    side.run(steps)
    elapsed, busy = time.perf_counter() - begun, time.process_time() - processors
    products, processors = [], time.process_time()
    for _ in range(PRODUCTS):
        begun = time.perf_counter()
        side.matmul()
        products.append(time.perf_counter() - begun)
    flops = 2 * MATMUL_SIZE**3 / 1e9
    return {
        "step_ms": 1e3 * elapsed / steps,
        "cpu_ms": 1e3 * busy / steps,
        "gflops": flops / statistics.median(products),
        "cpu_gflops": flops * PRODUCTS / (time.process_time() - processors),
    }


def read_case(text: str) -> Case:
    """The case that another process wrote as JSON."""
    written = json.loads(text)
    fields: dict[str, Any] = {name: tuple(x) if isinstance(x, list) else x for name, x in written.items()}
    return Case(**fields)


def peak_bytes() -> int:
    """The most memory that this process has had resident, in bytes (Linux)."""
    status = Path(f"/proc/{os.getpid()}/status").read_text()
    return 1024 * int(status.split("VmHWM:")[1].split()[0])


def _answer(content: Mapping[str, object]) -> None:
    print(json.dumps(content), flush=True)
