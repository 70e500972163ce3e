"""Model F of the paper: 12 trillion parameters in 50 tables.

    .venv/bin/python scripts/plan.py paper_f --topology b200:32x8 --partitioner ldm
    .venv/bin/python scripts/train.py paper_f --mesh.nodes 32 --mesh.chips 8

For planning: its dataset does not exist here, and its 24 TB of float16 tables need the memory of 256 B200s.

From the paper (Mudigere et al., ISCA 2022): the parameters, and 5 million operations a sample. Recalled of it, not
looked up: tens of tables of dim 256, 20 ids a bag on average, 7 MLP layers of width 490, float16 tables with row-wise
AdaGrad.
Chosen: 50 tables, log-normal rows (the largest table has 11 billion, more than 32 bits count) and pooling factors, a
batch of 65536 as for model A, 340 dense features, and an interaction that projects each embedding to 24 dimensions and
concatenates, so that the operations come out.
"""

from configs.skewed import Skewed
from dlrm_jax.config import Config, TrainConfig
from dlrm_jax.model import ModelConfig

_TABLES = Skewed(
    name="paper_f",
    num_parameters=12_000_000_000_000,
    tables_of_dim={256: 50},
    pooling_factor=20.0,
    num_dense=340,
    row_sigma=1.5,
)


def paper_f() -> Config:
    """The paper's model F: 50 tables, 12 trillion parameters; to plan."""
    return Config(
        name="paper_f",
        workdir="runs/paper_f",
        data=_TABLES.data(),
        embedding=_TABLES.embedding(),
        model=ModelConfig(bottom_mlp=(490,) * 3, top_mlp=(*(490,) * 4, 1), interaction="cat", projection_dim=24),
        train=TrainConfig(log_every=10, checkpoint_every=None),
        stated=_TABLES.card(),
    )
