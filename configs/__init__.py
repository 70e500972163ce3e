"""Experiments by name: each a function that returns a complete Config."""

from collections.abc import Callable

from configs.criteo_kaggle import criteo_kaggle
from configs.criteo_terabyte_mlperf import criteo_terabyte_mlperf
from configs.dcnv2_mlperf import dcnv2_mlperf
from configs.kuairand import kuairand, kuairand_plain
from configs.paper_a import paper_a
from configs.paper_f import paper_f
from configs.paper_i import paper_i
from configs.quickstart import quickstart
from configs.reference_random import reference_random
from dlrm_jax.config import Config

CONFIGS: dict[str, Callable[[], Config]] = {
    config.__name__: config
    for config in (
        quickstart,
        kuairand,
        kuairand_plain,
        criteo_kaggle,
        criteo_terabyte_mlperf,
        dcnv2_mlperf,
        reference_random,
        paper_a,
        paper_i,
        paper_f,
    )
}
