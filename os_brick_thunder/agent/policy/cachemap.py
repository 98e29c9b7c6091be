"""What a volume reads from its cache.

The cache holds the whole image: its block *i* is block *i* of the LUN, in the XML that
``cache_restore`` reads. The volume's own table says which parts are read from it: those that the
volume still shares with its image. So the cost of a cache depends neither on the size of the image
nor on what was written, and the parts can be changed by a new table, while a guest waits.

Format: cache_dump(8), cache_restore(8) of thin-provisioning-tools.
"""

from __future__ import annotations

from os_brick_thunder.common.policy.extents import Extents

#: A cache has at most this many blocks: an attach waits while cache_restore(8) writes their
#: metadata, at some 200,000 blocks a second.
MAX_BLOCKS = 1 << 14
#: A volume reads at most this many ranges from its cache: each is a segment of its table.
MAX_RANGES = 2000


def block_size(length: int, block: int) -> int:
    """Bytes of a block of a cache over ``length`` bytes.

    :param block: of the pool, bytes; a cache has larger blocks if it would have too many
    """
    while length > MAX_BLOCKS * block:
        block *= 2
    return block


def cached_length(image_size: int, volume_size: int, block: int) -> int:
    """Bytes at the start of a volume that the cache may cover: the image's whole blocks.

    A partial last block and everything after it is read from the LUN. That something is read from
    the LUN in any case, even if the volume is as large as its image, keeps the LUN open: opening it
    anew would wait for a LUN that recovers, and fail for one that is gone.

    :param block: of the pool, bytes
    """
    length = min(image_size, volume_size - 1)
    block = block_size(length, block)
    return length // block * block


def metadata_length(blocks: int) -> int:
    """Bytes of metadata that dm-cache requires for a cache of so many blocks.

    The kernel's documentation gives 4 MiB and 16 bytes a block.
    """
    mib = 1 << 20
    return -(-(4 * mib + 16 * blocks) // mib) * mib


def shared(unmodified: Extents, length: int, block: int) -> Extents:
    """What a volume is to read from its cache: the longest ranges of whole blocks of ``unmodified``
    below ``length``.

    :param length: of the cache, bytes
    :param block: of the pool, bytes
    """
    within = unmodified.intersection(Extents.of([(0, length)]))
    return within.whole_blocks(block).at_most(MAX_RANGES)


def metadata_xml(mapped: list[tuple[int, int]], blocks: int, block: int) -> str:
    """The metadata of a cache of ``blocks`` blocks of ``block`` bytes, none of them dirty."""
    lines = [
        f'<superblock uuid="" block_size="{block // 512}" nr_cache_blocks="{blocks}" '
        'policy="cleaner" hint_width="4">',
        "<mappings>",
    ]
    for first, last in mapped:
        lines += [
            f'<mapping cache_block="{i}" origin_block="{i}" dirty="false"/>'
            for i in range(first, last)
        ]
    return "\n".join([*lines, "</mappings>", "<hints>", "</hints>", "</superblock>", ""])
