"""What a config says in vain: settings that contradict nothing, and have no effect beside the others."""

import dataclasses
from collections.abc import Collection, Iterator, Mapping

from dlrm_jax.config import Config, DataConfig, DenseOptimizerConfig, ExchangeConfig, TableConfig, TrainConfig
from dlrm_jax.model import ModelConfig
from dlrm_jax.schedules import decayed_to_nothing

_MOMENTS = {"beta1", "beta2"}
# Settings that a rule does not read.
_UNREAD_DENSE = {
    "sgd": _MOMENTS | {"eps"},
    "adagrad": _MOMENTS | {"momentum"},
    "adam": {"momentum"},
    "adamw": {"momentum"},
    "lamb": {"momentum"},
}
_UNREAD_ROWS = {"sgd": _MOMENTS | {"eps"}, "adagrad": _MOMENTS, "rowwise_adagrad": _MOMENTS}
# What a frozen table does not read: it is never updated.
_OF_UPDATES = _MOMENTS | {"optimizer", "learning_rate", "weight_decay", "eps", "rounding"}
_NOT_CROSS = {"cross_layers", "cross_rank"}
_UNREAD_MODEL = {"dot": _NOT_CROSS, "cat": _NOT_CROSS}
# Not data.eval_batch_size, which scripts/eval.py reads, too.
_OF_EVALUATION = {"eval_every", "early_stop", "best_by"}
_OF_LOADER = {"shuffle_window", "prefetch", "threads"}
_OF_EXCHANGE = {"forward", "backward", "all_reduce"}

Settings = DataConfig | DenseOptimizerConfig | ExchangeConfig | ModelConfig | TableConfig | TrainConfig


def without_effect(config: Config, num_devices: int | None = None) -> Iterator[str]:
    """One line for each setting that is not its default and has no effect.

    Args:
        config: The experiment.
        num_devices: Devices; those that the config says unless given.

    Yields:
        Lines that name the setting, and why.
    """
    data, train, tables = config.data, config.train, config.embedding.tables
    if data.path is None and config.stated is not None:
        yield from _in_vain("data", data, _OF_LOADER, "data.path is None, so batches are random")
    if train.eval_split is None:
        yield from _in_vain("train", train, _OF_EVALUATION, "train.eval_split is None, so nothing is evaluated")
    if (num_devices or config.mesh.num_devices) == 1:
        yield from _in_vain("exchange", config.exchange, _OF_EXCHANGE, "one device sends nothing")
        yield from _in_vain("train", train, {"order_by"}, "one device sends nothing")
    yield from _unread("dense_optimizer", config.dense_optimizer, "name", _UNREAD_DENSE)
    yield from _unread("model", config.model, "interaction", _UNREAD_MODEL)
    for where, table in {
        "embedding.default": config.embedding.default,
        **{f"embedding.tables.{name}": table for name, table in tables.items()},
    }.items():
        if table.initial_values is not None:
            yield from _in_vain(where, table, {"initializer"}, "rows begin with initial_values")
        if table.frozen:
            yield from _in_vain(where, table, _OF_UPDATES, "the table is frozen")
            continue
        yield from _unread(where, table, "optimizer", _UNREAD_ROWS)
        if table.rounding == "stochastic" and table.dtype == "float32":
            yield f"{where}.rounding stochastic has no effect: float32 tables are not rounded"


def steps_in_vain(config: Config, *, step: int, last_step: int) -> Iterator[str]:
    """Says what is asked of steps that are done already, or that learn nothing.

    Args:
        config: The experiment.
        step: Step that the run is at.
        last_step: The last that is asked for.

    Yields:
        Lines that say what, and why.
    """
    if step > last_step:
        yield f"the run is at step {step:,}, beyond the last that is asked for, {last_step:,}"
    if config.train.profile is not None and step >= last_step:
        yield "train.profile has no effect: no step is left to trace"
    decayed = decayed_to_nothing(config.schedule)
    if decayed is not None and decayed < last_step:
        yield f"learning rates have decayed to nothing at step {decayed:,} of {last_step:,}: see schedule.decay_steps"


def _unread(where: str, settings: Settings, choice: str, unread: Mapping[str, set[str]]) -> Iterator[str]:
    """Of settings that a choice among rules leaves unread, those that are not their defaults."""
    chosen = getattr(settings, choice)
    yield from _in_vain(where, settings, unread.get(chosen, ()), f"{where}.{choice} is {chosen}")


def _in_vain(where: str, settings: Settings, unread: Collection[str], reason: str) -> Iterator[str]:
    """Of settings that nothing reads, those that are not their defaults."""
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        if field.name in unread and value != field.default:
            yield f"{where}.{field.name} {value} has no effect: {reason}"
