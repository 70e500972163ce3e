"""Dataset cards: what they may say, and where each field is explained."""

import dataclasses
import io
import json
import re

import pytest
from test_check import BAG, CARD, DOCS

from dlrm_jax.data.card import CARD_FILE, DatasetCard, DenseColumn, Frequencies, SparseColumn, read_card, write_card
from sharding.errors import InputError


@pytest.mark.parametrize(
    ("card", "message"),
    [
        ({"label": "price"}, "feature 'price' is also the column of \"label\"; take it off the features"),
        ({"label": "tags"}, "feature 'tags' is also the column of \"label\""),
        ({"sample_weight": "price"}, "feature 'price' is also the column of \"sample_weight\""),
        ({"sample_weight": "label"}, "\"sample_weight\" is 'label', which is the label; name another column, or"),
        ({"dense": (DenseColumn(name="price", std=float("inf")),)}, "'price' has std inf, but it must be above 0 and"),
        (
            {"dense": (DenseColumn(name="price", std=1e39),)},
            "has std 1e+39, but it must be above 0 and at most 3.40282",
        ),
        ({"dense": (DenseColumn(name="price", std=1e-46),)}, "'price' has std 1e-46, but it must be above 0 and"),
        ({"dense": (DenseColumn(name="price", std=float("nan")),)}, "'price' has std nan"),
        ({"dense": (DenseColumn(name="price", mean=-1e39),)}, "'price' has mean -1e+39, but it must be finite, also"),
        ({"dense": (DenseColumn(name="price", mean=float("nan")),)}, "'price' has mean nan, but it must be finite"),
        ({"dense": (DenseColumn(name="price", mean=-float("inf")),)}, "'price' has mean -inf"),
        ({"sparse": (SparseColumn(name="user", num_rows=2**63),)}, "num_rows 9223372036854775808; the limit is 1 to 9"),
        (
            {"sparse": (dataclasses.replace(BAG, mean_pooling_factor=float("nan")),)},
            "'tags' has mean_pooling_factor nan, but it must be at least 0 and finite",
        ),
        (
            {"sparse": (dataclasses.replace(BAG, frequencies=Frequencies(total=1, distinct=1, top=(("7", 1),))),)},
            "frequencies: top holds ['7', 1], but must be a list of pairs of int and int",
        ),
        ({"attainable": {"test": 0.8}}, "attainable.test is 0.8, but must be an object of numbers"),
    ],
)
def test_card_when_it_is_out_of_its_limits_then_one_line_names_the_field(tmp_path, card, message):
    write_card(dataclasses.replace(CARD, **card), tmp_path)
    with pytest.raises(InputError, match=re.escape(message)):
        read_card(tmp_path)


@pytest.mark.parametrize("begins_with", ["", "\ufeff"], ids=["plain", "byte order mark"])
def test_card_when_it_is_written_by_hand_then_it_is_utf_8_whatever_the_locale_says(tmp_path, monkeypatch, begins_with):
    write_card(dataclasses.replace(CARD, name="Größe"), tmp_path)
    path = tmp_path / CARD_FILE
    body = json.dumps(json.loads(path.read_bytes()), ensure_ascii=False)
    path.write_bytes((begins_with + body).encode())
    # What open() without an encoding asks for.
    monkeypatch.setattr(io, "text_encoding", lambda encoding, *_: encoding or "latin-1")
    assert read_card(tmp_path).name == "Größe"


def test_documentation_names_every_field_of_the_card():
    text = DOCS.read_text()
    for kind in (DatasetCard, DenseColumn, SparseColumn):
        for field in dataclasses.fields(kind):
            assert f"| `{field.name}` |" in text, field.name
    assert all(json.dumps(value) in text for value in ("dlrm_jax.dataset", 1))
