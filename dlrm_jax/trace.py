"""StepTrace: a trace of some steps of training, for TensorBoard (its profile plugin) and https://ui.perfetto.dev."""

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

from dlrm_jax.save_errors import SaveError

# Steps of a run before the traced ones: they compile.
_STEPS_BEFORE = 3


class StepTrace:
    """Traces steps, once a run. A context manager: what is under way when training ends is written, too."""

    def __init__(self, folder: Path, *, first_step: int, last_step: int, steps: int | None):
        """Traces nothing yet.

        Args:
            folder: Where the trace is written.
            first_step: Number of the run's first step.
            last_step: Number of its last step.
            steps: Steps to trace; None or 0 for none. They begin with the fourth step of the run, or earlier where it
                ends too soon for that.
        """
        self._folder = folder
        steps = steps or 0
        self._begin = max(first_step, min(first_step + _STEPS_BEFORE, last_step - steps + 1))
        self._last = self._begin + steps - 1
        self._running = False

    def __enter__(self) -> "StepTrace":
        """Returns itself."""
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Writes what has been traced; that this fails is no news where something else has failed."""
        with contextlib.suppress(*([] if kind is None else [SaveError])):
            self._stop()

    @contextlib.contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Around the start of a step.

        Args:
            number: Its number.
        """
        if self._begin <= number <= self._last and not self._running:
            options = jax.profiler.ProfileOptions()
            # Not every call of Python: they would be nearly all of the trace.
            options.python_tracer_level = 0
            # Files of this process alone: no server, and no port.
            jax.profiler.start_trace(self._folder, create_perfetto_trace=True, profiler_options=options)
            self._running = True
        with jax.profiler.StepTraceAnnotation("train", step_num=number):
            yield

    def finish(self, number: int, results: Any) -> float:
        """After the start of a step: ends the trace with the last traced one.

        Args:
            number: Its number.
            results: What it leaves, to wait for.

        Returns:
            Seconds that this took.
        """
        if not self._running or number < self._last:
            return 0.0
        started = time.perf_counter()
        jax.block_until_ready(results)
        self._stop()
        return time.perf_counter() - started

    def _stop(self) -> None:
        if self._running:
            self._running = False
            try:
                jax.profiler.stop_trace()
            except (OSError, jax.errors.JaxRuntimeError) as error:
                reason = str(error).splitlines()[0][:200]
                raise SaveError(f"{self._folder}: the trace cannot be written ({reason}); make room there") from error
