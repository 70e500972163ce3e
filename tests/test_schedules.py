"""The schedules against the formula of facebookresearch/dlrm, step by step."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dlrm_jax.schedules import ScheduleConfig, make_schedule
from sharding.errors import InputError

# One float32 division and one square: a few units in the last place.
RTOL = 1e-6


def multipliers(config, num_steps):
    return np.asarray(jax.vmap(make_schedule(config))(jnp.arange(num_steps)), np.float64)


def reference_policy(config, num_steps):
    """What LRPolicyScheduler gives to step s, of which its own count is s + 1, with a plateau of 1."""
    values, last = [], 1.0
    for count in range(1, num_steps + 1):
        decayed = count - config.decay_start_step
        if count < config.warmup_steps:
            values.append(count / config.warmup_steps)
        elif 0 <= decayed < config.decay_steps:
            last = max(((config.decay_steps - decayed) / config.decay_steps) ** 2, config.min_multiplier)
            values.append(last)
        else:
            values.append(last)
    return np.array(values)


def test_multiplier_when_nothing_is_set_then_it_is_one_at_every_step():
    np.testing.assert_array_equal(multipliers(ScheduleConfig(), 5), np.ones(5))


def test_multiplier_when_warming_up_then_it_rises_linearly_from_the_first_step_and_stays_at_one():
    np.testing.assert_allclose(multipliers(ScheduleConfig(warmup_steps=4), 7), [0.25, 0.5, 0.75, 1, 1, 1, 1], rtol=RTOL)


@pytest.mark.parametrize(
    "config",
    [
        ScheduleConfig(warmup_steps=8, decay_start_step=15, decay_steps=12),
        ScheduleConfig(warmup_steps=8, decay_start_step=8, decay_steps=5, min_multiplier=0.1),
        ScheduleConfig(decay_start_step=3, decay_steps=1),
        ScheduleConfig(decay_start_step=0, decay_steps=10),
        ScheduleConfig(warmup_steps=8000, decay_start_step=70000, decay_steps=30000, min_multiplier=1e-7 / 24),
    ],
    ids=["plateau", "no plateau, floor", "one step", "at once", "MLPerf"],
)
def test_multiplier_when_polynomial_then_it_follows_the_reference_policy(config):
    num_steps = config.decay_start_step + config.decay_steps + 10
    np.testing.assert_allclose(multipliers(config, num_steps), reference_policy(config, num_steps), rtol=RTOL)


def test_multiplier_when_the_decay_is_over_then_the_last_value_stays():
    values = multipliers(ScheduleConfig(decay_start_step=2, decay_steps=10), 40)
    np.testing.assert_allclose(values[11:], 0.01, rtol=RTOL)


def test_schedule_when_given_to_optax_under_jit_then_updates_are_scaled_by_it():
    schedule = make_schedule(ScheduleConfig(warmup_steps=4))
    optimizer = optax.chain(optax.scale_by_schedule(schedule), optax.sgd(0.5))
    params = jnp.ones(())
    state = optimizer.init(params)
    step = jax.jit(lambda state: optimizer.update(jnp.ones(()), state))
    updates = []
    for _ in range(5):
        update, state = step(state)
        updates.append(float(update))
    np.testing.assert_allclose(updates, [-0.125, -0.25, -0.375, -0.5, -0.5], rtol=RTOL)


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        ({"warmup_steps": -1}, "schedule.warmup_steps is -1"),
        ({"decay_steps": -5}, "schedule.decay_steps is -5"),
        ({"warmup_steps": 2**31}, "schedule.warmup_steps is 2147483648, but must be at most 2147483647"),
        ({"decay_start_step": 2**31, "decay_steps": 5}, "schedule.decay_start_step is 2147483648"),
        ({"decay_steps": 2**31}, "schedule.decay_steps is 2147483648"),
        ({"decay_steps": 5, "min_multiplier": 1.5}, "schedule.min_multiplier is 1.5"),
        ({"warmup_steps": 10, "decay_start_step": 9, "decay_steps": 5}, "schedule.decay_start_step is 9"),
        ({"decay_start_step": 9}, "decay_steps is 0"),
        ({"min_multiplier": 0.5}, "decay_steps is 0"),
    ],
)
def test_config_when_it_contradicts_itself_then_one_line_names_the_field(settings, field):
    with pytest.raises(InputError, match=field) as error:
        ScheduleConfig(**settings)
    assert "\n" not in str(error.value)
