"""Lets XLA order a program for GPUs by the estimates of `sharding.timeline`, instead of its own.

XLA's scheduler starts an exchange so long before its end as it takes, and runs beside it what takes as long, by figures
of its own. Those are rough: in its order the windows of exchanges are often far from what we estimate. It takes others
if it is given a profile, which is meant for times that were measured. So a program is compiled once, what each of its
instructions takes is estimated, and it is compiled again by that. What is computed stays the same.

The profile is a ``ProfiledInstructionsProto`` as text (tsl/profiler/protobuf/profiled_instructions.proto): a name and
microseconds for each instruction.
"""

import hashlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import jax

from sharding.collective import collective_of
from sharding.compiler_options import CompilerOptions, options_of_order
from sharding.cost_settings import CostSettings
from sharding.program import RUNS, Computation, Instruction, Program, parse_program
from sharding.timeline import exchange_seconds, work_seconds
from sharding.topology import Topology
from sharding.work import work_of


def can_schedule(topology: Topology) -> bool:
    """Whether there is something to order, and a compiler that takes profiles."""
    return topology.platform == "gpu" and topology.num_devices > 1


def scheduling_options(
    compiled: jax.stages.Compiled, topology: Topology, settings: CostSettings | None = None
) -> CompilerOptions:
    """Options by which the same program, compiled again, is ordered by our estimates.

    They name a file in the machine's folder for temporary files, which has to be there when they are used.

    Args:
        compiled: The program.
        topology: What it was compiled for.
        settings: Efficiencies.
    """
    profile = profile_of(parse_program(compiled.as_text() or ""), topology, settings or CostSettings())
    return options_of_order(str(_kept(profile)))


def profile_of(program: Program, topology: Topology, settings: CostSettings) -> str:
    """The profile of a program: what a device or its links need for each instruction that is scheduled.

    Args:
        program: The program.
        topology: The machine.
        settings: Efficiencies.
    """
    lines = []
    for instruction in _scheduled(program, program.entry):
        collective = collective_of(instruction, program, topology.nodes, topology.chips)
        if collective is not None:
            seconds = max(exchange_seconds(collective, topology, settings).values(), default=0.0)
        else:
            seconds = work_seconds(work_of(instruction, program), topology, settings)
        if seconds:
            lines.append(f'costs {{ name: "{instruction.name}" cost_us: {seconds * 1e6:.4f} }}\n')
    return "".join(lines)


def _scheduled(program: Program, computation: Computation) -> Iterator[Instruction]:
    """The instructions of a computation, and of those that it runs."""
    for instruction in computation.instructions:
        yield instruction
        if instruction.opcode in RUNS:
            for inner in program.called_by(instruction):
                yield from _scheduled(program, inner)


def _kept(profile: str) -> Path:
    """A file with the profile, named by its text: equal programs have equal options, also in compilation caches."""
    folder = Path(tempfile.gettempdir()) / f"dlrm_jax-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    path = folder / f"{hashlib.sha256(profile.encode()).hexdigest()}.pbtxt"
    # Whole or not at all: other processes of this machine may read it.
    with tempfile.NamedTemporaryFile("w", dir=folder, delete=False) as file:
        file.write(profile)
    Path(file.name).replace(path)
    return path
