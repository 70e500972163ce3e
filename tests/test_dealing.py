"""What whole slices cost as they are dealt out to bins: the cheapest way, and the bound of a step that knows of it."""

import itertools

import numpy as np
import pytest
from planner_cases import BATCH, every_assignment, model_of

from sharding.candidates import make_choices
from sharding.constraints import Constraint
from sharding.cost import Step
from sharding.dealing import least_dealt
from sharding.load import loads_by_feature
from sharding.lower_bound import relax
from sharding.tables import TableSpec
from sharding.topology import parse_topology


@pytest.mark.parametrize("seed", range(6))
def test_dealing_when_every_way_is_tried_then_the_cheapest_or_hardly_less(seed: int):
    rng = np.random.default_rng(seed)
    bins, count = int(rng.integers(2, 4)), int(rng.integers(2, 6))
    slices = rng.integers(1, bins + 1, count)
    slices[0] = 1
    seconds = rng.lognormal(0, 1, (count, 3))
    # A quantity that this group does not have.
    seconds[:, 1] = 0.0
    costs = []
    for places in itertools.product(*(itertools.combinations(range(bins), number) for number in slices.tolist())):
        load = np.zeros((3, bins))
        for each, taken in zip(seconds, places, strict=True):
            load[:, list(taken)] += each[:, None]
        costs.append(load.max(axis=1).sum())
    least = least_dealt(seconds, slices, bins)
    assert 0.998 * min(costs) <= least <= min(costs) * (1 + 1e-9)


def test_dealing_when_there_are_fewer_slices_than_bins_then_the_largest_alone():
    seconds = np.array([[3.0, 1.0], [2.0, 2.0]])
    assert least_dealt(seconds, np.array([1, 1]), 4) == pytest.approx(5.0)


@pytest.mark.parametrize("seed", range(3))
def test_bound_when_tables_have_one_kind_then_the_cheapest_way_to_deal_them_out(seed: int):
    rng = np.random.default_rng(seed)
    tables = [TableSpec(name="t", num_rows=int(rows), dim=32) for rows in rng.lognormal(9, 1, 5)]
    tables, features, loads = model_of(tables, rng.lognormal(2, 1, 5).tolist())
    machine = parse_topology("h200:1x3")
    step = Step(topology=machine, batch_size=3 * BATCH, loads=loads_by_feature(features, loads))
    whole = Constraint(tables=tuple(table.name for table in tables), kinds=("table_wise",))
    choices = make_choices(tables, features, step, [whole], float(machine.hbm_bytes))
    relaxed = relax(choices, machine.num_devices, float(machine.hbm_bytes))
    assert relaxed is not None
    cheapest = min(assignment.cost for assignment in every_assignment(choices, step))
    assert 0.998 * cheapest <= relaxed.seconds <= cheapest
