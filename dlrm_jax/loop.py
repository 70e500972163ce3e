"""The training loop: from a config to a trained model in a workdir.

Resumption: the state is restored from the latest complete checkpoint; its step gives epoch and step of the data order;
best score and early stopping come from the checkpoint's progress; metrics logged beyond the checkpoint are dropped and
logged again. So a run that is killed and started again ends with the same bits.
"""

import dataclasses
import signal
import threading
import time
from typing import Literal

import jax
import numpy as np
from jax.sharding import Mesh
from rich.console import Console

from dlrm_jax.checkpoint import Checkpointer, Progress
from dlrm_jax.config import Config
from dlrm_jax.evaluate import DivergedError, evaluate
from dlrm_jax.metrics import BinnedMetrics, Metrics
from dlrm_jax.recommender import Recommender
from dlrm_jax.report import RunLog, draw_curves, logged_metrics, result_table, write_result
from dlrm_jax.sources import Source, card_of, open_split
from dlrm_jax.train_state import NON_FINITE, TrainState, abstract_train_state, init_train_state, make_dense_optimizer
from dlrm_jax.train_step import make_predict_step, make_train_step
from dlrm_jax.workdir import Workdir
from sharding.mesh import REPLICATED, sharding_on

Ended = Literal["all steps", "early stop", "signal"]


class TrainingError(RuntimeError):
    """Training cannot go on; the message names the step, and the latest checkpoint is intact."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Result:
    """How training ended.

    Attributes:
        step: Updates made.
        ended: Why it ended.
        best_step: Step of the best evaluation, None if there was none.
        best: Its metrics.
        last: Metrics of the last evaluation, None if there was none.
    """

    step: int
    ended: Ended
    best_step: int | None
    best: Metrics | None
    last: Metrics | None


def train(config: Config, *, mesh: Mesh | None = None, console: Console | None = None) -> Result:
    """Trains as the config says, in its workdir, from where an earlier run of it stopped.

    SIGTERM and SIGINT make it save a checkpoint and return.

    Args:
        config: The experiment.
        mesh: Devices; one unless given.
        console: Where to print; standard error unless given.

    Returns:
        How it ended.

    Raises:
        InputError: Config, data and workdir cannot be used together; nothing has been written then.
        TrainingError: Loss, a gradient or a prediction became infinite or NaN.
    """
    console = console or Console(stderr=True)
    recommender = Recommender(config, card_of(config), mesh=mesh)
    source = open_split(recommender, "train", training=True)
    split = config.train.eval_split
    judged = None if split is None else open_split(recommender, split, training=False)
    workdir = Workdir(config.workdir)
    workdir.claim(config, recommender.card)
    with Checkpointer(workdir.path, recommender.tables, keep=config.train.keep_checkpoints) as checkpointer:
        return _Run(config, recommender, source, judged, workdir, checkpointer, console).run()


class _StopSignal:
    """Notes SIGTERM and SIGINT instead of dying of them; the second SIGINT interrupts as usual."""

    def __init__(self):
        self.received = False
        self._previous: dict[int, object] = {}

    def __enter__(self) -> "_StopSignal":
        # Python lets only the main thread handle signals; elsewhere (a notebook's worker) they are left alone.
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._previous[number] = signal.signal(number, self._note)
        return self

    def _note(self, number: int, frame: object) -> None:
        self.received = True
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # pyright: ignore[reportArgumentType]: what signal.signal returned


class _Run:
    """One run of the loop."""

    def __init__(
        self,
        config: Config,
        recommender: Recommender,
        source: Source,
        judged: Source | None,
        workdir: Workdir,
        checkpointer: Checkpointer,
        console: Console,
    ):
        self._settings = config.train
        self._recommender = recommender
        self._source = source
        self._judged = judged
        self._workdir = workdir
        self._checkpointer = checkpointer
        self._console = console
        self._optimizer = make_dense_optimizer(config.dense_optimizer, config.schedule)
        self._train_step = make_train_step(recommender, self._optimizer)
        self._predict_step = make_predict_step(recommender)
        # Made where the step leaves them, so that the step is compiled once.
        replicated = sharding_on(recommender.tables.mesh, REPLICATED)
        self._new_window = jax.jit(BinnedMetrics.zeros, out_shardings=replicated)
        steps = self._settings.epochs * source.steps_per_epoch
        self._last_step = steps if self._settings.max_steps is None else min(steps, self._settings.max_steps)
        self._evaluations: dict[int, Metrics] = {}

    def run(self) -> Result:
        state, progress, step = self._start()
        ended: Ended = "all steps"
        log = RunLog(self._workdir, self._console, first_step=step, last_step=self._last_step)
        with log, _StopSignal() as stop:
            self._log = log
            if self._gave_up(progress):
                ended = "early stop"
            elif step < self._last_step:
                state, progress, step, ended = self._steps(state, progress, step, stop)
        evaluations = self._evaluations
        result = Result(
            step=step,
            ended=ended,
            best_step=progress.best_step,
            best=None if progress.best_step is None else evaluations.get(progress.best_step),
            last=evaluations[max(evaluations)] if evaluations else None,
        )
        self._report(result)
        return result

    def _start(self) -> tuple[TrainState, Progress, int]:
        """The state of the latest checkpoint, or a new one."""
        recommender = self._recommender
        self._console.print(
            f"{recommender.config.name}: {recommender.num_table_parameters:,} parameters in "
            f"{len(recommender.tables.tables)} tables, {recommender.num_dense_parameters:,} dense; "
            f"{self._source.num_samples:,} training samples, {self._source.steps_per_epoch:,} steps an epoch",
            highlight=False,
            soft_wrap=True,
        )
        steps = self._checkpointer.steps()
        if not steps:
            return init_train_state(recommender, self._optimizer), Progress(), 0
        step = steps[-1]
        self._console.print(f"resuming from step {step:,} in {self._workdir.path}", highlight=False, soft_wrap=True)
        logged = logged_metrics(self._workdir, str(self._settings.eval_split))
        self._evaluations = {evaluated: metrics for evaluated, metrics in logged.items() if evaluated <= step}
        state = self._checkpointer.restore(step, abstract_train_state(recommender, self._optimizer))
        return state, self._checkpointer.progress(step), step

    def _steps(
        self, state: TrainState, progress: Progress, step: int, stop: _StopSignal
    ) -> tuple[TrainState, Progress, int, Ended]:
        settings, steps_per_epoch = self._settings, self._source.steps_per_epoch
        window, samples, since = self._new_window(), 0, time.perf_counter()
        pending, first = None, True
        while step < self._last_step:
            for batch in self._source.batches(step // steps_per_epoch, step % steps_per_epoch):
                state, window, fault = self._train_step(state, window, self._recommender.to_devices(batch))
                step += 1
                samples += int(np.count_nonzero(batch.weight))
                self._log.advance(step)
                if first:
                    # Compilation is no part of the speed.
                    first, samples, since = False, 0, time.perf_counter()
                if pending is not None:
                    # The window before is fetched while this step computes.
                    since = self._log_window(state, *pending, since)
                    pending = None
                if step % settings.log_every == 0:
                    pending = (step, window, fault, samples)
                    window, samples = self._new_window(), 0
                at_end = step == self._last_step
                improved = False
                evaluating = at_end or step % steps_per_epoch == 0 or _due(step, settings.eval_every)
                if self._judged is not None and evaluating:
                    self._check(state, fault)
                    started = time.perf_counter()
                    progress, improved = self._evaluate(self._judged, state, progress, step)
                    since += time.perf_counter() - started
                stopping = stop.received or self._gave_up(progress)
                if at_end or improved or stopping or _due(step, settings.checkpoint_every):
                    self._check(state, fault)
                    if pending is not None:
                        # What is not logged before a checkpoint, a run that resumes from it never logs.
                        since = self._log_window(state, *pending, since)
                        pending = None
                    self._checkpointer.save(state, progress)
                if at_end or stopping:
                    ended: Ended = "all steps" if at_end else "signal" if stop.received else "early stop"
                    return state, progress, step, ended
        raise AssertionError("the loop ends at its last step")

    def _log_window(
        self, state: TrainState, step: int, window: BinnedMetrics, fault: jax.Array, samples: int, since: float
    ) -> float:
        """Logs the metrics of a window of steps; returns the time at which the next one began."""
        self._check(state, fault)
        metrics = window.compute()
        now = time.perf_counter()
        self._log.metrics(step, "train", metrics, samples_per_second=samples / (now - since))
        return now

    def _evaluate(self, judged: Source, state: TrainState, progress: Progress, step: int) -> tuple[Progress, bool]:
        """Evaluates; returns the progress after it, and whether it was the best so far."""
        split = str(self._settings.eval_split)
        self._log.start_evaluation(split, judged.steps_per_epoch)
        try:
            metrics = evaluate(
                self._recommender,
                self._predict_step,
                state.dense_params,
                state.tables,
                judged.batches(0),
                advance=self._log.advance_evaluation,
            )
        except DivergedError as error:
            raise TrainingError(f"evaluation after step {step}: {error}; {self._intact()}") from error
        self._log.metrics(step, split, metrics)
        self._evaluations[step] = metrics
        score = metrics.auc if self._settings.best_by == "auc" else -metrics.ne
        if progress.best_score is None or score > progress.best_score:
            return Progress(best_score=score, best_step=step), True
        since_best = progress.evaluations_since_best + 1
        return dataclasses.replace(progress, evaluations_since_best=since_best), False

    def _gave_up(self, progress: Progress) -> bool:
        patience = self._settings.early_stop
        return patience is not None and progress.evaluations_since_best >= patience

    def _check(self, state: TrainState, fault: jax.Array) -> None:
        """Raises if training has come to a halt by itself."""
        code = int(fault)
        if not code:
            return
        # That step and all since have changed nothing.
        step = int(state.step) + 1
        what = "loss or a gradient is not finite" if code & NON_FINITE else "an id is outside its table"
        raise TrainingError(f"step {step}: {what}; lower the learning rates or check the data; {self._intact()}")

    def _intact(self) -> str:
        latest = max(self._checkpointer.steps(), default=None)
        return "there is no checkpoint yet" if latest is None else f"the checkpoint of step {latest} is intact"

    def _report(self, result: Result) -> None:
        split = str(self._settings.eval_split)
        attainable = self._recommender.card.attainable.get(split, {})
        rows: dict[str, Metrics | dict[str, float]] = {}
        if result.best is not None:
            rows[f"best, {result.best_step:,}"] = result.best
        if result.last is not None:
            rows[f"last, {max(self._evaluations):,}"] = result.last
        if rows and attainable:
            rows["attainable"] = attainable
        if rows:
            self._console.print(result_table(f"{self._recommender.config.name}, {split}", rows))
        picture = draw_curves(self._workdir, attainable)
        write_result(self._workdir, dataclasses.asdict(result))
        self._console.print(
            f"ended at step {result.step:,} ({result.ended}); curves in {picture}",
            highlight=False,
            soft_wrap=True,
        )


def _due(step: int, every: int | None) -> bool:
    return every is not None and step % every == 0
