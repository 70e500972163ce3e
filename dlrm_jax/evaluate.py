"""evaluate: exact metrics of a whole split."""

from collections.abc import Callable

import numpy as np
from flax import nnx

from dlrm_jax.metrics import ExactMetrics, Metrics
from dlrm_jax.predictions import Predicted, Predictions
from dlrm_jax.sources import Source
from sharding import InputError, TableState


class DivergedError(InputError):
    """A prediction is not a finite number."""


def evaluate(
    predictions: Predictions,
    dense_params: nnx.State,
    tables: TableState,
    source: Source,
    *,
    advance: Callable[[], None] = lambda: None,
) -> Metrics:
    """Predicts every sample and computes the metrics of all, on every process the same.

    Args:
        predictions: Predictions of the model.
        dense_params: Parameters of the dense part.
        tables: The tables.
        source: The split; samples of weight 0 do not count.
        advance: Called after each batch.

    Returns:
        The metrics.

    Raises:
        DivergedError: A prediction is not a finite number.
    """
    metrics = ExactMetrics()
    waiting = None
    ids_capacity = source.capacity
    for batch in source.batches(0):
        # Logits of the batch before are fetched while this one computes.
        started = predictions.start(dense_params, tables, batch, ids_capacity=ids_capacity)
        if waiting is not None:
            _add(metrics, predictions.finish(waiting))
        waiting = started
        advance()
    if waiting is not None:
        _add(metrics, predictions.finish(waiting))
    return metrics.compute()


def _add(metrics: ExactMetrics, predicted: Predicted) -> None:
    counted = predicted.weight > 0
    if not np.isfinite(predicted.logits[counted]).all():
        sample = int(np.flatnonzero(counted & ~np.isfinite(predicted.logits))[0])
        raise DivergedError(
            f"the prediction for sample {sample} of a batch is {predicted.logits[sample]}, so the parameters have "
            "diverged: lower the learning rates, or go back to an earlier checkpoint"
        )
    metrics.update(predicted.logits, predicted.label, predicted.weight)
