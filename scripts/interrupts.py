"""Ctrl-C ends a script in one line, also while it imports: scripts import this before what takes seconds to import."""

import sys
from types import TracebackType
from typing import NoReturn

# What a shell says of a command that Ctrl-C ended.
_INTERRUPTED = 130


def end_interrupted(interrupt: BaseException) -> NoReturn:
    """Ends with exit code 130 and one line on standard error, which ends in what the KeyboardInterrupt says."""
    print("; ".join(("interrupted", *interrupt.args)), file=sys.stderr)
    sys.exit(_INTERRUPTED)


def _end(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    if issubclass(kind, KeyboardInterrupt):
        end_interrupted(error)
    sys.__excepthook__(kind, error, trace)


sys.excepthook = _end
