"""Files that survive a power failure."""

from __future__ import annotations

import os
from pathlib import Path


def replace(path: Path, text: str) -> None:
    """Write a file so that, whatever happens, it has its old content or all of the new one.

    Its folder is created for its owner alone. Only one caller may write a path at a time. A crash
    may leave a hidden file (``.NAME.new``) in the folder, which the next call overwrites.

    :raises OSError: it was not written; the old content stays
    """
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    fresh = path.parent / f".{path.name}.new"
    with open(fresh, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    fresh.replace(path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
