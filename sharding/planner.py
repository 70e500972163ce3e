"""Planner: a plan whose padded cost is low and that fits into memory.

The relaxation of `sharding.lower_bound` says of which kind each table should be, a partitioner deals the slices of each
group out to devices and nodes, and the local search of `sharding.search` mends what both cannot see. Nothing is random
and nothing depends on the clock: the same input has the same plan.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from sharding.assignment import Assignment
from sharding.candidates import REPLICA_SHARE, Candidate, Choices, at_stages, make_choices
from sharding.constraints import Constraint, allowed_of
from sharding.cost import CostSettings, DenseLoad, PlanCost, Step, cost_of_layout
from sharding.errors import InputError
from sharding.fitting import fit
from sharding.layout import lay_out, make_layout
from sharding.load import FeatureLoad, loads_by_feature
from sharding.partition import PARTITIONERS
from sharding.plan import ShardingPlan, check_plan, one_device_plan
from sharding.search import improve
from sharding.shortage import Demand, shortage_error
from sharding.starts import initial_assignment, lightest_assignment
from sharding.tables import FeatureSpec, TableSpec, check_specs
from sharding.topology import Topology
from sharding.trades import trade

if TYPE_CHECKING:
    from sharding.lower_bound import Relaxed

PartitionerName = Literal["best", "greedy", "ldm"]
# Times that a plan is made again with less memory for stores, because its buffers take more than was left to them.
_ATTEMPTS = 6
_SEARCH_ROUNDS = 4
# Times that a plan is searched on from before it is made again.
_MENDS = 2
# Widths that further starts cut all tables to, the first of which cuts none: fewer groups, which round up less.
_WIDTHS = (1 << 20, 128, 64, 32)
# The cheapest of the starts, which are searched on from before one is picked, and cycles of ruins of each.
_SEARCHED = 6
_CYCLES = 2
# What is this close to the bound is good enough, as a share of the step.
_CLOSE = 5e-3
# Up to how many tables there is time for such.
_FEW_TABLES = 300
# What the runtime keeps for itself.
_USABLE_MEMORY = 0.92


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlanResult:
    """A plan and what is known of it.

    Attributes:
        plan: The plan.
        cost: Its cost.
        lower_bound: Seconds of a step that no plan made of the candidates can beat; see `sharding.lower_bound`.
        partitioner: The partitioner that it began from.
        partitioned: Name and seconds of what each partitioner gave, before the local search and without what is the
            same for every plan (the dense part).
        memory_limit: Bytes of a device that it was made for.
    """

    plan: ShardingPlan
    cost: PlanCost
    lower_bound: float
    partitioner: str
    partitioned: tuple[tuple[str, float], ...]
    memory_limit: int

    @property
    def gap(self) -> float:
        """How far the cost is above the lower bound, as a share of it."""
        return self.cost.total_seconds / self.lower_bound - 1.0 if self.lower_bound else 0.0


def make_plan(
    tables: Sequence[TableSpec],
    features: Sequence[FeatureSpec],
    topology: Topology,
    *,
    batch_size: int,
    loads: Sequence[FeatureLoad] = (),
    dense: DenseLoad | None = None,
    constraints: Sequence[Constraint] = (),
    partitioner: PartitionerName = "best",
    memory_limit: int | None = None,
    settings: CostSettings | None = None,
) -> PlanResult:
    """Plans where tables live.

    Args:
        tables: The tables.
        features: The features.
        topology: The machine.
        batch_size: Samples of the global batch.
        loads: What is known of the features' ids; see `sharding.load.loads_by_feature` for those left out.
        dense: The dense part; nothing unless given.
        constraints: What users want of single tables.
        partitioner: "greedy", "ldm", or "best": the better of the two.
        memory_limit: Bytes that a step may take on a device; 92 % of the topology's memory unless given.
        settings: Terms of the cost.

    Returns:
        The plan, its cost and its lower bound.

    Raises:
        InputError: The tables do not fit (the message says how much is missing and what to do), a device would have
            more rows than 32 bits can name, a constraint cannot be obeyed, or there is no such partitioner.
    """
    check_specs(tables, features)
    if batch_size < 1 or batch_size % topology.num_devices:
        raise InputError(
            f"batch_size is {batch_size}, but the {topology.num_devices} devices need as many samples each, at least "
            f"one: use {max(1, round(batch_size / topology.num_devices)) * topology.num_devices}"
        )
    if partitioner != "best" and partitioner not in PARTITIONERS:
        raise InputError(f"partitioner {partitioner!r} does not exist; use best, {' or '.join(PARTITIONERS)}")
    step = Step(
        topology=topology,
        batch_size=batch_size,
        loads=loads_by_feature(features, loads),
        dense=dense or DenseLoad(),
        settings=settings or CostSettings(),
    )
    limit = usable_memory(topology) if memory_limit is None else memory_limit
    names = tuple(PARTITIONERS) if partitioner == "best" else (partitioner,)
    search = _Search(tables=tables, features=features, step=step, constraints=constraints, limit=limit, names=names)
    result = search.one_device() if topology.num_devices == 1 else search.run()
    # Raises where a device has more rows than can be named, though there is memory for them.
    make_layout(tables, features, result.plan)
    return result


def usable_memory(topology: Topology) -> int:
    """Bytes of a device that a step may take: what the runtime does not keep for itself."""
    return int(topology.hbm_bytes * _USABLE_MEMORY)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Search:
    tables: Sequence[TableSpec]
    features: Sequence[FeatureSpec]
    step: Step
    constraints: Sequence[Constraint]
    limit: int
    names: tuple[str, ...]

    def cost(self, plan: ShardingPlan) -> PlanCost:
        check_plan(plan, self.tables, self.step.topology.nodes, self.step.topology.chips)
        return cost_of_layout(lay_out(self.tables, self.features, plan), self.features, self.step)

    def one_device(self) -> PlanResult:
        allowed = allowed_of(self.tables, self.constraints, self.step.topology)
        elsewhere = [table.name for table in self.tables if not allowed[table.name].allows("table_wise", 1, None)]
        if elsewhere:
            raise InputError(
                f"the constraints on table {elsewhere[0]!r} do not let it be table_wise on device 0, and there is no "
                "other place on one device: lift them, or plan for more devices"
            )
        plan = one_device_plan(self.tables)
        cost = self.cost(plan)
        if cost.storage.total > self.limit:
            raise self.shortage()
        return PlanResult(
            plan=plan,
            cost=cost,
            lower_bound=cost.total_seconds,
            partitioner=self.names[0],
            partitioned=tuple((name, cost.total_seconds) for name in self.names),
            memory_limit=self.limit,
        )

    def shortage(self) -> InputError:
        demand = Demand(
            tables=tuple(self.tables),
            features=tuple(self.features),
            step=self.step,
            constraints=tuple(self.constraints),
        )
        return shortage_error(demand, self.limit)

    def run(self) -> PlanResult:
        """The plan."""
        found = self.search()
        if found is None:
            raise self.shortage()
        return found

    def search(self) -> PlanResult | None:
        """A plan that fits, if one is found."""
        memory = float(self.limit - self.step.dense.memory_bytes)
        # Replicas do not depend on the limit: what is planned for more memory may fit into less.
        replicas = (usable_memory(self.step.topology) - self.step.dense.memory_bytes) * REPLICA_SHARE
        choices = make_choices(
            self.tables, self.features, self.step, self.constraints, max(memory, 0.0), replica_bytes=replicas
        )
        relaxed = self.relaxed(choices, memory)
        if relaxed is None:
            return None
        # Of the relaxation that leaves the stores all memory: others have less.
        least = relaxed.seconds + self.step.latency_seconds([])
        lower_bound = least + at_stages(self.step)
        enough = least + _CLOSE * lower_bound
        spare: PlanResult | None = None
        even = memory
        for _ in range(_ATTEMPTS):
            starts = self.starts(choices, relaxed, memory) if relaxed else []
            if starts:
                partitioned = self.partitioned(starts)
                best, name = self.best_start(choices, starts, memory, enough)
                begun = self.result(best, name, partitioned, lower_bound)
                if begun.cost.storage.total <= self.limit:
                    spare = min(begun, spare or begun, key=lambda result: result.cost.total_seconds)
                if len(self.tables) > _FEW_TABLES:
                    # To begin again takes seconds here: as much stays free as this has beyond what was counted.
                    beyond = begun.cost.storage.total - self.step.dense.memory_bytes - best.most_bytes
                    best.memory -= max(0.0, beyond)
                    trade(best, enough)
                for _ in range(_MENDS):
                    improve(best, _SEARCH_ROUNDS, enough=enough)
                    improved = self.result(best, name, partitioned, lower_bound)
                    excess = improved.cost.storage.total - self.limit
                    if excess <= 0:
                        return improved
                    # Stores are rounded up to whole lines, and updates of replicas take their turn, too.
                    memory -= 1.05 * excess
                    best.memory = min(memory, best.most_bytes - 1.05 * excess)
                    if not fit(best):
                        break
            else:
                spare = spare or self.lightest(choices, memory, lower_bound, enough)
                if spare is None and len(self.tables) > _FEW_TABLES:
                    # Further attempts would take half a minute to say so.
                    return None
                # That memory is even is more than a partitioner promises: leave it some to be uneven with.
                even *= 0.95
                relaxed = self.relaxed(choices, even, quick=True)
        return spare or self.lightest(choices, memory, lower_bound, enough)

    def lightest(self, choices: Choices, memory: float, lower_bound: float, enough: float) -> PlanResult | None:
        """A plan that begins where memory is all that counts; None if that does not fit either."""
        start = lightest_assignment(choices, self.step, PARTITIONERS[self.names[0]])
        partitioned = ((self.names[0], start.cost),)
        begun = self.result(start, self.names[0], partitioned, lower_bound)
        if begun.cost.storage.total > self.limit:
            return None
        # What was not counted stays free.
        start.memory = memory - max(0.0, begun.cost.storage.total - self.step.dense.memory_bytes - start.most_bytes)
        improve(start, _SEARCH_ROUNDS, enough=enough)
        improved = self.result(start, self.names[0], partitioned, lower_bound)
        return improved if improved.cost.storage.total <= self.limit else begun

    def plan_of(self, assignment: Assignment) -> ShardingPlan:
        return assignment.to_plan(self.step.topology.nodes, self.step.topology.chips)

    def partitioned(self, starts: list[tuple[Assignment, str]]) -> tuple[tuple[str, float], ...]:
        """The cheapest of each partitioner."""
        found: dict[str, float] = {}
        for start, name in starts:
            found[name] = min(start.cost, found.get(name, start.cost))
        return tuple((name, found[name]) for name in self.names if name in found)

    def result(
        self, assignment: Assignment, name: str, partitioned: tuple[tuple[str, float], ...], lower_bound: float
    ) -> PlanResult:
        plan = self.plan_of(assignment)
        return PlanResult(
            plan=plan,
            cost=self.cost(plan),
            lower_bound=lower_bound,
            partitioner=name,
            partitioned=partitioned,
            memory_limit=self.limit,
        )

    def relaxed(self, choices: Choices, memory: float, *, quick: bool = False) -> "Relaxed | None":
        if not all(choices.of_table):
            return None
        topology = self.step.topology
        # Late, since it needs HiGHS: a machine that trains by a given plan, or alone, need not have that.
        from sharding.lower_bound import relax

        return relax(choices, topology.num_devices, memory, quick=quick)

    def best_start(
        self, choices: Choices, starts: list[tuple[Assignment, str]], memory: float, enough: float
    ) -> tuple[Assignment, str]:
        """The cheapest of the starts, and of those whose tables are cut to narrower widths, once searched on from.

        A group's vectors a sample are whole numbers and its ids are as many as its fullest device has, so that many
        groups of few tables are dearer than the relaxation says. Tables cut to one width share a group.
        """
        found = list(starts)
        for cut in self.narrower(choices):
            relaxed = self.relaxed(cut, memory, quick=True)
            if relaxed is None or relaxed.seconds >= min(start.cost for start, _ in found):
                continue
            found += self.starts(cut, relaxed, memory)
        if len(found) == 1:
            # It is searched on from in any case.
            return found[0]
        for start, _ in found:
            start.let_choose(choices)
            improve(start, 0)
        found.sort(key=lambda entry: entry[0].cost)
        # Of many tables, where all start from one solution, swaps have told which of them to go on from.
        several = len(self.tables) <= _FEW_TABLES or len(found) > len(self.names)
        for start, _ in found[: _SEARCHED if several else 0]:
            improve(start, 2, cycles=_CYCLES, enough=enough)
        return min(found, key=lambda entry: entry[0].cost)

    def narrower(self, choices: Choices) -> list[Choices]:
        """The choices with fewer groups: narrower tables, and none spread over the chips of a node."""
        if len(self.tables) > _FEW_TABLES:
            return []
        found: list[Choices] = []
        for each in (choices, choices.without_family("table_row_wise")):
            for width in _WIDTHS:
                cut = each.up_to_width(width)
                if cut.of_table not in [other.of_table for other in (choices, *found)]:
                    found.append(cut)
        return found

    def starts(self, choices: Choices, relaxed: "Relaxed", memory: float) -> list[tuple[Assignment, str]]:
        """What each partitioner makes of the kinds that the relaxation chose; without those that do not fit."""
        found = []
        seen: list[list[Candidate]] = []
        for solution in relaxed.shares:
            chosen = [
                candidates[int(shares.argmax())] for candidates, shares in zip(choices.of_table, solution, strict=True)
            ]
            if chosen in seen:
                continue
            seen.append(chosen)
            for name in self.names:
                start = self.start(choices, chosen, name, memory)
                if start is not None:
                    found.append((start, name))
        return found

    def start(self, choices: Choices, chosen: list[Candidate], name: str, memory: float) -> Assignment | None:
        """What a partitioner makes of kinds; where that does not fit, tables are put elsewhere until it does."""
        dealt = initial_assignment(choices, chosen, PARTITIONERS[name], self.step, memory)
        if dealt is None:
            dealt = initial_assignment(choices, chosen, PARTITIONERS[name], self.step, math.inf)
            if dealt is not None:
                dealt.memory = memory
        return dealt if dealt is not None and fit(dealt) else None
