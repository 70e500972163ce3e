"""Flags that a command line gives more than once: of what they say, tyro and argparse would read the last alone."""

import itertools
import re
from collections.abc import Collection, Sequence

from sharding.errors import InputError

# What stands between the tables of `--embedding.shared` once its repeats are one flag; no table has such a name.
NEXT_TABLE = "\0"
_POOLING = "--embedding.pooling"
# Flags of dictionaries, which may be repeated, and what stands between the repeats.
_DICTIONARIES = {_POOLING: (), "--embedding.shared": (NEXT_TABLE,)}


def merge_dictionaries(arguments: Sequence[str]) -> list[str]:
    """The command line, in which each flag of a dictionary has the words of all its repeats.

    Raises:
        InputError: A feature's pooling is given twice.
    """
    words: dict[int | str, list[str]] = {-1: []}
    last: int | str = -1
    for place, word in enumerate(arguments):
        flag, given, value = word.partition("=")
        if flag in _DICTIONARIES:
            words[flag] = [*words[flag], *_DICTIONARIES[flag]] if flag in words else [flag]
            words[flag] += [value] if given else []
            last = flag
            continue
        last = place if word.startswith("--") else last
        words.setdefault(last, []).append(word)
    # scripts/command_line.py refuses tables that are given twice.
    _, *pairs = words.get(_POOLING, [""])
    given = set()
    for name, pooling in zip(pairs[::2], pairs[1::2], strict=False):
        if name in given:
            raise InputError(f"{_POOLING} gives {name!r} twice, the second time as {pooling!r}: keep one")
        given.add(name)
    return [word for of_flag in words.values() for word in of_flag]


def refuse_repeats(arguments: Sequence[str], may_repeat: Collection[str] = ()) -> None:
    """Raises InputError if a flag is given twice, or switched on and off.

    Args:
        arguments: The command line without the script's name.
        may_repeat: Flags that may, besides those of dictionaries.
    """
    places = [place for place, word in enumerate(arguments) if word.startswith("--")]
    given: dict[str, str] = {}
    for start, stop in itertools.pairwise([*places, len(arguments)]):
        flag = "--" + arguments[start].partition("=")[0].removeprefix("--").replace("-", "_")
        if flag in _DICTIONARIES or flag in may_repeat:
            continue
        # What is switched on by --a.b is switched off by --a.no_b.
        switch, text = re.sub(r"(--|\.)no_", r"\1", flag), " ".join(arguments[start:stop])
        if switch in given:
            raise InputError(f"{switch} is given twice, as {given[switch]!r} and as {text!r}: keep one")
        given[switch] = text
