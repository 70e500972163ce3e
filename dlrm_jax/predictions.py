"""Predictions: logits of batches, whatever room their ids need."""

import dataclasses
from typing import Any

import numpy as np
from flax import nnx
from jaxtyping import Float

from dlrm_jax.data.batch import Batch
from dlrm_jax.recommender import Recommender
from dlrm_jax.train_step import Prediction, PredictStep, make_predict_step
from sharding import TableState
from sharding.capacities import Capacities


@dataclasses.dataclass(frozen=True, kw_only=True)
class Started:
    """A batch whose prediction is under way."""

    dense_params: nnx.State
    tables: TableState
    batch: Batch
    prediction: Prediction


@dataclasses.dataclass(frozen=True, kw_only=True)
class Predicted:
    """Predictions for a batch, on the host: for the samples of all processes, in their order."""

    logits: Float[np.ndarray, " B"]
    label: Float[np.ndarray, " B"]
    weight: Float[np.ndarray, " B"]


class Predictions:
    """Runs the compiled prediction, and again with more room where the ids of a batch had not enough."""

    def __init__(self, recommender: Recommender):
        """Compiles nothing yet.

        Args:
            recommender: The model.
        """
        self._recommender = recommender
        self._step: PredictStep = make_predict_step(recommender)
        # By samples of a batch. All processes see the same needs, so they grow alike.
        self._capacities: dict[int, Capacities] = {}

    def start(
        self, dense_params: nnx.State, tables: TableState, batch: Batch, *, ids_capacity: int | None = None
    ) -> Started:
        """Starts a prediction; returns at once.

        Args:
            dense_params: Parameters of the dense part.
            tables: The tables.
            batch: This process's part of the batch, as numpy arrays.
            ids_capacity: Room for ids of ordinary batches of this size, the same on all processes; what the batch has
                unless given.

        Returns:
            What `finish` takes.
        """
        size = len(batch.label)
        if size not in self._capacities:
            room = batch.ids.capacity if ids_capacity is None else ids_capacity
            self._capacities[size] = self._recommender.first_capacities(size, room)
        return Started(
            dense_params=dense_params,
            tables=tables,
            batch=batch,
            prediction=self._predict(dense_params, tables, batch),
        )

    def finish(self, started: Started) -> Predicted:
        """Waits for a prediction.

        Args:
            started: What `start` returned.

        Returns:
            The predictions.
        """
        prediction = started.prediction
        while bool(prediction.overflow):
            size = len(started.batch.label)
            self._capacities[size] = self._recommender.grown_capacities(self._capacities[size], [prediction.needs])
            prediction = self._predict(started.dense_params, started.tables, started.batch)
        return Predicted(
            logits=np.asarray(prediction.logits),
            label=np.asarray(prediction.label),
            weight=np.asarray(prediction.weight),
        )

    def _predict(self, dense_params: nnx.State, tables: TableState, batch: Batch) -> Any:
        capacities = self._capacities[len(batch.label)]
        return self._step(dense_params, tables, self._recommender.to_devices(batch, capacities), capacities=capacities)
