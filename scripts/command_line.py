"""What the scripts share: configs by name, flags for their fields, and how errors end a script."""

import argparse
import dataclasses
import difflib
import itertools
import logging
import os
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Protocol, get_args, get_origin, get_type_hints

import jax
import tyro
from rich.console import Console
from rich.table import Table

from configs import CONFIGS
from dlrm_jax.config import Config, MeshConfig
from dlrm_jax.distributed import Processes, num_processes, process_id
from dlrm_jax.host_memory import keep_freed_memory
from scripts.one_line_errors import one_line_errors
from scripts.repeated_flags import NEXT_TABLE, merge_dictionaries, refuse_repeats
from sharding import InputError

# Device files of accelerators, by the drivers of NVIDIA, AMD and Google, and of WSL.
_ACCELERATORS = ("nvidia*", "kfd", "accel*", "vfio/[0-9]*", "dxg")
# What tyro says of a value that is none of a flag's, and of a dictionary's flag.
_CHOICES = re.compile(r"(?<=Expected one of \()([^()]*)")
_BAD_PAIRS = re.compile(r"Error parsing --([\w.]+): Failed to parse key-value pairs")
# Most flags that are listed where only what they have in common was given.
_MOST_LISTED = 8
# Tables with settings of their own, beyond which these are no flags: tyro takes seconds for thousands of flags.
_MOST_TABLES = 100

PROCESSES_HELP = (
    "--coordinator HOST:PORT --num_processes N --process_id I join N processes, each started with the same command but "
    "its own number from 0, where no cluster says who they are."
)

# The type of a field `config` whose own fields are flags without a prefix.
ConfigFlags = Annotated[Config, tyro.conf.arg(name="")]


class HasConfig(Protocol):
    """A script's command line: a dataclass with a field `config`, and fields with defaults."""

    __dataclass_fields__: ClassVar[dict[str, dataclasses.Field[Any]]]

    def __init__(self, *, config: Config) -> None: ...

    @property
    def config(self) -> Config:
        """The experiment."""
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class _ConfigAlone:
    config: ConfigFlags


def parse_config(arguments: Sequence[str], usage: str, more: str = "") -> Config:
    """`parse_with_config` of a script that has no flags of its own."""
    return parse_with_config(_ConfigAlone, arguments, usage, more).config


def parse_with_config[T: HasConfig](target: type[T], arguments: Sequence[str], usage: str, more: str = "") -> T:
    """Reads ``CONFIG --field.subfield value ...``.

    Args:
        target: What to make of the command line. Its field `config` is a `ConfigFlags`, all others have defaults.
        arguments: The command line without the script's name.
        usage: What the script does, for ``--help``.
        more: What ``CONFIG --help`` is to say besides, such as of flags that are taken elsewhere.

    Returns:
        An object of that class, with the config of that name and those fields.

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
    flagged = dataclasses.replace(default, stated=None)
    many = len(default.embedding.tables) > _MOST_TABLES
    if many:
        flagged = dataclasses.replace(flagged, embedding=dataclasses.replace(flagged.embedding, tables={}))
    defaults = target(config=flagged)
    parsed = parse_flags(
        target,
        flags,
        known=[field.removeprefix("config.") for field in _fields(defaults) if field != "config.stated"],
        prog=f"{Path(sys.argv[0]).name} {name}",
        description=f"{sys.modules[CONFIGS[name].__module__].__doc__ or ''}\n\n{more}".strip(),
        default=defaults,
        config=(tyro.conf.AvoidSubcommands, tyro.conf.CascadeSubcommandArgs),
        registry=None if default.embedding.shared else _registry_of_tables(),
    )
    config = dataclasses.replace(parsed.config, stated=default.stated)
    if many:
        tables = {**default.embedding.tables, **config.embedding.tables}
        config = dataclasses.replace(config, embedding=dataclasses.replace(config.embedding, tables=tables))
    return dataclasses.replace(parsed, config=config)


def parse_flags[T](target: type[T], arguments: Sequence[str], *, known: Iterable[str], **settings: Any) -> T:
    """`tyro.cli`, whose errors fill a box of several lines, with errors of one line.

    Flags of dictionaries, and those that the target appends to, may be repeated.

    Args:
        target: What to make of the command line.
        arguments: The command line without the script's name.
        known: Names of its flags.
        **settings: More arguments of `tyro.cli`.

    Returns:
        An object of that class.

    Raises:
        InputError: An unknown flag, one that is given twice, or a missing or unusable value.
    """
    kinds = get_type_hints(target, include_extras=True)
    refuse_repeats(
        arguments, {f"--{name}" for name, kind in kinds.items() if tyro.conf.UseAppendAction in get_args(kind)}
    )
    arguments = merge_dictionaries(arguments)
    try:
        with one_line_errors():
            parsed, unknown = tyro.cli(
                target, args=arguments, use_underscores=True, return_unknown_args=True, **settings
            )
    except InputError as error:
        found = _BAD_PAIRS.match(str(error))
        if found is None:
            # tyro has them in another order each time.
            raise InputError(_CHOICES.sub(lambda of: ", ".join(sorted(of[1].split(", "))), str(error))) from None
        raise InputError(_pairs_wanted(target, found[1], arguments)) from None
    if unknown:
        flag = unknown[0].partition("=")[0]
        flags = [f"--{name}" for name in known]
        nearest = _below(flag, flags) or _nearest(flag, flags)
        raise InputError(f"there is no flag {flag!r}{nearest}; --help lists all flags")
    return parsed


def _registry_of_tables() -> tyro.constructors.ConstructorRegistry:
    """What makes `--embedding.shared` a flag; where the config fills the dictionary, each entry has its own."""
    registry = tyro.constructors.ConstructorRegistry()
    registry.primitive_rule(_shared_tables)
    return registry


def _shared_tables(info: tyro.constructors.PrimitiveTypeInfo) -> tyro.constructors.PrimitiveConstructorSpec[Any] | None:
    """How tyro reads dictionaries of several words: one entry in each repeat of the flag."""
    if info.type != dict[str, tuple[str, ...]]:
        return None
    return tyro.constructors.PrimitiveConstructorSpec(
        nargs="*",
        metavar="TABLE FEATURE [FEATURE ...]",
        instance_from_str=_parse_tables,
        is_instance=lambda value: isinstance(value, dict),
        str_from_instance=lambda tables: [word for name, of_table in tables.items() for word in (name, *of_table)],
    )


def _parse_tables(words: list[str]) -> dict[str, tuple[str, ...]]:
    tables: dict[str, tuple[str, ...]] = {}
    for is_next, run in itertools.groupby(words, key=NEXT_TABLE.__eq__):
        if is_next:
            continue
        name, *features = run
        if not features:
            raise ValueError(f"table {name!r} has no features, but takes at least one: name them after it")
        if name in tables:
            raise ValueError(f"table {name!r} is given twice: name all its features at once")
        tables[name] = tuple(features)
    return tables


def _pairs_wanted(target: type[Any], name: str, arguments: Sequence[str]) -> str:
    """What the flag of a dictionary takes, and what it was given: tyro says only that this is wrong."""
    flag = f"--{name}"
    start = next(place for place, word in enumerate(arguments) if word.partition("=")[0] == flag)
    more = itertools.takewhile(lambda word: not word.startswith("--"), arguments[start + 1 :])
    given = " ".join([arguments[start], *more])
    own = {field.name for field in dataclasses.fields(target)}
    kind: Any = target
    for part in name.split(".") if name.partition(".")[0] in own else ("config", *name.split(".")):
        kind = get_type_hints(kind)[part]
    _, of_values = get_args(kind)
    values = f"one of {', '.join(get_args(of_values))}" if get_origin(of_values) is Literal else "what belongs to it"
    return f"{given}: {flag} takes pairs of a name and {values}; --help lists all flags"


def _nearest(word: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else ""


def _below(flag: str, known: Iterable[str]) -> str:
    """The flags of a group of fields, for whoever gives the group."""
    flags = [repr(name) for name in known if name.startswith(f"{flag}.")]
    listed = ", ".join(flags[:_MOST_LISTED])
    return f"; did you mean {listed}{', ...' if len(flags) > _MOST_LISTED else ''}?" if flags else ""


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


def take_processes(arguments: Sequence[str]) -> tuple[Processes, list[str]]:
    """Takes ``--coordinator HOST:PORT --num_processes N --process_id I`` out of a command line.

    They are no part of a config, and are needed before anything else is read, so that processes can agree on errors.

    Args:
        arguments: The command line without the script's name.

    Returns:
        The processes, and the rest of the command line.

    Raises:
        InputError: A number is not one, a value is missing, or a flag is given twice.
    """
    refuse_repeats(arguments)
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--coordinator")
    parser.add_argument("--num_processes", type=int)
    parser.add_argument("--process_id", type=int)
    try:
        given, others = parser.parse_known_args(list(arguments))
    except argparse.ArgumentError as error:
        raise InputError(f"{error.argument_name}: {error.message}") from error
    return Processes(**vars(given)), others


def configure_jax(mesh: MeshConfig | None = None) -> None:
    """Sets what scripts, not modules, may set: JAX's compilation cache, the CPU where there is nothing else, logging.

    A host keeps the memory of a step for the next one. With compilers for accelerators installed, JAX would look for
    the accelerators themselves and complain. On the CPU it makes as many devices as the mesh needs, so that any mesh
    can be tried on any machine.

    Args:
        mesh: Devices of all processes; one device unless given.

    Raises:
        InputError: JAX_PLATFORMS names devices that are not here.
    """
    cache = os.environ.get("JAX_COMPILATION_CACHE_DIR", str(Path.home() / ".cache" / "dlrm_jax" / "jax"))
    jax.config.update("jax_compilation_cache_dir", cache)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    # Orbax warns of each option that is not its default.
    logging.getLogger("absl").setLevel(logging.ERROR)
    has_accelerator = any(any(Path("/dev").glob(pattern)) for pattern in _ACCELERATORS)
    devices = 1 if mesh is None else -(-mesh.num_devices // num_processes())
    if not has_accelerator:
        keep_freed_memory(devices=devices)
    if "JAX_PLATFORMS" not in os.environ and sys.platform == "linux" and not has_accelerator:
        jax.config.update("jax_platforms", "cpu")
    if devices > 1 and jax.config.jax_platforms == "cpu":
        jax.config.update("jax_num_cpu_devices", devices)
        if process_id() == 0:
            print(f"no accelerator: each process makes {devices} devices of its CPU", file=sys.stderr)
    _check_platforms()


def _check_platforms() -> None:
    """Raises InputError unless JAX finds the devices that the environment asks for."""
    platforms = os.environ.get("JAX_PLATFORMS")
    if not platforms:
        return
    logged: list[str] = []

    def instead_of_traceback(record: logging.LogRecord) -> bool:
        logged.extend([str(record.exc_info[1])] if record.exc_info else [])
        return not record.exc_info

    log = logging.getLogger("jax._src.xla_bridge")
    log.addFilter(instead_of_traceback)
    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition(" (set JAX_PLATFORMS")[0] or "; ".join(logged) or "no such device"
        raise InputError(
            f"JAX_PLATFORMS is {platforms!r}, which JAX cannot use ({' '.join(reason.split())}): unset it, or install "
            "the extra of that device: gpu or tpu"
        ) from error
    finally:
        log.removeFilter(instead_of_traceback)
