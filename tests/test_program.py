"""The text of compiled programs, read as what it says: instructions, arithmetic, bytes, and who exchanges with whom."""

import pytest

from sharding.collective import Collective, axis_name, collective_of, role_of
from sharding.errors import InputError
from sharding.mesh import CHIP, NODE
from sharding.program import Program, parse_program
from sharding.scopes import named_scopes, scopes_of
from sharding.work import Work, work_of

HEAD = "HloModule jit_step, is_scheduled=true, entry_computation_layout={()->()}\n\n"
ADD = """%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[] parameter(0)
  %y = f32[] parameter(1)
  ROOT %sum = f32[] add(%x, %y)
}

"""


def program_of(entry: str, others: str = "") -> Program:
    """A program of such instructions, one a line."""
    lines = "\n".join(f"  {line.strip()}" for line in entry.strip().splitlines())
    return parse_program(f"{HEAD}{ADD}{others}ENTRY %main (a: f32[8,4]) -> f32[8,4] {{\n{lines}\n}}\n")


def work(entry: str, others: str = "") -> Work:
    """Work of the last instruction."""
    program = program_of(entry, others)
    return work_of(program.entry.instructions[-1], program)


def collective(line: str, nodes: int = 2, chips: int = 4, others: str = "") -> Collective:
    program = program_of(f"%a = f32[8,4]{{1,0}} parameter(0)\n{line}", others)
    found = collective_of(program.entry.instructions[-1], program, nodes, chips)
    assert found is not None
    return found


def test_an_instruction_when_read_then_it_has_results_operands_source_and_attributes() -> None:
    program = program_of(
        """%a = f32[8,4]{1,0:T(8,128)(2,1)S(1)} parameter(0), metadata={op_name="state"}
        %pair = (f32[8,4]{1,0:T(8,128)}, /*index=1*/s32[2]{0}) custom-call(%a, %a), custom_call_target="tpu(x)"
        ROOT %b = bf16[8,4]{1,0} reshape(%a), dimensions={0,1}, metadata={op_name="jit(step)/dense/add" stack=3}
        """
    )
    a, pair, b = program.entry.instructions
    assert a.results[0].near
    assert a.results[0].num_bytes == 128
    assert [(array.dtype, array.shape) for array in pair.results] == [("f32", (8, 4)), ("s32", (2,))]
    assert pair.operands == ("a", "a")
    assert pair.operand_bytes == 256
    assert (b.opcode, b.result_bytes, b.source) == ("reshape", 64, "jit(step)/dense/add")
    assert b.numbers("dimensions") == (0, 1)
    assert program.entry.root is b
    assert program.entry.users["a"] == (pair, b)


@pytest.mark.parametrize("text", ["", "HloModule jit_step\n\nENTRY %main () -> () {\n}\n", HEAD])
def test_a_text_that_is_no_scheduled_program_then_the_error_says_what_is_wrong(text: str) -> None:
    with pytest.raises(InputError, match=r"is_scheduled=true|no ENTRY"):
        parse_program(text)


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
        # A lookup: a row for each id, the ids, and what is written.
        ('%v = f32[8,16]{1,0} custom-call(%table, %ids), custom_call_target="mosaic_gpu_v2"', 32 * ROW + 128 + 8 * ROW),
        # An update in place: the same rows are read and written.
        (
            '%v = f32[1000000,16]{1,0} custom-call(%table, %ids), custom_call_target="mosaic_gpu_v2", '
            "output_to_operand_aliasing={{}: (0, {})}",
            2 * 32 * ROW + 128,
        ),
        # Four passes over keys and values.
        ("%v = (s32[32]{0}, s32[32]{0}) sort(%ids, %ids), dimensions={0}, to_apply=%add", 4 * 2 * 256),
        (
            "%v = (s32[32]{0}, s32[32]{0}, u8[99]{0}) custom-call(%ids, %ids), "
            'custom_call_target="__cub$DeviceRadixSort"',
            4 * 2 * 256,
        ),
        ('%v = f32[8,16]{1,0} custom-call(), custom_call_target="AllocateBuffer"', 0),
    ],
    ids=["gather", "slice", "near slice", "of near", "from near", "lookup", "update", "sort", "library", "allocation"],
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
            "%n = s32[] parameter(2)\n%g = f32[32,16]{1,0} parameter(3)\n"
            "%t = (s32[], f32[32,16]{1,0}) tuple(%n, %g)\n"
            "%v = (s32[], f32[32,16]{1,0}) while(%t), condition=%add, body=%body, "
            'backend_config={"known_trip_count":{"n":"7"}}',
            7 * 2 * 32 * ROW,
            7,
        ),
    ],
    ids=["gather", "gather in a fusion of its own", "scatter", "loop"],
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


SIZE = 8 * 4 * 4


@pytest.mark.parametrize(
    ("groups", "axes"),
    [
        ("replica_groups=mesh['node'=2,'chip'=4] {'chip'}", (CHIP,)),
        ("replica_groups=mesh['node'=2,'chip'=4] {'node'}", (NODE,)),
        ("replica_groups=mesh['node'=2,'chip'=4] {'node','chip'}", (NODE, CHIP)),
        ("replica_groups=mesh['axis_0'=8] {'axis_0'}", (NODE, CHIP)),
        ("replica_groups=mesh['axis_0'=8] {'axis_0':(2)4}", (CHIP,)),
        ("replica_groups=mesh['axis_0'=8] {'axis_0':(1)2}", (NODE,)),
        ("replica_groups={{0,1,2,3},{4,5,6,7}}", (CHIP,)),
        ("replica_groups={{0,4},{1,5},{2,6},{3,7}}", (NODE,)),
        ("replica_groups=[2,4]<=[8]", (CHIP,)),
        ("replica_groups=[4,2]<=[2,4]T(1,0)", (NODE,)),
        ("replica_groups={}", (NODE, CHIP)),
    ],
)
def test_replica_groups_in_any_form_then_the_axes_that_they_are_over(groups: str, axes: tuple[str, ...]) -> None:
    found = collective(f"%b = f32[8,4]{{1,0}} all-to-all(%a), channel_id=1, {groups}, dimensions={{0}}")
    assert found.axes == axes


@pytest.mark.parametrize(
    ("line", "inside", "between"),
    [
        ("%b = f32[8,4]{1,0} all-to-all(%a), replica_groups=mesh['n'=2,'c'=4] {'n','c'}", SIZE * 3 / 8, SIZE * 4 / 8),
        ("%b = f32[8,4]{1,0} all-to-all(%a), replica_groups=mesh['n'=2,'c'=4] {'c'}", SIZE * 3 / 4, 0),
        ("%b = f32[8,4]{1,0} all-to-all(%a), replica_groups=mesh['n'=2,'c'=4] {'n'}", 0, SIZE / 2),
        ("%b = f32[32,4]{1,0} all-gather(%a), replica_groups=mesh['n'=2,'c'=4] {'c'}", 3 * SIZE, 0),
        ("%b = f32[64,4]{1,0} all-gather(%a), replica_groups=mesh['n'=2,'c'=4] {'n','c'}", 6 * SIZE, SIZE),
        ("%b = f32[2,4]{1,0} reduce-scatter(%a), replica_groups=mesh['n'=2,'c'=4] {'c'}", SIZE * 3 / 4, 0),
        # Added inside nodes first: a quarter goes between them, and back.
        ("%b = f32[8,4]{1,0} all-reduce(%a), replica_groups=mesh['n'=2,'c'=4] {'n','c'}", SIZE * 6 / 4, SIZE / 4),
        ("%b = f32[8,4]{1,0} collective-permute(%a), source_target_pairs={{0,1},{1,0}}", SIZE, 0),
        ("%b = f32[8,4]{1,0} collective-permute(%a), source_target_pairs={{0,4},{4,0}}", 0, SIZE),
    ],
)
def test_a_collective_then_the_bytes_that_a_device_sends_over_each_kind_of_link(
    line: str, inside: float, between: float
) -> None:
    found = collective(line)
    assert (found.inside_bytes, found.between_bytes) == (inside, between)
    assert found.wire_bytes == inside + between


def test_a_collective_on_one_device_then_it_sends_nothing() -> None:
    found = collective("%b = f32[8,4]{1,0} all-reduce(%a), replica_groups=mesh['n'=1,'c'=1] {'n','c'}", 1, 1)
    assert (found.axes, found.wire_bytes, axis_name(found.axes)) == ((), 0.0, "none")


WRAPPED = """%called (p: f32[8,4]) -> f32[8,4] {
  %p = f32[8,4]{1,0} parameter(0)
  ROOT %r = f32[8,4]{1,0} all-reduce(%p), replica_groups={}, to_apply=%add
}

%begins (p.1: f32[8,4]) -> (f32[8,4], f32[8,4]) {
  %p.1 = f32[8,4]{1,0} parameter(0)
  %g = f32[8,4]{1,0} all-reduce(%p.1), replica_groups={}, backend_config={"async_collective_fusion_config":{}}
  ROOT %k = (f32[8,4]{1,0}, f32[8,4]{1,0}) custom-call(%g), custom_call_target="AsyncCollectiveStart"
}

"""


@pytest.mark.parametrize(
    ("line", "role"),
    [
        ("%b = f32[8,4]{1,0} all-reduce(%a), replica_groups={}", "whole"),
        ("%b = ((f32[8,4]{1,0}), f32[8,4]{1,0}) all-to-all-start(%a), replica_groups={}", "start"),
        (
            "%b = ((f32[8,4]{1,0}), f32[8,4]{1,0}) all-gather-start(%a), replica_groups={}, "
            'backend_config={"collective_backend_config":{"is_sync":true}}',
            "whole",
        ),
        ("%b = f32[8,4]{1,0} all-to-all-done(%a)", "end"),
        ("%b = ((f32[8,4]{1,0}), f32[8,4]{1,0}) async-start(%a), calls=%called", "start"),
        ("%b = ((), (), (s32[1]{0})) call-start(), to_apply=%called", "prepare"),
        ("%b = ((f32[8,4]{1,0}), f32[8,4]{1,0}) call-update(%a)", "start"),
        ("%b = f32[8,4]{1,0} fusion(%a), kind=kCustom, calls=%called", "whole"),
        ("%b = (f32[8,4]{1,0}, f32[8,4]{1,0}) fusion(%a), kind=kCustom, calls=%begins", "start"),
        ("%b = f32[8,4]{1,0} negate(%a)", None),
    ],
)
def test_what_begins_and_ends_a_collective_on_gpus_and_tpus_then_it_is_told_apart(line: str, role: str | None) -> None:
    program = program_of(f"%a = f32[8,4]{{1,0}} parameter(0)\n{line}", WRAPPED)
    assert role_of(program.entry.instructions[-1], program) == role


@pytest.mark.parametrize(
    ("source", "scopes"),
    [
        ("jit(step)/route_ahead/jit(_route_on_mesh)/shard_map/sort", ("route_ahead",)),
        ("jit(step)/dense/jit(_by_chunk)/shard_map/return_1/all_to_all", ("dense", "return_1")),
        ("jit(step)/dense/transpose(jvp())/dot_general", ("dense",)),
        ("jit(step)/(dense/shard_map/all_reduce/psum:update/psum)", ("dense", "all_reduce")),
        ("jit(step)/(reduce_sum:dense/psum)", ()),
        ("jit(step)/jit(_where)/select_n", ()),
        ("jit(step)/add", ()),
        ("cumsum", ()),
        ("", ()),
    ],
)
def test_named_scopes_of_a_source_then_from_the_outermost_to_the_innermost(
    source: str, scopes: tuple[str, ...]
) -> None:
    assert named_scopes(source) == scopes


def test_scopes_of_what_the_compiler_made_then_those_of_its_operands() -> None:
    program = program_of(
        """%a = f32[8,4]{1,0} parameter(0)
        %b = f32[8,4]{1,0} negate(%a), metadata={op_name="jit(step)/lookup/neg"}
        %c = f32[8,4]{1,0} negate(%a), metadata={op_name="jit(step)/dense/neg"}
        %copy = f32[8,4]{1,0} copy(%b)
        ROOT %d = f32[8,4]{1,0} add(%copy, %c), metadata={op_name="jit(step)/add"}
        """
    )
    scopes = scopes_of(program)
    assert [scopes[name] for name in ("a", "b", "c", "copy")] == ["other", "lookup", "dense", "lookup"]
