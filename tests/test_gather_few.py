"""A few numbers of every device, gathered as each platform does it best."""

import jax
import numpy as np
import pytest

from pallas_kernels.target import interpreting
from sharding.gather_few import gather_few
from sharding.mesh import BY_DEVICE, make_mesh


@pytest.mark.parametrize(("device_kind", "by"), [("NVIDIA H200", "all-gather"), ("TPU v5", "all-to-all")])
def test_gather_few_then_what_each_device_has_node_by_node(device_kind: str, by: str) -> None:
    numbers = np.arange(24, dtype=np.int32)
    mesh = make_mesh(2, 4)
    gather = jax.jit(
        jax.shard_map(
            lambda x: gather_few(x)[None], mesh=mesh, in_specs=BY_DEVICE, out_specs=BY_DEVICE, check_vma=False
        )
    )
    with interpreting(device_kind):
        compiled = gather.lower(numbers).compile()
    np.testing.assert_array_equal(compiled(numbers), np.broadcast_to(numbers.reshape(8, 3), (8, 8, 3)))
    assert f" {by}(" in str(compiled.as_text())
