"""Reads and writes block devices, in a node or outside; uses the standard library only.

::

    … blocks hash DEVICE LENGTH [FROM [LENGTH FROM]…]
                                             SHA-256 of LENGTH bytes, by default of the first ones
    … blocks write DEVICE SEED OFFSET…       a page of known bytes at each offset
    … blocks verify DEVICE SEED OFFSET…      exit code 1 and the offsets that differ
    … blocks fill DEVICE SEED LENGTH         write its first LENGTH bytes, report stalls
    … blocks churn DEVICE SEED SECONDS [FROM [TO [FILE]]]
                                             read and write, report stalls and errors
    … blocks watch DEVICE SEED LENGTH SECONDS CACHE
                                             read known bytes, report stalls and errors

It bypasses the page cache (O_DIRECT), so it sees what the device returns now.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import mmap
import os
import random
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

PAGE = 4096
_CHUNK = 1 << 20


def pattern(seed: str, offset: int) -> bytes:
    """The page of bytes that belongs at an offset."""
    word = hashlib.sha256(f"{seed}:{offset}".encode()).digest()
    return word * (PAGE // len(word))


def digest(device: str, length: int, begin: int = 0) -> str:
    """SHA-256 of ``length`` bytes of a device, in hex; ``begin`` is a multiple of a page."""
    found = hashlib.sha256()
    fd = os.open(device, os.O_RDONLY | os.O_DIRECT)
    try:
        with mmap.mmap(-1, _CHUNK) as buffer:
            at, end = begin, begin + length
            while at < end:
                count = min(os.preadv(fd, [buffer], at), end - at)
                if count <= 0:
                    raise OSError(f"{device} ends at {at}")
                found.update(memoryview(buffer)[:count])
                at += count
    finally:
        os.close(fd)
    return found.hexdigest()


def expected_digest(
    file: Path, patches: Iterable[tuple[str, int]], length: int | None = None
) -> str:
    """SHA-256 of a raw file with the ``(seed, offset)`` pages written over it.

    :param length: use only this many bytes, a multiple of 1 MiB
    """
    by_chunk: dict[int, list[tuple[int, bytes]]] = {}
    for seed, offset in patches:
        by_chunk.setdefault(offset // _CHUNK, []).append((offset % _CHUNK, pattern(seed, offset)))
    found, index = hashlib.sha256(), 0
    with open(file, "rb") as opened:
        while (length is None or index * _CHUNK < length) and (chunk := opened.read(_CHUNK)):
            changed = bytearray(chunk)
            for at, data in by_chunk.get(index, ()):
                changed[at : at + PAGE] = data[: len(chunk) - at]
            found.update(changed)
            index += 1
    return found.hexdigest()


def write(device: str, seed: str, offsets: Iterable[int]) -> None:
    """Write the pattern at each offset; it is on stable storage when this returns."""
    fd = os.open(device, os.O_WRONLY | os.O_DIRECT | os.O_DSYNC)
    try:
        with mmap.mmap(-1, PAGE) as buffer:
            for offset in offsets:
                buffer[:] = pattern(seed, offset)
                if os.pwritev(fd, [buffer], offset) != PAGE:
                    raise OSError(f"short write at {offset}")
    finally:
        os.close(fd)


def differing(device: str, seed: str, offsets: Iterable[int]) -> list[int]:
    """The offsets whose page differs from the pattern."""
    found = []
    fd = os.open(device, os.O_RDONLY | os.O_DIRECT)
    try:
        with mmap.mmap(-1, PAGE) as buffer:
            for offset in offsets:
                os.preadv(fd, [buffer], offset)
                if buffer[:] != pattern(seed, offset):
                    found.append(offset)
    finally:
        os.close(fd)
    return found


def filled(seed: str, at: int) -> bytes:
    """The MiB that :func:`fill` writes at an offset."""
    return pattern(seed, at) * (_CHUNK // PAGE)


def fill(device: str, seed: str, length: int) -> dict[str, float]:
    """Write the first ``length`` bytes, in units of 1 MiB, as fast as the device accepts them.

    :returns: seconds in total, the longest call, failed calls
    """
    fd = os.open(device, os.O_WRONLY | os.O_DIRECT)
    longest, failed, began = 0.0, 0, time.monotonic()
    with mmap.mmap(-1, _CHUNK) as buffer:
        for at in range(0, length, _CHUNK):
            buffer[:] = filled(seed, at)
            call = time.monotonic()
            try:
                os.pwritev(fd, [buffer], at)
            except OSError:
                failed += 1
            longest = max(longest, time.monotonic() - call)
    os.fsync(fd)
    os.close(fd)
    seconds = time.monotonic() - began
    return {"seconds": round(seconds, 3), "longest_s": round(longest, 3), "failed": failed}


def churn(
    device: str, seed: str, seconds: float, begin: int = 0, end: int = 0, stop: str = ""
) -> dict[str, float]:
    """Write, read back and read at random for a while.

    :param begin: nothing before this byte is written
    :param end: nothing from this byte on is read or written; 0: the device's own end
    :param stop: end as soon as a file of this name exists
    :returns: calls, the longest in seconds, failed calls, pages with wrong contents
    """
    end = end or os.lseek(os.open(device, os.O_RDONLY), 0, os.SEEK_END)
    fd = os.open(device, os.O_RDWR | os.O_DIRECT | os.O_DSYNC)
    calls, longest, failed, wrong = 0, 0.0, 0, 0
    written: set[int] = set()
    until = time.monotonic() + seconds
    with mmap.mmap(-1, PAGE) as buffer:
        for writes, offset in _choices(seed, begin, end):
            began = time.monotonic()
            if began >= until or (stop and os.path.exists(stop)):
                break
            try:
                if writes:
                    buffer[:] = pattern(seed, offset)
                    os.pwritev(fd, [buffer], offset)
                    written.add(offset)
                else:
                    os.preadv(fd, [buffer], offset)
                    if offset in written and buffer[:] != pattern(seed, offset):
                        wrong += 1
            except OSError:
                failed += 1
            longest = max(longest, time.monotonic() - began)
            calls += 1
    os.close(fd)
    return {"calls": calls, "longest_s": round(longest, 3), "failed": failed, "wrong": wrong}


def churned(seed: str, calls: int, begin: int, end: int) -> list[int]:
    """Offsets that :func:`churn` has written to after this many calls without a failure."""
    choices = itertools.islice(_choices(seed, begin, end), calls)
    return sorted({offset for writes, offset in choices if writes})


def _choices(seed: str, begin: int, end: int) -> Iterator[tuple[bool, int]]:
    """An endless sequence of offsets to write to (True) or read, determined by the seed."""
    dice = random.Random(seed)  # noqa: S311 - reproducible, not a secret
    chosen: list[int] = []
    while True:
        choice = dice.random()
        if choice < 0.3:
            chosen.append(dice.randrange(begin // PAGE, end // PAGE) * PAGE)
            yield True, chosen[-1]
        elif chosen and choice < 0.6:
            yield False, dice.choice(chosen)
        else:
            yield False, dice.randrange(end // PAGE) * PAGE


def make(file: Path, seed: str, length: int) -> None:
    """Create a file of known pages; ``length`` is a multiple of a page."""
    with open(file, "wb") as opened:
        for offset in range(0, length, PAGE):
            opened.write(pattern(seed, offset))


def watch(device: str, seed: str, length: int, seconds: float, cache: str) -> dict[str, float]:
    """Read at random in the first ``length`` bytes, which are known pages, for a while.

    :param cache: an underlying device whose page cache is dropped repeatedly, so that blocks
        that this host does not store are fetched again
    :returns: calls, the longest in seconds, failed calls, pages with wrong contents
    """
    dice = random.Random(seed)  # noqa: S311 - reproducible, not a secret
    fd, below = os.open(device, os.O_RDONLY | os.O_DIRECT), os.open(cache, os.O_RDONLY)
    calls, longest, failed, wrong, size = 0, 0.0, 0, 0, 16 * PAGE
    emptied, until = 0.0, time.monotonic() + seconds
    with mmap.mmap(-1, size) as buffer:
        while (began := time.monotonic()) < until:
            if began > emptied + 0.5:
                os.posix_fadvise(below, 0, 0, os.POSIX_FADV_DONTNEED)
                emptied = began = time.monotonic()
            offset = dice.randrange(length // size) * size
            try:
                read = os.preadv(fd, [buffer], offset)
            except OSError:
                failed += 1
                read = 0
            longest = max(longest, time.monotonic() - began)
            calls += 1
            for at in range(0, read, PAGE):
                wrong += buffer[at : at + PAGE] != pattern(seed, offset + at)
    os.close(fd)
    os.close(below)
    return {"calls": calls, "longest_s": round(longest, 3), "failed": failed, "wrong": wrong}


def main(arguments: list[str]) -> int:
    verb, device, *rest = arguments
    if verb == "hash":
        numbers = [*map(int, rest), 0][: len(rest) + len(rest) % 2]
        for count, at in zip(numbers[::2], numbers[1::2], strict=True):
            print(digest(device, count, at))
    elif verb == "write":
        write(device, rest[0], map(int, rest[1:]))
    elif verb == "verify":
        wrong = differing(device, rest[0], map(int, rest[1:]))
        print(*wrong)
        return 1 if wrong else 0
    elif verb == "fill":
        print(json.dumps(fill(device, rest[0], int(rest[1]))))
    elif verb == "churn":
        begin, end, stop = [*rest[2:], *("0", "0", "")[len(rest) - 2 :]]
        print(json.dumps(churn(device, rest[0], float(rest[1]), int(begin), int(end), stop)))
    elif verb == "watch":
        seed, length, seconds, cache = rest
        print(json.dumps(watch(device, seed, int(length), float(seconds), cache)))
    else:
        print(__doc__, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
