"""Predictor: a trained model, ready to predict.

Letters: n rows of a table, B samples of a batch.
"""

import dataclasses
import itertools
import operator
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
import pyarrow as pa
from jaxtyping import Float, Int

from dlrm_jax.checkpoint import Checkpointer, RemovedError
from dlrm_jax.config import Config, MeshConfig
from dlrm_jax.data.assemble import one_batch
from dlrm_jax.data.batch import Batch
from dlrm_jax.data.row_groups import columns_of
from dlrm_jax.data.validate import validate_schema
from dlrm_jax.data.writer import dataset_schema
from dlrm_jax.evaluate import evaluate
from dlrm_jax.metrics import Metrics
from dlrm_jax.predictions import Predictions
from dlrm_jax.recommender import Recommender
from dlrm_jax.sources import open_split
from dlrm_jax.train_state import TrainState, abstract_train_state, make_dense_optimizer
from dlrm_jax.workdir import Workdir
from pallas_kernels.implementations import Implementation
from sharding import InputError
from sharding.jagged import check_arrays, ids_of_values


class Predictor:
    """The model of a run, restored from one of its checkpoints.

        predictor = Predictor("runs/kuairand")
        clicks = predictor.predict(polars_or_pyarrow_table)

    Attributes:
        recommender: The model.
        state: Its parameters.
        step: Step of the checkpoint.
    """

    def __init__(
        self,
        workdir: str | os.PathLike[str],
        *,
        checkpoint: int | Literal["best", "latest"] = "best",
        mesh: MeshConfig | None = None,
        plan: str | None = None,
        kernels: Implementation | None = None,
    ):
        """Restores a checkpoint.

        Args:
            workdir: Folder of the run.
            checkpoint: Which one: the best evaluated (the latest, if none was evaluated), the latest, or by its step.
            mesh: Devices; one unless given, wherever it was trained.
            plan: File of a sharding plan; the planner's on several devices unless given.
            kernels: Implementation of lookups; the best for the devices unless given.

        Raises:
            InputError: The folder is not that of a run, or has no such checkpoint.
        """
        self._workdir = Workdir(Path(workdir))
        config, card = self._workdir.read()
        config = _on_mesh(dataclasses.replace(config, mesh=mesh or MeshConfig(), plan=plan, kernels=kernels))
        self.recommender = Recommender(config, card)
        self.step, self.state = _restore(self._workdir.path, self.recommender, checkpoint)
        self._predictions = Predictions(self.recommender)

    def predict(self, samples: Batch | Mapping[str, Sequence[Any]] | Any) -> Float[np.ndarray, " B"]:
        """Predicts the probability of the label.

        Args:
            samples: A batch; or rows with the columns of the dataset: a pyarrow Table or RecordBatch, a polars or
                pandas DataFrame, or a dictionary of lists. Labels and sample weights are not needed, and not looked at.

        Returns:
            One probability for each sample, in their order.

        Raises:
            InputError: A column is missing, of a wrong type, or holds what the dataset card does not allow.
        """
        if isinstance(samples, Batch):
            _check_batch(samples, self.recommender)
            batch, num_samples = samples, len(samples.label)
        else:
            table = _to_table(samples)
            batch, num_samples = self.batch(self._without_judgement(table)), table.num_rows
        started = self._predictions.start(self.state.dense_params, self.state.tables, batch)
        return np.asarray(jax.nn.sigmoid(self._predictions.finish(started).logits))[:num_samples]

    def _without_judgement(self, table: pa.Table) -> pa.Table:
        """The rows without labels, which may not be known yet, and weights: a sample of weight 0 would have no ids."""
        card = self.recommender.card
        judging = (card.label, card.sample_weight)
        return table.select([place for place, name in enumerate(table.column_names) if name not in judging])

    def batch(self, table: pa.Table) -> Batch:
        """Makes a batch of rows, padded so that few sizes are ever compiled: on each device to the next power of two.

        Args:
            table: Rows with the columns of the dataset; without a column of labels (or sample weights) these are 0 (1).

        Returns:
            The batch.

        Raises:
            InputError: As in `predict`.
        """
        card = self.recommender.card
        if card.label not in table.column_names:
            table = table.append_column(card.label, pa.array(np.zeros(table.num_rows, np.float32)))
        if card.sample_weight is not None and card.sample_weight not in table.column_names:
            table = table.append_column(card.sample_weight, pa.array(np.ones(table.num_rows, np.float32)))
        table = _without_null_types(table, dataset_schema(card))
        validate_schema(table.schema, card, "samples", trained=True)
        rows = columns_of(table, card, "samples", trained=True)
        devices = self.recommender.tables.num_devices
        samples = -(-table.num_rows // devices)
        return one_batch(rows, card, devices * (1 << max(samples - 1, 0).bit_length()))

    def evaluate(
        self, split: str, *, path: str | None = None, progress: Callable[[int, int], None] = lambda done, total: None
    ) -> Metrics:
        """Computes the metrics of a whole split.

        Args:
            split: Name of the split.
            path: Folder of the dataset; where the run was trained unless given.
            progress: Called after each batch with the number of samples that have been read, and of all.

        Returns:
            The metrics of all its samples.

        Raises:
            InputError: The split cannot be read, or its samples mean something else than those of the training.
        """
        source = open_split(self.recommender, split, training=False, path=path)
        batch_size = self.recommender.config.data.eval_batch_size
        ends = itertools.count(batch_size, batch_size)
        return evaluate(
            self._predictions,
            self.state.dense_params,
            self.state.tables,
            source,
            advance=lambda: progress(min(next(ends), source.num_samples), source.num_samples),
        )


def _on_mesh(config: Config) -> Config:
    """The config with batches that the mesh divides, which need not be that of the training."""
    data, devices = config.data, config.mesh.num_devices
    sizes = {name: data.next_batch_size(getattr(data, name), devices) for name in ("batch_size", "eval_batch_size")}
    return dataclasses.replace(config, data=dataclasses.replace(data, **sizes))


def _restore(
    path: Path, recommender: Recommender, checkpoint: int | Literal["best", "latest"]
) -> tuple[int, TrainState]:
    """The step and the state of a checkpoint. One that a training removes meanwhile gives way to the one after it."""
    config = recommender.config
    abstract = abstract_train_state(recommender, make_dense_optimizer(config.dense_optimizer, config.schedule))
    while True:
        try:
            with Checkpointer(path, recommender.tables, read_only=True) as checkpointer:
                step = _choose(checkpointer, checkpoint, path)
                return step, checkpointer.restore(step, abstract)
        except RemovedError:
            if checkpoint not in ("best", "latest"):
                raise


def _choose(checkpointer: Checkpointer, checkpoint: int | Literal["best", "latest"], path: Path) -> int:
    steps = checkpointer.steps()
    if not steps:
        raise InputError(f"{path}: has no complete checkpoint yet; train with scripts/train.py first")
    if checkpoint not in ("best", "latest"):
        try:
            return operator.index(checkpoint)
        except TypeError:
            raise InputError(
                f"checkpoint is {checkpoint!r}, but must be 'best', 'latest' or the step of one; there are {steps}"
            ) from None
    best = checkpointer.progress(steps[-1]).best_step if checkpoint == "best" else None
    if best is not None and best not in steps:
        raise InputError(
            f"{path}: the best evaluation was that of step {best}, whose checkpoint is gone; give 'latest' or the step "
            f"of another; there are {steps}"
        )
    return steps[-1] if best is None else best


def _to_table(samples: Mapping[str, Sequence[Any]] | Any) -> pa.Table:
    """Rows of whatever kind as a pyarrow table."""
    table, why = samples, ""
    try:
        if isinstance(samples, pa.RecordBatch):
            table = pa.Table.from_batches([samples])
        elif isinstance(samples, Mapping):
            table = pa.table(samples)
        elif hasattr(samples, "to_arrow"):
            table = samples.to_arrow()
        elif hasattr(samples, "iloc"):
            table = pa.Table.from_pandas(samples)
    except (pa.ArrowException, TypeError, AttributeError, OverflowError) as error:
        why = f" ({error})"
    if not isinstance(table, pa.Table):
        raise InputError(
            f"samples of type {type(samples).__name__} cannot be read{why}; give a polars or pandas DataFrame, a "
            "pyarrow Table, or a dictionary of lists"
        )
    return table


def _without_null_types(table: pa.Table, schema: pa.Schema) -> pa.Table:
    """Gives columns in which no value says what type they are, such as one of empty bags, the dataset's type."""
    for place, field in enumerate(table.schema):
        is_list = pa.types.is_list(field.type) or pa.types.is_large_list(field.type)
        kind = field.type.value_type if is_list else field.type
        if pa.types.is_null(kind) and field.name in schema.names:
            typed = table.column(place).cast(schema.field(field.name).type)
            table = table.set_column(place, field.name, typed)
    return table


def _check_batch(batch: Batch, recommender: Recommender) -> None:
    """Raises InputError if an id is outside its table, a bag too long, or a weight or a dense feature not finite."""
    ids = batch.ids
    check_arrays(ids)
    unusable = np.argwhere(~np.isfinite(batch.dense))
    if unusable.size:
        sample, number = unusable[0]
        name, value = recommender.card.dense[number].name, batch.dense[sample, number]
        raise InputError(f"sample {sample}: {name!r} is {value}, but dense features are finite: repair the value")
    ends = np.cumsum(ids.lengths.sum(axis=1))
    for name, last, lengths in zip(ids.features, ends, ids.lengths, strict=True):
        if name not in recommender.features:
            continue
        column = recommender.card.feature(name)
        num_rows = column.num_rows
        too_long = np.flatnonzero(lengths > column.max_pooling_factor)
        if too_long.size:
            sample = too_long[0]
            raise InputError(
                f"sample {sample}: feature {name!r} has {lengths[sample]} ids, but max_pooling_factor is "
                f"{column.max_pooling_factor}: shorten the bag"
            )
        own = slice(last - lengths.sum(), last)
        values = ids_of_values(ids.values[own])
        outside = np.flatnonzero((values < 0) | (values >= num_rows))
        if outside.size:
            sample = _sample_of(lengths, int(outside[0]))
            raise InputError(
                f"sample {sample}: feature {name!r} holds {values[outside[0]]}, but ids lie in [0, {num_rows}): "
                "repair the id"
            )
        weights = np.ones(0, np.float32) if ids.weights is None else ids.weights[own]
        unusable = np.flatnonzero(~np.isfinite(weights))
        if unusable.size:
            place = int(unusable[0])
            raise InputError(
                f"sample {_sample_of(lengths, place)}: feature {name!r} has the weight {weights[place]}, but weights "
                "are finite: repair the weight"
            )


def _sample_of(lengths: Int[np.ndarray, " B"], place: int) -> int:
    """The sample whose bag holds the id at that place, given the lengths of the bags of a feature."""
    return int(np.searchsorted(np.cumsum(lengths), place, side="right"))
