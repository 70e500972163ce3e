"""Constraints on a plan, from the command line: ``--pin``, ``--forbid``, ``--returns`` and ``--together``."""

from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any, get_args

from sharding.constraints import Constraint
from sharding.errors import InputError
from sharding.mesh import NODE
from sharding.plan import PlacementKind, Returns
from sharding.tables import TableSpec

_KINDS = get_args(PlacementKind)


def parse_constraints(
    tables: Sequence[TableSpec],
    *,
    pin: Sequence[str] = (),
    forbid: Sequence[str] = (),
    returns: Sequence[str] = (),
    together: Sequence[str] = (),
) -> tuple[Constraint, ...]:
    """Reads constraints; scripts/plan.py says how they are written.

    Args:
        tables: The tables, which patterns of names are matched with.
        pin: Where tables are to be.
        forbid: What they may not be.
        returns: How vectors of spread rows come home.
        together: Tables that are to be on one device.

    Returns:
        Constraints for the planner, which checks devices and nodes.

    Raises:
        InputError: A text is not of that form, or fits no table.
    """
    found = []
    for text in pin:
        names, value = _split("--pin", text, tables)
        owner, colon, numbers = value.partition(":")
        if colon and owner in ("device", "devices"):
            found.append(Constraint(tables=names, devices=_whole_numbers(text, numbers)))
        elif colon and owner in (NODE, f"{NODE}s"):
            found.append(Constraint(tables=names, nodes=_whole_numbers(text, numbers)))
        else:
            found.append(Constraint(tables=names, kinds=_choices("--pin", text, value, _KINDS)))
    for text in forbid:
        names, value = _split("--forbid", text, tables)
        found.append(Constraint(tables=names, forbidden=_choices("--forbid", text, value, _KINDS)))
    for text in returns:
        names, value = _split("--returns", text, tables)
        choices = _choices("--returns", text, value, get_args(Returns))
        if len(choices) > 1:
            raise InputError(f"--returns {text!r}: choose one of {', '.join(choices)}")
        found.append(Constraint(tables=names, returns=choices[0]))
    for text in together:
        members = tuple(dict.fromkeys(name for pattern in text.split(",") for name in _fitting(text, pattern, tables)))
        found.append(Constraint(tables=members, together=True))
    return tuple(found)


def _split(flag: str, text: str, tables: Sequence[TableSpec]) -> tuple[tuple[str, ...], str]:
    pattern, equals, value = text.rpartition("=")
    if not equals or not value:
        raise InputError(f"{flag} {text!r} is not TABLE=...; --help says how constraints are written")
    return _fitting(text, pattern, tables), value


def _fitting(text: str, pattern: str, tables: Sequence[TableSpec]) -> tuple[str, ...]:
    names = [table.name for table in tables]
    # A name is itself, whatever characters are in it.
    fitting = (pattern,) if pattern in names else tuple(name for name in names if fnmatchcase(name, pattern))
    if not fitting:
        raise InputError(f"constraint {text!r} names table {pattern!r}, which does not exist; there are {names[:20]}")
    return fitting


def _whole_numbers(text: str, numbers: str) -> tuple[int, ...]:
    try:
        return tuple(int(number) for number in numbers.split(","))
    except ValueError as error:
        raise InputError(f"--pin {text!r}: {numbers!r} are not whole numbers; write such as devices:0,1") from error


def _choices(flag: str, text: str, value: str, known: Sequence[str]) -> Any:
    words = tuple(value.split(","))
    unknown = [word for word in words if word not in known]
    if unknown:
        raise InputError(f"{flag} {text!r}: {unknown[0]!r} is not one of {', '.join(known)}")
    return words
