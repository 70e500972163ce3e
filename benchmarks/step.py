"""Time of one training step beside JAX as a user would write it first.

    .venv/bin/python benchmarks/step.py

Workloads: the Criteo Kaggle model with tables of at most 200,000 rows (one id a bag), and 26 tables of 200,000 x 64
with 10 ids a bag. Random uniform ids; both sides get the same batches and take turns. The plain version keeps tables as
parameters: gather, sum, autodiff to dense gradients of tables, SGD; what `optax.sgd` on an `nnx.Embed` compiles to.
"""

import dataclasses
import datetime
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from rich.console import Console
from rich.table import Table

from configs import CONFIGS
from configs.stated import KAGGLE_ROWS, criteo_card
from dlrm_jax.config import Config, DataConfig, DenseOptimizerConfig, EmbeddingConfig, TableConfig
from dlrm_jax.data.batch import Batch
from dlrm_jax.losses import weighted_bce
from dlrm_jax.metrics import BinnedMetrics
from dlrm_jax.model import ModelConfig
from dlrm_jax.recommender import Recommender
from dlrm_jax.sources import card_of, open_split
from dlrm_jax.train_state import init_train_state, make_dense_optimizer
from dlrm_jax.train_step import make_train_step
from sharding import Embeddings


def _workloads(batch_size: int) -> dict[str, Config]:
    kaggle = dataclasses.replace(
        CONFIGS["criteo_kaggle"](),
        stated=criteo_card("kaggle", [min(rows, 200_000) for rows in KAGGLE_ROWS], splits={"train": 2**20}),
    )
    multi_hot = Config(
        name="26 x 200k x 64, 10 ids",
        embedding=EmbeddingConfig(default=TableConfig(dim=64, optimizer="sgd", learning_rate=0.1)),
        model=ModelConfig(bottom_mlp=(512, 256, 64), top_mlp=(512, 512, 256, 1)),
        dense_optimizer=DenseOptimizerConfig(name="sgd", learning_rate=0.1),
        stated=criteo_card("multi_hot", [200_000] * 26, splits={"train": 2**20}, pooling_factors=[10] * 26),
    )
    data = DataConfig(path=None, batch_size=batch_size)
    return {config.name: dataclasses.replace(config, data=data) for config in (kaggle, multi_hot)}


def _ours(recommender: Recommender, batches: list[Batch]) -> Callable[[int], None]:
    config = recommender.config
    optimizer = make_dense_optimizer(config.dense_optimizer, config.schedule)
    step = make_train_step(recommender, optimizer)
    held = [init_train_state(recommender, optimizer), BinnedMetrics.zeros()]

    def run(number: int) -> None:
        held[0], held[1], report = step(held[0], held[1], batches[number % len(batches)])
        report.fault.block_until_ready()

    return run


def _plain(recommender: Recommender, batches: list[Batch]) -> Callable[[int], None]:
    tables, names = recommender.tables.tables, recommender.features
    rate = recommender.config.dense_optimizer.learning_rate

    def loss(params, batch: Batch):
        dense_params, weights = params
        bags = batch.ids.values.reshape(len(names), len(batch.label), -1)
        pooled = [weights[i][bags[i]].sum(axis=1) for i in range(len(names))]
        embeddings = Embeddings(blocks=(jnp.stack(pooled, axis=1),), sequences={}, names=(names,))
        return weighted_bce(recommender.logits(dense_params, batch.dense, embeddings), batch.label, batch.weight)

    def step(params, batch: Batch):
        return jax.tree.map(lambda p, g: p - rate * g, params, jax.grad(loss)(params, batch))

    compiled = jax.jit(step, donate_argnums=0)
    held = [(recommender.init_dense(), [jnp.zeros((table.num_rows, table.dim)) for table in tables])]

    def run(number: int) -> None:
        held[0] = jax.block_until_ready(compiled(held[0], batches[number % len(batches)]))

    return run


def main(batch_size: int = 2048, steps: int = 20, out: Path = Path("benchmarks/results/step.json")) -> None:
    """Times training steps.

    Args:
        batch_size: Samples of a step.
        steps: Steps timed of each side, in turns.
        out: Where to write the figures.
    """
    results = []
    table = Table("workload", "ours, ms", "plain JAX, ms", "ratio", "samples/s", title="median time of a training step")
    for name, config in _workloads(batch_size).items():
        recommender = Recommender(config, card_of(config))
        source = open_split(recommender, "train", training=True).batches(0)
        batches = [recommender.to_devices(next(source)) for _ in range(4)]
        times: dict[str, list[float]] = {}
        sides = {"ours": _ours(recommender, batches), "plain": _plain(recommender, batches)}
        for number in range(-2, steps):
            for side, run in sides.items():
                started = time.perf_counter()
                run(number)
                if number >= 0:
                    times.setdefault(side, []).append(1e3 * (time.perf_counter() - started))
        ours, plain = (statistics.median(times[side]) for side in ("ours", "plain"))
        results.append({"workload": name, "ours_ms": ours, "plain_ms": plain, "ratio": plain / ours})
        table.add_row(name, f"{ours:.1f}", f"{plain:.1f}", f"{plain / ours:.2f}", f"{1e3 * batch_size / ours:,.0f}")
    Console().print(table)
    body = {
        "command": f"benchmarks/step.py --batch_size {batch_size} --steps {steps}",
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "device": f"{jax.devices()[0].device_kind}, {platform.machine()}",
        "versions": {"jax": jax.__version__, "numpy": np.__version__},
        "results": results,
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(body, indent=1) + "\n")


if __name__ == "__main__":
    tyro.cli(main, use_underscores=True)
