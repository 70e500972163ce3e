"""Model I of the paper: 332 billion parameters in 400 tables, with long bags.

    .venv/bin/python scripts/plan.py paper_i --topology zionex:16x8 --partitioner ldm --compile
    .venv/bin/python scripts/train.py paper_i --mesh.nodes 16 --mesh.chips 8

For planning and compiling: its dataset does not exist here, and training on random batches needs 128 A100s.

From the paper (Mudigere et al., ISCA 2022): the parameters, and 60 million operations a sample. Recalled of it, not
looked up: hundreds of tables of dim 92, 70 ids a bag on average, 43 MLP layers of width 682. Chosen: 400 tables,
log-normal rows (the largest table has 0.6 billion) and pooling factors, float16 tables with row-wise AdaGrad and a
batch of 65536 as for model A, 800 dense features, and an interaction that projects each embedding to 32 dimensions and
concatenates, so that the operations come out.
"""

from configs.skewed import Skewed
from dlrm_jax.config import Config, TrainConfig
from dlrm_jax.model import ModelConfig

_TABLES = Skewed(
    name="paper_i",
    num_parameters=332_000_000_000,
    tables_of_dim={92: 400},
    pooling_factor=70.0,
    num_dense=800,
    row_sigma=2.0,
)


def paper_i() -> Config:
    """The paper's model I: 400 tables, 332 billion parameters, 70 ids a bag; to plan and compile."""
    return Config(
        name="paper_i",
        workdir="runs/paper_i",
        data=_TABLES.data(),
        embedding=_TABLES.embedding(),
        model=ModelConfig(bottom_mlp=(682,) * 13, top_mlp=(*(682,) * 30, 1), interaction="cat", projection_dim=32),
        train=TrainConfig(log_every=10, checkpoint_every=None),
        stated=_TABLES.card(),
    )
