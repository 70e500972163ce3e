"""What the instructions of compiled programs do: arithmetic and bytes."""

import math

import pytest
from program_cases import program_of

from sharding.work import Work, work_of


def work(entry: str, others: str = "") -> Work:
    """Work of the last instruction."""
    program = program_of(entry, others)
    return work_of(program.entry.instructions[-1], program)


@pytest.mark.parametrize(
    ("line", "products"),
    [
        ("%c = f32[8,3]{1,0} dot(%a, %b), lhs_contracting_dims={1}, rhs_contracting_dims={0}", 8 * 3 * 4),
        ("%c = f32[8,3]{1,0} convolution(%a, %b), dim_labels=bf_io->bf", 8 * 3 * 4),
        (
            '%c = (f32[8,3]{1,0}, s8[4096]{0}) custom-call(%a, %b), custom_call_target="__cublas$gemm", '
            'backend_config={"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"]}}}',
            8 * 3 * 4,
        ),
    ],
    ids=["dot", "convolution", "library"],
)
def test_a_matrix_product_in_any_form_then_its_arithmetic_is_counted(line: str, products: int) -> None:
    found = work(f"%a = f32[8,4]{{1,0}} parameter(0)\n%b = f32[4,3]{{1,0}} parameter(1)\n{line}")
    assert found.float32_flops == 2 * products
    assert found.bfloat16_flops == 0
    assert found.num_bytes == 4 * (8 * 4 + 4 * 3 + 8 * 3)


@pytest.mark.parametrize(
    ("operands", "results", "target"),
    [("8,4 4,3", "8,3", "dlrm_product"), ("8,4 8,3", "4,3", "dlrm_parameter_gradients")],
)
def test_a_layer_of_the_cpu_kernels_then_its_room_to_work_in_counts_for_nothing(
    operands: str, results: str, target: str
) -> None:
    left, right = operands.split()
    found = work(
        f"%a = bf16[{left}]{{1,0}} parameter(0)\n%b = bf16[{right}]{{1,0}} parameter(1)\n"
        f'%c = (bf16[4096]{{0}}, f32[{results}]{{1,0}}) custom-call(%a, %b), custom_call_target="{target}"'
    )
    assert found.bfloat16_flops == 2 * 8 * 4 * 3
    sizes = [math.prod(map(int, shape.split(","))) for shape in (left, right, results)]
    assert found.num_bytes == 2 * (sizes[0] + sizes[1]) + 4 * sizes[2]


@pytest.mark.parametrize(
    ("window", "labels", "left", "right", "result", "products"),
    [
        # A batch of products, as a TPU has it: one place of the kernel meets each number.
        ("size=5 stride=4 lhs_dilate=5", "0bf_0io->0bf", "5,8,4", "5,4,3", "5,8,3", 5 * 8 * 4 * 3),
        # A sum over two dimensions.
        ("size=6", "b0f_0io->b0f", "8,6,4", "6,4,3", "8,1,3", 8 * 6 * 4 * 3),
        # A proper convolution with padding: 3 + 3 + 2 + 2 places meet numbers.
        ("size=3 pad=1_1", "b0f_0io->b0f", "1,4,2", "3,2,5", "1,4,5", 10 * 2 * 5),
    ],
    ids=["batch", "two dimensions", "padding"],
)
def test_a_convolution_with_a_window_then_only_places_that_meet_numbers_count(
    window: str, labels: str, left: str, right: str, result: str, products: int
) -> None:
    found = work(
        f"""%a = bf16[{left}]{{2,1,0}} parameter(0)
        %b = bf16[{right}]{{2,1,0}} parameter(1)
        %c = f32[{result}]{{2,1,0}} convolution(%a, %b), window={{{window}}}, dim_labels={labels}"""
    )
    assert found.bfloat16_flops == 2 * products


TABLE = "%table = f32[1000000,16]{1,0} parameter(0)\n%ids = s32[32]{0} parameter(1)\n"
ROW = 16 * 4


@pytest.mark.parametrize(
    ("line", "num_bytes"),
    [
        ("%v = f32[32,16]{1,0} gather(%table, %ids), slice_sizes={1,16}", 2 * 32 * ROW),
        ("%v = f32[1,16]{1,0} dynamic-slice(%table, %ids), dynamic_slice_sizes={1,16}", 2 * ROW),
        # What is in the vector memory of a TPU is not read from, or written to, the main one.
        ("%v = f32[4,16]{1,0:S(1)} slice(%table), slice={[0:4], [0:16]}", 4 * ROW),
        ("%n = f32[8,16]{1,0:S(1)} parameter(2)\n%v = f32[4,16]{1,0} slice(%n), slice={[0:4], [0:16]}", 4 * ROW),
        (
            "%n = f32[4,16]{1,0:S(1)} parameter(2)\n%i = s32[] parameter(3)\n"
            "%v = f32[1000000,16]{1,0} dynamic-update-slice(%table, %n, %i, %i)",
            4 * ROW,
        ),
        # Copies in the background: what is read and written of main memory, once each.
        (
            "%n = f32[4,16]{1,0} parameter(2)\n%v = (f32[4,16]{1,0:S(1)}, f32[4,16]{1,0}, u32[]) copy-start(%n)",
            4 * ROW,
        ),
        (
            "%v = ((f32[1000000,16]{1,0}), f32[4,16]{1,0:S(1)}, u32[]) slice-start(%table), slice={[0:4], [0:16]}",
            4 * ROW,
        ),
        # A lookup: a row for each id, the ids, and what is written.
        ('%v = f32[8,16]{1,0} custom-call(%table, %ids), custom_call_target="mosaic_gpu_v2"', 32 * ROW + 128 + 8 * ROW),
        (
            "%near = f32[64,16]{1,0:S(1)} parameter(2)\n"
            '%v = f32[8,16]{1,0:S(1)} custom-call(%near, %ids), custom_call_target="tpu_custom_call"',
            128,
        ),
        # An update in place: the same rows are read and written.
        (
            '%v = f32[1000000,16]{1,0} custom-call(%table, %ids), custom_call_target="mosaic_gpu_v2", '
            "output_to_operand_aliasing={{}: (0, {})}",
            2 * 32 * ROW + 128,
        ),
        # No more rows are read than there are.
        (
            "%few = f32[4,16]{1,0} parameter(2)\n"
            '%v = f32[8,16]{1,0} custom-call(%few, %ids), custom_call_target="mosaic_gpu_v2"',
            4 * ROW + 128 + 8 * ROW,
        ),
        # Four passes over keys and values.
        ("%v = (s32[32]{0}, s32[32]{0}) sort(%ids, %ids), dimensions={0}, to_apply=%add", 4 * 2 * 256),
        (
            "%v = (s32[32]{0}, s32[32]{0}, u8[99]{0}) custom-call(%ids, %ids), "
            'custom_call_target="__cub$DeviceRadixSort"',
            4 * 2 * 256,
        ),
        # Room to work in is not touched as a whole.
        (
            "%m = f32[16,16]{1,0} parameter(2)\n"
            '%v = (f32[16,16]{1,0}, s8[4096]{0}) custom-call(%m, %m), custom_call_target="__cublas$gemm"',
            3 * 16 * ROW,
        ),
        ('%v = f32[8,16]{1,0} custom-call(), custom_call_target="AllocateBuffer"', 0),
    ],
    ids=[
        *(
            "gather",
            "slice",
            "near slice",
            "of near",
            "from near",
            "copy ahead",
            "slice ahead",
            "lookup",
            "near lookup",
        ),
        *("update", "few rows", "sort", "library", "product", "allocation"),
    ],
)
def test_bytes_of_what_touches_a_part_of_a_table_then_that_part_counts(line: str, num_bytes: int) -> None:
    assert work(TABLE + line).num_bytes == num_bytes


FUSIONS = """%gathers (t: f32[1000000,16], i: s32[32]) -> f32[32,16] {
  %t = f32[1000000,16]{1,0} parameter(0)
  %i = s32[32]{0} parameter(1)
  %same = f32[1000000,16]{1,0} bitcast(%t)
  %rows = f32[32,16]{1,0} gather(%same, %i), slice_sizes={1,16}
  ROOT %neg = f32[32,16]{1,0} negate(%rows)
}

%nests (t.2: f32[1000000,16], i.2: s32[32]) -> f32[32,16] {
  %t.2 = f32[1000000,16]{1,0} parameter(0)
  %i.2 = s32[32]{0} parameter(1)
  ROOT %inner = f32[32,16]{1,0} fusion(%t.2, %i.2), kind=kLoop, calls=%gathers
}

%writes (t.1: f32[1000000,16], i.1: s32[32], u: f32[32,16]) -> f32[1000000,16] {
  %t.1 = f32[1000000,16]{1,0} parameter(0)
  %i.1 = s32[32]{0} parameter(1)
  %u = f32[32,16]{1,0} parameter(2)
  ROOT %s = f32[1000000,16]{1,0} scatter(%t.1, %i.1, %u), to_apply=%add
}

%sorts (k: s32[32], v: s32[32]) -> (s32[32], s32[32]) {
  %k = s32[32]{0} parameter(0)
  %v = s32[32]{0} parameter(1)
  ROOT %sorted = (s32[32]{0}, s32[32]{0}) sort(%k, %v), dimensions={0}, to_apply=%add
}

%copies (c: f32[32,16]) -> f32[32,16] {
  %c = f32[32,16]{1,0} parameter(0)
  %away = (f32[32,16]{1,0:S(1)}, f32[32,16]{1,0}, u32[]) copy-start(%c)
  ROOT %there = f32[32,16]{1,0:S(1)} copy-done(%away)
}

%negates (e: f32[32,16]) -> f32[32,16] {
  %e = f32[32,16]{1,0} parameter(0)
  ROOT %opposite = f32[32,16]{1,0} negate(%e)
}

%hands (x.1: f32[32,16], y.1: f32[32,16]) -> (f32[32,16], f32[32,16]) {
  %x.1 = f32[32,16]{1,0} parameter(0)
  %y.1 = f32[32,16]{1,0} parameter(1)
  %minus = f32[32,16]{1,0} negate(%y.1)
  ROOT %two = (f32[32,16]{1,0}, f32[32,16]{1,0}) tuple(%x.1, %minus)
}

%body (state: (s32[], f32[32,16])) -> (s32[], f32[32,16]) {
  %state = (s32[], f32[32,16]{1,0}) parameter(0)
  %step = s32[] get-tuple-element(%state), index=0
  %value = f32[32,16]{1,0} get-tuple-element(%state), index=1
  %next = f32[32,16]{1,0} negate(%value)
  ROOT %both = (s32[], f32[32,16]{1,0}) tuple(%step, %next)
}

"""


@pytest.mark.parametrize(
    ("line", "num_bytes", "kernels"),
    [
        ("%v = f32[32,16]{1,0} fusion(%table, %ids), kind=kLoop, calls=%gathers", 2 * 32 * ROW + 128, 1),
        ("%v = f32[32,16]{1,0} fusion(%table, %ids), kind=kLoop, calls=%nests", 2 * 32 * ROW + 128, 1),
        # In place: what is written is read first.
        (
            "%g = f32[32,16]{1,0} parameter(2)\n"
            "%v = f32[1000000,16]{1,0} fusion(%table, %ids, %g), kind=kInput, calls=%writes",
            3 * 32 * ROW + 128,
            1,
        ),
        (
            "%v = (s32[32]{0}, s32[32]{0}) fusion(%ids, %ids), kind=kInput, calls=%sorts",
            4 * 2 * 256,
            1,
        ),
        # What is handed on as it is is neither read nor written.
        (
            "%g = f32[32,16]{1,0} parameter(2)\n"
            "%v = (f32[32,16]{1,0}, f32[32,16]{1,0}) fusion(%g, %g), kind=kLoop, calls=%hands",
            2 * 32 * ROW,
            1,
        ),
        # Of branches the one that moves most; copies in the background start no kernel.
        (
            "%n = s32[] parameter(2)\n%g = f32[32,16]{1,0} parameter(3)\n"
            "%v = f32[32,16]{1,0} conditional(%n, %g, %g), branch_computations={%copies, %negates}",
            2 * 32 * ROW,
            1,
        ),
        (
            "%g = f32[32,16]{1,0} parameter(2)\n%v = f32[32,16]{1,0} call(%g), to_apply=%copies",
            32 * ROW,
            0,
        ),
        (
            "%n = s32[] parameter(2)\n%g = f32[32,16]{1,0} parameter(3)\n"
            "%t = (s32[], f32[32,16]{1,0}) tuple(%n, %g)\n"
            "%v = (s32[], f32[32,16]{1,0}) while(%t), condition=%add, body=%body, "
            'backend_config={"known_trip_count":{"n":"7"}}',
            7 * 2 * 32 * ROW,
            7,
        ),
    ],
    ids=["gather", "gather in a fusion of its own", "scatter", "sort", "handed on", "condition", "copy", "loop"],
)
def test_bytes_of_a_fusion_or_loop_then_those_that_its_computation_touches(
    line: str, num_bytes: int, kernels: int
) -> None:
    found = work(TABLE + line, FUSIONS)
    assert (found.num_bytes, found.kernels) == (num_bytes, kernels)


OFFLOADED = """%sorts (k: s32[32], v: s32[32]) -> (s32[32], s32[32]) {
  %k = s32[32]{0} parameter(0)
  %v = s32[32]{0} parameter(1)
  ROOT %sorted = (s32[32]{0}, s32[32]{0}) sort(%k, %v), dimensions={0}, to_apply=%add
}, execution_thread="sparsecore"

%called (k.1: s32[32], v.1: s32[32]) -> (s32[32], s32[32]) {
  %k.1 = s32[32]{0} parameter(0)
  %v.1 = s32[32]{0} parameter(1)
  %begun = ((s32[32]{0}, s32[32]{0}), (s32[32]{0}, s32[32]{0}), u32[]) call-start(%k.1, %v.1), to_apply=%sorts
  ROOT %ended = (s32[32]{0}, s32[32]{0}) call-done(%begun)
}, execution_thread="sparsecore"

"""


def test_a_sort_when_a_tpu_runs_it_on_its_sparse_cores_then_its_bytes_are_those_of_a_sort() -> None:
    program = program_of(
        """%ids = s32[32]{0} parameter(0)
        %start = ((), (), (s32[1]{0})) call-start(), async_execution_thread="sparsecore", to_apply=%called
        %update = ((s32[32]{0}, s32[32]{0}), (s32[32]{0}, s32[32]{0})) call-update(%start, %ids, %ids)
        %done = (s32[32]{0}, s32[32]{0}) call-done(%update)""",
        OFFLOADED,
    )
    found = {each.opcode: work_of(each, program).num_bytes for each in program.entry.instructions}
    # Four passes over keys and values, where they are handed over.
    assert found == {"parameter": 0, "call-start": 0, "call-update": 4 * 2 * 256, "call-done": 0}


COUNTED = """%body (state: (s32[], f32[32,16])) -> (s32[], f32[32,16]) {
  %state = (s32[], f32[32,16]{1,0}) parameter(0)
  %step = s32[]{:T(128)} get-tuple-element(%state), index=0
  %one = s32[]{:T(128)} constant(STEP)
  %same = s32[]{:T(128)} copy(%step)
  %later = s32[]{:T(128)} add(%same, %one)
  %value = f32[32,16]{1,0} get-tuple-element(%state), index=1
  %next = f32[32,16]{1,0} negate(%value)
  ROOT %both = (s32[], f32[32,16]{1,0}) tuple(%later, %next)
}

%below (state.1: (s32[], f32[32,16])) -> pred[] {
  %state.1 = (s32[], f32[32,16]{1,0}) parameter(0)
  %limit = s32[]{:T(128)} constant(11), metadata={op_name="jit(step)/while/cond/lt"}
  %counter = s32[]{:T(128)} get-tuple-element(%state.1), index=0
  ROOT %lt = pred[]{:T(512)} compare(%counter, %limit), direction=LT
}

"""


@pytest.mark.parametrize(
    ("first", "step", "trips"),
    [("constant(0)", "1", 11), ("constant(1)", "4", 3), ("constant(12)", "1", 0), ("parameter(3)", "1", 1)],
)
def test_a_loop_when_the_compiler_does_not_say_how_often_it_runs_then_its_counter_does(
    first: str, step: str, trips: int
) -> None:
    loop = f"""%first = s32[]{{:T(128)}} {first}
        %n = s32[]{{:T(128)}} copy(%first)
        %g = f32[32,16]{{1,0}} parameter(0)
        %t = (s32[], f32[32,16]{{1,0}}) tuple(%n, %g)
        %v = (s32[], f32[32,16]{{1,0}}) while(%t), condition=%below, body=%body"""
    once = work(loop.replace(first, "constant(10)"), COUNTED.replace("STEP", "1"))
    # Copying and adding to the counter are work, too.
    assert once.num_bytes == 2 * 32 * ROW + 8 + 12
    assert work(loop, COUNTED.replace("STEP", step)) == once.times(trips)
