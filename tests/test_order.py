"""The order of samples: every sample once, whatever the processes, from whatever step."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dlrm_jax.data.order import PADDING, DataOrder


@st.composite
def data_orders(draw):
    virtual_shards = draw(st.sampled_from([1, 2, 4, 8]))
    return DataOrder(
        rows_per_group=tuple(draw(st.lists(st.integers(1, 20), min_size=1, max_size=30))),
        batch_size=virtual_shards * draw(st.integers(1, 5)),
        virtual_shards=virtual_shards,
        shuffle_window=draw(st.integers(1, 200)),
        seed=draw(st.integers(0, 2**32)),
        shuffle=draw(st.booleans()),
    )


ORDER = DataOrder(
    rows_per_group=(1024,) * 64, batch_size=512, virtual_shards=64, shuffle_window=16_384, seed=7, shuffle=True
)


def samples(order, epoch=0, first_step=0, shards=None):
    """Rows of the split that the batches hold, [steps, b], with PADDING."""
    shards = range(order.virtual_shards) if shards is None else shards
    group_starts = np.cumsum(order.rows_per_group) - order.rows_per_group
    steps = [np.zeros((0, len(shards) * order.rows_per_step), np.int64)]
    for window in order.epoch(epoch, first_step, shards).windows:
        pieces = zip(group_starts[window.group], window.first_row, window.num_rows, strict=True)
        rows = [np.arange(start + first, start + first + count) for start, first, count in pieces]
        steps.append(np.concatenate([*rows, [PADDING]])[window.source])
    return np.concatenate(steps)


@given(order=data_orders(), epoch=st.integers(0, 3))
def test_epoch_holds_every_sample_exactly_once(order, epoch):
    batches = samples(order, epoch)
    assert batches.shape == (order.steps_per_epoch, order.batch_size)
    np.testing.assert_array_equal(np.sort(batches[batches != PADDING]), np.arange(order.num_samples))


@given(order=data_orders())
def test_padding_is_in_the_last_step_alone(order):
    batches = samples(order)
    assert (batches[:-1] != PADDING).all()
    assert (batches[-1] != PADDING).any()


@given(order=data_orders(), processes=st.sampled_from([1, 2, 4]))
def test_batches_of_processes_side_by_side_are_the_batches_of_one_process(order, processes):
    order = dataclasses.replace(order, batch_size=4 * order.batch_size, virtual_shards=4 * order.virtual_shards)
    per_process = order.virtual_shards // processes
    parts = [samples(order, shards=range(p * per_process, (p + 1) * per_process)) for p in range(processes)]
    np.testing.assert_array_equal(np.concatenate(parts, axis=1), samples(order))


@given(order=data_orders(), data=st.data())
def test_starting_at_a_step_gives_the_batches_from_there_on(order, data):
    first_step = data.draw(st.integers(0, order.steps_per_epoch))
    np.testing.assert_array_equal(samples(order, 1, first_step), samples(order, 1)[first_step:])


@given(order=data_orders(), data=st.data())
def test_row_groups_are_listed_once_in_order_of_need_and_released_after_their_last_use(order, data):
    first_step = data.draw(st.integers(0, order.steps_per_epoch))
    first_shard = data.draw(st.integers(0, order.virtual_shards - 1))
    epoch = order.epoch(0, first_step, range(first_shard, order.virtual_shards))
    windows = list(epoch.windows)
    needed = [group for window in windows for group in window.group.tolist()]
    assert epoch.groups.tolist() == list(dict.fromkeys(needed))
    for position, window in enumerate(windows):
        later = {group for other in windows[position + 1 :] for group in other.group.tolist()}
        assert set(window.released) == set(window.group.tolist()) - later


@given(order=data_orders())
def test_without_shuffling_one_shard_keeps_the_order_of_the_files(order):
    order = dataclasses.replace(order, virtual_shards=1, shuffle=False)
    np.testing.assert_array_equal(samples(order).reshape(-1)[: order.num_samples], np.arange(order.num_samples))


@given(order=data_orders())
def test_a_window_needs_no_more_rows_than_configured(order):
    longest = max(order.shuffle_window, order.batch_size)
    assert all(window.num_rows.sum() <= longest for window in order.epoch(0, 0, range(order.virtual_shards)).windows)


@pytest.mark.parametrize("change", [{"seed": 8}, {"shuffle": False}, {"shuffle_window": 512}, {"virtual_shards": 32}])
def test_order_depends_on_each_field_of_the_configuration(change):
    assert (samples(dataclasses.replace(ORDER, **change)) != samples(ORDER)).mean() > 0.9


def test_epochs_differ_when_shuffled_and_agree_when_not():
    assert (samples(ORDER, 0) != samples(ORDER, 1)).mean() > 0.9
    in_order = dataclasses.replace(ORDER, shuffle=False)
    np.testing.assert_array_equal(samples(in_order, 0), samples(in_order, 1))


def test_shuffling_mixes_rows_of_a_window_and_row_groups_of_the_split():
    batches = samples(ORDER)
    # Row in its row group against step: 0 where a window (256 rows a shard) forgets the order inside, but windows
    # follow each other, so the windows' own order is taken out first.
    row, step = batches % 1024, np.broadcast_to(np.arange(len(batches))[:, None], batches.shape)
    in_window = np.corrcoef((row % 256).reshape(-1), (step % ORDER.steps_per_window).reshape(-1))[0, 1]
    # 65,536 pairs: the standard deviation of the correlation of independent ones is 0.004.
    assert abs(in_window) < 0.02
    groups = batches[:, ::8] // 1024
    assert all(len(set(step)) == 64 for step in groups.tolist())
    assert abs(np.corrcoef(groups[0], np.arange(64))[0, 1]) < 0.5  # standard deviation 0.13


def test_windows_when_shuffled_then_each_permutes_its_rows_in_its_own_way():
    order = DataOrder(rows_per_group=(1000,), batch_size=10, virtual_shards=1, shuffle_window=100, seed=7, shuffle=True)
    places = samples(order).reshape(10, 100) % 100
    assert len({tuple(window) for window in places.tolist()}) == 10


def test_order_of_a_small_split_stays_what_it_was():
    # Runs resume across versions of this program and of numpy: a change here is a change of every run's data.
    order = DataOrder(
        rows_per_group=(3, 4, 2, 4), batch_size=4, virtual_shards=2, shuffle_window=8, seed=1, shuffle=True
    )
    assert samples(order, epoch=5).tolist() == [[10, 9, 5, 0], [11, 12, 6, 1], [4, 3, 2, 8], [-1, -1, 7, -1]]
