"""The pieces of a base in the order in which it is filled, as it is read and missed.

What boots of the image read comes first, and of that what guests of this host or other hosts have
read in part: the rest of it is fetched at once, rather than by their next small reads. What they
have read whole is here already, and waits. What no boot reads comes when it may, at a part of its
rate while volumes use the base.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence

from os_brick_thunder.agent.base.demand import Demand
from os_brick_thunder.agent.policy import fillorder
from os_brick_thunder.agent.policy.fillorder import Piece
from os_brick_thunder.agent.ports import Blocks, PageCache
from os_brick_thunder.common.policy.extents import Extents
from os_brick_thunder.common.policy.profile import Profile

LOG = logging.getLogger(__name__)

#: Bytes that are asked for before they are read, at most: while one piece is checked and written,
#: the next ones are on their way. They wait in the page cache of the paths, where other hosts'
#: reads find them, too.
AHEAD = 4 << 20
#: Seconds that this takes at most, as guests' and other hosts' misses wait behind it; but always
#: these pieces.
AHEAD_SECONDS, LEAST_AHEAD = 0.1, 2
#: Seconds between two looks for what guests and other hosts miss: one takes about a millisecond.
LOOK = 0.01
#: What counts of a piece's speed when the next one is measured.
_DECAY = 0.9


class Misses:
    """What guests and other hosts miss of a base, which so is in the page cache."""

    def __init__(self, blocks: Blocks, device: str, size: int) -> None:
        """
        :param device: that is read through loop devices
        :param size: of the image
        """
        self._cache: PageCache | None = None
        with contextlib.suppress(OSError):  # no reason for which a base cannot be filled
            self._cache = blocks.page_cache(device, size)

    def share(self, piece: Piece) -> float:
        """The share of a piece that was missed."""
        with contextlib.suppress(OSError):
            return self._cache.share(piece.start, piece.end) if self._cache else 0.0
        return 0.0

    def close(self) -> None:
        if self._cache is not None:
            self._cache.close()


class Pieces:
    """The pieces of a base in the order of its newest profile, for one copy.

    :ivar all: nothing was left out
    """

    def __init__(
        self,
        size: int,
        newest: Callable[[], str],
        may_go_on: Callable[[str, float], bool],
        demand: Demand,
        misses: Misses,
        read_little: Callable[[bool], None],
        read_ahead: Callable[[int, int], None],
        forget: Callable[[int, int], None],
    ) -> None:
        """
        :param size: of the image
        :param newest: the profile, encoded, as it is now
        :param may_go_on: called with the profile, and with bytes a second so far, before each piece
            that is not in the profile; may wait
        :param demand: what guests read now, who would wait behind what is filled or read ahead
        :param misses: of guests and other hosts
        :param read_little: called before each piece with whether little is to be read ahead of
            these now
        :param read_ahead: has a piece read before it is reached
        :param forget: drops a range from the page cache
        """
        self._size = size
        self._newest = newest
        self._may_go_on = may_go_on
        self._demand = demand
        self._misses = misses
        self._read_little = read_little
        self._read_ahead = read_ahead
        self._forget = forget
        self._bytes = self._seconds = 0.0
        self._looked = -math.inf
        self._profiled = False  # the piece that is being copied
        self.all = False
        #: What was read ahead, and was not reached.
        self._unread: set[tuple[int, int]] = set()
        #: What boots read and was read, in the page cache still: what is read ahead of guests and
        #: other hosts goes on there, and would be fetched again.
        self._kept: list[tuple[int, int]] = []

    def __call__(self, missing: Extents, unit: int, longest: int) -> Iterator[tuple[int, int]]:
        """See :data:`.transfer.Order`."""
        done: list[tuple[int, int]] = []
        returns = False  # to what was passed over
        while not self.all:
            profile = self._newest()
            left = missing.difference(Extents.of(done))
            ordered = fillorder.ordered(left, unit, _ranges(profile, self._size), longest)
            passed: list[Piece] = []
            for piece, following in self._in_turn(
                ordered, AHEAD // unit, None if returns else passed
            ):
                if passed and not piece.profiled:
                    break
                self._read_little(piece.profiled)
                if not piece.profiled:
                    self._forget_kept()
                    if not self._may_go_on(profile, self._rate()):
                        return
                if self._newest() != profile:
                    break
                self._read_next(piece, following, bool(profile))
                done.append((piece.start, piece.end))
                self._unread.discard((piece.start, piece.end))
                self._profiled = piece.profiled
                began = time.monotonic()
                yield piece.start, piece.end
                self._wait_after(piece, time.monotonic() - began, bool(profile))
            else:
                self.all = not passed
            returns = bool(passed) and self._newest() == profile

    def was_read(self, start: int, end: int) -> None:
        """A piece was read, and is no longer needed in the page cache for this copy."""
        if self._profiled:
            self._kept.append((start, end))
        else:
            self._forget(start, end)

    def close(self) -> None:
        """Drop from the page cache what is left there.

        :raises OSError: the device is gone
        """
        self._kept += self._unread
        self._forget_kept()

    def _forget_kept(self) -> None:
        kept, self._kept = self._kept, []
        for start, end in kept:
            self._forget(start, end)

    def _in_turn(
        self, pieces: Iterator[Piece], count: int, passed: list[Piece] | None
    ) -> Iterator[tuple[Piece, Iterable[Piece]]]:
        """Each piece with up to ``count`` of those that follow.

        :param passed: gets the pieces that are passed over; None: there is no look at what guests
            and other hosts miss
        """
        waiting: list[Piece] = []
        while True:
            waiting += itertools.islice(pieces, count + 1 - len(waiting))
            if passed is not None and self._is_time_to_look(waiting):
                missed = {piece: self._missed(piece) for piece in waiting}
                passed += (piece for piece in waiting if missed[piece] == 1)
                left = [piece for piece in waiting if missed[piece] < 1]
                waiting = sorted(left, key=lambda piece: not missed[piece])
                self._looked = time.monotonic()
                waiting += itertools.islice(pieces, count + 1 - len(waiting))
            if not waiting:
                return
            yield waiting.pop(0), waiting

    def _is_time_to_look(self, waiting: Sequence[Piece]) -> bool:
        """Not at what no boot reads, which comes last."""
        due = time.monotonic() >= self._looked + LOOK
        return due and bool(waiting) and waiting[0].profiled

    def _missed(self, piece: Piece) -> float:
        """The share of a piece that guests or other hosts have read. What was read ahead of its
        turn tells nothing.
        """
        if not piece.profiled or (piece.start, piece.end) in self._unread:
            return 0.0
        return self._misses.share(piece)

    def _wait_after(self, piece: Piece, seconds: float, known: bool) -> None:
        """Leave guests and other hosts their part of the time after a piece.

        :param seconds: that it took
        :param known: whether boots of the image were recorded
        """
        length = piece.end - piece.start
        if piece.profiled or not known:
            self._bytes = self._bytes * _DECAY + length
            self._seconds = self._seconds * _DECAY + seconds
        if piece.profiled:
            time.sleep(self._demand.share(seconds))
        elif known:  # the kernel may have read it ahead, as far as guests miss in order
            time.sleep(self._demand.share_of_rest(max(seconds, length / self._rate())))

    def _rate(self) -> float:
        """Bytes a second; the first piece finds out."""
        return self._bytes / self._seconds if self._seconds else math.inf

    def _most_ahead(self, length: int) -> int:
        """Pieces of this length that are read ahead. On a fast link that is far there are more each
        time, until its time there and back is filled.
        """
        rate = self._rate() if self._seconds else 0.0
        return max(LEAST_AHEAD, min(AHEAD, int(rate * AHEAD_SECONDS)) // length)

    def _read_next(self, piece: Piece, following: Iterable[Piece], known: bool) -> None:
        """Have the next pieces read; those that no boot reads only once one of them may be, and no
        guest reads. What boots read is not read ahead of guests without a cache either.

        :param known: whether boots of the image were recorded
        """
        demand = self._demand
        rest_waits = not demand.quiet or (known and demand.is_slow)
        if demand.uncached if piece.profiled else rest_waits:
            return
        for each in itertools.islice(following, self._most_ahead(piece.end - piece.start)):
            if (each.start, each.end) not in self._unread and each.profiled >= piece.profiled:
                self._unread.add((each.start, each.end))
                self._read_ahead(each.start, each.end)


def _ranges(profile: str, size: int) -> tuple[tuple[int, int], ...]:
    """What boots read of an image, in order; nothing if that is not known."""
    try:
        return Profile.decode(profile, size).ordered() if profile else ()
    except ValueError as error:
        LOG.warning("a profile is left out: %s", error)
        return ()
