"""StopSignal: SIGTERM and SIGINT end training at the end of a step, the same one on every process."""

import signal
import threading

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool

from sharding.mesh import BY_DEVICE, sharding_on


class StopSignal:
    """Notes SIGTERM and SIGINT instead of dying of them; the second SIGINT interrupts as usual. A context manager.

    Attributes:
        received: Whether this process was signalled.
    """

    def __init__(self, mesh: Mesh):
        """Puts both possible flags on the devices, so that no step waits for a transfer.

        Args:
            mesh: Devices of all processes.
        """
        self.received = False
        self._previous: dict[int, object] = {}
        sharding = sharding_on(mesh, BY_DEVICE)
        local = len(mesh.local_devices)
        self._flags = [
            jax.make_array_from_process_local_data(sharding, np.full(local, value)) for value in (False, True)
        ]

    @property
    def flag(self) -> Bool[Array, " W"]:
        """What a step tells the other processes: each device says whether its process was signalled."""
        return self._flags[self.received]

    def __enter__(self) -> "StopSignal":
        # Python lets only the main thread handle signals; elsewhere (a notebook's worker) they are left alone.
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._previous[number] = signal.signal(number, self._note)
        return self

    def _note(self, number: int, frame: object) -> None:
        self.received = True
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # pyright: ignore[reportArgumentType]: what signal.signal returned
