"""Target: the kind of device that the program being traced will run on, and whether Pallas kernels are interpreted."""

import contextlib
import contextvars
import dataclasses
from collections.abc import Iterator

import jax


@dataclasses.dataclass(frozen=True, kw_only=True)
class Target:
    """A kind of device.

    Attributes:
        platform: "cpu", "gpu" or "tpu".
        device_kind: JAX's name of it, such as "NVIDIA H200" or "TPU v5".
        interpreted: Whether Pallas kernels run in interpret mode, on whatever device is there.
    """

    platform: str
    device_kind: str
    interpreted: bool = False


_STAND_IN: contextvars.ContextVar[Target | None] = contextvars.ContextVar("target of interpreted kernels", default=None)


def current_target() -> Target:
    """The devices of the mesh that tracing happens in (`jax.shard_map`, `jax.set_mesh`); else the default device's."""
    stand_in = _STAND_IN.get()
    if stand_in is not None:
        return stand_in
    device = jax.sharding.get_abstract_mesh().abstract_device
    if device is None:
        # A device, the name of a platform, or None.
        default = jax.config.jax_default_device
        device = default if isinstance(default, jax.Device) else jax.local_devices(backend=default)[0]
    platform = "gpu" if device.platform in ("cuda", "rocm") else device.platform
    return Target(platform=platform, device_kind=device.device_kind)


@contextlib.contextmanager
def interpreting(device_kind: str) -> Iterator[None]:
    """Kernels traced in here are those of a device that need not be present, in Pallas's interpret mode.

    Slow: for tests. A function that was compiled outside stays what it was.

    Args:
        device_kind: JAX's name of the device, such as "NVIDIA H200" or "TPU v5".
    """
    platform = "tpu" if device_kind.startswith("TPU") else "gpu"
    token = _STAND_IN.set(Target(platform=platform, device_kind=device_kind, interpreted=True))
    try:
        yield
    finally:
        _STAND_IN.reset(token)
