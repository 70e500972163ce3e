"""Which named scope of the step (`jax.named_scope`) each instruction of a compiled program belongs to."""

import re
from collections import Counter
from collections.abc import Mapping

from sharding.program import Instruction, Program

OTHER = "other"
# What JAX itself puts on the path of a source: calls, transformations and operations that hold others.
_WRAPPERS = re.compile(r"^(\w+\(.*|shard_map|while|body|cond|branch_\d+_fun|closed_call|custom_vjp_call|checkpoint)$")


def named_scopes(source: str) -> tuple[str, ...]:
    """The named scopes on a path such as "jit(step)/dense/jit(f)/shard_map/return_1/all_to_all": "dense", "return_1".

    Args:
        source: `Instruction.source`.
    """
    # Where the compiler merged several instructions it lists their paths: "jit(step)/(dense/add:update/mul)".
    first = re.split(r"[;:]", source, maxsplit=1)[0]
    # The last part is an operation.
    parts = [part.removeprefix("(") for part in first.split("/")[1:-1]]
    return tuple(part for part in parts if not _WRAPPERS.match(part))


def scopes_of(program: Program) -> Mapping[str, str]:
    """The outermost named scope of every instruction, by its name.

    What the compiler made itself has the scope of what it is made of: of the instructions fused into it, of its
    operands, or of the instruction before it.

    Args:
        program: The program.
    """
    scopes: dict[str, str] = {}
    for computation in program.computations.values():
        last = OTHER
        for instruction in computation.instructions:
            scope = _own_scope(instruction, program)
            if scope is None:
                scope = next((scopes[name] for name in instruction.operands if scopes.get(name, OTHER) != OTHER), None)
            if instruction.opcode in ("parameter", "constant"):
                scopes[instruction.name] = OTHER
                continue
            # A source without a named scope is no gap in the compiler's knowledge: it is the step's own code.
            named = scope is not None or bool(instruction.source)
            scopes[instruction.name] = last = scope or (OTHER if named else last)
    return scopes


def _own_scope(instruction: Instruction, program: Program) -> str | None:
    scopes = named_scopes(instruction.source)
    if scopes or instruction.opcode != "fusion":
        return scopes[0] if scopes else None
    inner = (part for called in program.called_by(instruction) for part in called.instructions)
    counts = Counter(scope for part in inner for scope in named_scopes(part.source)[:1])
    return counts.most_common(1)[0][0] if counts else None
