"""Cards: which datasets a model takes, and what the error says of the others."""

import dataclasses
from pathlib import Path

import pytest
import tiny

from dlrm_jax.data.card import DenseColumn, SparseColumn, SplitSummary, write_card
from dlrm_jax.recommender import Recommender
from dlrm_jax.sources import Source, card_of, open_split
from sharding import InputError

CARD = tiny.card()
CARD = tiny.card(sparse=(*CARD.sparse[:2], dataclasses.replace(CARD.sparse[2], vocabulary_digest="11")))
AGE, PRICE = CARD.dense
USER, ITEM, TAGS = CARD.sparse


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Recommender:
    folder = tmp_path_factory.mktemp("tiny")
    config = tiny.config(tiny.write_dataset(folder / "data", sparse=CARD.sparse), folder / "run")
    return Recommender(config, card_of(config))


def open_with(model: Recommender, folder: Path, **changes) -> Source:
    """Opens the test split of the model's dataset, whose card now has other fields."""
    (folder / "test").symlink_to(Path(str(model.config.data.path), "test"))
    write_card(tiny.card(**changes), folder)
    return open_split(model, "test", training=False, path=str(folder))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"label": "weight"}, "label is 'weight', but the model was trained with 'label'"),
        ({"sample_weight": "weight"}, "sample_weight is 'weight', but the model was trained with None"),
        ({"dense": (PRICE, AGE)}, "dense[0] is 'price', but the model was trained with 'age'"),
        ({"dense": (AGE,)}, "dense[1] is not there, but the model was trained with 'price'"),
        ({"dense": (AGE, PRICE, DenseColumn(name="weight"))}, "dense[2] is 'weight', but the model was trained with n"),
        ({"dense": (AGE, DenseColumn(name="price", mean=0.5))}, "dense.price.std is 1.0, but the model was trained wi"),
        (
            {"sparse": (SparseColumn(name="user", num_rows=39), ITEM, TAGS)},
            "sparse.user.num_rows is 39, but the model was trained with 40: give a dataset that was prepared as",
        ),
        (
            {"sparse": (dataclasses.replace(USER, vocabulary="user.parquet"), ITEM, TAGS)},
            "sparse.user.vocabulary is 'user.parquet', but the model was trained with None",
        ),
        (
            {"sparse": (USER, ITEM, dataclasses.replace(TAGS, vocabulary_digest="22"))},
            "sparse.tags.vocabulary_digest is '22', but the model was trained with '11': give a dataset that was prep",
        ),
        (
            {"sparse": (USER, ITEM, dataclasses.replace(TAGS, max_pooling_factor=31))},
            "sparse.tags.max_pooling_factor is 31, but the model was trained with 30 and takes no longer bags",
        ),
    ],
)
def test_split_when_its_card_means_something_else_to_the_model_then_the_error_names_the_first_field(
    model, tmp_path, changes, message
):
    with pytest.raises(InputError) as error:
        open_with(model, tmp_path, **changes)
    assert str(error.value).startswith(f"{tmp_path}/card.json: {message}")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "changes",
    [
        {"name": "other", "source": {"by": "hand"}, "attainable": {"test": {"auc": 0.9}}},
        {"splits": {"test": SplitSummary(num_samples=tiny.NUM_SAMPLES["test"], positive_rate=0.1)}},
        {"sparse": (TAGS, SparseColumn(name="other", num_rows=3), USER, ITEM)},
        {"sparse": (USER, ITEM, dataclasses.replace(TAGS, mean_pooling_factor=9.0))},
        # Of an earlier version, which took no digests; and of a later one than the model's.
        {"sparse": (USER, ITEM, dataclasses.replace(TAGS, vocabulary_digest=None))},
        {"sparse": (dataclasses.replace(USER, vocabulary_digest="22"), ITEM, TAGS)},
    ],
)
def test_split_when_its_card_describes_other_samples_alone_then_it_is_opened(model, tmp_path, changes):
    assert open_with(model, tmp_path, **changes).num_samples == tiny.NUM_SAMPLES["test"]
