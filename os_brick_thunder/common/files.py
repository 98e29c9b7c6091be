"""Files that survive a power failure, and locks on files."""

from __future__ import annotations

import fcntl
import os
import time
from pathlib import Path

#: Seconds between two attempts at a lock.
_POLL = 0.05


def replace(path: Path, text: str) -> None:
    """Write a file so that, whatever happens, it has its old content or all of the new one.

    File and folder are created for their owner alone. Only one caller may write a path at a time. A
    crash may leave a hidden file (``.NAME.new``) in the folder, which the next call overwrites.

    :raises OSError: it was not written; the old content stays
    """
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    fresh = path.parent / f".{path.name}.new"
    with open(fresh, "w", opener=lambda name, flags: os.open(name, flags, 0o600)) as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    fresh.replace(path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def lock_file(path: Path) -> int:
    """Open a file for :func:`lock`; it is created for its owner alone.

    :returns: a descriptor, which programs that are started do not inherit
    """
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)


def lock(descriptor: int, patience: float = 0.0, shared: bool = False) -> bool:
    """Lock an open file by flock(2), until it is closed.

    :param patience: seconds to wait for whoever has it
    :param shared: beside others who share it, rather than exclusively
    :returns: whether it is locked now
    """
    until = time.monotonic() + patience
    kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
    while True:
        try:
            fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= until:
                return False
            time.sleep(_POLL)
        else:
            return True
