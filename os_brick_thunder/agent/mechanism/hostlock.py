"""One agent for each host: two would take each other's work for the remains of a crash."""

from __future__ import annotations

import os
from pathlib import Path

from os_brick_thunder.common import errors, files


def hold(path: Path) -> None:
    """Lock a file until this process has ended, however that comes about.

    :raises errors.StateError: another process holds it
    """
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    # Never closed, and not inherited by the tools that are started.
    fd = files.lock_file(path)
    if not files.lock(fd):
        pid = os.pread(fd, 32, 0).decode(errors="replace").strip() or "unknown"
        os.close(fd)
        raise errors.StateError(
            f"another thunder-agent runs on this host, with process id {pid}: it holds {path}. "
            "Stop it first"
        )
    os.ftruncate(fd, 0)
    os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)
