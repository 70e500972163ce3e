"""Several processes that train one model: how they meet, agree, and end together.

They agree through the key-value store of `jax.distributed`'s coordination service, which needs no device, waits for a
bounded time and carries texts of any length. What only one process runs into, such as a damaged file, ends that process
at once, and thereby the others.
"""

import contextlib
import dataclasses
import hashlib
import itertools
import json
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax

# JAX has no public name for the client of its coordination service.
from jax._src.distributed import global_state

from dlrm_jax.save_errors import SaveError
from dlrm_jax.workdir import Workdir
from sharding.errors import InputError

# A process that is silent for so long has died, and the others end.
HEARTBEAT_SECONDS = 20
# Processes may start minutes apart, and read files of different sizes before they agree.
PATIENCE_SECONDS = 300
# Who waits longer than this for the others to start says so.
_SECONDS_OF_SILENCE = 10
_PACKAGES = ("dlrm_jax", "sharding", "pallas_kernels")
_LOST_PEER = ("gloo", "nccl", "coordination service", "heartbeat", "connection reset", "connection closed")
# A file system may take so long to show a new file to other machines.
_SECONDS_TO_SHOW = 30.0
# What a shell says of a command that Ctrl-C ended.
_INTERRUPTED = 130
_exchanges = itertools.count()


class AgreedError(InputError):
    """Input that cannot be used, which every process of the job raises at the same moment."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Processes:
    """Who the processes of a job are, where no cluster says so.

    Attributes:
        coordinator: HOST:PORT at which process 0 can be reached.
        num_processes: Number of processes.
        process_id: Number of this process, from 0.
    """

    coordinator: str | None = None
    num_processes: int | None = None
    process_id: int | None = None


def join(processes: Processes | None = None) -> int:
    """Joins the other processes of the job, if there are any. Call it before anything asks JAX for devices.

    Args:
        processes: The processes; found by JAX itself (Slurm, Open MPI, Kubernetes, Cloud TPU) unless given.

    Returns:
        Number of processes.

    Raises:
        InputError: They are stated incompletely, or do not all come.
    """
    given = processes or Processes()
    fields = dataclasses.asdict(given)
    missing = [name for name, value in fields.items() if value is None]
    if given.num_processes is not None and given.num_processes < 1:
        raise InputError(f"--num_processes is {given.num_processes}, but must be at least 1: say how many are started")
    if given.num_processes == 1:
        return 1
    if 0 < len(missing) < len(fields):
        raise InputError(f"--{missing[0]} is missing: give all of {', '.join(f'--{name}' for name in fields)}, or none")
    if given.num_processes is not None and given.process_id is not None:
        if not 0 <= given.process_id < given.num_processes:
            raise InputError(
                f"--process_id is {given.process_id}, but {given.num_processes} processes count from 0 to "
                f"{given.num_processes - 1}"
            )
        host, _, port = str(given.coordinator).rpartition(":")
        if not (host and port.isdecimal() and 0 < int(port) < 2**16):
            raise InputError(f"--coordinator is {given.coordinator!r}, but must be HOST:PORT of process 0")
    others = "the other processes" if missing else f"the {given.num_processes} processes of {given.coordinator}"
    fix = "start them all" + ("" if missing else ", with the same --coordinator and --num_processes")
    try:
        with _waiting_for(others, fix):
            jax.distributed.initialize(
                given.coordinator,
                given.num_processes,
                given.process_id,
                heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
                initialization_timeout=2 * PATIENCE_SECONDS,
            )
    except ValueError:
        if not missing:
            raise
        return 1  # no cluster
    except RuntimeError as error:
        if not missing:
            reason = str(error).splitlines()[0][:200]
            raise InputError(f"{others} did not all come ({reason}): {fix}") from error
        raise
    return num_processes()


@contextlib.contextmanager
def _waiting_for(others: str, fix: str) -> Iterator[None]:
    """Says that processes are waited for, and ends this one in a line once that has taken too long.

    JAX would end it with the stack of a C++ program, and no exception to catch; and while it waits, Python's handler of
    Ctrl-C does not run, so that of the system takes its place.
    """
    come = threading.Event()

    def watch() -> None:
        if not come.wait(_SECONDS_OF_SILENCE):
            print(f"waiting for {others}, {PATIENCE_SECONDS} seconds at most", file=sys.stderr, flush=True)
            if not come.wait(PATIENCE_SECONDS - _SECONDS_OF_SILENCE):
                late = f"did not all come in {PATIENCE_SECONDS} seconds"
                print(f"error: {others} {late}: {fix}", file=sys.stderr, flush=True)
                os._exit(2)

    interruptible = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    interruptible &= threading.current_thread() is threading.main_thread()
    if interruptible:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    threading.Thread(target=watch, daemon=True).start()
    try:
        yield
    finally:
        come.set()
        if interruptible:
            signal.signal(signal.SIGINT, signal.default_int_handler)


def num_processes() -> int:
    """Number of processes of the job. Asks no device."""
    return global_state.num_processes


def process_id() -> int:
    """Number of this process, from 0. Asks no device."""
    return global_state.process_id


def gather(text: str) -> list[str]:
    """Tells every process what each of them says. All must call it, equally often.

    Args:
        text: What this process says.

    Returns:
        The texts, by number of process.

    Raises:
        InputError: A process has not said anything for `PATIENCE_SECONDS`.
        ConnectionError: A process has ended.
    """
    if num_processes() == 1:
        return [text]
    folder = f"dlrm_jax/{next(_exchanges)}/"
    client: Any = global_state.client
    client.key_value_set(f"{folder}{process_id()}", text)
    try:
        return [
            client.blocking_key_value_get(f"{folder}{number}", 1000 * PATIENCE_SECONDS)
            for number in range(num_processes())
        ]
    except jax.errors.JaxRuntimeError as error:
        if "DEADLINE_EXCEEDED" not in str(error):
            raise ConnectionError(f"coordination service: {str(error).splitlines()[0]}") from error
        raise InputError(
            f"not all of {num_processes()} processes have answered in {PATIENCE_SECONDS} seconds: see what the others "
            "print"
        ) from error


@contextlib.contextmanager
def together() -> Iterator[None]:
    """Runs a block that may find unusable input on some processes only; then every process raises.

    Raises:
        AgreedError: The block raised InputError on some process; on the others the message names that process.
    """
    own: InputError | None = None
    try:
        yield
    except InputError as error:
        own = error
    messages = gather("" if own is None else str(own))
    failed = [number for number, message in enumerate(messages) if message]
    if own is not None:
        raise AgreedError(str(own)) from own
    if failed:
        raise AgreedError(f"process {failed[0]} cannot go on: {messages[failed[0]]}")


def check_same(facts: Mapping[str, Any], *, fix: str = "start all with the same command and version") -> None:
    """Makes sure that all processes were started alike.

    Args:
        facts: What must be equal, by name; values that JSON can hold.
        fix: What to do where a fact differs.

    Raises:
        AgreedError: A fact differs; every process raises, and the message says which, and whose.
    """
    everyone = [json.loads(text) for text in gather(json.dumps(dict(facts), sort_keys=True))]
    names = sorted({name for each in everyone for name in each})
    for name in names:
        values = [each.get(name) for each in everyone]
        texts = [json.dumps(value) for value in values]
        others = [number for number, text in enumerate(texts) if text != texts[0]]
        if others:
            more = f" (and {len(others) - 1} other processes)" if len(others) > 1 else ""
            place, first, other = _difference(name, values[0], values[others[0]])
            raise AgreedError(
                f"processes differ: {place} is {_brief(first)} for process 0, but {_brief(other)} for process "
                f"{others[0]}{more}: {fix}"
            )


def _difference(place: str, one: Any, other: Any) -> tuple[str, Any, Any]:
    """The first place in two decoded JSON texts where they differ, and what is there."""
    pairs: list[tuple[str, Any, Any]] = []
    if isinstance(one, dict) and isinstance(other, dict):
        pairs = [(key, one.get(key), other.get(key)) for key in sorted({*one, *other})]
    elif isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        pairs = [
            (_label(number, first), first, second)
            for number, (first, second) in enumerate(zip(one, other, strict=True))
        ]
    for label, first, second in pairs:
        if json.dumps(first) != json.dumps(second):
            return _difference(f"{place}, {label}", first, second)
    return place, one, other


def _label(number: int, entry: Any) -> str:
    """What to call an entry of a list: by its name, if it has one."""
    named = [entry[key] for key in ("table", "name") if key in entry] if isinstance(entry, dict) else []
    return repr(named[0]) if named else f"number {number}"


def check_shared(workdir: Workdir) -> None:
    """Makes sure that all processes of a job see one folder, once process 0 has claimed it. All call it together.

    Args:
        workdir: The folder, as this process sees it.

    Raises:
        AgreedError: A process does not see it, or sees other checkpoints there.
    """
    with together():
        until = time.monotonic() + _SECONDS_TO_SHOW
        while not workdir.is_claimed():
            if time.monotonic() > until:
                raise InputError(
                    f"{workdir.path}: process 0 has begun a run there that process {process_id()} does not see: give "
                    "all processes one --workdir on a file system that they share"
                )
            time.sleep(0.2)
    check_same({f"the checkpoints in {workdir.path}, which all processes must share,": workdir.checkpoint_steps()})


def _brief(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else text[:77] + "..."


def code_version() -> dict[str, str]:
    """What program this is: a digest of the three packages' sources, and the version of JAX."""
    digest = hashlib.sha256()
    root = Path(__file__).parent.parent
    for path in sorted(path for package in _PACKAGES for path in (root / package).rglob("*")):
        if path.suffix in (".py", ".cc", ".h"):
            digest.update(str(path.relative_to(root)).encode() + path.read_bytes())
    return {"the code": digest.hexdigest()[:16], "the version of jax": jax.__version__}


@contextlib.contextmanager
def ending_together(*agreed: type[Exception]) -> Iterator[None]:
    """Ends this process at once where an exception is its own, because the others would wait for it forever.

    A process that exits as usual waits for all others first.

    Args:
        *agreed: Exceptions that, like AgreedError, all processes raise at the same moment.
    """
    try:
        yield
    except (AgreedError, *agreed):
        raise
    except KeyboardInterrupt:
        if num_processes() == 1:
            raise
        print(f"process {process_id()}: interrupted", file=sys.stderr, flush=True)
        os._exit(_INTERRUPTED)
    except Exception as error:
        if num_processes() == 1:
            raise
        if isinstance(error, (InputError, SaveError)):
            print(f"error: process {process_id()}: {error}", file=sys.stderr)
        elif any(sign in str(error).lower() for sign in _LOST_PEER):
            reason = str(error).splitlines()[0][:200]
            print(
                f"error: process {process_id()}: another process of this job has ended ({reason}); the same command, "
                "started again on all, goes on from the latest checkpoint",
                file=sys.stderr,
            )
        else:
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(2 if isinstance(error, InputError) else 1)
