"""evaluate: exact metrics of a whole split."""

from collections.abc import Callable, Iterable

import numpy as np
from flax import nnx

from dlrm_jax.data.batch import Batch
from dlrm_jax.metrics import ExactMetrics, Metrics
from dlrm_jax.recommender import Recommender
from dlrm_jax.train_step import PredictStep
from sharding import InputError, TableState


class DivergedError(InputError):
    """A prediction is not a finite number."""


def evaluate(
    recommender: Recommender,
    predict_step: PredictStep,
    dense_params: nnx.State,
    tables: TableState,
    batches: Iterable[Batch],
    *,
    advance: Callable[[], None] = lambda: None,
) -> Metrics:
    """Predicts every sample and computes the metrics of all.

    Args:
        recommender: The model.
        predict_step: Its compiled prediction.
        dense_params: Parameters of the dense part.
        tables: The tables.
        batches: Batches as numpy arrays; samples of weight 0 do not count.
        advance: Called after each batch.

    Returns:
        The metrics.

    Raises:
        DivergedError: A prediction is not a finite number.
    """
    metrics = ExactMetrics()
    waiting = None
    for batch in batches:
        # Logits of the batch before are fetched while this one computes.
        logits = predict_step(dense_params, tables, recommender.to_devices(batch))
        if waiting is not None:
            _add(metrics, *waiting)
        waiting = (logits, batch)
        advance()
    if waiting is not None:
        _add(metrics, *waiting)
    return metrics.compute()


def _add(metrics: ExactMetrics, logits: object, batch: Batch) -> None:
    values = np.asarray(logits)
    counted = batch.weight > 0
    if not np.isfinite(values[counted]).all():
        sample = int(np.flatnonzero(counted & ~np.isfinite(values))[0])
        raise DivergedError(
            f"the prediction for sample {sample} of a batch is {values[sample]}, so the parameters have diverged: "
            "lower the learning rates, or go back to an earlier checkpoint"
        )
    metrics.update(values, batch.label, batch.weight)
