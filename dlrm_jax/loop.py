"""The training loop: from a config to a trained model in a workdir.

Resumption: the state is restored from the latest complete checkpoint; its step gives epoch and step of the data order;
best score and early stopping come from the checkpoint's progress; metrics logged beyond the checkpoint are dropped and
logged again. So a run that is killed and started again ends with the same bits.
"""

import contextlib
import dataclasses
import json
import math
import time
from collections.abc import Iterator
from typing import Literal

from jax.sharding import Mesh
from rich.console import Console

from dlrm_jax.checkpoint import Checkpointer, Progress
from dlrm_jax.config import Config
from dlrm_jax.config_notes import steps_in_vain, without_effect
from dlrm_jax.data.batch import Batch
from dlrm_jax.data.folder_lock import exclusive
from dlrm_jax.distributed import check_same, check_shared, code_version, gather, num_processes, process_id, together
from dlrm_jax.evaluate import DivergedError, evaluate
from dlrm_jax.metrics import Metrics
from dlrm_jax.pipeline import Pipeline
from dlrm_jax.plan_choice import check_chunks, check_memory
from dlrm_jax.predictions import Predictions
from dlrm_jax.recommender import Recommender
from dlrm_jax.replay import ReplayedSteps, Window
from dlrm_jax.report import RunLog, draw_curves, first_line, logged_metrics, result_table, write_result
from dlrm_jax.save_errors import saving
from dlrm_jax.sources import Source, card_of, check_parts, open_split
from dlrm_jax.stop_signal import StopSignal
from dlrm_jax.trace import StepTrace
from dlrm_jax.train_state import NON_FINITE, TrainState, abstract_train_state, init_train_state, make_dense_optimizer
from dlrm_jax.workdir import Workdir
from sharding.errors import InputError

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
        mesh: Devices; those that the config says unless given.
        console: Where process 0 prints; standard error unless given.

    Returns:
        How it ended.

    Raises:
        InputError: Config, data and workdir cannot be used together, or another process trains in the workdir;
            nothing has been written then.
        TrainingError: Loss, a gradient or a prediction became infinite or NaN.
        SaveError: A checkpoint or metrics cannot be written, as on a full disk.
    """
    writes = process_id() == 0
    console = (console or Console(stderr=True, markup=False)) if writes else Console(quiet=True)
    check_same(code_version() | config.facts())
    workdir = Workdir(config.workdir)
    split = config.train.eval_split
    num_devices = config.mesh.num_devices if mesh is None else mesh.devices.size
    with contextlib.ExitStack() as until_end:
        with together():
            if writes:
                # Processes of one job share the folder, and one of them keeps other jobs out.
                until_end.enter_context(exclusive(workdir.path, what="training", instead="another --workdir"))
            card = card_of(config)
            if split is not None and split not in card.splits:
                raise InputError(
                    f"train.eval_split is {split!r}, but the dataset's splits are {sorted(card.splits)}: make that "
                    "one, or give --train.eval_split None to train without evaluation"
                )
            check_parts(
                config.data,
                num_devices,
                num_processes(),
                batches=["batch_size"] if split is None else ["batch_size", "eval_batch_size"],
            )
            check_chunks(config, num_devices)
        for line in without_effect(config, num_devices):
            console.print(f"note: {line}", highlight=False, soft_wrap=True)
        # Processes that know the same take the same way, also where they plan and measure together.
        check_same({"the dataset's card": dataclasses.asdict(card)})
        with together():
            recommender = Recommender(config, card, mesh=mesh)
            check_memory(config, card, recommender.tables.plan, recommender.tables.mesh)
            source = open_split(recommender, "train", training=True)
            judged = None if split is None else open_split(recommender, split, training=False)
        check_same({"the plan": json.loads(recommender.tables.plan.to_json())})
        sources = {"train": source} if judged is None else {"train": source, str(split): judged}
        check_same(
            {f"the digest of row groups of {name}": opened.row_groups_digest for name, opened in sources.items()},
            fix="give all the same files of the dataset, since the order of samples follows their row groups",
        )
        with together():
            if writes:
                workdir.claim(config, recommender.card, row_groups=source.row_groups_digest)
        check_shared(workdir)
        with (
            saving(workdir),
            Checkpointer(workdir.path, recommender.tables, keep=config.train.keep_checkpoints) as checkpointer,
        ):
            return _Run(config, recommender, source, judged, workdir, checkpointer, console).run()


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
        self._predictions = Predictions(recommender)
        # Before a loader has read anything, so that it is the same on all processes.
        self._first_capacities = recommender.first_capacities(
            config.data.batch_size * recommender.num_local_devices // recommender.tables.num_devices, source.capacity
        )
        steps = self._settings.epochs * source.steps_per_epoch
        self._last_step = steps if self._settings.max_steps is None else min(steps, self._settings.max_steps)
        self._evaluations: dict[int, Metrics] = {}
        self._noted = False

    def run(self) -> Result:
        with StopSignal(self._recommender.tables.mesh) as stop:
            return self._run(stop)

    def _run(self, stop: StopSignal) -> Result:
        state, progress, step = self._start()
        ended: Ended = "all steps"
        writes = process_id() == 0
        profiled = self._settings.profile if writes else None
        for line in steps_in_vain(self._recommender.config, step=step, last_step=self._last_step):
            self._console.print(f"note: {line}", highlight=False, soft_wrap=True)
        log = RunLog(self._workdir, self._console, first_step=step, last_step=self._last_step, writes=writes)
        with log:
            self._log = log
            if self._gave_up(progress):
                ended = "early stop"
            elif step < self._last_step:
                pipeline = Pipeline(self._recommender, self._optimizer)
                steps = ReplayedSteps(
                    self._recommender,
                    pipeline,
                    state,
                    step=step,
                    capacities=self._first_capacities,
                    stop=stop,
                )
                # The steps own the state, since each is donated to the next.
                del state
                with StepTrace(
                    self._workdir.path / "profile", first_step=step + 1, last_step=self._last_step, steps=profiled
                ) as trace:
                    progress, ended = self._steps(steps, pipeline, progress, stop, trace)
                step = steps.step
        evaluations = self._evaluations
        result = Result(
            step=step,
            ended=ended,
            best_step=progress.best_step,
            best=None if progress.best_step is None else evaluations.get(progress.best_step),
            last=evaluations[max(evaluations)] if evaluations else None,
        )
        if writes:
            self._report(result)
        return result

    def _start(self) -> tuple[TrainState, Progress, int]:
        """The state of the latest checkpoint, or a new one."""
        recommender = self._recommender
        self._console.print(first_line(recommender, self._source), highlight=False, soft_wrap=True)
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
        self, steps: ReplayedSteps, pipeline: Pipeline, progress: Progress, stop: StopSignal, trace: StepTrace
    ) -> tuple[Progress, Ended]:
        settings, steps_per_epoch = self._settings, self._source.steps_per_epoch
        window = steps.new_window()
        # Compilation is no part of the speed.
        window.untimed = 1
        self._since = time.perf_counter()
        first = True
        batches = self._batches(steps.step, pipeline)
        batch, upcoming = next(batches)
        while True:
            with trace.step(steps.step + 1):
                steps.start(batch, window, upcoming)
            step = steps.step
            at_end = step == self._last_step
            if not at_end:
                # Read and copied while the step computes.
                batch, upcoming = next(batches)
                steps.stage(batch, upcoming)
            self._log.advance(step)
            if first:
                first, self._since = False, time.perf_counter()
            if step % settings.log_every == 0:
                window = steps.new_window()
            # Steps are looked at, and windows logged, while later steps compute.
            stopping = self._check(steps, ahead=steps.steps_ahead)
            self._since += trace.finish(step, steps.state)
            improved = False
            if self._judged is not None and (at_end or step % steps_per_epoch == 0 or _due(step, settings.eval_every)):
                stopping |= self._check(steps, ahead=0)
                with self._untimed():
                    progress, improved = self._evaluate(self._judged, steps.state, progress, step)
            if num_processes() == 1:
                # Nobody else has to hear of it first.
                stopping = stop.received
            gave_up = self._gave_up(progress)
            if at_end or improved or stopping or gave_up or _due(step, settings.checkpoint_every):
                # What is not logged before a checkpoint, a run that resumes from it never logs.
                stopping |= self._check(steps, ahead=0)
                with self._untimed():
                    self._log.to_disk()
                    self._checkpointer.save(steps.state, progress)
            if at_end or stopping or gave_up:
                return progress, "all steps" if at_end else "signal" if stopping else "early stop"

    @contextlib.contextmanager
    def _untimed(self) -> Iterator[None]:
        """What samples a second do not count."""
        started = time.perf_counter()
        yield
        self._since += time.perf_counter() - started

    def _batches(self, step: int, pipeline: Pipeline) -> Iterator[tuple[Batch, Batch | None]]:
        """The batches after a step, each with the next one as far as the pipeline looks ahead, across epochs."""
        batches = _of_all_epochs(self._source, step)
        batch = next(batches)
        while True:
            step += 1
            wanted = pipeline.needs_next or (pipeline.looks_ahead and step < self._last_step)
            upcoming = next(batches) if wanted else None
            yield batch, upcoming
            batch = next(batches) if upcoming is None else upcoming

    def _check(self, steps: ReplayedSteps, *, ahead: int) -> bool:
        """Looks at all but the last steps, and logs the windows that they end.

        Returns:
            Whether a process had been signalled to stop before one of them.

        Raises:
            TrainingError: Training has come to a halt by itself.
        """
        stop = False
        for checked in steps.checked(ahead=ahead):
            if checked.fault:
                # That step and all since have changed nothing.
                what = (
                    "loss or a gradient is not finite" if checked.fault & NON_FINITE else "an id is outside its table"
                )
                raise TrainingError(
                    f"step {checked.step}: {what}; lower the learning rates or check the data; {self._intact()}"
                )
            stop |= checked.stop
            if checked.step % self._settings.log_every == 0:
                self._log_window(checked.step, checked.window)
        return stop

    def _log_window(self, step: int, window: Window) -> None:
        """Logs the metrics of a window of steps that have all been looked at."""
        metrics = window.compute()
        now = time.perf_counter()
        timed = metrics.num_samples * (window.steps - window.untimed) / window.steps
        self._log.metrics(step, "train", metrics, samples_per_second=timed / (now - self._since))
        self._since = now

    def _evaluate(self, judged: Source, state: TrainState, progress: Progress, step: int) -> tuple[Progress, bool]:
        """Evaluates; returns the progress after it, and whether it was the best so far."""
        split = str(self._settings.eval_split)
        self._log.start_evaluation(split, judged.steps_per_epoch)
        try:
            metrics = evaluate(
                self._predictions,
                state.dense_params,
                state.tables,
                judged,
                advance=self._log.advance_evaluation,
            )
        except DivergedError as error:
            raise TrainingError(f"evaluation after step {step}: {error}; {self._intact()}") from error
        self._log.metrics(step, split, metrics)
        self._evaluations[step] = metrics
        # All processes have the same predictions, but hosts of different kinds may add them up differently.
        score = float(gather(repr(metrics.auc if self._settings.best_by == "auc" else -metrics.ne))[0])
        if math.isnan(score):
            self._note_undefined(split)
            return progress, False
        if progress.best_score is None or score > progress.best_score:
            return Progress(best_score=score, best_step=step), True
        since_best = progress.evaluations_since_best + 1
        return dataclasses.replace(progress, evaluations_since_best=since_best), False

    def _note_undefined(self, split: str) -> None:
        if not self._noted:
            name = self._settings.best_by
            self._console.print(
                f"note: {name} of {split!r} is undefined, since all its labels are equal: no evaluation is the best",
                highlight=False,
                soft_wrap=True,
            )
        self._noted = True

    def _gave_up(self, progress: Progress) -> bool:
        patience = self._settings.early_stop
        return patience is not None and progress.evaluations_since_best >= patience

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


def _of_all_epochs(source: Source, step: int) -> Iterator[Batch]:
    """The batches after a step, without end."""
    epoch, first = divmod(step, source.steps_per_epoch)
    while True:
        yield from source.batches(epoch, first)
        epoch, first = epoch + 1, 0


def _due(step: int, every: int | None) -> bool:
    return every is not None and step % every == 0
