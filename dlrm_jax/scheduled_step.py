"""ScheduledStep: a step that XLA orders by our estimates, see `sharding.scheduling`."""

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh

from sharding.capacities import Capacities
from sharding.compiler_options import CompilerOptions, options_to_look_at
from sharding.scheduling import can_schedule, scheduling_options
from sharding.topology import Topology, preset_of


class ScheduledStep:
    """A step under `jax.jit` that is compiled twice for each room for ids: to be estimated, and by that to be run."""

    def __init__(self, jit: Callable[[CompilerOptions], Any], topology: Topology):
        """Compiles nothing yet.

        Args:
            jit: Makes the step under `jax.jit`, given options to add to its own; ``capacities`` is static.
            topology: The devices, as estimates see them.
        """
        self._jit = jit
        self._topology = topology
        self._plain = jit({})
        self._steps: dict[Capacities | None, Any] = {}

    def __call__(self, *given: Any, capacities: Capacities | None = None, **more: Any) -> Any:
        """Runs the step."""
        step = self._steps.get(capacities)
        if step is None:
            lowered = self.lower(*given, capacities=capacities, **more)
            compiled = lowered.compile(compiler_options=options_to_look_at(self._topology.platform) or None)
            step = self._steps[capacities] = self._jit(scheduling_options(compiled, self._topology))
        return step(*given, capacities=capacities, **more)

    def lower(self, *given: Any, **more: Any) -> jax.stages.Lowered:
        """Lowers the step, in no order yet."""
        return self._plain.lower(*given, **more)


def schedulable_topology(mesh: Mesh) -> Topology | None:
    """The devices as estimates see them; None where nothing can be ordered, or their figures are not known.

    It is the same in every run and on every process: nothing is measured.

    Args:
        mesh: The devices.
    """
    topology = preset_of(mesh.devices.flat[0].device_kind, *mesh.devices.shape)
    return topology if topology is not None and can_schedule(topology) else None
