"""Machines and models that plans are made for, shared by the tests of the planner and of its parts."""

import dataclasses
import itertools
from collections.abc import Iterator

import numpy as np

from sharding.assignment import Assignment
from sharding.candidates import SPREAD, Buffers, Choices, make_choices
from sharding.cost import Step
from sharding.load import FeatureLoad, loads_by_feature
from sharding.partition import greedy
from sharding.planner import PlanResult, make_plan
from sharding.starts import initial_assignment
from sharding.tables import FeatureSpec, TableSpec
from sharding.topology import Topology, parse_topology

NODES, CHIPS = 2, 4
MACHINE = parse_topology(f"h200:{NODES}x{CHIPS}")
BATCH = 1024


def model_of(
    tables: list[TableSpec], factors: list[float]
) -> tuple[list[TableSpec], list[FeatureSpec], list[FeatureLoad]]:
    named = [dataclasses.replace(table, name=f"t{number}") for number, table in enumerate(tables)]
    features = [FeatureSpec(name=f"f{number}", table=table.name) for number, table in enumerate(named)]
    loads = [
        FeatureLoad(feature=feature.name, pooling_factor=factor)
        for feature, factor in zip(features, factors, strict=False)
    ]
    return named, features, loads


def skewed_model(num_tables: int, seed: int) -> tuple[list[TableSpec], list[FeatureSpec], list[FeatureLoad]]:
    rng = np.random.default_rng(seed)
    tables = [
        TableSpec(name="t", num_rows=int(rng.lognormal(10, 2)) + 10, dim=int(rng.choice([16, 32, 64, 128])))
        for _ in range(num_tables)
    ]
    return model_of(tables, rng.lognormal(2, 1, num_tables).tolist())


def choices_of(model, machine: Topology, constraints=(), memory: float = float("inf")) -> tuple[Choices, Step]:
    tables, features, loads = model
    step = Step(topology=machine, batch_size=BATCH, loads=loads_by_feature(features, loads))
    return make_choices(tables, features, step, constraints, memory), step


def with_strange_buffers(choices: Choices, dice: np.random.Generator) -> Choices:
    """Buffers that have nothing to do with seconds, so that bytes rise where those fall; as large as stores."""
    shape = len(choices.groups), len(SPREAD)
    together, in_turn = (dice.choice([0.0, 3e12], shape) * dice.random(shape) for _ in range(2))
    of_table = tuple(
        tuple(dataclasses.replace(c, fixed_bytes=1e12 * c.fixed * dice.integers(9)) for c in candidates)
        for candidates in choices.of_table
    )
    return dataclasses.replace(
        choices, of_table=of_table, buffers=Buffers(constant=1e6, together=together, in_turn=in_turn)
    )


def plan_of(num_tables: int = 10, seed: int = 0, **arguments) -> PlanResult:
    tables, features, loads = skewed_model(num_tables, seed)
    return make_plan(tables, features, MACHINE, batch_size=BATCH, loads=loads, **arguments)


def drawn_start(model, machine: Topology = MACHINE, constraints=(), *, seed: int) -> Assignment:
    """Tables of any of their kinds, dealt out."""
    memory = float(machine.hbm_bytes)
    choices, step = choices_of(model, machine, constraints, memory)
    dice = np.random.default_rng(seed)
    chosen = [candidates[int(dice.integers(len(candidates)))] for candidates in choices.of_table]
    started = initial_assignment(choices, chosen, greedy, step, memory)
    assert started is not None
    return started


def added_up_again(assignment: Assignment) -> Assignment:
    """The same, placed anew."""
    again = Assignment(assignment.choices, assignment.step, assignment.memory)
    for candidate, bins in assignment.snapshot():
        again.place(candidate, bins)
    return again


def every_assignment(choices: Choices, step: Step) -> Iterator[Assignment]:
    """Every way to place all tables."""
    every_place = [
        [
            (candidate, bins)
            for candidate in candidates
            for bins in itertools.combinations(range(step.topology.num_devices // candidate.span), candidate.num_slices)
        ]
        for candidates in choices.of_table
    ]
    for places in itertools.product(*every_place):
        assignment = Assignment(choices, step, float(step.topology.hbm_bytes))
        for candidate, bins in places:
            assignment.place(candidate, bins)
        yield assignment
