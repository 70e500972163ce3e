"""What is known of a feature's ids: what is refused, and what follows for owners and distinct rows."""

import pytest

from sharding.errors import InputError
from sharding.load import FeatureLoad, loads_by_feature
from sharding.tables import FeatureSpec


@pytest.mark.parametrize(
    ("load", "message"),
    [
        ({"pooling_factor": float("inf")}, "pooling_factor is inf"),
        ({"pooling_factor": float("nan")}, "pooling_factor is nan"),
        ({"coverage": ((1, 0.5), (2, 1.1))}, "shares up to 1"),
        ({"coverage": ((1, -0.5), (2, 1.0))}, "shares up to 1"),
        ({"coverage": ((1, 0.9), (2, 0.5))}, "must rise in both numbers"),
        ({"coverage": ((1, 0.5), (1, 0.9))}, "must rise in both numbers"),
        ({"top": ((-1, 0.5),)}, "rows of at least 0"),
        ({"top": ((0, 0.5), (1, -0.1))}, "rows of at least 0"),
    ],
)
def test_load_when_its_numbers_cannot_be_then_an_error_says_what_is_allowed(load: dict, message: str):
    with pytest.raises(InputError, match=message):
        FeatureLoad(feature="f", **load)


def test_loads_when_a_feature_has_two_then_an_error():
    with pytest.raises(InputError, match="'f' is given two loads; keep one"):
        loads_by_feature([FeatureSpec(name="f", table="t")], [FeatureLoad(feature="f")] * 2)


def test_loads_when_a_feature_has_none_then_as_many_ids_as_it_may_have_or_one():
    features = [FeatureSpec(name="five", table="t", max_ids=5), FeatureSpec(name="any", table="t")]
    found = loads_by_feature(features, [])
    assert (found["five"].pooling_factor, found["any"].pooling_factor) == (5.0, 1.0)


def test_owners_when_only_ranks_are_known_then_hot_ranks_stand_for_rows_and_the_rest_is_even():
    # Half of all ids are of the first row, a tenth each of the next two.
    load = FeatureLoad(feature="f", coverage=((1, 0.5), (3, 0.7), (1000, 1.0)))
    assert load.owner_shares(4).tolist() == pytest.approx([0.575, 0.175, 0.175, 0.075], rel=1e-9)
    assert FeatureLoad(feature="f").owner_shares(4).tolist() == [0.25] * 4
    # Counted shares may add up to a little more than 1.
    assert FeatureLoad(feature="f", top=((0, 1.0005),)).owner_shares(2).tolist() == [1.0005, 0.0]


def test_distinct_rows_then_never_more_than_ids_nor_than_rows_of_the_table():
    unknown = FeatureLoad(feature="f")
    assert unknown.distinct(1, 0.5) == 0.5
    # Counted over a larger table.
    larger = FeatureLoad(feature="f", coverage=((2000, 1.0),))
    assert larger.distinct(1000, 1000.0) == pytest.approx(unknown.distinct(1000, 1000.0))
