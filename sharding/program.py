"""A compiled program as data: the instructions of the scheduled HLO text, in the order in which a device runs them.

The text is `jax.stages.Compiled.as_text()`. What is read of an instruction is its results, operands, attributes and
where in the source it comes from (the scopes of `jax.named_scope`). Source of the syntax: openxla.org/xla, "HLO dump".
"""

import dataclasses
import functools
import math
import re
from collections.abc import Mapping

from sharding.errors import InputError

_BYTES = {"pred": 1, "token": 0, "opaque": 0}
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = ")
_ARRAY = re.compile(r"([a-z]\w*)\[([\d,<=]*)\](?:\{([^}]*)\})?")
_NAME = re.compile(r"%([\w.\-]+)")
_CALLS = re.compile(
    r"(?:calls|to_apply|body|condition|called_computations|true_computation|false_computation)=%([\w.\-]+)"
)
_BRANCHES = re.compile(r"(?:branch_computations|called_computations|calls)=\{([^}]*)\}")
_OP_NAME = re.compile(r'op_name="([^"]*)"')
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
# Instructions whose computations are part of the schedule.
RUNS = ("while", "conditional", "call")
# Memory spaces of a TPU's layouts other than its main memory, such as S(1), the vector memory.
_NEAR_MEMORY = re.compile(r"S\([1-9]\)")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ArrayShape:
    """An array of the program.

    Attributes:
        dtype: Its dtype, in XLA's words: "f32", "s32", "pred".
        shape: Its sizes.
        near: Whether the compiler keeps it in memory of the chip other than the main one.
    """

    dtype: str
    shape: tuple[int, ...]
    near: bool = False

    @property
    def size(self) -> int:
        """Numbers in it."""
        return math.prod(self.shape)

    @property
    def itemsize(self) -> float:
        """Bytes of a number."""
        if self.dtype in _BYTES:
            return _BYTES[self.dtype]
        bits = re.match(r"[a-z]+(\d+)", self.dtype)
        return int(bits[1]) / 8 if bits else 4

    @property
    def num_bytes(self) -> int:
        """Bytes of all."""
        return math.ceil(self.size * self.itemsize)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Instruction:
    """One instruction.

    Attributes:
        name: Its name, unique in the computation.
        opcode: What it does: "fusion", "all-to-all-start".
        results: Arrays that it returns; of nested tuples, all arrays in order.
        operands: Names of the instructions whose results it takes.
        inputs: Arrays of its operands, in their order; an operand of several arrays has all of them.
        called: Names of the computations that it runs.
        attributes: The rest of the line.
        is_root: Whether its results are the computation's.
        trip_count: How often a loop runs; 1 where that cannot be known, and of all else.
    """

    name: str
    opcode: str
    results: tuple[ArrayShape, ...]
    operands: tuple[str, ...]
    inputs: tuple[tuple[ArrayShape, ...], ...]
    called: tuple[str, ...]
    attributes: str
    is_root: bool
    trip_count: int = 1

    @property
    def result_bytes(self) -> int:
        """Bytes of its results."""
        return sum(array.num_bytes for array in self.results)

    @property
    def operand_bytes(self) -> int:
        """Bytes of its operands."""
        return sum(array.num_bytes for arrays in self.inputs for array in arrays)

    @property
    def source(self) -> str:
        """Path of named scopes and JAX operations that it comes from; empty if the compiler made it."""
        found = _OP_NAME.search(self.attributes)
        return found[1] if found else ""

    def attribute(self, name: str) -> str | None:
        """Text of an attribute that is a word or in braces: "{1}" of ``dimensions={1}``; None without it."""
        found = re.search(rf"(?:^|[ ,]){name}=(\{{[^}}]*\}}|[^,\s]+)", self.attributes)
        return found[1] if found else None

    def numbers(self, name: str) -> tuple[int, ...]:
        """The whole numbers of an attribute, such as (0, 1) of ``dimensions={0,1}``."""
        return tuple(map(int, re.findall(r"-?\d+", self.attribute(name) or "")))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Computation:
    """A computation: instructions in the order of the schedule.

    Attributes:
        name: Its name.
        instructions: All of them.
    """

    name: str
    instructions: tuple[Instruction, ...]

    @functools.cached_property
    def by_name(self) -> Mapping[str, Instruction]:
        """Its instructions by name."""
        return {instruction.name: instruction for instruction in self.instructions}

    @functools.cached_property
    def users(self) -> Mapping[str, tuple[Instruction, ...]]:
        """Who takes the results of each instruction."""
        users: dict[str, list[Instruction]] = {instruction.name: [] for instruction in self.instructions}
        for instruction in self.instructions:
            for operand in dict.fromkeys(instruction.operands):
                users[operand].append(instruction)
        return {name: tuple(found) for name, found in users.items()}

    @functools.cached_property
    def parameters(self) -> tuple[Instruction, ...]:
        """Its parameters, in order."""
        found = [instruction for instruction in self.instructions if instruction.opcode == "parameter"]
        return tuple(sorted(found, key=lambda parameter: int(parameter.attributes.partition(")")[0])))

    @property
    def root(self) -> Instruction:
        """The instruction whose results are the computation's."""
        return next(instruction for instruction in self.instructions if instruction.is_root)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Program:
    """A scheduled program.

    Attributes:
        entry: What a device runs.
        computations: All computations, by name.
    """

    entry: Computation
    computations: Mapping[str, Computation]

    def called_by(self, instruction: Instruction) -> tuple[Computation, ...]:
        """The computations that an instruction runs."""
        return tuple(self.computations[name] for name in instruction.called)


def parse_program(text: str) -> Program:
    """Reads a scheduled program.

    Args:
        text: What `jax.stages.Compiled.as_text()` returns.

    Returns:
        The program.

    Raises:
        InputError: The text is not that of a scheduled program.
    """
    if "is_scheduled=true" not in text.partition("\n")[0]:
        raise InputError(
            "this is not the text of a scheduled program (its first line lacks is_scheduled=true): give "
            "jax.stages.Compiled.as_text(), of a program that is compiled"
        )
    computations: dict[str, Computation] = {}
    entry = name = None
    instructions: dict[str, Instruction] = {}
    for line in text.splitlines():
        if name is None:
            header = _HEADER.match(line)
            if header:
                name, instructions = header[2], {}
                entry = name if header[1] else entry
        elif line.startswith("}"):
            computations[name] = Computation(name=name, instructions=tuple(instructions.values()))
            name = None
        else:
            instruction = _parse_instruction(line, instructions)
            if instruction is not None:
                if instruction.opcode == "while":
                    trips = _trip_count(instruction, instructions, computations)
                    instruction = dataclasses.replace(instruction, trip_count=1 if trips is None else trips)
                instructions[instruction.name] = instruction
    if entry is None:
        raise InputError("this is not the text of a program: it has no ENTRY computation")
    return Program(entry=computations[entry], computations=computations)


def _parse_instruction(line: str, earlier: Mapping[str, Instruction]) -> Instruction | None:
    start = _INSTRUCTION.match(line)
    if start is None:
        return None
    results, rest = _split_type(line[start.end() :])
    opcode, _, rest = rest.partition("(")
    inside, attributes = _split_parentheses(rest)
    # Of a parameter or constant, what stands there is a number.
    leaf = opcode in ("parameter", "constant")
    operands = tuple(_NAME.findall("" if leaf else inside))
    called = [*_CALLS.findall(attributes)]
    for branches in _BRANCHES.findall(attributes):
        called += _NAME.findall(branches)
    if opcode == "call-update":
        # It hands its operands to a call that has started.
        called += earlier[operands[0]].called
    return Instruction(
        name=start[2],
        opcode=opcode,
        results=_arrays(results),
        operands=operands,
        inputs=tuple(earlier[operand].results for operand in operands),
        called=tuple(dict.fromkeys(called)),
        attributes=f"{inside}){attributes}" if leaf else attributes,
        is_root=start[1] is not None,
    )


def _trip_count(
    loop: Instruction, earlier: Mapping[str, Instruction], computations: Mapping[str, Computation]
) -> int | None:
    """How often a loop runs: what the compiler says, or else, as for TPUs, while a counter is below a constant."""
    said = _TRIPS.search(loop.attributes)
    if said:
        return int(said[1])
    # What a computation calls is before it in the text.
    condition, body = (computations[(loop.attribute(name) or "").lstrip("%")] for name in ("condition", "body"))
    first, last = earlier[loop.operands[0]], body.root
    if condition.root.attribute("direction") != "LT" or {first.opcode, last.opcode} != {"tuple"}:
        return None
    counter, limit = (_copied(name, condition.by_name) for name in condition.root.operands)
    if counter.opcode != "get-tuple-element":
        return None
    (place,) = counter.numbers("index")
    after = _copied(last.operands[place], body.by_name)
    if after.opcode != "add":
        return None
    before, added = (_copied(name, body.by_name) for name in after.operands)
    start, end, step = map(_constant, (_copied(first.operands[place], earlier), limit, added))
    if before.opcode != "get-tuple-element" or before.numbers("index") != (place,):
        return None
    return None if start is None or end is None or not step else max(0, -(-(end - start) // step))


def _copied(name: str, by_name: Mapping[str, Instruction]) -> Instruction:
    """An instruction or, of a copy, what is copied."""
    while by_name[name].opcode in ("copy", "bitcast"):
        (name,) = by_name[name].operands
    return by_name[name]


def _constant(instruction: Instruction) -> int | None:
    """The whole number that an instruction is."""
    text = instruction.attributes.partition(")")[0]
    return int(text) if instruction.opcode == "constant" and re.fullmatch(r"-?\d+", text) else None


def _split_type(text: str) -> tuple[str, str]:
    """The type at the start of a text, and what follows it."""
    if not text.startswith("("):
        kind, _, rest = text.partition(" ")
        return kind, rest
    inside, rest = _split_parentheses(text[1:])
    return inside, rest.lstrip()


def _split_parentheses(text: str) -> tuple[str, str]:
    """What is before the parenthesis that closes one before the text, and what is after it."""
    depth = 1
    for match in re.finditer(r"[()]", text):
        depth += 1 if match[0] == "(" else -1
        if depth == 0:
            return text[: match.start()], text[match.end() :]
    return text, ""


def _arrays(text: str) -> tuple[ArrayShape, ...]:
    return tuple(
        ArrayShape(
            dtype=dtype,
            shape=tuple(int(size.removeprefix("<=")) for size in sizes.split(",") if size),
            near=_NEAR_MEMORY.search(layout) is not None,
        )
        for dtype, sizes, layout in _ARRAY.findall(text)
    )
