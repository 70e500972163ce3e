"""How errors end a script: one line on standard error, also where tyro would draw a box of several."""

import contextlib
import io
import itertools
import sys
from collections.abc import Callable, Iterator, Sequence

from sharding.errors import InputError


def run(main: Callable[[Sequence[str]], None], *fatal: type[Exception]) -> None:
    """Runs a script's main function: unusable input ends with one line on standard error and exit code 2.

    Args:
        main: Takes the command line without the script's name.
        *fatal: Exceptions that end with one line and exit code 1.
    """
    try:
        main(sys.argv[1:])
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except fatal as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)


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
