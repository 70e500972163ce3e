"""Trains a model.

    scripts/train.py CONFIG [--field.subfield value ...]

The same command again resumes the run in its --workdir, also on other devices. SIGTERM saves a checkpoint and exits
with 0.

Several processes, each started with the same command, train together: JAX finds the others on Slurm, Open MPI,
Kubernetes and Cloud TPU; elsewhere add --coordinator HOST:PORT --num_processes N --process_id I.
"""

# First, and for what its import does: how Ctrl-C ends the script while the others are imported.
import scripts.interrupts  # noqa: F401

# isort: split

from collections.abc import Sequence

import jax

from dlrm_jax.distributed import ending_together, join, together
from dlrm_jax.loop import TrainingError, train
from dlrm_jax.save_errors import SaveError
from scripts.command_line import PROCESSES_HELP, configure_jax, parse_config, take_processes
from scripts.one_line_errors import run


def main(arguments: Sequence[str]) -> None:
    """Trains what the command line says."""
    processes, others = take_processes(arguments)
    if others and not {"-h", "--help"} & set(others):
        # Else JAX takes SIGTERM for itself, and a job that gets it before it trains goes on as if nothing had been.
        jax.config.update("jax_enable_preemption_service", False)
        join(processes)
    with ending_together(TrainingError):
        with together():
            config = parse_config(others, __doc__ or "", PROCESSES_HELP)
        configure_jax(config.mesh)
        train(config)


if __name__ == "__main__":
    run(main, TrainingError, SaveError)
