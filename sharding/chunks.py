"""Seconds of a step whose samples are cut into chunks, and the number of chunks that makes it shortest.

With exchanges of F seconds forward and G backward, a dense part of D seconds, and k chunks, the vectors of the first
chunk travel while the next batch's ids are got ready (R seconds), the gradients of the last one while those of its
weights are computed, a third of the dense part's arithmetic, and the others beside other chunks::

    T(k) = max(0, F / k - R) + max(0, (G - D / 3) / k) + max(D, (F + G) (1 - 1 / k)) + (k - 1) (L + M)

where L is the time that a chunk's exchanges take to start, and M that of what each chunk reads anew: the weights, for
the forward pass and twice for the backward pass, and their gradients, read and written. Beside T(k), ids of the next
batch and the all-reduce travel while rows are looked up and updated (I + A against P + U), and the second pass of rules
that need whole rows (S) has nothing beside it::

    step = T(k) + max(P + U, I + A) + S + latency

This is an estimate: compiled programs show what XLA makes of it (docs/overlap.md).
"""

from collections.abc import Sequence

from sharding.cost import Step, cost_of_layout
from sharding.cost_settings import STAGES
from sharding.layout import Layout
from sharding.tables import FeatureSpec

# Fewer samples at once leave most of an accelerator's matrix units idle.
_FEWEST_SAMPLES = 256
_MOST_CHUNKS = 32
_FLOAT_BYTES = 4
_PASSES = 5
# Of memory traffic for each id until it sets out: read off the compiled step of dcnv2_mlperf for h200:1x8.
_ROUTING_BYTES = 1500


def best_chunks(layout: Layout, features: Sequence[FeatureSpec], step: Step) -> int:
    """The number of chunks of the shortest step, a power of two that divides the samples of a device.

    Args:
        layout: A plan that is laid out.
        features: The features.
        step: What a training step asks of the machine.

    Returns:
        k; 1 where nothing travels.
    """
    seconds = cost_of_layout(layout, features, step).seconds
    samples, most = step.batch_size // layout.num_devices, 1
    while most < _MOST_CHUNKS and samples % (2 * most) == 0 and samples >= 2 * most * _FEWEST_SAMPLES:
        most *= 2
    choices = [2**power for power in range(most.bit_length())]
    return min(choices, key=lambda chunks: overlapped_seconds(seconds, layout, step, chunks))


def overlapped_seconds(seconds: Sequence[float], layout: Layout, step: Step, chunks: int) -> float:
    """Seconds of a pipelined step in so many chunks.

    Args:
        seconds: Seconds of each of `STAGES` by itself, of `PlanCost`.
        layout: The plan that they are the cost of.
        step: What a training step asks of the machine.
        chunks: k.
    """
    of_kind: dict[str, float] = {}
    for stage, value in zip(STAGES, seconds, strict=True):
        kind = stage.split()[0]
        of_kind[kind] = of_kind.get(kind, 0.0) + value
    vectors = of_kind["forward"] + of_kind["backward"]
    families = {group.family for group in layout.groups}
    bandwidth = step.topology.hbm_bandwidth * step.settings.bandwidth_efficiency
    reads = _PASSES * step.dense.parameters * _FLOAT_BYTES / bandwidth if bandwidth else 0.0
    ids = step.batch_size / layout.num_devices * sum(load.pooling_factor for load in step.loads.values())
    routing = ids * _ROUTING_BYTES / bandwidth if bandwidth else 0.0
    of_each = 2 * len(families) * step.exchange_latency() + reads
    first = max(0.0, of_kind["forward"] / chunks - routing)
    last = max(0.0, of_kind["backward"] - of_kind["dense"] / 3) / chunks
    dense = first + last + max(of_kind["dense"], vectors * (1 - 1 / chunks)) + (chunks - 1) * of_each
    tables = max(of_kind["lookup"] + of_kind["update"], of_kind["ids"] + of_kind["all-reduce"])
    return dense + tables + of_kind["statistics"] + of_kind["latency"]
