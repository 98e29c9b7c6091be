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
    missing: Extents, unit: int, profile: Iterable[tuple[int, int]] = (), longest: int = 0
) -> Iterator[Piece]:
    """The pieces of what is missing, each once.

    :param missing: whole units; the last one may end with the image
    :param unit: bytes of which a piece is a multiple, and that it begins at a multiple of
    :param profile: ranges of bytes in the order in which boots read them; the rest is ascending
    :param longest: bytes of the longest piece, if that is more than a unit; of what boots read
        nothing is added to make one longer
    """
    if not missing:
        return
    size = missing.ranges[-1][1]
    left = bytearray(-(-size // unit))
    for start, _ in missing.chunks(unit):
        left[start // unit] = 1
    most = max(1, longest // unit)
    for ranges, profiled in ((profile, True), (missing.ranges, False)):
        for start, end in ranges:
            for first, last in _taken(left, start // unit, -(-end // unit), most):
                yield Piece(first * unit, min(last * unit, size), profiled)


def _taken(left: bytearray, first: int, last: int, most: int) -> Iterator[tuple[int, int]]:
    """Take the runs of what is left from ``first`` to ``last``, cut at multiples of ``most``."""
    last = min(last, len(left))
    while first < last:
        end, limit = first, min(last, (first // most + 1) * most)
        while end < limit and left[end]:
            left[end] = 0
            end += 1
        if first < end:
            yield first, end
        first = max(end, first + 1)
