"""A process in a node that does what a guest, its host and its bad luck do, as it is told.

::

    thunder-run -m lab.inside.worker connect         on a compute host: can attach, too
    python -m lab.inside.worker                      on a storage host

It reads requests from its standard input and writes answers to its standard output, a JSON object
a line: ``{"id", "verb", …}`` and ``{"id", "answer"}`` or ``{"id", "error"}``. Requests are served
at the same time. So a call costs a millisecond, where a process in a node takes a second to start.
"""

from __future__ import annotations

import errno
import fcntl
import json
import mmap
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lab.inside import sectors
from lab.inside.sectors import SECTOR
from os_brick_thunder.common.policy import devnames

_DISCARD, _ZERO_OUT = 0x1277, 0x127F  # BLKDISCARD, BLKZEROOUT
#: Bytes read at a time.
_CHUNK = 1 << 20
_PAUSE = 0.1
#: Thin id and name of the device that fills a pool.
_FILLER_ID, _FILLER = (1 << 24) - 7, "model-filler"


# -- as a guest ----------------------------------------------------------------------------------


def io(device: str, ops: list[list[Any]], patience: float) -> dict[str, Any]:
    """Operations on a device, one after the other: ``[kind, first, count, token]``.

    :param patience: seconds for which one that failed is tried again
    :returns: for each None, the runs that were read, or ``{"error": text}``; with it the longest
        time that one took, in seconds, and how many failed at first
    """
    found: list[Any] = []
    longest, failed = 0.0, 0
    with mmap.mmap(-1, _CHUNK) as buffer:
        for op in ops:
            began = time.monotonic()
            while True:
                try:
                    result: Any = _op(device, buffer, *op)
                    break
                except OSError as error:
                    result = {"error": f"{type(error).__name__}: {error}", "errno": error.errno}
                    unsupported = error.errno in (errno.EOPNOTSUPP, errno.ENOTTY)
                    if unsupported or time.monotonic() > began + patience:
                        break
                    failed += 1
                    time.sleep(_PAUSE)
            longest = max(longest, time.monotonic() - began)
            found.append(result)
    return {"results": found, "longest_s": round(longest, 3), "failed": failed}


def _op(device: str, buffer: mmap.mmap, kind: str, first: int, count: int, token: int) -> Any:
    fd = os.open(device, os.O_RDWR | os.O_DIRECT)
    try:
        if kind == "flush":
            return os.fsync(fd)
        if kind in ("trim", "zero"):
            span = (first * SECTOR).to_bytes(8, sys.byteorder)
            span += (count * SECTOR).to_bytes(8, sys.byteorder)
            fcntl.ioctl(fd, _DISCARD if kind == "trim" else _ZERO_OUT, span)
            return None
        return (
            _read(fd, buffer, first, count)
            if kind == "read"
            else _write(fd, buffer, first, count, token)
        )
    finally:
        os.close(fd)


def _write(fd: int, buffer: mmap.mmap, first: int, count: int, token: int) -> None:
    """In one request, if it fits."""
    for at in range(first, first + count, _CHUNK // SECTOR):
        length = min(_CHUNK // SECTOR, first + count - at)
        buffer[: length * SECTOR] = sectors.encode(token, at, length)
        with memoryview(buffer) as view, view[: length * SECTOR] as part:
            if os.pwritev(fd, [part], at * SECTOR) != length * SECTOR:
                raise OSError(errno.EIO, f"short write at sector {at}")


def _read(fd: int, buffer: mmap.mmap, first: int, count: int) -> list[sectors.Run]:
    runs: list[sectors.Run] = []
    for at in range(first, first + count, _CHUNK // SECTOR):
        length = min(_CHUNK // SECTOR, first + count - at)
        with memoryview(buffer) as view, view[: length * SECTOR] as part:
            if os.preadv(fd, [part], at * SECTOR) != length * SECTOR:
                raise OSError(errno.EIO, f"short read at sector {at}")
        for run in sectors.decode(buffer[: length * SECTOR], at):
            sectors.join(runs, run)
    return runs


# -- as a compute host ---------------------------------------------------------------------------


def connect(what: str, volume: str) -> dict[str, Any]:
    """A verb of lab/inside/brick.py; the answer also tells whether the volume now has a cache.

    ``reconnect`` uses what an earlier attach has stored, as Nova does after a reboot of its host.
    """
    from lab.inside import brick

    stored = {}
    if what == "reconnect":
        stored = {"stored": (brick.STATE / f"{volume}.json").read_text()}
    answer = brick.VERBS[what](volume, **stored)
    return {**answer, "cached": Path(devnames.path(devnames.VolumeNames(volume).cached)).exists()}


def fail_path(volume: str) -> bool:
    """Fail the cached path of a volume, as the agent does when a cache must be left at once.

    :returns: whether it had one
    """
    names = devnames.VolumeNames(volume)
    cached = Path(devnames.path(names.cached))
    if not cached.exists():
        return False
    device = os.stat(cached).st_rdev
    path = f"fail_path {os.major(device)}:{os.minor(device)}"
    try:
        _dmsetup("message", names.failover, "0", path)
    except OSError:
        if Path(devnames.path(names.failover)).exists():
            raise
        return False  # it is being built, or taken down
    return True


def kill_watcher() -> bool:
    """SIGKILL for the process that switches volumes to their LUNs; returns whether it ran."""
    command = ["pkill", "-KILL", "-f", "os_brick_thunder.failover.main"]
    return subprocess.run(command).returncode == 0


def cut(address: str, seconds: float) -> None:
    """Drop all that this host sends to an address, for a while."""
    route = ["blackhole", f"{address}/32"]
    subprocess.run(["ip", "route", "add", *route], check=True)
    try:
        time.sleep(seconds)
    finally:
        subprocess.run(["ip", "route", "del", *route], check=True)


def fill(percent: float, seconds: float) -> int:
    """Use the local pool to this percentage for a while.

    :returns: bytes that had to be written for it
    """
    words = _dmsetup("status", devnames.POOL).split()
    used, total = map(int, words[5].split("/"))
    block = int(_dmsetup("table", devnames.POOL).split()[5]) * SECTOR
    blocks = int(total * percent / 100) - used
    if blocks <= 0:
        return 0
    _dmsetup("message", devnames.POOL, "0", f"create_thin {_FILLER_ID}")
    pool = devnames.path(devnames.POOL)
    _dmsetup("create", _FILLER, "--table", f"0 {blocks * block // SECTOR} thin {pool} {_FILLER_ID}")
    try:
        fd = os.open(f"/dev/mapper/{_FILLER}", os.O_WRONLY | os.O_DIRECT)
        with mmap.mmap(-1, _CHUNK) as buffer:
            for at in range(0, blocks * block - _CHUNK, _CHUNK):
                os.pwritev(fd, [buffer], at)
        os.close(fd)
        time.sleep(seconds)
    finally:
        _dmsetup("remove", "--retry", _FILLER)
        _dmsetup("message", devnames.POOL, "0", f"delete {_FILLER_ID}")
    return blocks * block


# -- as a storage host ---------------------------------------------------------------------------


def break_lun(device: str, first: int, count: int, seconds: float) -> None:
    """Have a logical volume fail for a while, all of it or ``count`` sectors of it.

    :param device: its name in device-mapper
    """
    good = _dmsetup("table", device).strip()
    size = int(good.split()[1])
    if count == 0:
        with _table(device, good, f"0 {size} error"):
            time.sleep(seconds)
        return
    other = f"model-good-{device[-12:]}"
    _dmsetup("create", other, "--table", good)
    parts = [(0, first, "linear"), (first, count, "error"), (first + count, size, "linear")]
    lines = []
    for at, length, kind in parts:
        length = min(length, size - at)
        if length > 0:
            target = f"linear /dev/mapper/{other} {at}" if kind == "linear" else kind
            lines.append(f"{at} {length} {target}")
    try:
        with _table(device, good, "\n".join(lines)):
            time.sleep(seconds)
    finally:
        _dmsetup("remove", "--retry", other)


@contextmanager
def _table(device: str, good: str, bad: str) -> Iterator[None]:
    _reload(device, bad)
    try:
        yield
    finally:
        _reload(device, good)


def _reload(device: str, table: str) -> None:
    _dmsetup("load", device, input=table + "\n")
    _dmsetup("suspend", "--noflush", device)
    _dmsetup("resume", device)


def whole(device: str, count: int) -> list[sectors.Run]:
    """All sectors of a logical volume, as :func:`io` reads them."""
    fd = os.open(f"/dev/mapper/{device}", os.O_RDONLY | os.O_DIRECT)
    try:
        with mmap.mmap(-1, _CHUNK) as buffer:
            return _read(fd, buffer, 0, count)
    finally:
        os.close(fd)


def _dmsetup(*arguments: str, input: str | None = None) -> str:
    done = subprocess.run(["dmsetup", *arguments], input=input, capture_output=True, text=True)
    if done.returncode != 0:
        raise OSError(f"dmsetup {' '.join(arguments)}: {done.stderr.strip()}")
    return done.stdout


# -- requests --------------------------------------------------------------------------------------

_VERBS: dict[str, Callable[..., Any]] = {
    verb.__name__: verb
    for verb in (io, connect, fail_path, kill_watcher, cut, fill, break_lun, whole)
}


def main(arguments: list[str]) -> None:
    if arguments:
        from lab.inside import brick

        brick.prepare()
    answers, lock = os.fdopen(os.dup(1), "w"), threading.Lock()
    os.dup2(2, 1)  # what libraries print is no answer

    def serve(request: dict[str, Any]) -> None:
        answer: dict[str, Any] = {"id": request.pop("id")}
        try:
            answer["answer"] = _VERBS[request.pop("verb")](**request)
        except Exception as error:
            answer["error"] = f"{type(error).__name__}: {error}"
        with lock:
            print(json.dumps(answer), file=answers, flush=True)

    print(json.dumps({"id": 0, "answer": "ready"}), file=answers, flush=True)
    with ThreadPoolExecutor(32) as threads:
        for line in sys.stdin:
            threads.submit(serve, json.loads(line))


if __name__ == "__main__":
    main(sys.argv[1:])
