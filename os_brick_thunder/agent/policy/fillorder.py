"""The order in which a base is filled: what boots read, in their order, then the rest."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

from os_brick_thunder.common.policy.extents import Extents


class Piece(NamedTuple):
    """A range of bytes that is read and checked at once; ``profiled``: boots read some of it."""

    start: int
    end: int
    profiled: bool


def ordered(
    missing: Extents, length: int, profile: Iterable[tuple[int, int]] = ()
) -> Iterator[Piece]:
    """The pieces of what is missing, each once.

    :param missing: whole pieces; the last one may end with the image
    :param length: bytes of a piece, which begins at a multiple of it
    :param profile: ranges of bytes in the order in which boots read them; the rest is ascending
    """
    if not missing:
        return
    size = missing.ranges[-1][1]
    left = bytearray(-(-size // length))
    for start, _ in missing.chunks(length):
        left[start // length] = 1
    for start, end in profile:
        for number in range(start // length, min(-(-end // length), len(left))):
            if left[number]:
                left[number] = 0
                yield Piece(number * length, min((number + 1) * length, size), True)
    for start, end in missing.chunks(length):
        if left[start // length]:
            yield Piece(start, end, False)
