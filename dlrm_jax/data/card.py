"""The dataset card: one JSON file that says what the columns of a dataset mean. Described for users in docs/data.md."""

import dataclasses
import json
import math
import os
import typing
from pathlib import Path
from typing import Any

from sharding.errors import InputError
from sharding.tables import MAX_ROWS
from sharding.whole_file import write_whole

CARD_FILE = "card.json"
FORMAT = "dlrm_jax.dataset"
VERSION = 1
# The smallest and the largest float32 above 0: features are normalised in float32.
_MIN_FLOAT32 = 2.0**-149
_MAX_FLOAT32 = 2.0**128 - 2.0**104


@dataclasses.dataclass(frozen=True, kw_only=True)
class DenseColumn:
    """A dense feature. The model is given ``(x - mean) / std``.

    Attributes:
        name: Column of floats in the Parquet files.
        mean: Subtracted from the column; finite, also as float32.
        std: The column is divided by it; above 0 and finite, also as float32.
    """

    name: str
    mean: float = 0.0
    std: float = 1.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Frequencies:
    """How often ids occur in the training split, in brief: what a planner needs of a skewed distribution.

    Attributes:
        total: Occurrences of all ids.
        distinct: Ids that occur at least once.
        top: The most frequent ids, each with its count, most frequent first (at most 64).
        coverage: Pairs (k, share): the share of all occurrences that the k most frequent ids make up, for k = 1, 10,
            100, ... up to ``distinct``.
    """

    total: int
    distinct: int
    top: tuple[tuple[int, int], ...] = ()
    coverage: tuple[tuple[int, float], ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class SparseColumn:
    """A sparse feature.

    Attributes:
        name: Column in the Parquet files: of integers, or of lists of integers for a bag.
        num_rows: Ids lie in [0, num_rows).
        bag: Whether the column holds lists. A missing value (null) is an empty bag either way.
        max_pooling_factor: Largest number of ids in one bag.
        mean_pooling_factor: Mean number of ids in a bag, over the training split.
        weights: Column of lists of floats, one weight for each id of the bag; None for an unweighted feature.
        vocabulary: Parquet file, relative to the dataset, with columns ``id``, ``value`` and ``count``; None if ids
            were not made from a vocabulary.
        vocabulary_digest: What `data.vocabulary_digest` says of it; None where nobody took it.
        frequencies: How often ids occur; None if nobody counted.
    """

    name: str
    num_rows: int
    bag: bool = False
    max_pooling_factor: int = 1
    mean_pooling_factor: float = 1.0
    weights: str | None = None
    vocabulary: str | None = None
    vocabulary_digest: str | None = None
    frequencies: Frequencies | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class SplitSummary:
    """Size of one split.

    Attributes:
        num_samples: Rows in all of the split's files.
        positive_rate: Mean label.
    """

    num_samples: int
    positive_rate: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class DatasetCard:
    """What the columns of a dataset mean.

    Attributes:
        name: Name of the dataset.
        label: Column of labels in [0, 1].
        sample_weight: Column of sample weights of at least 0, or None where every sample counts once.
        dense: Dense features.
        sparse: Sparse features.
        splits: Splits by name, each a folder of Parquet files.
        attainable: Figures of the model that generated the data (``auc``, ``ne``, ``log_loss`` of the split that
            the key names), where they are known: ``{"test": {"auc": 0.8, ...}}``.
        source: How the dataset was made; for people, never interpreted.
    """

    name: str
    label: str = "label"
    sample_weight: str | None = None
    dense: tuple[DenseColumn, ...] = ()
    sparse: tuple[SparseColumn, ...] = ()
    splits: dict[str, SplitSummary]
    attainable: dict[str, dict[str, float]] = dataclasses.field(default_factory=dict)
    source: dict[str, Any] = dataclasses.field(default_factory=dict)

    def feature(self, name: str) -> SparseColumn:
        """Returns the sparse feature of that name.

        Raises:
            InputError: There is none; the message lists those there are.
        """
        for column in self.sparse:
            if column.name == name:
                return column
        raise InputError(
            f"dataset {self.name!r} has no sparse feature {name!r}; it has {[c.name for c in self.sparse]}"
        )


def write_card(card: DatasetCard, directory: str | os.PathLike[str]) -> None:
    """Writes the card into a dataset's folder, replacing an older one in one step."""
    body = {"format": FORMAT, "version": VERSION, **dataclasses.asdict(card)}
    write_whole(Path(directory, CARD_FILE), json.dumps(body, indent=1) + "\n")


def read_card(directory: str | os.PathLike[str]) -> DatasetCard:
    """Reads the card of a dataset.

    Args:
        directory: Folder of the dataset.

    Returns:
        The card.

    Raises:
        InputError: No such folder or card, not JSON, another format, or a field that is missing, unknown, of a
            wrong type or out of its limits; the message names file and field.
    """
    path = Path(directory, CARD_FILE)
    if not path.is_file():
        raise InputError(
            f"{path}: no dataset card there; make the dataset with scripts/prepare.py, or see docs/data.md"
        )
    try:
        # Bytes, since JSON is UTF-8 whatever the locale says.
        body = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read as JSON ({error}); repair it or prepare the dataset again") from error
    if not isinstance(body, dict) or body.pop("format", None) != FORMAT:
        raise InputError(f'{path}: not a dataset card; its "format" must be {FORMAT!r}')
    version = body.pop("version", None)
    if version != VERSION:
        raise InputError(f"{path}: version {version!r} of the format, but this program reads version {VERSION}")
    card = _decode(DatasetCard, body, str(path))
    _check_limits(card, str(path))
    return card


_NESTED: dict[tuple[type, str], type] = {
    (DatasetCard, "dense"): DenseColumn,
    (DatasetCard, "sparse"): SparseColumn,
    (DatasetCard, "splits"): SplitSummary,
    (SparseColumn, "frequencies"): Frequencies,
}
_SCALARS: dict[str, tuple[type, ...]] = {"str": (str,), "int": (int,), "float": (int, float), "bool": (bool,)}


def _decode(kind: type, body: object, where: str) -> Any:
    """Builds a dataclass of this file from decoded JSON, checking names and types of its fields."""
    if not isinstance(body, dict):
        raise InputError(f"{where}: {body!r} stands where an object with the fields of {kind.__name__} belongs")
    fields = {field.name: field for field in dataclasses.fields(kind)}
    unknown = sorted(set(body) - set(fields))
    if unknown:
        raise InputError(f"{where}: unknown field {unknown[0]!r}; the fields are {sorted(fields)}")
    values: dict[str, Any] = {}
    for name, field in fields.items():
        if name not in body:
            if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
                raise InputError(f"{where}: field {name!r} is missing; docs/data.md says what it means")
            continue
        values[name] = _decode_field(kind, field, body[name], f"{where}: {name}")
    return kind(**values)


def _decode_field(kind: type, field: dataclasses.Field[Any], value: object, where: str) -> Any:
    annotation = str(field.type.__name__ if isinstance(field.type, type) else field.type)
    if value is None:
        if "None" not in annotation:
            raise InputError(f"{where} is null, but must be {annotation}")
        return None
    nested = _NESTED.get((kind, field.name))
    if annotation.startswith("tuple"):
        if not isinstance(value, list):
            raise InputError(f"{where} is {value!r}, but must be a list")
        if nested:
            return tuple(_decode(nested, item, f"{where}[{i}]") for i, item in enumerate(value))
        first, second = (kind.__name__ for kind in typing.get_args(typing.get_args(field.type)[0]))
        for item in value:
            if not (isinstance(item, list) and len(item) == 2 and _is_a(item[0], first) and _is_a(item[1], second)):
                raise InputError(f"{where} holds {item!r}, but must be a list of pairs of {first} and {second}")
        return tuple(tuple(item) for item in value)
    if annotation.startswith("dict"):
        if not isinstance(value, dict):
            raise InputError(f"{where} is {value!r}, but must be an object")
        if field.type == dict[str, dict[str, float]]:
            _check_figures(value, where)
        return {k: _decode(nested, v, f"{where}.{k}") for k, v in value.items()} if nested else value
    if nested:
        return _decode(nested, value, where)
    if not _is_a(value, annotation.removesuffix(" | None")):
        raise InputError(f"{where} is {value!r}, but must be {annotation}")
    return value


def _is_a(value: object, scalar: str) -> bool:
    expected = _SCALARS[scalar]
    return isinstance(value, expected) and (bool in expected or not isinstance(value, bool))


def _check_figures(value: dict[str, Any], where: str) -> None:
    for split, figures in value.items():
        if not (isinstance(figures, dict) and all(_is_a(figure, "float") for figure in figures.values())):
            raise InputError(f"{where}.{split} is {figures!r}, but must be an object of numbers")


def _check_limits(card: DatasetCard, where: str) -> None:
    if not card.splits:
        raise InputError(f'{where}: "splits" is empty; name at least one split, such as "train"')
    names = [column.name for column in (*card.dense, *card.sparse)]
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise InputError(f"{where}: feature {repeated[0]!r} is declared twice; names must differ")
    _check_label(card, names, where)
    for column in card.dense:
        _check_dense(column, where)
    for column in card.sparse:
        if not 1 <= column.num_rows <= MAX_ROWS:
            raise InputError(
                f"{where}: sparse feature {column.name!r} has num_rows {column.num_rows}; the limit is 1 to {MAX_ROWS}"
            )
        if column.max_pooling_factor < 1 or (not column.bag and column.max_pooling_factor != 1):
            limit = "at least 1" if column.bag else 'exactly 1 where "bag" is false'
            raise InputError(
                f"{where}: sparse feature {column.name!r} has max_pooling_factor {column.max_pooling_factor}; {limit}"
            )
        if not 0 <= column.mean_pooling_factor < math.inf:
            raise InputError(
                f"{where}: sparse feature {column.name!r} has mean_pooling_factor {column.mean_pooling_factor}, but it "
                "must be at least 0 and finite"
            )
        if column.weights is not None and not column.bag:
            raise InputError(f'{where}: sparse feature {column.name!r} has weights, so its "bag" must be true')


def _check_label(card: DatasetCard, features: list[str], where: str) -> None:
    """Refuses a feature that is also what is predicted, or how much it counts."""
    if card.sample_weight == card.label:
        raise InputError(
            f'{where}: "sample_weight" is {card.label!r}, which is the label; name another column, or set null'
        )
    for what, name in (("label", card.label), ("sample_weight", card.sample_weight)):
        if name in features:
            raise InputError(f'{where}: feature {name!r} is also the column of "{what}"; take it off the features')


def _check_dense(column: DenseColumn, where: str) -> None:
    if not _MIN_FLOAT32 <= column.std <= _MAX_FLOAT32:
        raise InputError(
            f"{where}: dense feature {column.name!r} has std {column.std}, but it must be above 0 and at most "
            f"{_MAX_FLOAT32:.7g}, also as float32"
        )
    if not -_MAX_FLOAT32 <= column.mean <= _MAX_FLOAT32:
        raise InputError(
            f"{where}: dense feature {column.name!r} has mean {column.mean}, but it must be finite, also as float32"
        )
