"""Collectives of a compiled program: between whom they are, and what they put on the wire.

A device's bytes on the wire, of a buffer of S bytes over n devices: all-to-all ``S (n-1)/n``; all-gather (S is what
comes together) and reduce-scatter (S is what is scattered) the same; all-reduce twice that; a permute S. Over both
axes, N nodes of C chips in W = N C: an all-to-all puts ``S (C-1)/W`` on links inside nodes and ``S (W-C)/W`` on those
between; the others go over CHIP first or last, so that ``S (C-1)/C`` goes inside and ``S/C (N-1)/N`` between.
"""

import dataclasses
import math
import re
from typing import Literal

import numpy as np

from sharding.errors import InputError
from sharding.mesh import AXES, CHIP, NODE
from sharding.program import Instruction, Program

CollectiveKind = Literal["all-to-all", "all-gather", "reduce-scatter", "all-reduce", "collective-permute"]

Role = Literal["whole", "start", "end", "prepare", "carry"]

# By opcode; rarer ones as what they are most like.
_KINDS: dict[str, CollectiveKind] = {
    "all-to-all": "all-to-all",
    "ragged-all-to-all": "all-to-all",
    "all-gather": "all-gather",
    "reduce-scatter": "reduce-scatter",
    "all-reduce": "all-reduce",
    "collective-permute": "collective-permute",
    "collective-broadcast": "collective-permute",
}
# What tells the fusions apart in which a TPU runs a collective beside other work.
_FUSED: tuple[tuple[Role, str], ...] = (
    ("start", '"AsyncCollectiveStart"'),
    ("end", '"AsyncCollectiveDone"'),
    ("carry", '"async_collective_fusion_config"'),
)
_MESH = re.compile(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}")
_EXPLICIT = re.compile(r"replica_groups=\{(\{[\d,{} ]*\})\}")
_IOTA = re.compile(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
_PAIRS = re.compile(r"source_target_pairs=\{(\{[\d,{} ]*\})\}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Collective:
    """A collective.

    Attributes:
        kind: What it does.
        axes: Axes of the mesh that it is over: CHIP, NODE, or both; none if it is of one device.
        num_bytes: Bytes of the whole buffer on one device.
        inside_bytes: Bytes that a device sends to the others of its node.
        between_bytes: Bytes that a device sends to other nodes.
        source: Path of named scopes and JAX operations that it comes from.
    """

    kind: CollectiveKind
    axes: tuple[str, ...]
    num_bytes: int
    inside_bytes: float
    between_bytes: float
    source: str

    @property
    def wire_bytes(self) -> float:
        """Bytes that a device sends."""
        return self.inside_bytes + self.between_bytes


def collective_of(instruction: Instruction, program: Program, nodes: int, chips: int) -> Collective | None:
    """What an instruction sends, if it is a collective or starts one.

    Args:
        instruction: The instruction.
        program: The program that it is of.
        nodes: Size of NODE.
        chips: Size of CHIP.

    Returns:
        The collective; None for all other instructions, among them those that end a collective.
    """
    sender = _sender(instruction, program)
    if sender is None:
        return None
    kind = _KINDS[sender.opcode.removesuffix("-start")]
    group = _group(sender, nodes * chips)
    group_nodes = len(set((group // chips).tolist()))
    group_chips = math.ceil(len(group) / group_nodes)
    given = sender.operand_bytes
    size = given * len(group) if kind == "all-gather" else given
    inside, between = _wire_bytes(kind, size, group_nodes, group_chips)
    return Collective(
        kind=kind,
        axes=tuple(axis for axis, length in zip(AXES, (group_nodes, group_chips), strict=True) if length > 1),
        num_bytes=size,
        inside_bytes=inside,
        between_bytes=between,
        source=instruction.source or sender.source,
    )


def role_of(instruction: Instruction, program: Program) -> Role | None:
    """What an instruction is to a collective.

    Args:
        instruction: The instruction.
        program: The program that it is of.

    Returns:
        "whole" for a collective that is done when the instruction is; "start" and "end" of an asynchronous one;
        "prepare" for what names one that a later "start" hands its operands; "carry" for a computation that passes one
        on that is under way; None for everything else.
    """
    opcode = instruction.opcode
    if opcode.endswith("-done") and opcode.removesuffix("-done") in (*_KINDS, "async", "call"):
        return "end"
    if opcode in ("call-update", "async-update"):
        return "start"
    if _sender(instruction, program) is None:
        return None
    if opcode == "fusion":
        text = [inner.attributes for called in program.called_by(instruction) for inner in called.instructions]
        for role, mark in _FUSED:
            if any(mark in attributes for attributes in text):
                return role
        return "whole"
    if opcode == "call-start":
        return "prepare"
    # XLA leaves the two forms of the name, but runs it on the device's own stream.
    return "start" if opcode.endswith("-start") and '"is_sync":true' not in instruction.attributes else "whole"


def _sender(instruction: Instruction, program: Program) -> Instruction | None:
    """The collective that an instruction is or wraps."""
    if instruction.opcode.removesuffix("-start") in _KINDS:
        return instruction
    if instruction.opcode in ("async-start", "call-start", "fusion"):
        for computation in program.called_by(instruction):
            for inner in computation.instructions:
                found = _sender(inner, program)
                if found is not None:
                    return found
    return None


def _wire_bytes(kind: CollectiveKind, size: int, nodes: int, chips: int) -> tuple[float, float]:
    """Bytes inside nodes, and between them."""
    devices = nodes * chips
    if devices == 1:
        return 0.0, 0.0
    match kind:
        case "collective-permute":
            return (0.0, float(size)) if nodes > 1 else (float(size), 0.0)
        case "all-to-all":
            return size * (chips - 1) / devices, size * (devices - chips) / devices
    trips = 2 if kind == "all-reduce" else 1
    return trips * size * (chips - 1) / chips, trips * size / chips * (nodes - 1) / nodes


def _group(instruction: Instruction, devices: int) -> np.ndarray:
    """Numbers of the devices of one group; devices are numbered node by node, as in the mesh."""
    attributes = instruction.attributes
    mesh = _MESH.search(attributes)
    if mesh:
        return _mesh_group(mesh[1], mesh[2])
    iota = _IOTA.search(attributes)
    if iota:
        shape, dims, order = (tuple(map(int, part.split(","))) if part else () for part in iota.groups())
        numbers = np.arange(math.prod(dims)).reshape(dims)
        return (numbers.transpose(order) if order else numbers).reshape(shape)[0]
    found = _EXPLICIT.search(attributes) or _PAIRS.search(attributes)
    if found:
        groups = [list(map(int, re.findall(r"\d+", group))) for group in re.findall(r"\{([^}]*)\}", found[1])]
        # Of a permute, the pair that is furthest apart.
        return np.array(max(groups, key=lambda group: max(group) - min(group)) if groups else range(devices))
    return np.arange(devices)


def _mesh_group(sizes: str, members: str) -> np.ndarray:
    """The first group of ``mesh['node'=2,'chip'=4] {'chip'}``: devices that differ along the named axes only."""
    names = re.findall(r"'([^']+)'=\d+", sizes)
    lengths = [int(size) for size in re.findall(r"'=(\d+)", sizes)]
    if "device_ids" in sizes:
        raise InputError(f"collectives over a mesh whose devices are in another order are not read: mesh[{sizes}]")
    numbers = np.arange(math.prod(lengths)).reshape(lengths)
    taken: list[slice] = [slice(1)] * len(names)
    for name, before, size in re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", members):
        axis = names.index(name)
        if size:
            # Part of an axis: it is split into (before, size, rest), and the group runs along the middle.
            rest = lengths[axis] // (int(before) * int(size))
            taken[axis] = slice(0, rest * int(size), rest)
        else:
            taken[axis] = slice(None)
    return numbers[tuple(taken)].reshape(-1)


def axis_name(axes: tuple[str, ...]) -> str:
    """What a person calls the axes of a collective."""
    return {(): "none", (CHIP,): CHIP, (NODE,): NODE}.get(axes, f"{NODE}, {CHIP}")
