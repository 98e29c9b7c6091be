"""What each sector of a volume may hold, as far as its guest can know.

A write that was acknowledged is what every later read returns. It is sure to outlive a crash of
the host only once a flush after it has been acknowledged: then a sector holds the value of that
flush, or any value written since. A write that failed, or was not answered, may have happened.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from lab.inside.sectors import FOREIGN, ZERO, Run, join


@dataclass(frozen=True)
class Image:
    """``data``: its ranges that are not zero, as first and number of sectors; ``size`` in them."""

    token: int
    size: int
    data: tuple[tuple[int, int], ...]

    def at(self, sector: int) -> int:
        """The token of a sector; zero past the end."""
        inside = any(first <= sector < first + count for first, count in self.data)
        return self.token if inside else ZERO


@dataclass(frozen=True)
class Cell:
    """``now``: what a read may return; ``kept``: what may be there after a crash, which is more."""

    now: frozenset[int]
    kept: frozenset[int]

    @property
    def is_stable(self) -> bool:
        return self.now == self.kept


@dataclass(frozen=True)
class Wrong:
    """Sectors that returned what they cannot hold.

    ``lost``: the value is older than one that had been flushed.
    """

    first: int
    count: int
    found: int
    allowed: tuple[int, ...]
    lost: bool

    def __str__(self) -> str:
        found = "foreign bytes" if self.found == FOREIGN else f"the value of {self.found}"
        allowed = " or ".join(map(str, self.allowed))
        lost = " (a flushed write is lost)" if self.lost else ""
        return f"sectors {self.first}+{self.count}: {found} in place of {allowed}{lost}"


class Contents:
    """The sectors of one volume or snapshot; those never written are the image's."""

    def __init__(self, image: Image) -> None:
        self.image = image
        self._cells: dict[int, Cell] = {}
        self._unstable: set[int] = set()

    def cell(self, sector: int) -> Cell:
        found = self._cells.get(sector)
        if found is None:
            value = frozenset((self.image.at(sector),))
            found = Cell(value, value)
        return found

    def write(self, first: int, count: int, token: int) -> None:
        """A write was acknowledged."""
        value = frozenset((token,))
        for at in range(first, first + count):
            self._put(at, Cell(value, self.cell(at).kept | value))

    def attempt(self, first: int, count: int, token: int) -> None:
        """A write failed, or nobody knows."""
        value = frozenset((token,))
        for at in range(first, first + count):
            old = self.cell(at)
            self._put(at, Cell(old.now | value, old.kept | value))

    def flush(self) -> None:
        """A flush was acknowledged."""
        for at in tuple(self._unstable):
            now = self._cells[at].now
            self._put(at, Cell(now, now))

    def crash(self) -> None:
        """The guest's host lost power."""
        for at in tuple(self._unstable):
            kept = self._cells[at].kept
            self._put(at, Cell(kept, kept))

    def observe(self, runs: Iterable[Run]) -> list[Wrong]:
        """Judge what was read; a sector that might have held several values now holds this one."""
        wrong: list[Wrong] = []
        for run in self._refined(runs):
            first, count, token = run
            cell = self.cell(first)
            if token not in cell.now:
                lost = cell.is_stable and FOREIGN < token < max(cell.now)
                wrong.append(Wrong(first, count, token, tuple(sorted(cell.now)), lost))
            elif len(cell.now) > 1:
                self._put(first, Cell(frozenset((token,)), cell.kept))
        return _joined(wrong)

    def _refined(self, runs: Iterable[Run]) -> Iterator[Run]:
        """The runs, cut where what is allowed may change."""
        edges = {edge for first, count in self.image.data for edge in (first, first + count)}
        for first, count, token in runs:
            end, at = first + count, first
            within = range(first, end)
            if count > len(self._cells):
                cells = [each for each in self._cells if each in within]
            else:
                cells = [each for each in within if each in self._cells]
            cuts = {*cells, *(each + 1 for each in cells), *edges}
            for cut in sorted(each for each in cuts if first < each < end):
                yield at, cut - at, token
                at = cut
            yield at, end - at, token

    def spans(self, end: int, margin: int = 2048) -> list[tuple[int, int]]:
        """Ranges to read in order to see all that was ever there: first and number of sectors.

        :param end: sectors of the volume
        """
        runs: list[Run] = [(0, min(self.image.size + margin, end), 0)]
        for at in sorted(self._cells):
            begin = at // margin * margin
            if begin >= runs[-1][0] + runs[-1][1]:
                join(runs, (begin, min(margin, end - begin), 0))
        return [(first, count) for first, count, _ in runs]

    def copy(self) -> Contents:
        """A snapshot of it: durable as it is."""
        found = Contents(self.image)
        found._cells = dict(self._cells)
        found._unstable = set(self._unstable)
        found.flush()
        return found

    def _put(self, at: int, cell: Cell) -> None:
        self._cells[at] = cell
        if cell.is_stable:
            self._unstable.discard(at)
        else:
            self._unstable.add(at)


def _joined(wrong: Iterable[Wrong]) -> list[Wrong]:
    found: list[Wrong] = []
    for each in wrong:
        last = found[-1] if found else None
        if last and (last.found, last.allowed, last.lost, last.first + last.count) == (
            each.found,
            each.allowed,
            each.lost,
            each.first,
        ):
            found[-1] = Wrong(
                last.first, last.count + each.count, last.found, last.allowed, last.lost
            )
        else:
            found.append(each)
    return found
