"""How errors end a script: one line on standard error, also where tyro would draw a box of several."""

import contextlib
import io
import itertools
import os
import sys
from collections.abc import Callable, Iterator, Sequence

from scripts.interrupts import end_interrupted
from sharding.errors import InputError

# What a shell says of a command whose output nobody reads any more, as in `... | head`.
_NO_READER = 141


def run(main: Callable[[Sequence[str]], None], *fatal: type[Exception]) -> None:
    """Runs a script's main function: unusable input ends with one line on standard error and exit code 2.

    It ends without a word, and exit code 141, once nobody reads what it prints; at Ctrl-C with one line, which ends in
    what the KeyboardInterrupt says, and exit code 130.

    Args:
        main: Takes the command line without the script's name.
        *fatal: Exceptions that end with one line and exit code 1.
    """
    with _quiet_without_reader():
        try:
            main(sys.argv[1:])
        except InputError as error:
            print(f"error: {error}", file=sys.stderr)
            sys.exit(2)
        except fatal as error:
            print(f"error: {error}", file=sys.stderr)
            sys.exit(1)
        except KeyboardInterrupt as interrupt:
            end_interrupted(interrupt)


@contextlib.contextmanager
def _quiet_without_reader() -> Iterator[None]:
    try:
        try:
            yield
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(_NO_READER)
    except SystemExit as stop:
        # What rich makes of it.
        if isinstance(stop.__context__, BrokenPipeError):
            sys.exit(_NO_READER)
        raise


@contextlib.contextmanager
def one_line_errors() -> Iterator[None]:
    """Turns what tyro prints before it exits with an error into an InputError.

    Raises:
        InputError: The command line cannot be used; the message is what the box says is wrong.
    """
    written = io.StringIO()
    try:
        with contextlib.redirect_stderr(written):
            yield
    except SystemExit as stop:
        if not stop.code:
            raise
        # The title and a rule, what is wrong, a rule, what may help.
        _, *lines = (line.strip(" │") for line in written.getvalue().splitlines())
        below_title = itertools.dropwhile(_is_rule, lines)
        reason = " ".join(itertools.takewhile(lambda line: not _is_rule(line), below_title))
        suggested = itertools.dropwhile(lambda line: not line.startswith("Perhaps you meant"), lines)
        flag = next((line.split()[0] for line in suggested if line.startswith("--")), None)
        nearest = f"; did you mean {flag!r}?" if flag else ""
        raise InputError(f"{reason.rstrip('.')}{nearest}; --help lists all flags") from None


def _is_rule(line: str) -> bool:
    return not line.strip("-─╭╮╰╯ ")
