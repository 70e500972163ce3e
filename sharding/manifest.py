"""The manifest of a folder of tables: the layout that they were saved in. Rows are found by it, without the model."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pallas_kernels import ROW_OPTIMIZERS
from sharding.errors import InputError
from sharding.groups import Shard
from sharding.layout import FROZEN, Layout, StoreLayout
from sharding.tables import TableSpec
from sharding.whole_file import write_whole

MANIFEST = "manifest.json"
_FORMAT = 2
_SHARD_FIELDS = (
    "first_column",
    "num_columns",
    "first_device",
    "num_owners",
    "replicated",
    "first_row",
    "first_scalar",
)
_WHOLE_NUMBERS = {*_SHARD_FIELDS, "num_devices", "lines_per_device", "scalar_lines_per_device", "num_rows", "dim"} - {
    "replicated"
}


def manifest_of(layout: Layout) -> dict[str, Any]:
    """The manifest of tables in a layout, as a tree of JSON."""
    tables: dict[str, Any] = {}
    for store in layout.stores:
        for shard in store.shards:
            entry = tables.setdefault(
                shard.table.name,
                {"store": store.name, "num_rows": shard.table.num_rows, "dim": shard.table.dim, "shards": []},
            )
            fields = {name: getattr(shard, name) for name in _SHARD_FIELDS}
            entry["shards"].append(fields | {"width": shard.width})
    return {
        "format": _FORMAT,
        "num_devices": layout.num_devices,
        "stores": {
            store.name: {
                "dtype": store.dtype,
                "lines_per_device": store.lines_per_device,
                "scalar_lines_per_device": store.scalar_lines_per_device,
            }
            for store in layout.stores
        },
        "tables": tables,
    }


def write_manifest(layout: Layout, folder: Path) -> None:
    """Writes the manifest of a folder, which declares it complete."""
    write_whole(folder / MANIFEST, json.dumps(manifest_of(layout), indent=1) + "\n")


def read_manifest(directory: str | os.PathLike[str]) -> Layout:
    """Reads the manifest of a folder of tables.

    Args:
        directory: The folder.

    Returns:
        The layout that the tables were saved in. It has no groups, and of the tables only what says where they lie.

    Raises:
        InputError: There is none, so the folder is not complete; or it is damaged, or of another version.
    """
    path = Path(directory, MANIFEST)
    try:
        manifest = json.loads(path.read_text())
        if {"stores", "tables"} - set(manifest):
            raise ValueError('no "stores" and "tables" in it')
    except (OSError, ValueError, TypeError) as error:
        raise InputError(f"{path}: not a complete folder of tables ({error}); use another checkpoint") from error
    if manifest.get("format") != _FORMAT:
        raise InputError(
            f"{path}: was made by another version of this program (its format is {manifest.get('format')}, this "
            f"version reads {_FORMAT}); use that version, or another checkpoint"
        )
    try:
        return _layout(manifest)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(f"{path}: is damaged ({error!r}); use another checkpoint") from error


def _layout(manifest: Mapping[str, Any]) -> Layout:
    for entry in (manifest, *manifest["stores"].values(), *manifest["tables"].values()):
        for piece in (entry, *entry.get("shards", ())):
            odd = sorted(key for key, value in piece.items() if key in _WHOLE_NUMBERS and not _is_whole(value))
            if odd:
                raise ValueError(f"{odd[0]} is {piece[odd[0]]!r}")
    stores = []
    for name, entry in manifest["stores"].items():
        dtype, rule = name.split(".")[:2]
        if dtype != entry["dtype"] or (rule != FROZEN and rule not in ROW_OPTIMIZERS):
            raise ValueError(f"store {name!r} of {entry['dtype']}")
        shards = []
        for table, of_table in manifest["tables"].items():
            if of_table["store"] != name:
                continue
            spec = TableSpec(
                name=table,
                num_rows=of_table["num_rows"],
                dim=of_table["dim"],
                dtype=dtype,
                frozen=rule == FROZEN,
                **({} if rule == FROZEN else {"optimizer": rule}),
            )
            shards += [Shard(table=spec, **{key: piece[key] for key in _SHARD_FIELDS}) for piece in of_table["shards"]]
        if not shards:
            raise ValueError(f"no table in store {name!r}")
        stores.append(
            StoreLayout(
                name=name,
                dtype=dtype,
                num_devices=manifest["num_devices"],
                lines_per_device=entry["lines_per_device"],
                scalar_lines_per_device=entry["scalar_lines_per_device"],
                shards=tuple(shards),
            )
        )
    layout = Layout(num_devices=manifest["num_devices"], stores=tuple(stores), groups=())
    # Nothing was lost or added: a table of a store that is not there, a width that is not this version's.
    found = manifest_of(layout)
    different = sorted(name for name in manifest["tables"] if found["tables"].get(name) != manifest["tables"][name])
    if different:
        raise ValueError(f"table {different[0]!r}")
    return layout


def _is_whole(value: object) -> bool:
    return type(value) is int and value >= 0


def difference(saved: Layout, layout: Layout) -> str | None:
    """The first thing that keeps saved tables from being those of a model, in words; None if they are the same."""
    was, now = manifest_of(saved)["tables"], manifest_of(layout)["tables"]
    for name in sorted(set(was) | set(now)):
        if name not in was or name not in now:
            here, there = ("model", "checkpoint") if name in now else ("checkpoint", "model")
            return f"table {name!r} is in the {here}, but not in the {there}"
        for field in ("store", "num_rows", "dim"):
            if was[name][field] != now[name][field]:
                return (
                    f"table {name!r} has {field} {was[name][field]} in the checkpoint, but {now[name][field]} in the "
                    "model"
                )
    return None
