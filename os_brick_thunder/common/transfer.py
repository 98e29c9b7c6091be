"""Copies of image data.

:func:`copy` takes a source and a destination and returns a :class:`Transfer`, which runs in a
native thread: one pass over the source, in pieces, each checked before any of it is written. What
the destination has already is not copied again, so an interrupted copy resumes where it was.
Sources and destinations are in :mod:`.copyends`.

Sizes and offsets are in bytes.
"""

from __future__ import annotations

import math
import mmap
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Protocol

from os_brick_thunder.common import errors
from os_brick_thunder.common.copyends import Destination, Input, read_all
from os_brick_thunder.common.pace import Pace
from os_brick_thunder.common.policy import manifest as manifests
from os_brick_thunder.common.policy.extents import Extents
from os_brick_thunder.common.policy.manifest import Manifest

#: Longest piece that is held in memory to write whole blocks of a sparse destination. Others are
#: written in whole blocks however long these are.
LONGEST_PIECE = 64 << 20
#: Length of a piece where digests cover less: each piece has its cost.
PIECE = 256 << 10
#: Interval, in seconds, at which a transfer in another thread is polled.
_POLL = 0.05

#: The pieces of a copy in the order in which they are copied, of what is to be copied, in whole
#: units, the bytes of a unit, and those of the longest piece. A piece is of whole units. They are
#: asked for one by one, in the transfer's thread. Those that are left out are not copied.
Order = Callable[[Extents, int, int], Iterator[tuple[int, int]]]


class Check(Protocol):
    """What the bytes of an image are compared with: its manifest, or its hash tree.

    ``chunk``: bytes that are checked at once, at a multiple of it; the last ones may be fewer.
    """

    @property
    def chunk(self) -> int: ...

    def fits(self, start: int, data: memoryview) -> bool:
        """Whether ``data`` are the image's bytes at ``start``.

        :raises errors.TransferError: that cannot be found out
        """

    def beside(self, start: int, end: int) -> Iterable[tuple[int, int]]:
        """What else of the source, from where to where, is read to check these bytes."""


def _ascending(extents: Extents, _unit: int, longest: int) -> Iterator[tuple[int, int]]:
    return extents.chunks(longest)


def _in_a_thread(work: Callable[[], None]) -> None:
    threading.Thread(target=work, name="transfer", daemon=True).start()


def copy(
    source: Input,
    destination: Destination,
    *,
    check: Check | None = None,
    digest: bool = False,
    chunk: int | None = None,
    pace: Callable[[int], float] | None = None,
    proceed: Callable[[], bool] = lambda: True,
    order: Order = _ascending,
    piece: int = 0,
    spawn: Callable[[Callable[[], None]], object] = _in_a_thread,
) -> Transfer:
    """Start to copy an image; both ends are closed when the copy ends.

    :param check: every byte is compared with it before it is written
    :param digest: make the image's manifest, see :attr:`Transfer.manifest`
    :param chunk: bytes that each of its digests covers, unless as in new manifests
    :param pace: called with the bytes of each piece, tells when to go on: :meth:`.Pace.after` of a
        limit, which other copies may share; None is no limit
    :param proceed: called before each piece, in that thread; it may wait, and False cancels
    :param order: see :data:`Order`; not with ``digest``
    :param piece: length of the longest piece, if that is more than a unit
    :param spawn: runs a function in a native thread
    """
    transfer = Transfer(source, destination, check, digest, pace, proceed, order, chunk, piece)
    spawn(transfer.run)
    return transfer


class Transfer:
    """A copy in progress.

    Its state is plain attributes, which are polled: in a process with green threads, locks do not
    work between these and native threads.

    :ivar total: bytes that have to be copied
    :ivar done: bytes of these that have been, including zeroes that need not be written
    :ivar finished: the copy has ended, with or without success
    """

    def __init__(
        self,
        source: Input,
        destination: Destination,
        check: Check | None = None,
        digest: bool = False,
        pace: Callable[[int], float] | None = None,
        proceed: Callable[[], bool] = lambda: True,
        order: Order = _ascending,
        chunk: int | None = None,
        piece: int = 0,
    ) -> None:
        self._source = source
        self._destination = destination
        self._check = check
        self._digests: list[bytes] | None = [] if digest else None
        self._pace = pace or Pace().after
        self._proceed = proceed
        self._order = order
        self._chunk = check.chunk if check else chunk or manifests.chunk_for(source.size)
        self._unit = _unit_of(self._chunk, destination)
        self._longest = max(1, piece // self._unit) * self._unit
        self._size = source.size
        needed = source.extents
        if destination.sparse:  # what is written is written in whole blocks
            needed = needed.touched_blocks(destination.block, source.size)
        self._wanted = needed.difference(destination.present)
        #: What is read of a piece: to check a chunk, all of it.
        self._read = source.extents
        if not (check or digest):
            self._read = source.extents.intersection(self._wanted)
        self._cancelled = False
        self._error: BaseException | None = None
        self._manifest: Manifest | None = None
        self.total = self._wanted.length
        self.done = 0
        self.finished = False

    # -- for the caller -------------------------------------------------------------------------

    def wait(self, timeout: float | None = None) -> bool:
        """Wait for the end, for ``timeout`` seconds at most.

        :returns: whether it has ended
        :raises errors.WrongDigest: the source returned other bytes than the image's
        :raises errors.TransferCancelled:
        :raises errors.TransferError: reading or writing failed; says where
        """
        until = None if timeout is None else time.monotonic() + timeout
        while not self.finished:
            if until is not None and time.monotonic() >= until:
                return False
            time.sleep(_POLL)
        if self._error is not None:
            raise self._error
        return True

    def cancel(self) -> None:
        """Let it end after the current piece; what has been written stays."""
        self._cancelled = True

    def close(self) -> None:
        """Cancel it and wait until both ends are closed."""
        self.cancel()
        while not self.finished:
            time.sleep(_POLL)

    @property
    def manifest(self) -> Manifest | None:
        """The image's manifest, if it was requested and the copy succeeded."""
        return self._manifest

    # -- the work -------------------------------------------------------------------------------

    def run(self) -> None:
        """Copy; in a thread of its own. Never raises: see :meth:`wait`."""
        try:
            try:
                self._copy()
            finally:
                self._source.close()
                self._destination.close()
        except errors.TransferError as error:
            self._error = error
        except Exception as error:
            self._error = errors.TransferError(
                f"{self._source.name} to {self._destination.name}: {error}"
            )
            self._error.__cause__ = error
        finally:
            self.finished = True

    def _copy(self) -> None:
        buffer = mmap.mmap(-1, self._longest)  # page-aligned, as O_DIRECT requires
        view = memoryview(buffer)
        written = 0  # up to here
        for start, end in self._pieces():
            self._check_cancelled()
            self._digest_holes(start)
            try:
                self._fetch(view, start, end)
                self._verify(view, start, end)
            finally:  # nothing is kept in the page cache, wrong bytes included
                self._source.forget(start, end)
            copied = 0
            for a, b in self._wanted.within(start, end):
                for first, last in self._runs(buffer, a - start, b - start):
                    self._put(view, start, first, last)
                    written = max(written, start + last)
                copied += b - a
            self.done += copied
            self._wait_until(self._pace(copied))
        if self._destination.sparse and written == self._size:
            self._complete_last_block(view)
        self._destination.flush()
        self._digest_holes(self._size)
        if self._digests is not None:
            self._manifest = Manifest(self._size, self._chunk, b"".join(self._digests))

    def _pieces(self) -> Iterator[tuple[int, int]]:
        touched = self._wanted
        if self._digests is not None:
            touched = touched.union(self._read)
        touched = touched.touched_blocks(self._unit, self._size)
        return self._order(touched, self._unit, self._longest)

    def _check_cancelled(self) -> None:
        if self._cancelled or not self._proceed():
            raise errors.TransferCancelled(
                f"{self._source.name} to {self._destination.name}: cancelled after "
                f"{self.done} of {self.total} bytes"
            )

    def _fetch(self, view: memoryview, start: int, end: int) -> None:
        """Read a piece; holes and what is beyond the image's end are zeroes."""
        at = start
        for a, b in self._read.within(start, end):
            _zero(view, at - start, a - start)
            upto = _rounded(b, self._source.align)
            read_all(self._source, view[a - start : upto - start], a)
            at = b
        upto = _rounded(end - start, math.lcm(self._unit, self._destination.align))
        _zero(view, at - start, min(upto, len(view)))

    def _verify(self, view: memoryview, start: int, end: int) -> None:
        for at in range(start, end, self._chunk):
            chunk = view[at - start : min(at + self._chunk, end) - start]
            if self._check is not None and not self._check.fits(at, chunk):
                raise errors.WrongDigest(
                    f"{self._source.name}: the {len(chunk)} bytes at {at} are not the image's: "
                    "they were not written"
                )
            if self._digests is not None:
                self._digests.append(self._digest(chunk, at))

    def _digest_holes(self, upto: int) -> None:
        """Add the digests of the chunks since the last piece: an image of terabytes may have few
        bytes that are not holes, and none of these is looked at."""
        if self._digests is not None:
            for at in range(len(self._digests) * self._chunk, upto, self._chunk):
                length = min(self._chunk, self._size - at)
                self._digests.append(manifests.digest_of_zeroes(length))

    def _digest(self, chunk: memoryview, at: int) -> bytes:
        hole = next(self._read.within(at, at + len(chunk)), None) is None
        return manifests.digest_of_zeroes(len(chunk)) if hole else manifests.digest(chunk)

    def _runs(self, buffer: mmap.mmap, first: int, last: int) -> Iterable[tuple[int, int]]:
        """The parts of a buffer's bytes ``[first, last)`` that have to be written."""
        block = self._destination.block
        if self._destination.sparse and len(buffer) % block == 0:
            return _data(buffer, first, last, block)
        return [(first, last)]

    def _complete_last_block(self, view: memoryview) -> None:
        """Write zeroes from the image's end to the end of its last block."""
        at = _rounded(self._size, self._destination.align)
        upto = min(_rounded(self._size, self._destination.block), self._destination.capacity)
        _zero(view, 0, len(view))
        while at < upto:
            length = min(len(view), upto - at)
            self._put(view, at, 0, length)
            at += length

    def _put(self, view: memoryview, start: int, first: int, last: int) -> None:
        """Write bytes ``[first, last)`` of a buffer; ``start`` is its offset in the image."""
        last = _rounded(last, self._destination.align)
        while first < last:
            written = self._destination.write(view[first:last], start + first)
            if written <= 0:
                raise errors.TransferError(
                    f"{self._destination.name}: no bytes could be written at {start + first}"
                )
            first += written

    def _wait_until(self, due: float) -> None:
        while not self._cancelled:
            ahead = due - time.monotonic()
            if ahead <= 0:
                return
            time.sleep(min(ahead, _POLL))


def _unit_of(chunk: int, destination: Destination) -> int:
    """Whole chunks, which can be checked, of whole blocks.

    The thin pool would fill the rest of a partially written block from the origin, unchecked. So
    only of a destination without one, which is sparse, may a piece have less than a block.
    """
    unit = math.lcm(chunk, destination.block)
    return chunk if destination.sparse and unit > LONGEST_PIECE else unit


def _rounded(offset: int, align: int) -> int:
    return -(-offset // align) * align


def _zero(view: memoryview, start: int, end: int) -> None:
    if start < end:
        view[start:end] = bytes(end - start)


def _data(buffer: mmap.mmap, start: int, end: int, block: int) -> Iterator[tuple[int, int]]:
    """The parts of ``[start, end)`` of a buffer that are not zeros, in whole blocks."""
    begun: int | None = None
    zeros = bytes(block)
    for a, b in Extents(((start, end),)).chunks(block):
        if buffer[a:b] == (zeros if b - a == block else zeros[: b - a]):
            if begun is not None:
                yield begun, a
            begun = None
        elif begun is None:
            begun = a
    if begun is not None:
        yield begun, end
