"""Trains a model.

    scripts/train.py CONFIG [--field.subfield value ...]

The same command again resumes the run in its --workdir. SIGTERM saves a checkpoint and exits with 0.
"""

from collections.abc import Sequence

from dlrm_jax.loop import TrainingError, train
from scripts.command_line import configure_jax, parse_config
from scripts.one_line_errors import run


def main(arguments: Sequence[str]) -> None:
    """Trains what the command line says."""
    config = parse_config(arguments, __doc__ or "")
    configure_jax()
    train(config)


if __name__ == "__main__":
    run(main, TrainingError)
