"""Learning-rate schedules: one multiplier of all learning rates, dense and sparse, as a function of the step."""

import dataclasses

import jax.numpy as jnp
import optax
from jaxtyping import Array, ArrayLike, Float

from dlrm_jax.config_types import check_types
from sharding.errors import InputError

# Of the base learning rates.
_NOTHING = 1e-3
# The last step that its number, an int32, counts.
_LAST_STEP = 2**31 - 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """Linear warmup, plateau, quadratic decay; each part is optional, and without any the rate is constant."""

    warmup_steps: int = 0
    """Steps over which the multiplier rises linearly to 1. 0: no warmup."""
    decay_start_step: int = 0
    """Number of steps before the decay. It cannot be less than `warmup_steps`."""
    decay_steps: int = 0
    """Steps over which the multiplier falls quadratically. 0: no decay."""
    min_multiplier: float = 0.0
    """What the decay does not go below. The DLRM reference has 1e-7 divided by the base learning rate."""

    def __post_init__(self):
        """Refuses schedules that contradict themselves."""
        check_types(self, "schedule.")
        for name in ("warmup_steps", "decay_start_step", "decay_steps"):
            value = getattr(self, name)
            if value < 0:
                raise InputError(f"schedule.{name} is {value}, but must be at least 0: raise it")
            if value > _LAST_STEP:
                raise InputError(f"schedule.{name} is {value}, but must be at most {_LAST_STEP}: lower it")
        if not 0.0 <= self.min_multiplier <= 1.0:
            raise InputError(f"schedule.min_multiplier is {self.min_multiplier}, but must be in [0, 1]: change it")
        if self.decay_steps and self.decay_start_step < self.warmup_steps:
            raise InputError(
                f"schedule.decay_start_step is {self.decay_start_step}, but warmup takes {self.warmup_steps} steps "
                "and must end before the decay starts: raise decay_start_step"
            )
        if not self.decay_steps and (self.decay_start_step or self.min_multiplier):
            raise InputError(
                "schedule.decay_start_step or schedule.min_multiplier is set, but decay_steps is 0: "
                "set decay_steps, or leave them out"
            )


def decayed_to_nothing(config: ScheduleConfig) -> int | None:
    """The step from which on learning rates are less than a thousandth of their base; None if they always are more.

    Args:
        config: The schedule.
    """
    last = max(config.decay_steps**-2, config.min_multiplier) if config.decay_steps else 1.0
    return config.decay_start_step + config.decay_steps if last < _NOTHING else None


def make_schedule(config: ScheduleConfig) -> optax.Schedule:
    """Makes the function from the step to the multiplier of the base learning rates.

    For step s = 0, 1, ... let c = s + 1 and d = c - decay_start_step. The multiplier is

    - `c / warmup_steps` while c < warmup_steps;
    - `max(((decay_steps - d) / decay_steps)^2, min_multiplier)` from d = 0 on, with d at most decay_steps - 1, so that
      the last value stays;
    - 1 in between.

    Source: `LRPolicyScheduler` of facebookresearch/dlrm (dlrm_s_pytorch.py), the policy of MLPerf's DLRM. There the
    plateau stays at the warmup's last value, (warmup_steps - 1) / warmup_steps; here it is 1.

    Args:
        config: The schedule.

    Returns:
        A function of the step, usable under jit. A table's learning rate is its base rate times the multiplier; in a
        chain with the dense optimizer, `optax.scale_by_schedule` does the same.
    """

    def multiplier(step: ArrayLike) -> Float[Array, ""]:
        count = jnp.asarray(step, jnp.int32) + 1
        value = jnp.ones((), jnp.float32)
        if config.warmup_steps:
            value = jnp.minimum(count.astype(jnp.float32) / config.warmup_steps, value)
        if config.decay_steps:
            decayed = jnp.minimum(count - config.decay_start_step, config.decay_steps - 1)
            fraction = (config.decay_steps - decayed).astype(jnp.float32) / config.decay_steps
            value = jnp.where(decayed >= 0, jnp.maximum(fraction**2, config.min_multiplier), value)
        return value

    return multiplier
