"""Errors of the command line in one line, where tyro draws a box of several."""

import contextlib
import io
import itertools
from collections.abc import Iterator

from sharding.errors import InputError


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
