"""The ends of a copy of image data: what it is read from, and what it is written to.

A source is a raw :class:`File` (a Glance image after Cinder's checks) or a :class:`Disk` (a replica
that is logged in, a base's source); a destination is a Disk. Sizes and offsets are in bytes.
"""

from __future__ import annotations

import fcntl
import os
import stat
import struct
from collections.abc import Callable, Iterator
from typing import Protocol

from os_brick_thunder.common import errors
from os_brick_thunder.common.policy.extents import Extents

#: The smallest block of a thin pool.
GRAIN = 65536
#: linux/fs.h: a block device's logical block size
_BLKSSZGET = 0x1268


class Input(Protocol):
    """Where an image is read from; bytes outside ``extents`` are zeroes."""

    name: str
    align: int
    extents: Extents

    @property
    def size(self) -> int: ...

    def read(self, buffer: memoryview, offset: int) -> int:
        """Fill ``buffer`` or the beginning of it.

        :returns: the number of bytes read; 0 at the end of the source
        """

    def forget(self, start: int, end: int) -> None:
        """These bytes will not be read again."""

    def close(self) -> None: ...


def read_all(source: Input, buffer: memoryview, offset: int) -> None:
    """Fill all of ``buffer``.

    :raises errors.TransferError: the source ends before that
    """
    done = 0
    while done < len(buffer):
        if (got := source.read(buffer[done:], offset + done)) <= 0:
            raise errors.TransferError(
                f"{source.name} ends at {offset + done}, not at {offset + len(buffer)}"
            )
        done += got


class Destination(Protocol):
    """Where an image is written to.

    ``present`` need not be written. ``block`` is its unit of allocation. With ``sparse``, a block
    of which nothing is written reads as zeroes, and one of which a part is written may have
    anything in its other part; otherwise zeroes are written, too. ``capacity`` is its own size, the
    image's or more.
    """

    name: str
    align: int
    block: int
    sparse: bool
    present: Extents

    @property
    def capacity(self) -> int: ...

    def write(self, buffer: memoryview, offset: int) -> int:
        """Write ``buffer`` or the beginning of it; returns the number of bytes written."""

    def flush(self) -> None: ...

    def close(self) -> None: ...


class File:
    """A raw image in a file, without its holes.

    :param size: of the image: the file's own, or more (beyond its end it reads as zeroes)
    """

    align = 1

    def __init__(self, path: str, size: int | None = None) -> None:
        self.name = path
        self._fd = os.open(path, os.O_RDONLY)
        try:
            length = os.fstat(self._fd).st_size
            self.size = length if size is None else size
            if self.size < length:
                raise errors.TransferError(f"{path} is longer than its image of {size} bytes")
            data = Extents.of(self._data(length))
        except BaseException:
            self.close()
            raise
        self._length = length
        self.extents = data.touched_blocks(GRAIN, self.size)

    def _data(self, length: int) -> Iterator[tuple[int, int]]:
        at = 0
        while at < length:
            try:
                start = os.lseek(self._fd, at, os.SEEK_DATA)
            except OSError:  # ENXIO: the rest is a hole
                return
            at = os.lseek(self._fd, start, os.SEEK_HOLE)
            yield start, at

    def read(self, buffer: memoryview, offset: int) -> int:
        inside = min(len(buffer), max(self._length - offset, 0))
        if not inside:
            buffer[:] = bytes(len(buffer))
            return len(buffer)
        return os.preadv(self._fd, [buffer[:inside]], offset)

    def forget(self, start: int, end: int) -> None:
        pass

    def close(self) -> None:
        os.close(self._fd)


class Disk:
    """A block device, or a file that stands for one in tests."""

    def __init__(
        self,
        path: str,
        size: int,
        extents: Extents | None = None,
        *,
        write: bool = False,
        present: Extents | None = None,
        block: int = GRAIN,
        sparse: bool = False,
        cached: bool = False,
        forget: Callable[[int, int], None] | None = None,
    ) -> None:
        """
        :param size: of the image, which may be less than the device's
        :param extents: of a source: the ranges to read; all of it if not given
        :param present: of a destination: the ranges that it has already
        :param cached: of a source: read it through the page cache, without readahead
        :param forget: of a source: called with the start and end of each range that was read
        :raises OSError: it cannot be opened
        """
        self.name = path
        self.size = size
        self.extents = Extents.of([(0, size)]) if extents is None else extents
        self.present = present or Extents()
        self.block = block
        self.sparse = sparse
        self._forget = forget
        direct = os.O_DIRECT if stat.S_ISBLK(os.stat(path).st_mode) and not cached else 0
        self._fd = os.open(path, (os.O_WRONLY if write else os.O_RDONLY) | direct)
        if cached:
            os.posix_fadvise(self._fd, 0, 0, os.POSIX_FADV_RANDOM)
        self.align = self._sector() if direct else 1

    @property
    def capacity(self) -> int:
        return os.lseek(self._fd, 0, os.SEEK_END)

    def _sector(self) -> int:
        (length,) = struct.unpack("i", fcntl.ioctl(self._fd, _BLKSSZGET, bytes(4)))
        return int(length)

    def read(self, buffer: memoryview, offset: int) -> int:
        return os.preadv(self._fd, [buffer], offset)

    def write(self, buffer: memoryview, offset: int) -> int:
        return os.pwritev(self._fd, [buffer], offset)

    def forget(self, start: int, end: int) -> None:
        if self._forget is not None:
            self._forget(start, end)

    def flush(self) -> None:
        os.fsync(self._fd)

    def close(self) -> None:
        os.close(self._fd)


class Nowhere:
    """A destination that has everything: a copy to it only reads the source."""

    name = "nowhere"
    align = 1
    block = GRAIN
    sparse = False

    def __init__(self, size: int) -> None:
        self.capacity = size
        self.present = Extents.of([(0, size)])

    def write(self, buffer: memoryview, offset: int) -> int:
        raise AssertionError("nothing is missing here")

    def flush(self) -> None:
        pass

    def close(self) -> None:
        pass
