"""The training step is one program of one size, however many tables there are."""

import re

import jax
import pytest

from benchmarks.program_size import make_config, make_plan
from dlrm_jax.config import make_specs
from dlrm_jax.target_step import lower_train_step
from sharding.mesh import make_mesh


def lowered_step(num_tables: int) -> jax.stages.Lowered:
    config = make_config(num_tables)
    assert config.stated is not None
    plan = make_plan(make_specs(config.embedding, config.stated)[0], nodes=2, chips=4)
    return lower_train_step(config, config.stated, plan, make_mesh(2, 4))


def num_operations(program: str) -> int:
    return len(re.findall(r" = \"?(?:stablehlo|func)\.", program)) + program.count(" = call @")


@pytest.mark.slow
def test_the_step_when_tables_are_ten_times_as_many_then_the_program_is_as_large() -> None:
    # Fewer make a smaller program, with few of a kind on a device: 16,400 instructions for 20, 17,400 for 80, 18,000
    # for 100, 18,200 for 200 and 18,300 for 1,000 tables.
    few, many = (lowered_step(count) for count in (100, 1000))
    # Where vectors happen to lie side by side, a slice takes the place of a gather.
    assert num_operations(many.as_text()) <= 1.05 * num_operations(few.as_text())
    with jax.numpy_dtype_promotion("standard"):
        compiled = [step.compile().as_text() or "" for step in (few, many)]
    instructions = [text.count(" = ") for text in compiled]
    assert instructions[1] <= 1.05 * instructions[0]
