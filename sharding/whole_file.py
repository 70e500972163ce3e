"""write_whole: a small file that is there whole or not at all, whatever happens while it is written.  to_disk."""

import os
from pathlib import Path


def write_whole(path: Path, text: str) -> None:
    """Writes a file beside the old one and puts it in its place, so that a kill or a power cut leaves one of the two.

    Args:
        path: The file; until it is complete, its name ends in ``.partial``.
        text: All that it is to hold.
    """
    partial = path.with_name(path.name + ".partial")
    with partial.open("w") as file:
        file.write(text)
        file.flush()
        # Else a file system may keep the new name and lose what the file holds.
        os.fsync(file.fileno())
    partial.replace(path)
    to_disk(path.parent)


def to_disk(path: Path) -> None:
    """Waits until what a file holds, or the names in a folder, would outlast a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
