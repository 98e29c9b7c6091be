"""The identity map that dm-cache starts with, in the XML that ``cache_restore`` reads.

Cache block *i* holds origin block *i*, for every block the volume still shares with its image.
Format: cache_dump(8), cache_restore(8) of thin-provisioning-tools.
"""

from __future__ import annotations

from os_brick_thunder.common.policy.extents import Extents

#: A cache has at most this many blocks. A guest may wait while cache_restore(8) writes their
#: metadata, at some 200,000 blocks a second.
MAX_BLOCKS = 1 << 17


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


def identity_map(unmodified: Extents, length: int, block: int) -> list[tuple[int, int]]:
    """Block ranges ``[first, last)`` to map: whole blocks of ``unmodified`` below ``length``."""
    within = unmodified.intersection(Extents.of([(0, length)]))
    return [(start // block, end // block) for start, end in within.whole_blocks(block)]


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
