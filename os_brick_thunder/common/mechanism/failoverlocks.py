"""Locks between the agent and the failover watcher, in a folder that neither of them removes."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import signal
import struct
import time
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from os_brick_thunder.common import files

LOG = logging.getLogger(__name__)

#: Not in the agent's own folder, which systemd may remove when the agent stops.
FOLDER = Path("/run/thunder-failover")
_LINE = 64
#: Seconds that a last will may take: some messages to device-mapper for each volume.
_LAST_WILL = 10.0
#: struct flock: l_type, l_whence, l_start, l_len, l_pid.
_FLOCK = struct.Struct("hhqqi4x")


@dataclass(frozen=True)
class Watcher:
    """A watcher that runs; ``silent``: seconds since it was last seen at work."""

    pid: int
    version: int
    silent: float = 0.0


def watcher_file(folder: Path = FOLDER) -> Path:
    """The file that the watcher has locked while it runs."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    return folder / "watcher"


def last_will_file(folder: Path = FOLDER) -> Path:
    """The file that is locked while a killed watcher's last will is done, and during a claim."""
    return watcher_file(folder).with_name("last-will")


def claim(watcher: Watcher, folder: Path = FOLDER, patience: float = 2.0) -> int | None:
    """Become the watcher of this host, until this process ends.

    :param patience: seconds; :func:`running` holds the lock for a moment
    :returns: a descriptor for :func:`beat`, which must stay open; None if there is one already
    """
    with _no_last_will(folder):
        fd = files.lock_file(watcher_file(folder))
        if not files.lock(fd, patience):
            os.close(fd)
            return None
        os.pwrite(fd, f"{watcher.pid} {watcher.version}".ljust(_LINE).encode(), 0)
        return fd


@contextlib.contextmanager
def _no_last_will(folder: Path) -> Iterator[None]:
    """A last will that is being done would undo what the new watcher does first."""
    fd = files.lock_file(last_will_file(folder))
    try:
        if not files.lock(fd, _LAST_WILL):
            LOG.warning("a last will is not done after %.0f s; not waiting for it", _LAST_WILL)
        yield
    finally:
        os.close(fd)


def beat(descriptor: int) -> None:
    """The watcher is at work."""
    os.utime(descriptor)


def running(folder: Path = FOLDER) -> Watcher | None:
    """The watcher of this host, if one runs."""
    fd = files.lock_file(watcher_file(folder))
    try:
        # Shared: two who ask at once must not take each other for the watcher.
        if files.lock(fd, shared=True):
            return None
        pid, _, version = os.pread(fd, _LINE, 0).decode().strip().partition(" ")
        silent = max(0.0, time.time() - os.fstat(fd).st_mtime)
        return Watcher(int(pid or 0), int(version or 0), silent)
    finally:
        os.close(fd)


def end(folder: Path = FOLDER) -> None:
    """Have the watcher of this host stop; absent is success. For a host that has no volumes."""
    found = running(folder)
    if found and found.pid > 0:
        with contextlib.suppress(ProcessLookupError):
            os.kill(found.pid, signal.SIGTERM)


@contextlib.contextmanager
def volume(volume_id: str, folder: Path = FOLDER) -> Iterator[None]:
    """Held while the table of a volume's device is swapped, or must not be: by one at a time.

    All volumes share one file, and each has a byte in it; that two have the same is rare and
    harmless. The lock belongs to the open file, so threads exclude each other, too.
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    fd = files.lock_file(folder / "volumes")
    try:
        byte = zlib.crc32(volume_id.encode())
        wanted = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, byte, 1, 0)
        fcntl.fcntl(fd, fcntl.F_OFD_SETLKW, wanted)
        yield
    finally:
        os.close(fd)
