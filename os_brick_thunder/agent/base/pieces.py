"""The pieces of a base in the order in which it is filled, as it is read and missed.

What boots of the image read comes first: as far as guests of this host or other hosts are ahead of
that, what they miss now and what boots read next, then what they have passed. The rest comes when
it may, at a part of its rate while volumes use the base.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator

from os_brick_thunder.agent.base.demand import Demand
from os_brick_thunder.agent.base.devices import LITTLE_AHEAD, READ_AHEAD
from os_brick_thunder.agent.policy import fillorder
from os_brick_thunder.agent.policy.fillorder import Piece
from os_brick_thunder.agent.ports import Kit, PageCache
from os_brick_thunder.common import errors
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
#: Pieces that are looked at, before one is filled, for misses of guests and other hosts.
_LOOKED = 16
#: What counts of a piece's speed when the next one is measured.
_DECAY = 0.9


class Misses:
    """What guests and other hosts miss, and how far the kernel reads ahead of that.

    Little while what boots read is filled: each of the other hosts' pieces arrives as several
    requests in a row, and what is read ahead of these no boot may read.
    """

    def __init__(self, kit: Kit, device: str, size: int) -> None:
        """
        :param device: that is read through loop devices
        :param size: of the image
        """
        self._loops = kit.loops
        self._device = device
        self._little = False
        self._cache: PageCache | None = None
        with contextlib.suppress(OSError):  # no reason for which a base cannot be filled
            self._cache = kit.blocks.page_cache(device, size)

    def read_ahead(self, *, little: bool) -> None:
        if little != self._little:
            self._little = little
            # A device that is gone is none of the reasons for which a base cannot be filled.
            with contextlib.suppress(errors.DeviceNotFound):
                self._loops.reopen(self._device, LITTLE_AHEAD if little else READ_AHEAD)

    def has_any(self, piece: Piece) -> bool:
        """Whether some of a piece was missed, and so is in the page cache."""
        with contextlib.suppress(OSError):
            return self._cache is not None and self._cache.has_any(piece.start, piece.end)
        return False

    def close(self) -> None:
        if self._cache is not None:
            self._cache.close()


class Pieces:
    """The pieces of a base in the order of its newest profile, for one copy.

    :ivar all: nothing was left out
    :ivar unread: what was read ahead, and was not reached
    """

    def __init__(
        self,
        size: int,
        newest: Callable[[], str],
        may_go_on: Callable[[str, float], bool],
        demand: Demand,
        read_ahead: Callable[[int, int], None],
        misses: Misses,
    ) -> None:
        """
        :param size: of the image
        :param newest: the profile, encoded, as it is now
        :param may_go_on: called with the profile, and with bytes a second so far, before each piece
            that is not in the profile; may wait
        :param demand: what guests read now, who would wait behind what is filled or read ahead
        :param read_ahead: has a piece read before it is reached
        :param misses: of guests and other hosts
        """
        self._size = size
        self._newest = newest
        self._may_go_on = may_go_on
        self._demand = demand
        self._read_ahead = read_ahead
        self._misses = misses
        self._bytes = self._seconds = 0.0
        self.all = False
        self.unread: set[tuple[int, int]] = set()

    def __call__(self, missing: Extents, unit: int, longest: int) -> Iterator[tuple[int, int]]:
        """See :data:`.transfer.Order`."""
        done: list[tuple[int, int]] = []
        returns = False  # to what was passed over
        while not self.all:
            profile = self._newest()
            left = missing.difference(Extents.of(done))
            ordered = fillorder.ordered(left, unit, _ranges(profile, self._size), longest)
            passed = False
            for piece, following in _with_next(ordered, AHEAD // unit):
                if piece.profiled and not returns and self._is_missed(following):
                    passed = True
                    continue
                if passed and not piece.profiled:
                    break
                self._misses.read_ahead(little=piece.profiled)
                if not piece.profiled and not self._may_go_on(profile, self._rate()):
                    return
                if self._newest() != profile:
                    break
                self._read_next(piece, following, bool(profile))
                done.append((piece.start, piece.end))
                self.unread.discard((piece.start, piece.end))
                began = time.monotonic()
                yield piece.start, piece.end
                self._wait_after(piece, time.monotonic() - began, bool(profile))
            else:
                self.all = not passed
            returns = passed and self._newest() == profile

    def _is_missed(self, pieces: Iterable[Piece]) -> bool:
        """Whether guests or other hosts are at one of these pieces, or were. What was read ahead of
        its turn tells nothing.
        """
        return any(
            piece.profiled
            and (piece.start, piece.end) not in self.unread
            and self._misses.has_any(piece)
            for piece in itertools.islice(pieces, _LOOKED)
        )

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
            if (each.start, each.end) not in self.unread and each.profiled >= piece.profiled:
                self.unread.add((each.start, each.end))
                self._read_ahead(each.start, each.end)


def _with_next(pieces: Iterator[Piece], count: int) -> Iterator[tuple[Piece, Iterable[Piece]]]:
    """Each piece with up to ``count`` of those that follow."""
    following: deque[Piece] = deque()
    while True:
        following.extend(itertools.islice(pieces, count + 1 - len(following)))
        if not following:
            return
        yield following.popleft(), following


def _ranges(profile: str, size: int) -> tuple[tuple[int, int], ...]:
    """What boots read of an image, in order; nothing if that is not known."""
    try:
        return Profile.decode(profile, size).ordered() if profile else ()
    except ValueError as error:
        LOG.warning("a profile is left out: %s", error)
        return ()
