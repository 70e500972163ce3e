"""What the scripts share: configs by name, flags for their fields, and how errors end a script."""

import dataclasses
import difflib
import logging
import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import jax
import tyro
from rich.console import Console
from rich.table import Table

from configs import CONFIGS
from dlrm_jax.config import Config
from scripts.one_line_errors import one_line_errors
from sharding import InputError

# Device files of accelerators, by the drivers of NVIDIA, AMD and Google, and of WSL.
_ACCELERATORS = ("nvidia*", "kfd", "accel*", "vfio/[0-9]*", "dxg")


def parse_config(arguments: Sequence[str], usage: str) -> Config:
    """Reads ``CONFIG --field.subfield value ...``.

    Args:
        arguments: The command line without the script's name.
        usage: What the script does, for ``--help``.

    Returns:
        The config of that name with those fields.

    Raises:
        InputError: An unknown config or flag, in which case the message names the nearest, or an unusable value.
    """
    if not arguments or arguments[0] in ("-h", "--help"):
        _list_configs(usage)
        sys.exit(0)
    name, *flags = arguments
    if name not in CONFIGS:
        raise InputError(f"no config {name!r}{_nearest(name, CONFIGS)}; there are {', '.join(CONFIGS)}")
    default = CONFIGS[name]()
    # The stated card is a value of the config's file, not a flag.
    config = parse_flags(
        Config,
        flags,
        known=_fields(default),
        prog=f"{Path(sys.argv[0]).name} {name}",
        description=sys.modules[CONFIGS[name].__module__].__doc__,
        default=dataclasses.replace(default, stated=None),
        config=(tyro.conf.AvoidSubcommands, tyro.conf.CascadeSubcommandArgs),
    )
    return dataclasses.replace(config, stated=default.stated)


def parse_flags[T](target: type[T], arguments: Sequence[str], *, known: Iterable[str], **settings: Any) -> T:
    """`tyro.cli`, whose errors fill a box of several lines, with errors of one line.

    Args:
        target: What to make of the command line.
        arguments: The command line without the script's name.
        known: Names of its flags.
        **settings: More arguments of `tyro.cli`.

    Returns:
        An object of that class.

    Raises:
        InputError: An unknown flag, or a missing or unusable value.
    """
    with one_line_errors():
        parsed, unknown = tyro.cli(
            target, args=list(arguments), use_underscores=True, return_unknown_args=True, **settings
        )
    if unknown:
        flag = unknown[0].partition("=")[0]
        nearest = _nearest(flag, [f"--{name}" for name in known])
        raise InputError(f"there is no flag {flag!r}{nearest}; --help lists all flags")
    return parsed


def _nearest(word: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else ""


def _fields(value: object, prefix: str = "") -> list[str]:
    """Dotted names of all fields of a tree of dataclasses and dictionaries."""
    if dataclasses.is_dataclass(value):
        children = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    elif isinstance(value, dict):
        children = value
    else:
        return [prefix]
    separator = "." if prefix else ""
    return [name for key, child in children.items() for name in _fields(child, f"{prefix}{separator}{key}")]


def _list_configs(usage: str) -> None:
    table = Table("config", "what it is")
    for name, config in CONFIGS.items():
        table.add_row(name, (config.__doc__ or "").splitlines()[0])
    console = Console()
    console.print(usage, highlight=False)
    console.print(table)
    console.print("`CONFIG --help` lists the flags of a config, one for each field.", highlight=False)


def configure_jax() -> None:
    """Sets what scripts, not modules, may set: JAX's compilation cache, the CPU where there is nothing else, logging.

    With compilers for accelerators installed, JAX would look for the accelerators themselves and complain.
    """
    cache = os.environ.get("JAX_COMPILATION_CACHE_DIR", str(Path.home() / ".cache" / "dlrm_jax" / "jax"))
    jax.config.update("jax_compilation_cache_dir", cache)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    # Orbax warns of each option that is not its default.
    logging.getLogger("absl").setLevel(logging.ERROR)
    has_accelerator = any(any(Path("/dev").glob(pattern)) for pattern in _ACCELERATORS)
    if "JAX_PLATFORMS" not in os.environ and sys.platform == "linux" and not has_accelerator:
        jax.config.update("jax_platforms", "cpu")
