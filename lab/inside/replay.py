"""Reads a device as a server did while it booted: the same ranges, in the same order.

::

    … replay DEVICE TRACE SCALE [HOLD]

A line of the file TRACE is a read: microseconds of thinking before it, first sector, sectors. The
next read begins when the last one has ended and SCALE times that time has passed. What the guest
did at once is done one after the other, for every device alike. With HOLD the file HOLD.ready is
made, and the first read waits until there is no file HOLD. Standard library only; O_DIRECT.
"""

from __future__ import annotations

import json
import mmap
import os
import sys
import time
from pathlib import Path

SECTOR = 512
_POLL = 0.005


def replay(device: str, trace: str, scale: float, hold: str = "") -> dict[str, float]:
    """:returns: seconds of all, of thinking and of the longest read; reads and bytes"""
    with open(trace) as file:
        reads = [tuple(map(int, line.split())) for line in file]
    longest = thinking = 0.0
    fd = os.open(device, os.O_RDONLY | os.O_DIRECT)
    buffer = memoryview(mmap.mmap(-1, max(count for _, _, count in reads) * SECTOR))
    if hold:
        Path(f"{hold}.ready").touch()
        while os.path.exists(hold):
            time.sleep(_POLL)
    began = time.monotonic()
    for gap, first, count in reads:
        thinking += gap * scale / 1e6
        time.sleep(gap * scale / 1e6)
        asked = time.monotonic()
        if os.preadv(fd, [buffer[: count * SECTOR]], first * SECTOR) != count * SECTOR:
            raise OSError(f"{device} ends in sectors {first} to {first + count}")
        longest = max(longest, time.monotonic() - asked)
    seconds = time.monotonic() - began
    os.close(fd)
    return {
        "seconds": seconds,
        "thinking": thinking,
        "longest": longest,
        "reads": len(reads),
        "bytes": SECTOR * sum(count for _, _, count in reads),
    }


if __name__ == "__main__":
    print(json.dumps(replay(sys.argv[1], sys.argv[2], float(sys.argv[3]), *sys.argv[4:])))
