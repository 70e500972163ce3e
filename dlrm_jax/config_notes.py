"""What a config says in vain: settings that contradict nothing, and have no effect beside the others."""

import dataclasses
from collections.abc import Iterator, Mapping

from dlrm_jax.config import Config, DenseOptimizerConfig, TableConfig
from dlrm_jax.model import ModelConfig

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
_NOT_CROSS = {"cross_layers", "cross_rank"}
_UNREAD_MODEL = {"dot": _NOT_CROSS, "cat": _NOT_CROSS}


def without_effect(config: Config) -> Iterator[str]:
    """One line for each setting that is not its default and has no effect.

    Args:
        config: The experiment.

    Yields:
        Lines that name the setting, and why.
    """
    train, tables = config.train, config.embedding.tables
    if train.early_stop is not None and train.eval_split is None:
        yield f"train.early_stop {train.early_stop} has no effect: train.eval_split is None, so nothing is evaluated"
    yield from _unread("dense_optimizer", config.dense_optimizer, "name", _UNREAD_DENSE)
    yield from _unread("model", config.model, "interaction", _UNREAD_MODEL)
    for where, table in {
        "embedding.default": config.embedding.default,
        **{f"embedding.tables.{name}": table for name, table in tables.items()},
    }.items():
        yield from _unread(where, table, "optimizer", _UNREAD_ROWS)
        if table.rounding == "stochastic" and table.dtype == "float32":
            yield f"{where}.rounding stochastic has no effect: float32 tables are not rounded"


def _unread(
    where: str,
    settings: DenseOptimizerConfig | ModelConfig | TableConfig,
    choice: str,
    unread: Mapping[str, set[str]],
) -> Iterator[str]:
    """Of settings that a choice among rules leaves unread, those that are not their defaults."""
    chosen = getattr(settings, choice)
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        if field.name in unread.get(chosen, ()) and value != field.default:
            yield f"{where}.{field.name} {value} has no effect: {where}.{choice} is {chosen}"
