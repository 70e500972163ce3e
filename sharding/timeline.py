"""An estimate of how a compiled step runs: when a device computes, when links are busy, and what of that is hidden.

The model of time is docs/overlap.md. In short: a device runs the instructions of the schedule one after another.
A matrix product takes ``flops / (peak * efficiency)``, any instruction at least ``bytes / (bandwidth * efficiency)``.
An exchange takes ``wire bytes / (bandwidth of its links * efficiency)``, plus their latency. Links inside nodes and
those between are busy independently on GPUs; TPUs have one network. On a link, exchanges run in the order in which
they start. A device that waits for an exchange, or runs one that is not asynchronous, computes nothing until it ends.
"""

import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence

from sharding.collective import Collective, collective_of, role_of
from sharding.cost_settings import CostSettings
from sharding.mesh import CHIP, NODE
from sharding.program import RUNS, Computation, Instruction, Program
from sharding.scopes import named_scopes, scopes_of
from sharding.topology import Platform, Topology
from sharding.work import Work, work_of

COMPUTE, INSIDE, BETWEEN = "compute", "links inside", "links between"
LANES = (COMPUTE, INSIDE, BETWEEN)

# Seconds that an instruction takes however little it does. GPU: XLA's own estimate (kKernelLaunchOverhead in
# xla/service/gpu/model/gpu_performance_model_base.h). TPU: the same in programs for a v5p, whose smallest fusions have
# "estimated_cycles" of 2,100, at 1.75 GHz. CPU: a program is one piece of code.
_KERNEL_SECONDS: dict[Platform, float] = {"cpu": 0.0, "gpu": 1e-6, "tpu": 1.2e-6}
# Instructions that hand on what has started.
_PASSES_ON = ("get-tuple-element", "bitcast", "tuple", "async-update", "call-update")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Span:
    """Something that takes time.

    Attributes:
        lane: One of `LANES`.
        scope: The named scope of the step that it belongs to: of computing the outermost, of exchanges the innermost,
            without the number of its chunk.
        start: When it starts, in seconds from the start of the step.
        seconds: How long it takes.
    """

    lane: str
    scope: str
    start: float
    seconds: float

    @property
    def end(self) -> float:
        """When it ends."""
        return self.start + self.seconds


@dataclasses.dataclass(frozen=True, kw_only=True)
class Exchange:
    """A collective, and what hides it.

    Attributes:
        name: Its name in the program.
        collective: What it sends.
        scope: The named scopes of the step that it belongs to, such as "dense/return_1".
        asynchronous: Whether the device computes while it is under way.
        window: What the device computes between its start and its end in the program.
        lane: The links that need longest for it.
        start: When its links begin with it, in seconds from the start of the step.
        seconds: How long they take.
        hidden_seconds: Of these, seconds in which the device computes. A link has one exchange at a time, so that no
            two exchanges of a link count the same computing.
    """

    name: str
    collective: Collective
    scope: str
    asynchronous: bool
    window: Work
    lane: str
    start: float
    seconds: float
    hidden_seconds: float

    @property
    def hidden_share(self) -> float:
        """Share of its seconds that is hidden; 1 for one that sends nothing."""
        return min(1.0, self.hidden_seconds / self.seconds) if self.seconds else 1.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Timeline:
    """A step, as it is estimated to run.

    Attributes:
        topology: The machine.
        seconds: Seconds of the step.
        exposed_seconds: Of these, seconds in which the device waits for links.
        exchanges: The collectives, in the order of the program.
        spans: What keeps the device and the links busy.
        work: What the device computes.
    """

    topology: Topology
    seconds: float
    exposed_seconds: float
    exchanges: tuple[Exchange, ...]
    spans: tuple[Span, ...]
    work: Work

    def busy_seconds(self, lane: str) -> float:
        """Seconds that a lane is busy."""
        return sum(span.seconds for span in self.spans if span.lane == lane)

    @property
    def compute_seconds(self) -> float:
        """Seconds in which the device computes."""
        return self.seconds - self.exposed_seconds

    @property
    def exchange_seconds(self) -> float:
        """Seconds of all exchanges, one after another."""
        return sum(exchange.seconds for exchange in self.exchanges)

    @property
    def hidden_share(self) -> float:
        """Share of the exchanges' seconds that is hidden."""
        total = self.exchange_seconds
        return sum(exchange.hidden_seconds for exchange in self.exchanges) / total if total else 1.0

    @property
    def shortest_seconds(self) -> float:
        """A bound: no order of this work is faster than the busiest of device and links."""
        return max(self.compute_seconds, *(self.busy_seconds(lane) for lane in (INSIDE, BETWEEN)))

    @property
    def largest_hidden_share(self) -> float:
        """A bound on `hidden_share`: of each kind of link, computing hides at most as long as it takes."""
        of_lane = (
            sum(exchange.seconds for exchange in self.exchanges if exchange.lane == lane) for lane in (INSIDE, BETWEEN)
        )
        total = self.exchange_seconds
        return sum(min(seconds, self.compute_seconds) for seconds in of_lane) / total if total else 1.0

    def scope_seconds(self) -> Mapping[str, float]:
        """Seconds that the device computes for each scope."""
        found: dict[str, float] = {}
        for span in self.spans:
            if span.lane == COMPUTE:
                found[span.scope] = found.get(span.scope, 0.0) + span.seconds
        return found


def estimate_timeline(program: Program, topology: Topology, settings: CostSettings | None = None) -> Timeline:
    """Estimates how a scheduled program runs on a machine.

    Args:
        program: The program, compiled for the machine.
        topology: The machine.
        settings: Efficiencies; its multipliers of stages are not used.
    """
    return _Clock(program, topology, settings or CostSettings()).run()


def exchange_seconds(collective: Collective, topology: Topology, settings: CostSettings) -> Mapping[str, float]:
    """Seconds that an exchange keeps each kind of link busy.

    Args:
        collective: The exchange.
        topology: The machine.
        settings: Efficiencies.
    """
    seconds: dict[str, float] = {}
    parts = (
        (INSIDE, CHIP, collective.inside_bytes, topology.inside_bandwidth, topology.inside_latency),
        (BETWEEN, NODE, collective.between_bytes, topology.between_bandwidth, topology.between_latency),
    )
    for lane, axis, num_bytes, bandwidth, latency in parts:
        if axis in collective.axes:
            # A bandwidth that is not known costs nothing.
            travel = num_bytes / (bandwidth * settings.bandwidth_efficiency) if bandwidth else 0.0
            seconds[lane] = latency * settings.latency + travel
    # Both ways on a TPU are over the links of one torus.
    return {INSIDE: sum(seconds.values())} if topology.platform == "tpu" and seconds else seconds


def work_seconds(work: Work, topology: Topology, settings: CostSettings) -> float:
    """Seconds that a device computes: the longer of its matrix products and its memory traffic, and starting kernels.

    Args:
        work: What it does.
        topology: The machine.
        settings: Efficiencies.
    """
    arithmetic = 0.0
    for flops, peak in (
        (work.float32_flops, topology.float32_flops),
        (work.bfloat16_flops, topology.bfloat16_flops),
    ):
        arithmetic += flops / (peak * settings.dense_efficiency) if peak else 0.0
    bandwidth = topology.hbm_bandwidth * settings.bandwidth_efficiency
    memory = work.num_bytes / bandwidth if bandwidth else 0.0
    return max(arithmetic, memory) + work.kernels * _KERNEL_SECONDS[topology.platform]


@dataclasses.dataclass(kw_only=True)
class _UnderWay:
    """An exchange that has started: as `Exchange`, and the work that was done before it started."""

    name: str
    collective: Collective
    scope: str
    lane: str
    start: float
    seconds: float
    before: Work
    order: int


class _Clock:
    """Runs the schedule: one time for the device, one for each kind of link."""

    def __init__(self, program: Program, topology: Topology, settings: CostSettings):
        self._program, self._topology, self._settings = program, topology, settings
        self._scopes = scopes_of(program)
        self._now = 0.0
        self._exposed = 0.0
        self._free = {INSIDE: 0.0, BETWEEN: 0.0}
        self._done = Work()
        self._under_way: dict[str, _UnderWay] = {}
        self._spans: list[Span] = []
        self._ended: list[tuple[_UnderWay, Work, bool]] = []
        self._with_collectives: dict[str, bool] = {}
        # For what hands an exchange on, its start; and collectives that wait for their operands.
        self._origins: dict[str, str] = {}
        self._prepared: dict[str, Collective] = {}
        self._count = 0

    def run(self) -> Timeline:
        for instruction in self._schedule(self._program.entry):
            self._step(instruction)
        for one in self._under_way.values():
            self._end(one)
        computing = [span for span in self._spans if span.lane == COMPUTE]
        exchanges = [
            Exchange(
                name=one.name,
                collective=one.collective,
                scope=one.scope,
                asynchronous=asynchronous,
                window=window,
                lane=one.lane,
                start=one.start,
                seconds=one.seconds,
                hidden_seconds=_overlap(computing, one.start, one.start + one.seconds),
            )
            for one, window, asynchronous in sorted(self._ended, key=lambda ended: ended[0].order)
        ]
        return Timeline(
            topology=self._topology,
            seconds=self._now,
            exposed_seconds=self._exposed,
            exchanges=tuple(exchanges),
            spans=tuple(self._spans),
            work=self._done,
        )

    def _schedule(self, computation: Computation) -> Iterator[Instruction]:
        """The instructions in order; loops and calls with collectives inside are unrolled."""
        for instruction in computation.instructions:
            called = self._program.called_by(instruction) if instruction.opcode in RUNS else ()
            inner = [computation for computation in called if self._sends(computation)]
            if not inner:
                yield instruction
                continue
            if instruction.opcode == "conditional":
                # The longest branch.
                inner = [max(inner, key=lambda branch: len(branch.instructions))]
            for _ in range(instruction.trip_count):
                for computation_inside in inner:
                    yield from self._schedule(computation_inside)

    def _sends(self, computation: Computation) -> bool:
        """Whether there are collectives in a computation, or in what it runs."""
        if computation.name not in self._with_collectives:
            self._with_collectives[computation.name] = any(
                self._collective(instruction) is not None
                or (instruction.opcode in RUNS and any(map(self._sends, self._program.called_by(instruction))))
                for instruction in computation.instructions
            )
        return self._with_collectives[computation.name]

    def _collective(self, instruction: Instruction) -> Collective | None:
        return collective_of(instruction, self._program, self._topology.nodes, self._topology.chips)

    def _step(self, instruction: Instruction) -> None:
        role = role_of(instruction, self._program)
        origin = next((self._origins[name] for name in instruction.operands if name in self._origins), None)
        match role:
            case "whole":
                collective = self._collective(instruction)
                if collective is not None:
                    self._end(self._start(instruction.name, collective, instruction), asynchronous=False)
                return
            case "prepare":
                collective = self._collective(instruction)
                if collective is not None:
                    self._prepared[instruction.name] = collective
                return
            case "start":
                prepared = next((name for name in instruction.operands if name in self._prepared), None)
                collective = self._prepared.pop(prepared) if prepared else self._collective(instruction)
                if collective is not None:
                    self._origins[instruction.name] = instruction.name
                    self._under_way[instruction.name] = self._start(instruction.name, collective, instruction)
                    return
            case "end":
                if origin in self._under_way:
                    self._end(self._under_way.pop(origin))
                    return
        if origin is not None and (role == "carry" or instruction.opcode in _PASSES_ON):
            self._origins[instruction.name] = origin
        self._compute(instruction)

    def _compute(self, instruction: Instruction) -> None:
        work = work_of(instruction, self._program)
        seconds = work_seconds(work, self._topology, self._settings)
        if not seconds:
            return
        self._spans.append(Span(lane=COMPUTE, scope=self._scopes[instruction.name], start=self._now, seconds=seconds))
        self._now += seconds
        self._done += work

    def _start(self, name: str, collective: Collective, instruction: Instruction) -> _UnderWay:
        lanes = exchange_seconds(collective, self._topology, self._settings)
        scopes = named_scopes(collective.source) or (self._scopes[instruction.name],)
        innermost = re.sub(r"_\d+$", "", scopes[-1])
        start = max([self._now, *(self._free[lane] for lane in lanes)])
        for lane, seconds in lanes.items():
            self._free[lane] = start + seconds
            self._spans.append(Span(lane=lane, scope=innermost, start=start, seconds=seconds))
        self._count += 1
        return _UnderWay(
            name=name,
            collective=collective,
            scope="/".join(scopes),
            lane=max(lanes, key=lanes.__getitem__, default=INSIDE),
            start=start,
            seconds=max(lanes.values(), default=0.0),
            before=self._done,
            order=self._count,
        )

    def _end(self, one: _UnderWay, *, asynchronous: bool = True) -> None:
        end = one.start + one.seconds
        self._exposed += max(0.0, end - self._now)
        self._now = max(self._now, end)
        window = self._done - one.before
        # What ends as soon as it has started is asynchronous in name only.
        self._ended.append((one, window, asynchronous and window.kernels > 0))


def _overlap(spans: Sequence[Span], start: float, end: float) -> float:
    """Seconds of spans that lie between two times."""
    return sum(max(0.0, min(span.end, end) - max(span.start, start)) for span in spans)
