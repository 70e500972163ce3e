"""The steps that the loop of training runs, look-ahead and checks included, on a few batches in turn."""

from collections.abc import Sequence

import jax

from dlrm_jax.data.batch import Batch
from dlrm_jax.pipeline import Pipeline
from dlrm_jax.recommender import Recommender
from dlrm_jax.replay import ReplayedSteps
from dlrm_jax.stop_signal import StopSignal
from dlrm_jax.train_state import init_train_state, make_dense_optimizer
from sharding.capacities import Capacities


class RepeatedSteps:
    """Trains a model anew.

    Attributes:
        replayed: The steps, with the state after the last.
        window: Where their metrics are added.
    """

    def __init__(self, recommender: Recommender, batches: Sequence[Batch], capacities: Capacities):
        config = recommender.config
        optimizer = make_dense_optimizer(config.dense_optimizer, config.schedule)
        self._batches = batches
        self.replayed = ReplayedSteps(
            recommender,
            Pipeline(recommender, optimizer),
            init_train_state(recommender, optimizer),
            step=0,
            capacities=capacities,
            stop=StopSignal(recommender.tables.mesh),
        )
        self.window = self.replayed.new_window()

    def run(self, steps: int) -> None:
        """Trains for some steps, and returns when the last is done."""
        replayed = self.replayed
        for _ in range(steps):
            batch, upcoming, after = (self._batches[(replayed.step + i) % len(self._batches)] for i in range(3))
            replayed.start(batch, self.window, upcoming)
            replayed.stage(upcoming, after)
            self._check(ahead=replayed.steps_ahead)
        self._check(ahead=0)
        jax.block_until_ready(replayed.state)

    def _check(self, *, ahead: int) -> None:
        for checked in self.replayed.checked(ahead=ahead):
            if checked.fault:
                raise RuntimeError(f"step {checked.step} has fault {checked.fault}, so its time means nothing")
