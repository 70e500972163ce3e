"""ReplayedSteps: training steps that lose no id, and that the host never waits for.

The room for ids on their way is static, and chosen for ordinary batches. Where a batch needs more, its step and all
later ones change nothing but `TrainState.fault` (`OVERFLOW`). The host looks a few steps late, raises the capacities
and does those steps again, in order, with the batches that it has kept; what a step had done ahead for the next one
(`pipeline.py`) it does again, too. Fault and needs are the same on every process, so all of them do the same.
"""

import dataclasses
import time
from collections import deque
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from dlrm_jax.data.batch import Batch
from dlrm_jax.host_memory import give_back_freed_memory
from dlrm_jax.metrics import EXACT_SAMPLES, BinnedMetrics, Metrics
from dlrm_jax.pipeline import Pipeline
from dlrm_jax.recommender import Recommender
from dlrm_jax.stop_signal import StopSignal
from dlrm_jax.train_state import OVERFLOW, TrainState
from dlrm_jax.train_step import StepReport, make_no_metrics
from sharding.capacities import Capacities
from sharding.mesh import REPLICATED, is_of_hosts, sharding_on

# Steps that may be under way when the host looks at one. XLA's programs for hosts allocate the temporary arrays of a
# step when it is started, not when it runs, and are hardly faster with a step waiting.
_STEPS_AHEAD = 2
_STEPS_AHEAD_ON_HOSTS = 0
# Of a step's time, how long the host then leaves XLA to free those arrays, which it does some 0.1 ms after the results
# are there: else the next step takes more memory from the system beside them, and glibc breaks up what is freed.
_PAUSE_ON_HOSTS = 0.002


class Window:
    """The metrics of the steps between two lines of the log.

    Attributes:
        metrics: Sums over its latest steps, each device's own.
        steps: Number of its steps.
        untimed: Those of them that do not count for the speed.
    """

    def __init__(
        self, no_metrics: Callable[[], BinnedMetrics], to_all: Callable[[BinnedMetrics], BinnedMetrics], room: int
    ):
        """Begins without steps.

        Args:
            no_metrics: Makes the metrics of no samples.
            to_all: Gives every process what all devices have.
            room: Steps that the metrics on the devices add up exactly.
        """
        self.metrics = no_metrics()
        self.steps = 0
        self.untimed = 0
        self._no_metrics = no_metrics
        self._to_all = to_all
        self._room = self._left = room
        self._full: list[BinnedMetrics] = []

    def add(self, metrics: BinnedMetrics) -> None:
        """Takes the metrics that a step has added to; sets them aside where they have no room for another.

        Args:
            metrics: As they are after it.
        """
        self.metrics = metrics
        self._left -= 1
        if not self._left:
            self._full.append(metrics)
            self.metrics, self._left = self._no_metrics(), self._room

    def compute(self) -> Metrics:
        """Computes the metrics; it waits for the steps. All processes call it together."""
        total = self._to_all(self.metrics)
        for part in self._full:
            total = total.merge(self._to_all(part))
        return total.compute()


@dataclasses.dataclass(kw_only=True)
class _Unchecked:
    """A step that the host has not looked at."""

    step: int
    batch: Batch
    window: Window
    report: StepReport
    started: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Checked:
    """A step that is done for good, or at which training has come to a halt.

    Attributes:
        step: Its number.
        fault: The state's fault after it, never `OVERFLOW`.
        stop: Whether a process had been signalled to stop.
        window: The window that it belongs to.
    """

    step: int
    fault: int
    stop: bool
    window: Window


class ReplayedSteps:
    """Starts training steps one after another, and checks them later.

    Attributes:
        state: The state after the last step started.
        step: Its number.
        capacities: Room for ids.
        steps_ahead: Steps that may be under way when the host looks at one.
    """

    def __init__(
        self,
        recommender: Recommender,
        pipeline: Pipeline,
        state: TrainState,
        *,
        step: int,
        capacities: Capacities,
        stop: StopSignal,
    ):
        """Begins after a step.

        Args:
            recommender: The model.
            pipeline: Its compiled steps.
            state: The state after that step.
            step: Number of that step.
            capacities: Room for ids to begin with.
            stop: Whether this process has been signalled.
        """
        self.state = state
        self.step = step
        self.capacities = capacities
        self._recommender = recommender
        self._pipeline = pipeline
        self._stop = stop
        self._unchecked: deque[_Unchecked] = deque()
        # Room for which steps have been compiled.
        self._compiled: Capacities | None = None
        # Made where the step leaves it, so that the step is compiled once.
        mesh: Mesh = recommender.tables.mesh
        self.steps_ahead = _STEPS_AHEAD_ON_HOSTS if is_of_hosts(mesh) else _STEPS_AHEAD
        replicated = sharding_on(mesh, REPLICATED)
        self._no_fault = jax.jit(lambda: jnp.int32(0), out_shardings=replicated)
        self._no_metrics = make_no_metrics(mesh)
        self._to_all = jax.jit(lambda metrics: metrics, out_shardings=replicated)

    def new_window(self) -> Window:
        """A window without steps."""
        tables = self._recommender.tables
        samples = self._recommender.config.data.batch_size // tables.num_devices
        return Window(self._no_metrics, self._to_all, max(1, EXACT_SAMPLES // samples))

    def start(self, batch: Batch, window: Window, upcoming: Batch | None = None) -> None:
        """Starts the next step.

        Args:
            batch: This process's part of its batch, as numpy arrays.
            window: Where its metrics are added.
            upcoming: The batch that will be given next, if the pipeline looks ahead and there will be one.
        """
        self.step += 1
        window.steps += 1
        started = time.perf_counter()
        report = self._run(batch, upcoming, window)
        step = _Unchecked(step=self.step, batch=batch, window=window, report=report, started=started)
        self._unchecked.append(step)

    def stage(self, batch: Batch, upcoming: Batch | None = None) -> None:
        """Copies to the devices what `start` will be given next, while the step before it computes.

        Args:
            batch: As of `start`.
            upcoming: As of `start`.
        """
        self._pipeline.stage(batch, upcoming, self.capacities)

    def checked(self, *, ahead: int) -> Iterator[Checked]:
        """Looks at steps in order, and does again those that ids had no room in.

        Args:
            ahead: Steps that need not be looked at yet.

        Yields:
            The steps looked at. After one with a fault there is nothing to go on with.
        """
        while len(self._unchecked) > ahead:
            first = self._unchecked[0]
            report: StepReport = jax.device_get(first.report)
            if self.steps_ahead == 0:
                time.sleep(_PAUSE_ON_HOSTS * (time.perf_counter() - first.started))
            fault = int(report.fault)
            if fault == OVERFLOW:
                self._replay()
                continue
            self._unchecked.popleft()
            yield Checked(step=first.step, fault=fault, stop=bool(report.stop), window=first.window)

    def _replay(self) -> None:
        """Does all unchecked steps again, with room for what each of them, and the batch routed ahead, needs."""
        needs = [jax.device_get(entry.report.needs) for entry in self._unchecked]
        ahead = self._pipeline.ahead
        if self._pipeline.needs is not None:
            needs.append(self._pipeline.needs)
        self._pipeline.forget()
        self.capacities = self._recommender.grown_capacities(self.capacities, needs)
        self.state = dataclasses.replace(self.state, fault=self._no_fault())
        batches = [entry.batch for entry in self._unchecked]
        for entry, upcoming in zip(self._unchecked, [*batches[1:], ahead], strict=True):
            entry.report = self._run(entry.batch, upcoming, entry.window)

    def _run(self, batch: Batch, upcoming: Batch | None, window: Window) -> StepReport:
        # Whatever else moved between host and devices would keep the host waiting.
        with jax.transfer_guard("disallow"):
            self.state, metrics, report = self._pipeline.step(
                self.state, window.metrics, batch, upcoming, stop=self._stop.flag, capacities=self.capacities
            )
        if self._compiled != self.capacities:
            # The compiler's, which is more than a step takes.
            give_back_freed_memory()
            self._compiled = self.capacities
        window.add(metrics)
        return report
