"""What one instruction of a compiled program does: arithmetic of its matrix products, and bytes of main memory.

``flops = 2 * (numbers of the result) * (products summed up in each)`` of every matrix product; other arithmetic is not
counted, memory takes longer. Bytes are those of operands and results, but where an instruction can touch a part of an
array only, that part: rows that are gathered, slices, updates in place. A kernel that is handed a table and ids reads
(and, in place, writes) at most a row for each id.
"""

import dataclasses
import math
import re
from collections.abc import Iterator, Sequence

from sharding.program import ArrayShape, Computation, Instruction, Program

# A radix sort reads and writes keys and values once for every 8 bits of the key.
_SORT_BITS = 8
# Instructions that move nothing: they name, group or view arrays.
_FREE = (
    *("parameter", "constant", "get-tuple-element", "tuple", "bitcast", "after-all", "opt-barrier", "add-dependency"),
    *("partition-id", "replica-id", "domain", "copy-done", "slice-done", "async-done", "async-update", "call-done"),
)
_SLICES = ("slice", "dynamic-slice", "gather")
# Alone, in two parts or fused beside other work: their time is that of links.
_COLLECTIVES = (
    *("all-gather", "all-reduce", "reduce-scatter", "all-to-all"),
    *("ragged-all-to-all", "collective-permute", "collective-broadcast"),
)
# Dtypes of ids.
_IDS = ("s32", "u32")
# Calls that only name memory.
_NO_KERNELS = ('"AllocateBuffer"', '"ConcatBitcast"', '"Sharding"')
# Products of dense layers by `pallas_kernels.cpu`, whose first result is room to work in.
_LAYERS = ('"dlrm_product"', '"dlrm_parameter_gradients"')
_LABELS = re.compile(r"dim_labels=([\w?]+)_([\w?]+)->([\w?]+)")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Work:
    """What an instruction does on one device.

    Attributes:
        float32_flops: Arithmetic of matrix products of four-byte numbers.
        bfloat16_flops: The same of narrower ones.
        num_bytes: Bytes of main memory that are read and written.
        kernels: Kernels that are started.
    """

    float32_flops: float = 0.0
    bfloat16_flops: float = 0.0
    num_bytes: float = 0.0
    kernels: int = 0

    @property
    def flops(self) -> float:
        """All arithmetic of matrix products."""
        return self.float32_flops + self.bfloat16_flops

    def __add__(self, other: "Work") -> "Work":
        return Work(
            float32_flops=self.float32_flops + other.float32_flops,
            bfloat16_flops=self.bfloat16_flops + other.bfloat16_flops,
            num_bytes=self.num_bytes + other.num_bytes,
            kernels=self.kernels + other.kernels,
        )

    def __sub__(self, other: "Work") -> "Work":
        return self + other.times(-1)

    def times(self, count: int) -> "Work":
        """The same so many times."""
        return Work(
            float32_flops=self.float32_flops * count,
            bfloat16_flops=self.bfloat16_flops * count,
            num_bytes=self.num_bytes * count,
            kernels=self.kernels * count,
        )


def work_of(instruction: Instruction, program: Program) -> Work:
    """What an instruction does; nothing for a collective, whose time is that of links.

    A loop does what its body does, as often as it runs (once if that cannot be known). Of the branches of a condition
    the one that moves most bytes counts.

    Args:
        instruction: The instruction.
        program: The program that it is of.
    """
    opcode = instruction.opcode
    if opcode in _FREE or opcode.removesuffix("-start").removesuffix("-done") in _COLLECTIVES:
        return Work()
    if opcode == "while":
        body = _computation(instruction, program, "body")
        return _total(body, program).times(instruction.trip_count)
    if opcode == "conditional":
        branches = [_total(branch, program) for branch in program.called_by(instruction)]
        return max(branches, key=lambda work: work.num_bytes, default=Work())
    if opcode == "call-start" and not instruction.operands:
        return Work()  # A call-update hands it its operands.
    if opcode in ("call", "async-start", "call-start", "call-update"):
        # Work in the background competes for the same memory: it is charged where it starts.
        return sum((_total(called, program) for called in program.called_by(instruction)), Work())
    if opcode == "custom-call" and instruction.attribute("custom_call_target") in _NO_KERNELS:
        return Work()
    if opcode == "fusion":
        return _flops(instruction, program) + Work(num_bytes=_fusion_bytes(instruction, program), kernels=1)
    # Copies in the background start no kernel.
    kernels = 0 if opcode.endswith("-start") else 1
    return _flops(instruction, program) + Work(num_bytes=_bytes(instruction), kernels=kernels)


def _computation(instruction: Instruction, program: Program, attribute: str) -> Computation:
    return program.computations[(instruction.attribute(attribute) or "").lstrip("%")]


def _total(computation: Computation, program: Program) -> Work:
    return sum((work_of(instruction, program) for instruction in computation.instructions), Work())


def _flops(instruction: Instruction, program: Program) -> Work:
    """Matrix products of an instruction and of all that is fused into it."""
    if instruction.opcode == "fusion":
        found = Work()
        for called in program.called_by(instruction):
            found = sum((_flops(inner, program) for inner in called.instructions), found)
        return found
    products = _products(instruction)
    if not products:
        return Work()
    flops = 2.0 * products
    narrow = min(array.itemsize for arrays in instruction.inputs[:2] for array in arrays[:1]) <= 2
    return Work(bfloat16_flops=flops) if narrow else Work(float32_flops=flops)


def _products(instruction: Instruction) -> float:
    """Products of two numbers that an instruction adds up."""
    if instruction.attribute("custom_call_target") in _LAYERS:
        return instruction.inputs[0][0].size * instruction.results[1].shape[-1]
    if instruction.opcode == "dot" or _is_library_product(instruction):
        left = instruction.inputs[0][0].shape
        return instruction.results[0].size * math.prod(left[dim] for dim in _contracted(instruction))
    return _convolution_products(instruction) if instruction.opcode == "convolution" else 0.0


def _is_library_product(instruction: Instruction) -> bool:
    target = instruction.attribute("custom_call_target") or ""
    return instruction.opcode == "custom-call" and ("gemm" in target or "matmul" in target)


def _contracted(instruction: Instruction) -> Sequence[int]:
    dims = instruction.numbers("lhs_contracting_dims")
    if dims:
        return dims
    # Libraries' products have it in their settings: "lhs_contracting_dimensions":["1"].
    found = re.search(r'"lhs_contracting_dimensions":\[([^\]]*)\]', instruction.attributes)
    return tuple(map(int, re.findall(r"\d+", found[1]))) if found else ()


def _convolution_products(instruction: Instruction) -> float:
    """Products of a convolution, which is how TPUs are given matrix products."""
    labels = _LABELS.search(instruction.attributes)
    if labels is None:
        return 0.0
    left, right, result = (
        array.shape for array in (instruction.inputs[0][0], instruction.inputs[1][0], *instruction.results[:1])
    )
    spatial = [label for label in labels[3] if label.isdigit()]
    window = _window(instruction.attributes, len(spatial))
    total = float(left[labels[1].index("b")] * right[labels[2].index("o")] * right[labels[2].index("i")])
    for number, label in enumerate(spatial):
        terms = window[number]
        total *= _window_products(
            left[labels[1].index(label)], right[labels[2].index(label)], result[labels[3].index(label)], terms
        )
    return total


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Window:
    """How a convolution's kernel moves along one dimension."""

    stride: int = 1
    low_padding: int = 0
    left_dilation: int = 1
    right_dilation: int = 1


def _window(attributes: str, dims: int) -> list[_Window]:
    found = re.search(r"window=\{([^}]*)\}", attributes)
    text = found[1] if found else ""

    def terms(name: str, default: int) -> list[int]:
        match = re.search(rf"\b{name}=([\d_x\-]+)", text)
        return [int(part.partition("_")[0] or 0) for part in match[1].split("x")] if match else [default] * dims

    parts = zip(terms("stride", 1), terms("pad", 0), terms("lhs_dilate", 1), terms("rhs_dilate", 1), strict=True)
    return [
        _Window(stride=stride, low_padding=pad, left_dilation=left, right_dilation=right)
        for stride, pad, left, right in parts
    ]


def _window_products(left: int, right: int, result: int, window: _Window) -> int:
    """Pairs of a place in the result and one in the kernel that meet a number, not padding."""
    stride, dilation = window.stride, window.left_dilation
    end = (left - 1) * dilation
    common = math.gcd(stride, dilation)
    # Places in the result that meet a number are this far apart.
    step = dilation // common
    inverse = pow(stride // common, -1, step)
    total = 0
    for place in range(right):
        offset = place * window.right_dilation - window.low_padding
        if offset % common:
            continue
        first, last = max(0, -(offset // stride)), min(result - 1, (end - offset) // stride)
        met = -(offset // common) * inverse % step
        total += max(0, (last - met) // step - (first - 1 - met) // step)
    return total


def _bytes(instruction: Instruction) -> float:
    opcode = instruction.opcode
    match opcode:
        case "sort":
            return _sort_bytes(instruction)
        case "custom-call" if "RadixSort" in (instruction.attribute("custom_call_target") or ""):
            return _sort_bytes(instruction)
        case "slice" | "dynamic-slice" | "gather":
            return _moved(instruction.results, instruction.inputs[0]) + _far(instruction.results)
        case "copy-start":
            # It returns the copy, then its operand.
            return _far(instruction.results[:2])
        case "slice-start":
            slices = instruction.results[-2]
            return float(slices.num_bytes * (2 - slices.near))
        case "dynamic-update-slice" | "scatter":
            updates = _updates(instruction)
            return _far(updates) + _moved(updates, instruction.results)
        case "broadcast" | "iota":
            return _far(instruction.results)
        case "custom-call":
            return _kernel_bytes(instruction)
    return _far(instruction.results) + sum(_far(arrays) for arrays in instruction.inputs)


def _sort_bytes(instruction: Instruction) -> float:
    key = instruction.inputs[0][0]
    return 2.0 * math.ceil(key.itemsize * 8 / _SORT_BITS) * instruction.operand_bytes


def _far(arrays: Sequence[ArrayShape]) -> float:
    """Bytes of the arrays that are in main memory."""
    return float(sum(array.num_bytes for array in arrays if not array.near))


def _moved(parts: Sequence[ArrayShape], whole: Sequence[ArrayShape]) -> float:
    """Bytes of parts of arrays, unless those are not in main memory."""
    return float(sum(array.num_bytes for array in parts)) if _far(whole) else 0.0


def _updates(instruction: Instruction) -> tuple[ArrayShape, ...]:
    """The arrays that a scatter or an update in place writes: of operands, indices and updates, the last."""
    if instruction.opcode == "dynamic-update-slice":
        return instruction.inputs[1]
    count = (len(instruction.inputs) - 1) // 2
    return tuple(array for arrays in instruction.inputs[-count:] for array in arrays)


def _kernel_bytes(instruction: Instruction) -> float:
    """Bytes of a kernel: a row for each id at most, of tables that it is handed, and all of the rest."""
    num_ids = max((array.size for arrays in instruction.inputs for array in arrays if array.dtype in _IDS), default=0)

    def touched(array: ArrayShape) -> float:
        if array.near:
            return 0.0
        if len(array.shape) < 2 or not num_ids:
            return float(array.num_bytes)
        row_bytes = array.num_bytes / array.shape[0] if array.shape[0] else 0.0
        return min(float(array.num_bytes), num_ids * row_bytes)

    results = instruction.results
    if _is_library_product(instruction):
        results = results[:1]  # The other is room to work in.
    if instruction.attribute("custom_call_target") in _LAYERS:
        results = results[1:]
    arrays = [array for arrays in instruction.inputs for array in arrays]
    return sum(map(touched, (*arrays, *results)))


def _fusion_bytes(instruction: Instruction, program: Program) -> float:
    """Bytes of a fusion: what its computation touches of its operands, and writes of its results."""
    called = program.called_by(instruction)
    if not called:
        return _far(instruction.results) + sum(_far(arrays) for arrays in instruction.inputs)
    computation = called[0]
    sorts = [inner for inner in computation.instructions if inner.opcode == "sort"]
    if sorts:
        return sum(map(_bytes, sorts))
    total = 0.0
    for parameter, arrays in zip(computation.parameters, instruction.inputs, strict=False):
        total += min(_far(arrays), _read(parameter, computation, program))
    for written, result in zip(_written(computation), instruction.results, strict=False):
        total += min(_far((result,)), written)
    return total


def _read(parameter: Instruction, computation: Computation, program: Program) -> float:
    """Bytes of a parameter that a computation reads."""
    total = 0.0
    for view, user in _uses(parameter, computation):
        if user.opcode in _SLICES and user.operands[0] == view.name:
            total += sum(array.num_bytes for array in user.results)
        elif user.opcode in ("scatter", "dynamic-update-slice") and view.name in user.operands[: _targets(user)]:
            total += 0.0 if user.opcode == "dynamic-update-slice" else sum(a.num_bytes for a in _updates(user))
        elif user.opcode == "fusion" and program.called_by(user):
            inner = program.called_by(user)[0]
            given = zip(inner.parameters, user.operands, strict=False)
            total += sum(_read(place, inner, program) for place, name in given if name == view.name)
        elif (user.opcode == "tuple" and user.is_root) or user.opcode in _COLLECTIVES:
            continue
        else:
            return math.inf
    return total


def _uses(view: Instruction, computation: Computation) -> Iterator[tuple[Instruction, Instruction]]:
    """Who uses an array, or views of it; with the view."""
    users = computation.users[view.name]
    if view.is_root:
        yield view, view
    for user in users:
        if user.opcode in ("bitcast", "reshape") and not user.is_root:
            yield from _uses(user, computation)
        else:
            yield view, user


def _targets(scatter: Instruction) -> int:
    return 1 if scatter.opcode == "dynamic-update-slice" else (len(scatter.inputs) - 1) // 2


def _written(computation: Computation) -> list[float]:
    """Bytes that a computation writes of each of its results."""
    root = computation.root
    sources = [computation.by_name[name] for name in root.operands] if root.opcode == "tuple" else [root]
    written = []
    for source in sources:
        while source.opcode in ("bitcast", "reshape") and source.operands:
            source = computation.by_name[source.operands[0]]
        in_place = source.opcode in ("scatter", "dynamic-update-slice")
        size = sum(a.num_bytes for a in _updates(source)) if in_place else source.result_bytes
        written.append(0.0 if source.opcode in ("parameter", *_COLLECTIVES) else float(size))
    return written
