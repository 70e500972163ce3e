"""What of a dataset's card a model depends on, and what a run that is resumed: cards are compared here alone."""

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dlrm_jax.data.card import CARD_FILE, DatasetCard
from sharding.errors import InputError

# Fields of a column that say what its values stand for. The others describe the samples at hand.
_MEANING = ("mean", "std", "num_rows", "bag", "weights", "vocabulary", "vocabulary_digest")


def model_inputs(card: DatasetCard) -> dict[str, Any]:
    """What of a card a model depends on: which columns it is given, in which order, and what their values stand for.

    Args:
        card: The card, with the sparse features in use, in the model's order.

    Returns:
        Values of the card by dotted name; ``dense[2]`` is the name of the third dense feature.
    """
    inputs: dict[str, Any] = {"label": card.label, "sample_weight": card.sample_weight}
    for kind, columns in (("dense", card.dense), ("sparse", card.sparse)):
        inputs |= {f"{kind}[{place}]": column.name for place, column in enumerate(columns)}
        for column in columns:
            fields = dataclasses.asdict(column)
            inputs |= {f"{kind}.{column.name}.{field}": fields[field] for field in _MEANING if field in fields}
    return inputs


def card_identity(card: DatasetCard) -> dict[str, Any]:
    """What of a card must not change when a run is resumed: everything that says what the samples are.

    Args:
        card: The card, with the sparse features in use, in the model's order.

    Returns:
        `model_inputs`, and what describes the samples.
    """
    identity = {"name": card.name} | model_inputs(card)
    for column in card.sparse:
        fields = {field: value for field, value in dataclasses.asdict(column).items() if field != "name"}
        identity |= {f"sparse.{column.name}.{field}": value for field, value in fields.items()}
    return identity | {f"splits.{name}": dataclasses.asdict(summary) for name, summary in card.splits.items()}


def differing(was: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Fields of two cards that differ. A digest that one lacks, as cards of earlier versions do, does not.

    Args:
        was: What of a card is compared, by dotted name.
        now: The same of the other.
    """
    return [
        field
        for field in dict.fromkeys([*was, *now])
        if was.get(field) != now.get(field)
        and not (field.endswith(".vocabulary_digest") and None in (was.get(field), now.get(field)))
    ]


def check_model_inputs(card: DatasetCard, trained: DatasetCard, directory: str | os.PathLike[str]) -> None:
    """Makes sure that the samples of a dataset mean to a model what those of its training did.

    Args:
        card: The dataset's card, with the sparse features in use, in the model's order.
        trained: The card that the model was trained with, likewise.
        directory: Folder of the dataset, for the message.

    Raises:
        InputError: What the model depends on differs, or bags may be longer; the message names the first such field.
    """
    path = Path(directory, CARD_FILE)
    was, now = model_inputs(trained), model_inputs(card)
    for field in differing(was, now):
        raise InputError(
            f"{path}: {field} is {_shown(now, field)}, but the model was trained with {_shown(was, field)}: give a "
            "dataset that was prepared as that of the training was, or train again on this one"
        )
    for column, known in zip(card.sparse, trained.sparse, strict=True):
        if column.max_pooling_factor > known.max_pooling_factor:
            raise InputError(
                f"{path}: sparse.{column.name}.max_pooling_factor is {column.max_pooling_factor}, but the model was "
                f"trained with {known.max_pooling_factor} and takes no longer bags: shorten the bags, or train again "
                "on this dataset"
            )


def _shown(values: dict[str, Any], field: str) -> str:
    return repr(values[field]) if field in values else "not there"
