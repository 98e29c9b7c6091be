"""Writes the hash tree of an image, while the image is read for its manifest.

Sizes and offsets are in bytes.
"""

from __future__ import annotations

import os

from os_brick_thunder.common.copyends import GRAIN
from os_brick_thunder.common.policy import hashtree, manifest
from os_brick_thunder.common.policy.extents import Extents

#: Longest piece of zeroes, or of their hashes, that is held in memory.
_PIECE = 1 << 20


class TreeWriter:
    """A destination that keeps nothing but the hashes of an image.

    They go to a device that has the image already, and room for the tree behind it.

    :ivar root: of the tree, once it was flushed
    :ivar digests: of the tree, in chunks as those of the image's manifest; likewise
    """

    align = 1
    block = GRAIN
    sparse = True
    present = Extents()

    def __init__(self, path: str, size: int, data: Extents, block: int, chunk: int) -> None:
        """
        :param size: of the image
        :param data: what is not a hole of it
        :param block: bytes of a block of the device's pool
        :param chunk: bytes that a digest covers
        :raises OSError: it cannot be opened
        """
        self.name = path
        self.capacity = size
        self.root = ""
        self.digests = b""
        self._data = data
        self._block = block
        self._chunk = chunk
        self._leaves = size + hashtree.levels(size)[0][0]
        self._hashed = 0  # of the image, up to here
        self._file = open(path, "r+b", buffering=_PIECE)  # noqa: SIM115 - see close()
        self._file.seek(self._leaves)

    def write(self, buffer: memoryview, offset: int) -> int:
        """Hash what is at ``offset``. The pieces have to come in their order."""
        self._skip_to(offset)
        self._file.write(hashtree.hashes(buffer))
        self._hashed += len(buffer)
        return len(buffer)

    def _skip_to(self, offset: int) -> None:
        """What was left out is zeroes."""
        blocks = (offset - self._hashed) // hashtree.BLOCK
        most = _PIECE // hashtree.WIDTH
        while blocks:
            now = min(blocks, most)
            self._file.write(hashtree.hash_of_zeroes() * now)
            blocks -= now
        self._hashed = offset

    def flush(self) -> None:
        size, length = self.capacity, hashtree.length(self.capacity)
        self._skip_to(size)
        self._file.write(bytes(size + length - self._file.tell()))
        self.root = hashtree.complete(size, self._read, self._write)
        self._clear_around(size, size + length)
        self._file.flush()
        os.fsync(self._file.fileno())
        self.digests = b"".join(
            manifest.digest(self._read(at, min(self._chunk, length - at)))
            for at in range(0, length, self._chunk)
        )

    def _read(self, at: int, length: int) -> bytes:
        self._file.seek(self.capacity + at)
        return self._file.read(length)

    def _write(self, at: int, data: bytes) -> None:
        self._file.seek(self.capacity + at)
        self._file.write(data)

    def _clear_around(self, start: int, end: int) -> None:
        """Write zeroes beside the tree: in a block that was new, the pool may have left what was
        there before.
        """
        first = start // self._block * self._block
        last = min(-(-end // self._block) * self._block, self._file.seek(0, os.SEEK_END))
        before = Extents.of([(first, start)]).difference(self._data)
        for at, upto in before.union(Extents.of([(end, last)])).chunks(_PIECE):
            self._file.seek(at)
            self._file.write(bytes(upto - at))

    def close(self) -> None:
        self._file.close()
