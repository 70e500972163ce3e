"""The text of compiled programs, read as what it says: instructions, and who exchanges with whom."""

import pytest
from program_cases import HEAD, program_of

from sharding.collective import Collective, axis_name, collective_of, role_of
from sharding.errors import InputError
from sharding.mesh import CHIP, NODE
from sharding.program import parse_program
from sharding.scopes import named_scopes, scopes_of


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
