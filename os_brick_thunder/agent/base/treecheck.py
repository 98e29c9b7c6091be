"""Checks what a base is filled with, with the image's hash tree, of which only the root is known.

The blocks of the tree that are needed for that are read from where the image is read from, and are
checked in the same way, up to the root. Sizes and offsets are in bytes.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

from os_brick_thunder.common import errors
from os_brick_thunder.common.copyends import GRAIN, Input, read_all
from os_brick_thunder.common.policy import hashtree
from os_brick_thunder.common.policy.hashtree import BLOCK, PER_BLOCK, WIDTH

#: Checked blocks of the tree that are kept, those used last: leaves of 128 MiB of image.
_KEPT = 256


class TreeCheck:
    """Checks an image with the tree behind it, chunk by chunk: a :class:`.transfer.Check`.

    :ivar chunk: short: of a chunk that a boot reads all is fetched
    """

    chunk = GRAIN

    def __init__(self, size: int, root: str, source: Input) -> None:
        """
        :param size: of the image, which has a tree
        :param root: of the tree, in hexadecimal
        :param source: image and tree; it takes buffers of any alignment
        :raises ValueError: an image of this size has no tree, or the root is no hash
        """
        self._root = bytes.fromhex(root)
        levels = hashtree.levels(size)
        if not levels or len(self._root) != WIDTH:
            raise ValueError(f"an image of {size} bytes has no hash tree with root {root!r}")
        self._source = source
        spans = [(0, size), *((size + at, length) for at, length in levels)]
        above = [*(at for at, _ in spans[1:]), None]
        #: Start and end of the image and of each level of the tree, in the order in which they lie,
        #: and where their hashes begin: in the next level. The hash of the last one is the root.
        self._spans = sorted(
            (at, at + length, hashes) for (at, length), hashes in zip(spans, above, strict=True)
        )
        self._block = functools.lru_cache(maxsize=_KEPT)(self._checked)

    def fits(self, start: int, data: bytes | memoryview) -> bool:
        """Whether ``data``, whole blocks, are the bytes at ``start``.

        :raises errors.WrongDigest: what the source has of the tree is not this image's
        :raises errors.TransferError: the tree cannot be read
        """
        return hashtree.hashes(data) == self._hashes(start, start + len(data))

    def beside(self, start: int, end: int) -> Iterator[tuple[int, int]]:
        """Which blocks of the tree have the hashes of these bytes; see :class:`.transfer.Check`."""
        for place in self._places(start, end):
            if place is not None:
                first, last = place
                yield first - first % BLOCK, last + -last % BLOCK

    def _places(self, start: int, end: int) -> Iterator[tuple[int, int] | None]:
        """From where to where in the tree the hashes of these bytes are; None: it is the root."""
        for first, last, hashes in self._spans:
            at, upto = max(start, first) - first, min(end, last) - first
            if at < upto:
                if hashes is None:
                    yield None
                else:
                    yield hashes + at // PER_BLOCK, hashes + upto // PER_BLOCK

    def _hashes(self, start: int, end: int) -> bytes:
        """What the hashes of these bytes have to be."""
        places = self._places(start, end)
        return b"".join(self._root if place is None else self._tree(*place) for place in places)

    def _tree(self, start: int, end: int) -> bytes:
        """Bytes of the tree, checked."""
        first = start - start % BLOCK
        blocks = b"".join(map(self._block, range(first, end, BLOCK)))
        return blocks[start - first : end - first]

    def _checked(self, at: int) -> bytes:
        """A block of the tree, checked with those above it."""
        data = memoryview(bytearray(BLOCK))
        read_all(self._source, data, at)
        if hashtree.hashes(data) != self._hashes(at, at + BLOCK):
            self._source.forget(at, at + BLOCK)  # not to be found in the page cache again
            raise errors.WrongDigest(
                f"{self._source.name}: the block at {at} is not of the image's hash tree: "
                "nothing was written"
            )
        return bytes(data)
