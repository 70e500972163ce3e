"""write_whole: a small file that is there whole or not at all, whatever happens while it is written."""

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
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
