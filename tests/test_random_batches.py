"""Random batches: a function of seed, epoch and step, whoever makes which part of them."""

import numpy as np
import pytest
import tiny

from dlrm_jax.data.card import SparseColumn
from dlrm_jax.data.random_batches import RandomBatches
from sharding import InputError


def test_random_batches_when_read_from_any_step_then_they_are_a_function_of_seed_epoch_and_step():
    def batches(seed, epoch, first_step=0):
        source = RandomBatches(tiny.card(), "train", features=["tags", "user"], batch_size=100, seed=seed)
        assert source.steps_per_epoch == 12
        return list(source.batches(epoch, first_step))

    first = batches(0, 1)
    tiny.assert_identical(batches(0, 1, 7), first[7:])
    assert not np.array_equal(first[0].label, first[1].label)
    # Of an epoch no batch is one of another's.
    assert len({batch.label.tobytes() for epoch in (0, 1, 2) for batch in batches(0, epoch)}) == 36
    assert not np.array_equal(first[0].label, batches(1, 1)[0].label)
    tests = [
        next(RandomBatches(tiny.card(), "test", features=["tags", "user"], batch_size=100, seed=s).batches(1))
        for s in (0, 1)
    ]
    assert not np.array_equal(tests[0].label, tests[1].label)
    assert not np.array_equal(tests[0].label, first[0].label)
    assert first[0].ids.features == ("tags", "user")
    assert first[0].ids.lengths.tolist() == [[3] * 100, [1] * 100]
    assert first[0].ids.values[:300].max() < tiny.TAGS
    assert first[0].ids.values[300:].max() < tiny.USERS


def test_random_batches_of_two_processes_then_side_by_side_those_of_one():
    def batch(samples):
        source = RandomBatches(tiny.card(), "train", features=["tags", "user"], batch_size=100, seed=3, samples=samples)
        return next(source.batches(0))

    whole, left, right = batch(None), batch(range(40)), batch(range(40, 100))
    for name in ("dense", "label", "weight"):
        np.testing.assert_array_equal(np.concatenate([getattr(left, name), getattr(right, name)]), getattr(whole, name))
    np.testing.assert_array_equal(np.concatenate([left.ids.lengths, right.ids.lengths], axis=1), whole.ids.lengths)
    # Three tags of each sample, then one user.
    values = [left.ids.values[:120], right.ids.values[:180], left.ids.values[120:], right.ids.values[180:]]
    np.testing.assert_array_equal(np.concatenate(values), whole.ids.values)


@pytest.mark.parametrize(
    ("column", "message"),
    [
        (SparseColumn(name="user", num_rows=9, bag=True, weights="w"), "random ids of feature 'user'"),
    ],
)
def test_random_batches_when_ids_cannot_be_made_then_the_error_names_the_feature(column, message):
    with pytest.raises(InputError, match=message):
        RandomBatches(tiny.card(sparse=(column,)), "train", features=["user"], batch_size=4)
