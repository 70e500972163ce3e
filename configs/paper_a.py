"""Model A of the paper: 793 billion parameters in 1,000 tables.

    .venv/bin/python scripts/plan.py paper_a --topology zionex:16x8 --partitioner ldm --compile
    .venv/bin/python scripts/train.py paper_a --mesh.nodes 16 --mesh.chips 8

For planning and compiling: its dataset does not exist here, and training on random batches needs 128 A100s.

From the paper (Mudigere et al., ISCA 2022): the parameters, and 638 million operations a sample. Recalled of it, not
looked up: about 1,000 tables of dims 4 to 384 (93 on average), 15 ids a bag on average, 20 MLP layers of width 3375,
float16 tables with row-wise AdaGrad, a batch of 65536. Chosen: how many tables have which dim, log-normal rows (half of
the tables have fewer than 450 thousand, the largest 1.7 billion) and pooling factors, 1,600 dense features, and an
interaction that projects each embedding to 28 dimensions and concatenates, so that the operations come out.
"""

from configs.skewed import Skewed
from dlrm_jax.config import Config, TrainConfig
from dlrm_jax.model import ModelConfig

_TABLES = Skewed(
    name="paper_a",
    num_parameters=793_000_000_000,
    tables_of_dim={4: 40, 8: 60, 16: 110, 32: 147, 64: 210, 96: 120, 128: 150, 192: 70, 256: 57, 384: 36},
    pooling_factor=15.0,
    num_dense=1600,
    row_sigma=2.5,
)


def paper_a() -> Config:
    """The paper's model A: 1,000 tables, 793 billion parameters; to plan and compile."""
    return Config(
        name="paper_a",
        workdir="runs/paper_a",
        data=_TABLES.data(),
        embedding=_TABLES.embedding(),
        model=ModelConfig(bottom_mlp=(3375,) * 6, top_mlp=(*(3375,) * 14, 1), interaction="cat", projection_dim=28),
        train=TrainConfig(log_every=10, checkpoint_every=None),
        stated=_TABLES.card(),
    )
