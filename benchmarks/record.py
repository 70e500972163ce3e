"""What every benchmark writes beside its figures: command, date, device and versions."""

import datetime
import importlib.metadata
import json
import os
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax


def record(out: Path, command: str, body: Mapping[str, Any], *, packages: Sequence[str] = ()) -> None:
    """Writes figures as JSON.

    Args:
        out: The file; its folder is made if there is none.
        command: What to run to get such figures again.
        body: The figures.
        packages: Packages whose versions matter, beside jax and numpy.
    """
    head = {
        "command": command,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "device": f"{jax.local_devices()[0].device_kind}; {os.cpu_count()} cores, {platform.machine()}",
        "versions": {name: importlib.metadata.version(name) for name in ("jax", "numpy", *packages)},
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps({**head, **body}, indent=1) + "\n")
