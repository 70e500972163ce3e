"""Sums of dense gradients over devices: exact, or rounded on their way, with what rounding takes owed to later sums."""

import math
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sharding.all_reduce import AllReduce, all_reduce_local
from sharding.mesh import BY_DEVICE, make_mesh

DEVICES = 8
# Of which the second is added up by itself.
SHAPES = {"bias": (5,), "kernel": (256, 256), "thin": (7, 3)}
SIZE = 5 + 256 * 256 + 21


def gradients_of(seed: int) -> dict[str, np.ndarray]:
    """Gradients of each device, of very different sizes."""
    random = np.random.default_rng(seed)
    scale = 10.0 ** random.integers(-6, 2, size=DEVICES)
    return {
        name: (random.normal(size=(DEVICES, *shape)) * scale.reshape(-1, *[1] * len(shape))).astype(np.float32)
        for name, shape in SHAPES.items()
    }


def adding(how: AllReduce, *, nodes: int = 2, devices: int = DEVICES):
    """A function of all devices' gradients and what each owes: every device's sums, and what it owes then."""
    mesh = make_mesh(nodes, devices // nodes)

    def of_device(gradients, residual):
        own = {name: part[0] for name, part in gradients.items()}
        sums, owed = all_reduce_local(own, how, residual)
        return jax.tree.map(lambda x: x[None], sums), owed

    return jax.jit(jax.shard_map(of_device, mesh=mesh, in_specs=BY_DEVICE, out_specs=BY_DEVICE, check_vma=False))


def added(how: AllReduce, gradients, residual, *, nodes: int = 2, devices: int = DEVICES):
    return jax.device_get(adding(how, nodes=nodes, devices=devices)(gradients, residual))


def flat(tree) -> np.ndarray:
    return np.concatenate([np.asarray(tree[name], np.float64).reshape(DEVICES, -1) for name in sorted(tree)], axis=1)


@pytest.mark.parametrize("how", ["float32", "bfloat16", "bfloat16_feedback"])
@pytest.mark.parametrize("nodes", [1, 2, 8])
def test_sums_then_the_same_bits_on_every_device_and_within_the_error_of_what_travels(how, nodes):
    gradients = gradients_of(0)
    residual = jnp.zeros((DEVICES, SIZE)) if how == "bfloat16_feedback" else None
    sums, _ = added(how, gradients, residual, nodes=nodes)
    found, given = flat(sums), flat(gradients)
    np.testing.assert_array_equal(found, np.broadcast_to(found[:1], found.shape))
    # Two hops and the way back, each rounded to eight bits; float32 rounds its sums alone.
    bound = (3 * 2.0**-8 if how != "float32" else 2.0**-21) * np.abs(given).sum(axis=0)
    assert (np.abs(found[0] - given.sum(axis=0)) <= bound).all()


@pytest.mark.parametrize("how", ["bfloat16", "bfloat16_feedback"])
def test_sums_in_bfloat16_then_half_the_bytes_travel_and_nothing_but_codes(how):
    owed = jnp.zeros((DEVICES, SIZE)) if how == "bfloat16_feedback" else None
    program = adding(how).lower(gradients_of(0), owed).compile().as_text()
    found = re.findall(r"= (\(?\w+\[.*?) (all-[a-z-]+)\(.*?replica_groups=mesh\[.*?\] {(.*?)}", program)
    assert [kind for _, kind, _ in found] == ["all-to-all", "all-to-all", "all-gather", "all-gather"]
    received = 0.0
    for shapes, _, axes in found:
        assert set(re.findall(r"(\w+)\[", shapes)) == {"u16"}
        size = sum(math.prod(map(int, shape.split(","))) for shape in re.findall(r"\[([\d,]+)\]", shapes))
        members = {"'node'": 2, "'chip'": 4}[axes]
        received += 2 * size * (members - 1) / members
    # A ring all-reduce of float32 sends twice four bytes of all numbers but a device's own.
    assert received == pytest.approx(8 * SIZE * (DEVICES - 1) / DEVICES / 2, rel=1e-3)


@pytest.mark.parametrize("nodes", [1, 2])
def test_feedback_then_nothing_is_lost_over_steps_but_what_is_owed_at_the_end(nodes):
    residual = jnp.zeros((DEVICES, SIZE))
    arrived, true = np.zeros(SIZE), np.zeros(SIZE)
    for step in range(6):
        gradients = gradients_of(step % 2)
        sums, residual = added("bfloat16_feedback", gradients, residual, nodes=nodes)
        arrived += flat(sums)[0]
        true += flat(gradients).sum(axis=0)
    owed = np.asarray(residual, np.float64).sum(axis=0)
    size = np.abs(flat(gradients_of(0))).sum(axis=0) + np.abs(flat(gradients_of(1))).sum(axis=0)
    np.testing.assert_allclose(arrived + owed, true, atol=1e-5 * size.max())
    # Less than what one step may round.
    assert (np.abs(owed) <= 4 * 2.0**-8 * size).all()


@pytest.mark.parametrize("how", ["bfloat16", "bfloat16_feedback"])
def test_sum_of_one_device_then_not_rounded_and_what_was_owed_is_paid(how):
    gradients = {name: part[:1] for name, part in gradients_of(0).items()}
    owed = jnp.ones((1, SIZE)) if how == "bfloat16_feedback" else None
    sums, left = added(how, gradients, owed, nodes=1, devices=1)
    for name, part in gradients.items():
        np.testing.assert_array_equal(sums[name], part if owed is None else part + np.float32(1))
    assert left is None if owed is None else not left.any()


def test_sums_when_a_gradient_is_not_finite_then_neither_is_its_sum():
    gradients = gradients_of(0)
    gradients["bias"][3, 2] = np.inf
    sums, _ = added("bfloat16", gradients, None)
    assert np.isnan(sums["bias"][:, 2]).all()
    assert np.isfinite(sums["bias"][:, 1]).all()


def test_a_residual_that_does_not_fit_then_an_error_says_so():
    reduce = partial(all_reduce_local, {"bias": jnp.zeros(3)})
    with pytest.raises(ValueError, match="'bfloat16_feedback' without a residual"):
        reduce("bfloat16_feedback", None)
    with pytest.raises(ValueError, match="'float32' with a residual: only feedback has one"):
        reduce("float32", jnp.zeros((1, 3)))
    with pytest.raises(ValueError, match="'int4' does not exist; use one of float32, bfloat16, bfloat16_feedback"):
        reduce("int4", None)  # pyright: ignore[reportArgumentType] - what a config file may say
