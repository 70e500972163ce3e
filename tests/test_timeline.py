"""The estimated step: what waits, what is hidden, and that nothing hides two exchanges of one link."""

import dataclasses
from pathlib import Path

import pytest

from sharding.cost_settings import CostSettings
from sharding.program import parse_program
from sharding.timeline import BETWEEN, COMPUTE, INSIDE, Timeline, estimate_timeline, exchange_seconds, work_seconds
from sharding.timeline_picture import draw_timeline
from sharding.timeline_report import collectives_table, summary
from sharding.topology import Platform, Topology
from sharding.work import Work

# Every figure is reached, so that times can be told by heart: 1 kB takes 1 s to read, 1 s to exchange inside a node and
# 4 s between nodes.
SETTINGS = CostSettings(dense_efficiency=1.0, bandwidth_efficiency=1.0)
MACHINE = Topology(
    name="simple:2x2",
    platform="cpu",
    device_kind="simple",
    nodes=2,
    chips=2,
    hbm_bytes=10**9,
    hbm_bandwidth=1000.0,
    host_memory_bytes=0,
    host_memory_bandwidth=0.0,
    ssd_bytes=0,
    ssd_bandwidth=0.0,
    inside_bandwidth=1000.0,
    between_bandwidth=250.0,
    inside_latency=0.0,
    between_latency=0.0,
    float32_flops=1e12,
    bfloat16_flops=2e12,
)
# Over CHIP, of 2 kB half is sent, which takes 1 s; so does reading 500 B and writing them. Over NODE: 4 s.
BUFFER = "f32[500]{0}"
CHIPS, NODES = "replica_groups=mesh['node'=2,'chip'=2] {'chip'}", "replica_groups=mesh['node'=2,'chip'=2] {'node'}"


def timeline(entry: str, topology: Topology = MACHINE, others: str = "") -> Timeline:
    """The timeline of such instructions; COMPUTE n stands for one that takes n seconds, START and END for exchanges."""
    lines = ["%buffer = f32[500]{0} parameter(0)"]
    for number, line in enumerate(entry.strip().splitlines()):
        word, *rest = line.split()
        match word:
            case "COMPUTE":
                scope = rest[1] if len(rest) > 1 else "dense"
                numbers = int(float(rest[0]) * 125)
                line = (
                    f'%c{number} = f32[{numbers}]{{0}} negate(%p{number}), metadata={{op_name="jit(step)/{scope}/neg"}}'
                )
                lines.append(f"%p{number} = f32[{numbers}]{{0}} parameter({number + 1})")
            case "START" | "WHOLE":
                name, axis = rest
                opcode = "all-to-all-start" if word == "START" else "all-to-all"
                rest_of_line = f'{CHIPS if axis == "chip" else NODES}, metadata={{op_name="jit(step)/lookup/a"}}'
                line = f"%{name} = (({BUFFER}), {BUFFER}) {opcode}(%buffer), {rest_of_line}"
            case "END":
                line = f"%{rest[0]}.done = {BUFFER} all-to-all-done(%{rest[0]})"
        lines.append(line)
    body = "\n".join(f"  {line}" for line in lines)
    text = f"HloModule step, is_scheduled=true\n\n{others}ENTRY %main () -> () {{\n{body}\n}}\n"
    return estimate_timeline(parse_program(text), topology, SETTINGS)


def shares(found: Timeline) -> list[float]:
    return [pytest.approx(exchange.hidden_share) for exchange in found.exchanges]


def test_an_exchange_when_enough_is_computed_meanwhile_then_it_is_hidden() -> None:
    found = timeline("START x chip\nCOMPUTE 3\nEND x")
    assert found.seconds == pytest.approx(3)
    assert found.exposed_seconds == 0
    (exchange,) = found.exchanges
    assert exchange.asynchronous
    assert (exchange.seconds, exchange.hidden_share, found.hidden_share) == pytest.approx((1, 1, 1))
    assert exchange.window.num_bytes == 3000


def test_an_exchange_when_less_is_computed_meanwhile_then_the_rest_is_exposed() -> None:
    found = timeline("COMPUTE 1\nSTART x node\nCOMPUTE 1\nEND x\nCOMPUTE 1")
    assert found.seconds == pytest.approx(6)
    assert found.exposed_seconds == pytest.approx(3)
    assert shares(found) == [0.25]
    assert found.compute_seconds == pytest.approx(3)


def test_a_synchronous_exchange_then_all_of_it_is_exposed() -> None:
    found = timeline("COMPUTE 1\nWHOLE x chip\nCOMPUTE 1")
    assert (found.seconds, found.exposed_seconds) == pytest.approx((3, 1))
    assert not found.exchanges[0].asynchronous
    assert shares(found) == [0]


def test_an_exchange_that_ends_as_soon_as_it_has_started_then_it_is_not_asynchronous() -> None:
    found = timeline("COMPUTE 1\nSTART x chip\nEND x\nCOMPUTE 1")
    assert not found.exchanges[0].asynchronous
    assert found.exposed_seconds == pytest.approx(1)


def test_an_exchange_that_xla_writes_in_two_but_runs_as_one_then_its_end_computes_nothing() -> None:
    start = f'all-to-all-start(%buffer), {CHIPS}, backend_config={{"collective_backend_config":{{"is_sync":true}}}}'
    found = timeline(f"COMPUTE 1\n%x = (({BUFFER}), {BUFFER}) {start}\nCOMPUTE 1\nEND x")
    assert (found.seconds, found.compute_seconds, found.exposed_seconds) == pytest.approx((3, 2, 1))


def test_two_exchanges_of_one_link_when_their_windows_overlap_then_no_computing_counts_twice() -> None:
    found = timeline("START x chip\nSTART y chip\nCOMPUTE 1\nEND x\nEND y")
    # The first has it all; the second begins when the link is free.
    assert shares(found) == [1, 0]
    assert found.exchanges[1].start == pytest.approx(1)
    assert found.exchanges[1].window.num_bytes == 1000
    assert (found.seconds, found.exposed_seconds) == pytest.approx((2, 1))


@pytest.mark.parametrize(("platform", "seconds"), [("gpu", 4), ("tpu", 5)])
def test_exchanges_inside_nodes_and_between_then_gpus_have_links_of_their_own_for_each(
    platform: Platform, seconds: float
) -> None:
    found = timeline("START x chip\nSTART y node\nEND x\nEND y", dataclasses.replace(MACHINE, platform=platform))
    assert found.seconds == pytest.approx(seconds)
    assert found.busy_seconds(INSIDE) + found.busy_seconds(BETWEEN) == pytest.approx(5)


@pytest.mark.parametrize(("platform", "inside", "between"), [("gpu", 0.5, 4), ("tpu", 4.5, None)])
def test_an_exchange_over_both_axes_then_each_kind_of_link_carries_its_part(
    platform: Platform, inside: float, between: float | None
) -> None:
    topology = dataclasses.replace(MACHINE, platform=platform)
    both = CHIPS.replace("{'chip'}", "{'node','chip'}")
    found = timeline(f"%x = {BUFFER} all-to-all(%buffer), {both}", topology)
    lanes = exchange_seconds(found.exchanges[0].collective, topology, SETTINGS)
    assert (lanes[INSIDE], lanes.get(BETWEEN)) == (inside, between)
    assert found.seconds == pytest.approx(max(lanes.values()))


def test_an_exchange_in_a_loop_then_each_round_has_its_own() -> None:
    body = f"""%body (s: f32[500]) -> f32[500] {{
  %s = {BUFFER} parameter(0)
  %x = (({BUFFER}), {BUFFER}) all-to-all-start(%s), {CHIPS}
  %more = f32[125]{{0}} custom-call(%s), custom_call_target="AllocateBuffer"
  %work = f32[125]{{0}} negate(%more)
  ROOT %y = {BUFFER} all-to-all-done(%x)
}}

"""
    loop = (
        f'%w = {BUFFER} while(%buffer), condition=%body, body=%body, backend_config={{"known_trip_count":{{"n":"3"}}}}'
    )
    found = timeline(loop, others=body)
    assert len(found.exchanges) == 3
    assert found.seconds == pytest.approx(3)
    assert found.hidden_share == pytest.approx(1)


def test_exchanges_in_the_branches_of_a_condition_then_those_of_the_longest_count() -> None:
    branches = f"""%short (s: f32[500]) -> f32[500] {{
  %s = {BUFFER} parameter(0)
  ROOT %x = {BUFFER} all-to-all(%s), {CHIPS}
}}

%long (t: f32[500]) -> f32[500] {{
  %t = {BUFFER} parameter(0)
  %y = {BUFFER} all-to-all(%t), {CHIPS}
  ROOT %z = {BUFFER} all-to-all(%y), {CHIPS}
}}

"""
    condition = f"%c = {BUFFER} conditional(%which, %buffer, %buffer), branch_computations={{%short, %long}}"
    found = timeline(f"%which = s32[] parameter(1)\n{condition}", others=branches)
    assert [exchange.name for exchange in found.exchanges] == ["y", "z"]
    assert found.seconds == pytest.approx(2)


def test_an_exchange_that_nothing_waits_for_then_the_step_does() -> None:
    found = timeline("START x node\nCOMPUTE 1")
    assert (found.seconds, found.exposed_seconds) == pytest.approx((4, 3))
    assert shares(found) == [0.25]


def test_exchanges_of_several_chunks_then_their_spans_have_one_scope() -> None:
    lines = (
        f'%x{chunk} = {BUFFER} all-to-all(%buffer), {CHIPS}, metadata={{op_name="jit(step)/dense/return_{chunk}/a"}}'
        for chunk in (0, 1)
    )
    found = timeline("\n".join(lines))
    assert {span.scope for span in found.spans} == {"return"}
    assert [exchange.scope for exchange in found.exchanges] == ["dense/return_0", "dense/return_1"]


def test_what_a_tpu_runs_on_its_sparse_cores_then_it_starts_with_its_operands_and_ends_with_the_call() -> None:
    called = f"""%called (s: f32[500]) -> f32[500] {{
  %s = {BUFFER} parameter(0)
  ROOT %r = {BUFFER} all-to-all(%s), {CHIPS}
}}

"""
    found = timeline(
        f"""%x = ((), (), (s32[1]{{0}})) call-start(), to_apply=%called
COMPUTE 1
%x.update = (({BUFFER}), {BUFFER}) call-update(%x, %buffer)
COMPUTE 2
%x.done = {BUFFER} call-done(%x.update)""",
        others=called,
    )
    (exchange,) = found.exchanges
    assert (exchange.start, exchange.hidden_share, exchange.window.num_bytes) == pytest.approx((1, 1, 2000))


def test_bounds_then_no_step_is_shorter_than_its_computing_and_its_busiest_link() -> None:
    found = timeline("START x node\nCOMPUTE 1\nEND x\nCOMPUTE 2")
    assert found.seconds == pytest.approx(6)
    assert found.shortest_seconds == pytest.approx(4)
    assert found.largest_hidden_share == pytest.approx(0.75)
    assert found.hidden_share == pytest.approx(0.25)


def test_the_largest_hidden_share_when_both_links_are_busy_then_each_may_hide_behind_the_same_computing() -> None:
    found = timeline("START x node\nSTART y chip\nCOMPUTE 2\nEND y\nEND x")
    assert [exchange.name for exchange in found.exchanges] == ["x", "y"]
    # Half of 4 s, and all of 1 s.
    assert found.hidden_share == pytest.approx(3 / 5)
    assert found.largest_hidden_share == pytest.approx(3 / 5)


@pytest.mark.parametrize(
    ("work", "platform", "seconds"),
    [
        (Work(float32_flops=2e12, num_bytes=500), "tpu", 2.0),
        (Work(bfloat16_flops=2e12, num_bytes=500), "tpu", 1.0),
        (Work(float32_flops=1e9, num_bytes=500), "tpu", 0.5),
        # XLA's own figures for a kernel's start.
        (Work(kernels=3), "gpu", 3e-6),
        (Work(kernels=2), "tpu", 2.4e-6),
    ],
    ids=["float32", "bfloat16", "memory", "kernels of a gpu", "kernels of a tpu"],
)
def test_seconds_of_work_then_the_longer_of_arithmetic_and_memory(
    work: Work, platform: Platform, seconds: float
) -> None:
    assert work_seconds(work, dataclasses.replace(MACHINE, platform=platform), SETTINGS) == pytest.approx(seconds)


def test_efficiencies_when_half_then_all_takes_twice_as_long() -> None:
    half = CostSettings(dense_efficiency=0.5, bandwidth_efficiency=0.5)
    assert work_seconds(Work(float32_flops=1e12), MACHINE, half) == pytest.approx(2)
    assert work_seconds(Work(num_bytes=1000), MACHINE, half) == pytest.approx(2)
    collective = timeline("WHOLE x chip").exchanges[0].collective
    assert exchange_seconds(collective, MACHINE, half)[INSIDE] == pytest.approx(2)


def test_latency_of_links_then_each_exchange_over_them_takes_that_much_longer() -> None:
    slow = dataclasses.replace(MACHINE, inside_latency=0.5, between_latency=2.0)
    assert timeline("WHOLE x chip\nWHOLE y node", slow).seconds == pytest.approx(1.5 + 6)
    assert timeline("WHOLE x chip", slow).seconds == pytest.approx(1.5)
    (exchange,) = timeline("WHOLE x node", slow).exchanges
    unknown = dataclasses.replace(slow, between_bandwidth=0.0)
    assert exchange_seconds(exchange.collective, unknown, SETTINGS) == {BETWEEN: 2}
    half = dataclasses.replace(SETTINGS, latency=0.5)
    assert exchange_seconds(exchange.collective, slow, half) == {BETWEEN: pytest.approx(4 + 1)}


def test_the_report_then_it_says_every_collective_and_the_totals(tmp_path: Path) -> None:
    found = timeline("START x chip\nCOMPUTE 2 lookup\nEND x\nCOMPUTE 1 update\nWHOLE y node")
    assert found.scope_seconds() == pytest.approx({"lookup": 2, "update": 1})
    table = collectives_table(found)
    assert [list(column.cells) for column in table.columns[1:5:3]] == [["lookup", "lookup"], ["yes", "no"]]
    text = summary(found, 700).plain
    assert "estimated step: 7,000.000 ms, 100 samples a second" in text
    assert "exposed communication 4,000.000 ms, 57.1% of the step" in text
    picture = tmp_path / "step.png"
    draw_timeline(found, picture)
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert {span.lane for span in found.spans} == {COMPUTE, INSIDE, BETWEEN}
