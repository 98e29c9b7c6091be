"""Checks what a base is filled with, with the image's hash tree, of which only the root is known.

The blocks of the tree that are needed for that are read from where the image is read from, and are
checked in the same way, up to the root. Sizes and offsets are in bytes.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator

from os_brick_thunder.common import errors
from os_brick_thunder.common.copyends import GRAIN, Input
from os_brick_thunder.common.policy import hashtree
from os_brick_thunder.common.policy.hashtree import BLOCK, WIDTH

#: Bytes of the tree whose block has the hashes of one byte of the tree for each so many of it.
_RATIO = BLOCK // WIDTH
#: Checked blocks that are kept, those used last: leaves of 128 MiB of image, and all above them.
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
        self._leaves = spans[1][0]
        above = [*(at for at, _ in spans[1:]), None]
        #: Start and end of the image and of each level of the tree, in the order in which they lie,
        #: and where their hashes begin: in the next level. The hash of the last one is the root.
        self._spans = sorted(
            (at, at + length, hashes) for (at, length), hashes in zip(spans, above, strict=True)
        )
        self._checked: OrderedDict[int, bytes] = OrderedDict()

    def fits(self, start: int, data: bytes | memoryview) -> bool:
        """Whether ``data``, whole blocks, are the bytes at ``start``.

        :raises errors.WrongDigest: what the source has of the tree is not this image's
        :raises errors.TransferError: the tree cannot be read
        """
        return hashtree.hashes(data) == self._hashes(start, start + len(data))

    def leaves(self, start: int, end: int) -> tuple[int, int]:
        """Which bytes of the tree are needed to check these of the image."""
        first, last = self._leaves + start // _RATIO, self._leaves + -(-end // _RATIO)
        return first - first % BLOCK, last + -last % BLOCK

    def _hashes(self, start: int, end: int) -> bytes:
        """What the hashes of these bytes have to be."""
        return b"".join(self._parts(start, end))

    def _parts(self, start: int, end: int) -> Iterator[bytes]:
        for first, last, above in self._spans:
            at, upto = max(start, first), min(end, last)
            if at >= upto:
                continue
            if above is None:
                yield self._root
                continue
            at, upto = above + (at - first) // _RATIO, above + (upto - first) // _RATIO
            while at < upto:
                block = at - at % BLOCK
                yield self._block(block)[at - block : upto - block]
                at = block + BLOCK

    def _block(self, at: int) -> bytes:
        """A block of the tree, checked."""
        if at not in self._checked:
            data = self._read(at)
            if hashtree.hashes(data) != self._hashes(at, at + BLOCK):
                self._source.forget(at, at + BLOCK)  # not to be found in the page cache again
                raise errors.WrongDigest(
                    f"{self._source.name}: the block at {at} is not of the image's hash tree: "
                    "nothing was written"
                )
            self._checked[at] = data
            while len(self._checked) > _KEPT:
                self._checked.popitem(last=False)
        self._checked.move_to_end(at)
        return self._checked[at]

    def _read(self, at: int) -> bytes:
        data = bytearray(BLOCK)
        with memoryview(data) as view:
            done = 0
            while done < BLOCK:
                if (got := self._source.read(view[done:], at + done)) <= 0:
                    raise errors.TransferError(f"{self._source.name} ends at {at + done}")
                done += got
        return bytes(data)
