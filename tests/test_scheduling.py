"""Programs are ordered by our estimates: what the compiler is told, and that a step so made is the same step."""

import dataclasses
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from dlrm_jax.scheduled_step import ScheduledStep, schedulable_topology
from sharding.capacities import Capacities
from sharding.compiler_options import CompilerOptions
from sharding.cost_settings import CostSettings
from sharding.mesh import make_mesh
from sharding.program import parse_program
from sharding.scheduling import can_schedule, profile_of, scheduling_options
from sharding.timeline import estimate_timeline
from sharding.topology import parse_topology

PROGRAM = """\
HloModule step, is_scheduled=true

%body (p: f32[500000]) -> f32[500000] {
  %p = f32[500000]{0} parameter(0)
  ROOT %inside = f32[500000]{0} negate(%p), metadata={op_name="jit(step)/dense/while/body/neg"}
}

%cond (q: f32[500000]) -> pred[] {
  %q = f32[500000]{0} parameter(0)
  ROOT %more = pred[] constant(true)
}

ENTRY %main () -> () {
  %x = f32[500000]{0} parameter(0)
  %go = ((f32[500000]{0}), f32[500000]{0}) all-to-all-start(%x), replica_groups=GROUPS
  %c = f32[500000]{0} negate(%x), metadata={op_name="jit(step)/dense/neg"}
  %come = f32[500000]{0} all-to-all-done(%go)
  %loop = f32[500000]{0} while(%c), condition=%cond, body=%body, backend_config={"known_trip_count":{"n":"3"}}
}
"""


@pytest.mark.parametrize(
    ("machine", "groups"),
    [
        ("h200:1x8", "mesh['node'=1,'chip'=8] {'chip'}"),
        # The slower of two kinds of link.
        ("h200:2x4", "mesh['node'=2,'chip'=4] {'node','chip'}"),
    ],
)
def test_the_profile_of_a_program_then_it_has_what_the_timeline_takes_for_each_instruction(
    machine: str, groups: str
) -> None:
    topology, settings = parse_topology(machine), CostSettings()
    program = parse_program(PROGRAM.replace("GROUPS", groups))
    found = re.findall(r'costs \{ name: "([^"]+)" cost_us: ([\d.]+) \}\n', profile_of(program, topology, settings))
    costs = {name: float(microseconds) * 1e-6 for name, microseconds in found}
    assert set(costs) == {"go", "c", "loop", "inside"}
    timeline = estimate_timeline(program, topology, settings)
    assert costs["go"] == pytest.approx(timeline.exchanges[0].seconds, abs=1e-9)
    assert costs["c"] + costs["loop"] == pytest.approx(timeline.compute_seconds, abs=1e-9)
    # Three times the same.
    assert costs["loop"] == pytest.approx(3 * costs["inside"], rel=0.2)


def test_options_for_equal_programs_then_they_name_one_file_with_the_profile(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    compiled = jax.jit(lambda x: jnp.sin(x) @ x).lower(jnp.ones((64, 64))).compile()
    topology = parse_topology("h200:1x8")
    first, second = (scheduling_options(compiled, topology) for _ in range(2))
    assert first == second
    (path,) = tmp_path.glob("*/*")
    assert str(path) in first.values()
    assert path.read_text() == profile_of(parse_program(compiled.as_text() or ""), topology, CostSettings())
    assert "cost_us" in path.read_text()


def test_which_devices_can_be_scheduled_for() -> None:
    targets = {"h200:1x8": True, "zionex:16x8": True, "h200:1x1": False, "v6e:2x4": False}
    assert {target: can_schedule(parse_topology(target)) for target in targets} == targets
    # Hosts run exchanges one after another.
    assert schedulable_topology(make_mesh(2, 4)) is None


def test_a_scheduled_step_then_it_gives_what_the_step_gives_and_compiles_once_for_each_room() -> None:
    asked: list[CompilerOptions] = []

    def add_up(x, *, capacities, shift):
        assert capacities is not None
        return jnp.cumsum(x) + shift

    def jit(more: CompilerOptions):
        asked.append(more)
        return jax.jit(add_up, static_argnames="capacities", donate_argnums=0, compiler_options=more or None)

    topology = dataclasses.replace(parse_topology("h200:1x8"), platform="cpu")
    step = ScheduledStep(jit, topology)
    small, large = (Capacities(ids=ids, rounds=1, groups=()) for ids in (8, 16))
    for room in (small, large, small):
        assert step(jnp.arange(4.0), capacities=room, shift=jnp.float32(1)).tolist() == [1, 2, 4, 7]
    plain, *scheduled = asked
    assert plain == {}
    assert len(scheduled) == 2
    assert all("xla_gpu_pgle_profile_file_or_directory_path" in options for options in scheduled)
