"""Whether two thin devices of a pool have the same blocks, from the pool's metadata alone.

A snapshot shares its origin's tree of mappings: the metadata then has one root block for both. The
kernel never changes a tree that is shared, it copies what it changes, up to the root. So as long as
both have one root, neither was written to since, nor was anything discarded. The format is that of
drivers/md/dm-thin-metadata.c and persistent-data/dm-btree; it has been the same since Linux 3.2.
"""

from __future__ import annotations

import bisect
import mmap
import os
import struct

_BLOCK = 4096
_MAGIC, _VERSIONS = 27022010, (1, 2)
#: What the checksums of the two kinds of blocks are combined with.
_SUPERBLOCK, _NODE = 160774, 121107
_INTERNAL, _LEAF = 1, 2
_HEADER = struct.Struct("<IIQIIII")  # checksum, flags, block, entries, capacity, value size, -
_MOST_LEVELS = 32


class BadMetadata(ValueError):
    """The metadata is not as expected: nothing is known."""


def same_mappings(metadata: str, root: int, one: int, other: int) -> bool:
    """Whether two thin devices have the same tree of mappings.

    :param metadata: path of the pool's metadata device
    :param root: block of a metadata snapshot that is held until this returns, or 0 for metadata
        that nobody changes
    :param one: and ``other``: ids of the devices
    :raises OSError: the metadata cannot be read
    :raises BadMetadata:
    """
    # The kernel does not write through the device's page cache.
    file = os.open(metadata, os.O_RDONLY | os.O_DIRECT)
    try:
        tree = _data_mapping_root(_read(file, root, _SUPERBLOCK))
        return _lookup(file, tree, one) == _lookup(file, tree, other)
    finally:
        os.close(file)


def _data_mapping_root(superblock: bytes) -> int:
    magic, version = struct.unpack_from("<QI", superblock, 32)
    root, _details, _data_sectors, sectors = struct.unpack_from("<QQII", superblock, 320)
    if magic != _MAGIC or version not in _VERSIONS or sectors * 512 != _BLOCK:
        raise BadMetadata(f"magic {magic}, version {version}, blocks of {sectors} sectors")
    return int(root)


def _lookup(file: int, root: int, device: int) -> int:
    """The root of a device's tree."""
    at = root
    for _ in range(_MOST_LEVELS):
        node = _read(file, at, _NODE)
        _sum, flags, _at, entries, capacity, size, _ = _HEADER.unpack_from(node)
        values = _HEADER.size + 8 * capacity
        if flags not in (_INTERNAL, _LEAF) or size != 8 or entries > capacity:
            raise BadMetadata(f"block {at} is not a node")
        if values + 8 * capacity > _BLOCK:
            raise BadMetadata(f"block {at} is too small for its entries")
        keys = struct.unpack_from(f"<{entries}Q", node, _HEADER.size)
        index = bisect.bisect_right(keys, device) - 1
        if index < 0:
            break
        (at,) = struct.unpack_from("<Q", node, values + 8 * index)
        if flags == _LEAF:
            if keys[index] != device:
                break
            return int(at)
    raise BadMetadata(f"there is no thin device {device}")


def _read(file: int, number: int, kind: int) -> bytes:
    """A block whose checksum and own number are right."""
    with mmap.mmap(-1, _BLOCK) as buffer:  # aligned, as O_DIRECT requires
        if os.preadv(file, [buffer], number * _BLOCK) != _BLOCK:
            raise BadMetadata(f"block {number} is beyond the end")
        block = buffer[:]
    checksum, _flags, own = struct.unpack_from("<IIQ", block)
    if own != number or checksum != _crc32c(block[4:]) ^ kind:
        raise BadMetadata(f"block {number} has a wrong checksum or number")
    return block


def _table() -> tuple[int, ...]:
    found = []
    for value in range(256):
        for _ in range(8):
            value = value >> 1 ^ (0x82F63B78 if value & 1 else 0)
        found.append(value)
    return tuple(found)


_TABLE = _table()


def _crc32c(data: bytes) -> int:
    """As the kernel's crc32c with the seed ~0, without the final inversion."""
    value, table = 0xFFFFFFFF, _TABLE
    for byte in data:
        value = value >> 8 ^ table[(value ^ byte) & 0xFF]
    return value
