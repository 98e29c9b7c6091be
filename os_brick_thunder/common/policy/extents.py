"""Sets of byte ranges as values.

An :class:`Extents` is a sorted tuple of disjoint, non-adjacent, non-empty half-open ranges
``[start, end)`` in bytes. Every part of an image or a volume (allocated, unmodified, filled) is an
Extents.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Extents:
    """An immutable set of bytes, held as sorted, disjoint, non-adjacent ranges."""

    ranges: tuple[tuple[int, int], ...] = ()

    @classmethod
    def of(cls, ranges: Iterable[tuple[int, int]]) -> Extents:
        """From ``(start, end)`` pairs in any order; overlaps are merged, empty ones dropped.

        :raises ValueError: a range that starts below 0 or ends before it starts
        """
        merged: list[tuple[int, int]] = []
        for start, end in sorted(ranges):
            if start < 0 or end < start:
                raise ValueError(f"not a byte range: [{start}, {end})")
            if start == end:
                continue
            if merged and start <= merged[-1][1]:
                merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
            else:
                merged.append((start, end))
        return cls(tuple(merged))

    @classmethod
    def from_wire(cls, pairs: Iterable[Sequence[int]]) -> Extents:
        """Parse ``[[start, length], …]``, the form that crosses RPC."""
        return cls.of((start, start + length) for start, length in pairs)

    def to_wire(self) -> list[list[int]]:
        """Print as ``[[start, length], …]`` in bytes."""
        return [[start, end - start] for start, end in self.ranges]

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return iter(self.ranges)

    def __bool__(self) -> bool:
        return bool(self.ranges)

    @property
    def length(self) -> int:
        """Bytes in the set."""
        return sum(end - start for start, end in self.ranges)

    def complement(self, size: int) -> Extents:
        """The bytes of ``[0, size)`` that are not in the set."""
        gaps: list[tuple[int, int]] = []
        at = 0
        for start, end in self.ranges:
            if start >= size:
                break
            gaps.append((at, start))
            at = end
        gaps.append((at, max(at, size)))
        return Extents.of(gaps)

    def union(self, other: Extents) -> Extents:
        return Extents.of((*self.ranges, *other.ranges))

    def intersection(self, other: Extents) -> Extents:
        found: list[tuple[int, int]] = []
        mine = theirs = 0
        while mine < len(self.ranges) and theirs < len(other.ranges):
            (start, end), (begin, stop) = self.ranges[mine], other.ranges[theirs]
            if max(start, begin) < min(end, stop):
                found.append((max(start, begin), min(end, stop)))
            mine, theirs = (mine + 1, theirs) if end <= stop else (mine, theirs + 1)
        return Extents(tuple(found))

    def difference(self, other: Extents) -> Extents:
        size = self.ranges[-1][1] if self.ranges else 0
        return self.intersection(other.complement(size))

    def whole_blocks(self, block: int) -> Extents:
        """Shrink every range to the blocks that it covers completely."""
        return Extents.of(
            (-(-start // block) * block, end // block * block)
            for start, end in self.ranges
            if -(-start // block) * block < end // block * block
        )

    def touched_blocks(self, block: int, size: int) -> Extents:
        """Extend every range to the blocks that it touches, up to ``size``."""
        return Extents.of(
            (start // block * block, min(-(-end // block) * block, size))
            for start, end in self.ranges
            if start < size
        )

    def within(self, start: int, end: int) -> Iterator[tuple[int, int]]:
        """Iterate over the parts of the ranges inside ``[start, end)``."""
        at = max(bisect.bisect_right(self.ranges, (start, math.inf)) - 1, 0)
        while at < len(self.ranges) and self.ranges[at][0] < end:
            a, b = max(self.ranges[at][0], start), min(self.ranges[at][1], end)
            if a < b:
                yield a, b
            at += 1

    def chunks(self, length: int) -> Iterator[tuple[int, int]]:
        """Iterate over pieces of at most ``length`` bytes, cut at multiples of it."""
        for start, end in self.ranges:
            at = start
            while at < end:
                upto = min(end, (at // length + 1) * length)
                yield at, upto
                at = upto

    def with_holes(self, count: int, size: int) -> Extents:
        """With the ``count`` longest holes before ``size`` alone: the others count as data."""
        return self.complement(size).at_most(count).complement(size)

    def at_most(self, count: int) -> Extents:
        """The ``count`` longest ranges: a subset that can be limited in size."""
        if len(self.ranges) <= count:
            return self
        longest = sorted(self.ranges, key=lambda r: r[0] - r[1])[:count]
        return Extents(tuple(sorted(longest)))
