"""Pipeline: what runs beside a step of training: nothing, or the first part of the next one (`train.pipeline`)."""

import dataclasses
from typing import Any

import jax
import numpy as np
import optax
from jaxtyping import Array, Bool, Int32

from dlrm_jax.data.batch import Batch
from dlrm_jax.metrics import BinnedMetrics
from dlrm_jax.pipelined_step import PipelinedStep, Prologue, make_pipelined_step, make_prologue
from dlrm_jax.recommender import Recommender
from dlrm_jax.train_state import TrainState
from dlrm_jax.train_step import StepReport, TrainStep, make_train_step
from sharding.capacities import Capacities
from sharding.route import Routed


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Ahead:
    """A batch whose ids are routed, or under way.

    Attributes:
        batch: The batch on the host.
        on_devices: The same on the devices.
        routed: Its ids.
    """

    batch: Batch
    on_devices: Batch
    routed: Routed


class Pipeline:
    """Runs steps, each with the batch that comes after it, and holds what was done ahead for that.

    Attributes:
        main_step: The compiled step that training repeats.
        looks_ahead: Whether a step wants the next batch.
        needs_next: Whether it does even where training ends: the state then holds what a longer run would go on from.
    """

    def __init__(self, recommender: Recommender, optimizer: optax.GradientTransformation):
        """Compiles nothing yet.

        Args:
            recommender: The model; its config says what runs ahead.
            optimizer: Optimizer of its dense part.
        """
        how = recommender.config.train.pipeline
        self.looks_ahead = how != "none"
        self.needs_next = how == "stale"
        self._recommender = recommender
        make = make_pipelined_step if self.looks_ahead else make_train_step
        self.main_step: Any = make(recommender, optimizer)
        self._prologue: Prologue = make_prologue(recommender)
        self._ahead: _Ahead | None = None
        # A batch, and the same on the devices, before a step has asked for it.
        self._staged: tuple[Batch, Batch] | None = None

    @property
    def ahead(self) -> Batch | None:
        """The batch that is routed ahead, if there is one."""
        return None if self._ahead is None else self._ahead.batch

    @property
    def needs(self) -> Int32[np.ndarray, " needs"] | None:
        """Room that the ids of that batch need."""
        return None if self._ahead is None else jax.device_get(self._ahead.routed.needs)

    def forget(self) -> None:
        """Drops what was done ahead, as it was done with less room than there is now."""
        self._ahead = self._staged = None

    def stage(self, batch: Batch, upcoming: Batch | None, capacities: Capacities) -> None:
        """Copies the batch that the next step is the first to want to the devices, while the one before it computes.

        Args:
            batch: The next step's batch.
            upcoming: The batch after it, as `step` will be given it.
            capacities: As `step` will be given them.
        """
        new = upcoming if self.looks_ahead else batch
        if new is not None:
            self._staged = new, self._to_devices(new, capacities)

    def step(
        self,
        state: TrainState,
        metrics: BinnedMetrics,
        batch: Batch,
        upcoming: Batch | None,
        *,
        stop: Bool[Array, " W"],
        capacities: Capacities,
    ) -> tuple[TrainState, BinnedMetrics, StepReport]:
        """Starts a step; returns at once.

        Args:
            state: The state before; donated.
            metrics: Metrics to add to; donated.
            batch: This process's part of the batch, as numpy arrays.
            upcoming: The next batch; None where training ends after this one, or nothing runs ahead.
            stop: For each device, whether its process was signalled to stop.
            capacities: Room for ids; the same as in the step before, unless what that did ahead was forgotten.

        Returns:
            As `train_step`.

        Raises:
            ValueError: There is no next batch, but it is needed.
        """
        if not self.looks_ahead:
            on_devices = self._to_devices(batch, capacities)
            plain_step: TrainStep = self.main_step
            return plain_step(state, metrics, on_devices, stop=stop, capacities=capacities)
        if upcoming is None and self.needs_next:
            raise ValueError("a stale step needs the next batch, also where training ends")
        now, self._ahead = self._ahead, None
        if now is None or now.batch is not batch:
            on_devices = self._to_devices(batch, capacities)
            routed, stale = self._prologue(state, on_devices.ids, capacities=capacities)
            state = dataclasses.replace(state, stale=stale)
            now = _Ahead(batch=batch, on_devices=on_devices, routed=routed)
        # Without a next batch the same program routes this one again, in vain.
        then = now.on_devices if upcoming is None else self._to_devices(upcoming, capacities)
        step: PipelinedStep = self.main_step
        state, metrics, report, routed = step(
            state, metrics, now.on_devices, now.routed, then.ids, stop=stop, capacities=capacities
        )
        if upcoming is not None:
            self._ahead = _Ahead(batch=upcoming, on_devices=then, routed=routed)
        return state, metrics, report

    def _to_devices(self, batch: Batch, capacities: Capacities) -> Batch:
        staged, self._staged = self._staged, None
        if staged is not None and staged[0] is batch:
            return staged[1]
        # The one transfer that is meant: under a guard, that of several processes would count as an implicit one.
        with jax.transfer_guard("allow"):
            return self._recommender.to_devices(batch, capacities)
