"""The hash tree of an image, with which the kernel checks each block that is read (dm-verity).

It is SHA-256 without a salt, in the format of version 1 without a superblock: the block of the root
first, the leaves last. It is stored behind the image, so that one LUN has both, and a replica is a
copy of both. Sizes and offsets are in bytes.

Source: Documentation/admin-guide/device-mapper/verity.rst of the kernel.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable
from dataclasses import dataclass

#: Of the image and of the tree: what one hash covers.
BLOCK = 4096
#: Of one hash.
WIDTH = 32
#: Hashes in a block of the tree.
PER_BLOCK = BLOCK // WIDTH
#: The longest chunk of a manifest of such an image.
_UNIT = 256 << 10
#: A tree takes a 128th of its image, holes included, and is written as a whole.
LARGEST_IMAGE = 64 << 30


@dataclass(frozen=True)
class HashTree:
    """A tree that was written; empty: there is none.

    :ivar digests: of the tree, in chunks as those of the image's manifest
    """

    root: str = ""
    digests: bytes = b""


def length(size: int) -> int:
    """Length of the tree of an image.

    :returns: 0 if an image of this size has none: it is too large, or does not consist of whole
        chunks of a manifest, which also covers the tree
    """
    return sum(_levels(size))


def behind(size: int, root: str) -> int:
    """Length of the tree behind an image.

    :param root: of the tree; empty if there is none
    """
    return length(size) if root else 0


def levels(size: int) -> list[tuple[int, int]]:
    """Offset in the tree, and length, of each level: the leaves first, the root's block last."""
    found, at = [], length(size)
    for each in _levels(size):
        at -= each
        found.append((at, each))
    return found


def _levels(size: int) -> list[int]:
    if not 0 < size <= LARGEST_IMAGE or size % _UNIT:
        return []
    found: list[int] = []
    blocks = size // BLOCK
    while not found or blocks > 1:
        blocks = -(-blocks // PER_BLOCK)
        found.append(blocks * BLOCK)
    return found


def hashes(data: bytes | memoryview) -> bytes:
    """The hash of each block of ``data``, one after the other."""
    sha256 = hashlib.sha256
    return b"".join(sha256(data[at : at + BLOCK]).digest() for at in range(0, len(data), BLOCK))


@functools.cache
def hash_of_zeroes() -> bytes:
    """The hash of a hole's block."""
    return hashes(bytes(BLOCK))


def complete(
    size: int, read: Callable[[int, int], bytes], write: Callable[[int, bytes], None]
) -> str:
    """Write all levels of a tree whose leaves are written.

    :param size: of the image
    :param read: returns so many bytes of the tree at an offset
    :param write: writes bytes of the tree at an offset
    :returns: the root hash, in hexadecimal
    """
    level, *above = levels(size)
    for upper in above:
        _write_level(level, upper, read, write)
        level = upper
    return hashes(read(*level)).hex()


def _write_level(
    level: tuple[int, int],
    upper: tuple[int, int],
    read: Callable[[int, int], bytes],
    write: Callable[[int, bytes], None],
) -> None:
    """Write a level from the one below, a block at a time."""
    (below, end), (at, _) = (level[0], sum(level)), upper
    while below < end:
        found = hashes(read(below, min(PER_BLOCK * BLOCK, end - below)))
        write(at, found.ljust(BLOCK, b"\0"))
        below += PER_BLOCK * BLOCK
        at += BLOCK
