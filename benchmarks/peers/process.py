"""Sides as processes of their own, one of which works at a time."""

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from benchmarks.peers.case import Case
from benchmarks.peers.environment import ROOT, peers_python


class Peer(NamedTuple):
    """How a side is started.

    Attributes:
        module: Its module in this folder.
        arguments: What the module is told beside the case.
        rowwise_adagrad: Whether it knows that rule.
        bfloat16: Whether it multiplies in that dtype, too.
        in_peers: Whether it lives in `.venv-peers`.
    """

    module: str
    arguments: tuple[str, ...] = ()
    rowwise_adagrad: bool = False
    bfloat16: bool = True
    in_peers: bool = True

    def serves(self, optimizer: str, dtype: str) -> bool:
        """Whether it knows a rule and a dtype."""
        return (optimizer == "sgd" or self.rowwise_adagrad) and (dtype == "float32" or self.bfloat16)


OURS = Peer("ours_model", rowwise_adagrad=True, in_peers=False)
PEERS = {
    "torchrec": Peer("torchrec_model", rowwise_adagrad=True),
    "torchrec_compiled": Peer("torchrec_model", ("compiled",), rowwise_adagrad=True),
    "torch": Peer("torch_model"),
    "torch_compiled": Peer("torch_model", ("compiled",)),
    "plain_jax": Peer("jax_model", bfloat16=False, in_peers=False),
}


class SideProcess:
    """A running side.

    Attributes:
        start_s: Seconds from the start of the process until its model was built.
    """

    def __init__(self, process: subprocess.Popen[str], what: str):
        """Waits until the side has the weights of the case.

        Args:
            process: The process.
            what: Its name in messages.
        """
        self._process = process
        self._what = what
        self.start_s: float = self._answer()["start_s"]
        self._answer()

    def ask(self, order: str) -> dict[str, Any]:
        """Gives an order of `serve.serve`, and waits for the answer."""
        assert self._process.stdin is not None
        self._process.stdin.write(order + "\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            # torch prints notes of its own.
            if line.startswith("{"):
                return json.loads(line)
        raise RuntimeError(f"{self._what} ended early; what it said is above")


@contextmanager
def started(peer: Peer, case: Case) -> Iterator[SideProcess]:
    """Starts a side, and ends it.

    Args:
        peer: Which.
        case: The workload.

    Yields:
        The side, with the weights of the case.
    """
    python = str(peers_python()) if peer.in_peers else sys.executable
    with tempfile.TemporaryDirectory() as cache:
        arguments = [json.dumps(dataclasses.asdict(case)), json.dumps(time.time()), *peer.arguments]
        process = subprocess.Popen(
            [python, "-m", f"benchmarks.peers.{peer.module}", *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env={
                **os.environ,
                "JAX_PLATFORMS": "cpu",
                # Threads that spin while they wait lose several times over on a host with other work to do.
                "OMP_WAIT_POLICY": "passive",
                # Nothing that an earlier run compiled is at hand.
                "TORCHINDUCTOR_CACHE_DIR": cache,
            },
        )
        with process:
            yield SideProcess(process, f"{peer.module} of {case.name}")
            assert process.stdin is not None
            process.stdin.close()
