"""Reads and writes a device in several ways at once, each in a thread, and reports what failed.

::

    … streams DEVICE SECONDS STOP STREAM…

A stream is ``NAME:KIND:BEGIN:END``: one page of the device every few milliseconds, from byte BEGIN
to END, again and again. KIND is ``read``, ``write``, or ``new``, which writes to places so far
apart that each needs a new block. It ends after SECONDS, or once there is a file STOP.
Standard library only; O_DIRECT.
"""

from __future__ import annotations

import itertools
import json
import mmap
import os
import sys
import threading
import time
from collections.abc import Iterator

PAGE, APART = 4096, 64 << 10
#: Seconds between two calls of a stream; those to new blocks use up space.
_PAUSE, _NEW_PAUSE = 0.02, 0.1


def offsets(kind: str, begin: int, end: int) -> Iterator[int]:
    """Where a stream reads or writes, in order."""
    step = APART if kind == "new" else PAGE
    return itertools.cycle(range(begin, end, step))


class Stream:
    """One stream; ``report`` is complete once it has ended."""

    def __init__(self, device: str, word: str, until: float, stop: str) -> None:
        self.name, self._kind, begin, end = word.split(":")
        self._offsets = offsets(self._kind, int(begin), int(end))
        self._device, self._until, self._stop = device, until, stop
        self._longest, self._calls, self._failed = 0.0, 0, 0
        self._first: float | None = None  # seconds from the start to the end of the first failure
        self._thread = threading.Thread(target=self._run)

    def start(self) -> None:
        self._thread.start()

    def report(self) -> dict[str, object]:
        self._thread.join()
        return {
            "name": self.name,
            "calls": self._calls,
            "failed": self._failed,
            "longest_s": round(self._longest, 3),
            "first_failure_s": self._first,
        }

    def _run(self) -> None:
        began = time.monotonic()
        fd = os.open(self._device, os.O_RDWR | os.O_DIRECT)
        with mmap.mmap(-1, PAGE) as buffer:
            while time.monotonic() < self._until and not os.path.exists(self._stop):
                call = time.monotonic()
                try:
                    if self._kind == "read":
                        os.preadv(fd, [buffer], next(self._offsets))
                    else:
                        os.pwritev(fd, [buffer], next(self._offsets))
                except OSError:
                    self._failed += 1
                    if self._first is None:
                        self._first = round(time.monotonic() - began, 1)
                self._calls += 1
                self._longest = max(self._longest, time.monotonic() - call)
                time.sleep(_NEW_PAUSE if self._kind == "new" else _PAUSE)
        os.close(fd)


def main(arguments: list[str]) -> int:
    device, seconds, stop, *words = arguments
    until = time.monotonic() + float(seconds)
    streams = [Stream(device, word, until, stop) for word in words]
    for stream in streams:
        stream.start()
    print(json.dumps([stream.report() for stream in streams]))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
