"""Evaluates a trained model on a split.

    scripts/eval.py WORKDIR [--split test] [--mesh.nodes N --mesh.chips C]

Prints a table, and as its last line the same figures as JSON.
"""

# First, and for what its import does: how Ctrl-C ends the script while the others are imported.
import scripts.interrupts  # noqa: F401

# isort: split

import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import tyro
from rich.console import Console

from dlrm_jax.config import MeshConfig
from dlrm_jax.data.card import read_card
from dlrm_jax.data.display import ProgressDisplay
from dlrm_jax.metrics import Metrics
from dlrm_jax.predict import Predictor
from dlrm_jax.report import result_table
from pallas_kernels.implementations import Implementation
from scripts.command_line import configure_jax, parse_flags
from scripts.one_line_errors import run


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arguments:
    """Evaluates a trained model on every sample of a split."""

    workdir: tyro.conf.Positional[Path]
    """Folder of the run."""
    split: str = "test"
    """Split of the dataset."""
    checkpoint: Literal["best", "latest"] | int = "best"
    """The best evaluated during training, the latest, or one by its step."""
    data: str | None = None
    """Folder of the dataset; where the run was trained unless given."""
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    """Devices to evaluate on, which need not be those of the training."""
    plan: str | None = None
    """File of a sharding plan for them; the planner's unless given."""
    kernels: Implementation | None = None
    """Implementation of lookups; the best for the devices unless given."""


def main(arguments: Sequence[str]) -> None:
    """Evaluates what the command line says."""
    flags = [*(field.name for field in dataclasses.fields(Arguments)), "mesh.nodes", "mesh.chips"]
    given = parse_flags(Arguments, arguments, known=flags)
    configure_jax(given.mesh)
    split = given.split
    predictor = Predictor(
        given.workdir, checkpoint=given.checkpoint, mesh=given.mesh, plan=given.plan, kernels=given.kernels
    )
    with ProgressDisplay() as display:
        metrics = predictor.evaluate(split, path=given.data, progress=display.of_stage(split))
    rows: dict[str, Metrics | dict[str, float]] = {f"{predictor.step:,}": metrics}
    path = given.data or predictor.recommender.config.data.path
    # Of the samples at hand, which need not be those of the training.
    card = predictor.recommender.card if path is None else read_card(path)
    attainable = card.attainable.get(split)
    if attainable:
        rows["attainable"] = attainable
    Console(stderr=True, markup=False).print(result_table(f"{given.workdir}, {split}", rows))
    figures = {
        name: value if math.isfinite(value) else None
        for name, value in dataclasses.asdict(metrics).items()
        if name != "auc_error_bound"
    }
    print(json.dumps({"split": split, "step": predictor.step, **figures}))


if __name__ == "__main__":
    run(main)
