"""Types of settings: a config written in Python may hold anything, which would come to light late and far off."""

import dataclasses
import functools
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from sharding.errors import InputError


def check_types(config: Any, prefix: str = "") -> None:
    """Raises InputError unless every field of a dataclass, and of those that it holds, has a value of its type.

    A Literal is left to whoever knows its choices. Lists will do for tuples, and whole numbers for floats.

    Args:
        config: An instance of a dataclass.
        prefix: What to call it in errors, with a dot.
    """
    hints = _hints(type(config))
    for field in dataclasses.fields(config):
        value, hint, name = getattr(config, field.name), hints[field.name], prefix + field.name
        if not _fits(value, hint):
            wanted = hint.__name__ if isinstance(hint, type) and not get_args(hint) else str(hint)
            raise InputError(f"{name} is {value!r}, of type {type(value).__name__}, but must be {wanted}: change it")
        entries = value.items() if isinstance(value, dict) else ((None, value),)
        for key, entry in entries:
            if dataclasses.is_dataclass(entry):
                check_types(entry, f"{name}." if key is None else f"{name}.{key}.")


@functools.cache
def _hints(of: type) -> dict[str, Any]:
    """The types of a class's fields, which take longer to find than to check: a config may have a thousand tables."""
    return get_type_hints(of)


def _fits(value: Any, hint: Any) -> bool:
    inner = get_args(hint)
    match get_origin(hint):
        case origin if origin is Literal:
            return True
        case origin if origin in (Union, UnionType):
            return any(_fits(value, each) for each in inner)
        case origin if origin is tuple:
            # Of any number of entries, as all in configs.
            return isinstance(value, (tuple, list)) and all(_fits(entry, inner[0]) for entry in value)
        case origin if origin is dict:
            return isinstance(value, dict) and all(
                _fits(key, inner[0]) and _fits(entry, inner[1]) for key, entry in value.items()
            )
    if hint in (int, float):
        return isinstance(value, (int, hint)) and not isinstance(value, bool)
    return isinstance(value, hint)
