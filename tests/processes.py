"""Jobs of several processes of scripts/train.py on this machine, which meet at a port of their own."""

import socket
import subprocess
import time
from pathlib import Path

import kill9
import tiny

from dlrm_jax.config import make_specs
from sharding.plan import Placement, ShardingPlan, row_wise, table_row_wise, table_wise

# A job ends so soon after one of its processes has died.
LOST_WITHIN_SECONDS = 60


def flags(data: Path, workdir: Path, *more: object) -> list[str]:
    """The command line of scripts/train.py: small tables in float32; two epochs."""
    arguments = [
        *("quickstart", "--data.path", str(data), "--workdir", str(workdir)),
        *("--data.batch_size", str(tiny.BATCH_SIZE), "--data.eval_batch_size", str(tiny.BATCH_SIZE)),
        *("--data.virtual_shards", "4", "--data.shuffle_window", "256", "--embedding.default.dim", "8"),
        *("--model.bottom_mlp", "8", "--model.top_mlp", "8", "1", "--train.epochs", "2"),
        *("--train.checkpoint_every", "8", "--train.eval_every", "8", "--train.log_every", "1"),
        *more,
    ]
    return kill9.last_of_each(arguments)


def mesh(nodes: int, chips: int) -> list[str]:
    """The flags of a mesh."""
    return ["--mesh.nodes", str(nodes), "--mesh.chips", str(chips)]


def write_plan(data: Path, path: Path) -> Path:
    """Writes a plan of three placements on a mesh of 2 x 2; returns where it is."""
    user, item, tags = make_specs(tiny.config(data, path.parent).embedding, tiny.card())[0]
    placements: tuple[Placement, ...] = (
        row_wise(user, returns="rows"),
        table_row_wise(item, 1, returns="partial_sums"),
        table_wise(tags, 3),
    )
    ShardingPlan(nodes=2, chips=2, placements=placements).save(path)
    return path


def start(*commands: list[str]) -> list[subprocess.Popen[str]]:
    """Starts a job of one process a command line."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    job = ["--coordinator", f"127.0.0.1:{port}", "--num_processes", str(len(commands))]
    return [
        kill9.start([*command, *job, "--process_id", str(number)]) if len(commands) > 1 else kill9.start(command)
        for number, command in enumerate(commands)
    ]


def end(job: list[subprocess.Popen[str]], patience: float = kill9.PATIENCE_SECONDS) -> list[tuple[int, str]]:
    """Waits until all processes have ended; returns exit codes and what they wrote."""
    deadline = time.monotonic() + patience
    try:
        return [
            (process.returncode, errors)
            for process in job
            for _, errors in [process.communicate(timeout=max(deadline - time.monotonic(), 0.1))]
        ]
    finally:
        for process in job:
            process.kill()
            process.wait()


def train(*commands: list[str]) -> list[str]:
    """Runs a job that ends well; returns what its processes wrote."""
    ended = end(start(*commands))
    assert [code for code, _ in ended] == [0] * len(commands), "\n".join(errors for _, errors in ended)
    return [errors for _, errors in ended]
