"""Evaluates a trained model on a split.

    scripts/eval.py WORKDIR [--split test]

Prints a table, and as its last line the same figures as JSON.
"""

import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import tyro
from rich.console import Console

from dlrm_jax.metrics import Metrics
from dlrm_jax.predict import Predictor
from dlrm_jax.report import result_table
from scripts.command_line import configure_jax, run


def evaluate(
    workdir: Annotated[Path, tyro.conf.Positional],
    split: str = "test",
    checkpoint: Literal["best", "latest"] | int = "best",
    data: str | None = None,
) -> None:
    """Evaluates a trained model on every sample of a split.

    Args:
        workdir: Folder of the run.
        split: Split of the dataset.
        checkpoint: The best evaluated during training, the latest, or one by its step.
        data: Folder of the dataset; where the run was trained unless given.
    """
    configure_jax()
    predictor = Predictor(workdir, checkpoint=checkpoint)
    metrics = predictor.evaluate(split, path=data)
    rows: dict[str, Metrics | dict[str, float]] = {f"step {predictor.step:,}": metrics}
    attainable = predictor.recommender.card.attainable.get(split)
    if attainable:
        rows["attainable"] = attainable
    Console(stderr=True).print(result_table(f"{workdir}, {split}", rows))
    figures = {
        name: value if math.isfinite(value) else None
        for name, value in dataclasses.asdict(metrics).items()
        if name != "auc_error_bound"
    }
    print(json.dumps({"split": split, "step": predictor.step, **figures}))


def main(arguments: Sequence[str]) -> None:
    """Evaluates what the command line says."""
    tyro.cli(evaluate, args=list(arguments), use_underscores=True)


if __name__ == "__main__":
    run(main)
