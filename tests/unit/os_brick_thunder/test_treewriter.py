"""The hash tree that is written while an image is read."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from os_brick_thunder.common.copyends import GRAIN, Disk
from os_brick_thunder.common.policy import hashtree, manifest
from os_brick_thunder.common.policy.extents import Extents
from os_brick_thunder.common.policy.manifest import Manifest
from os_brick_thunder.common.transfer import Transfer
from os_brick_thunder.common.treewriter import TreeWriter
from tests.unit.os_brick_thunder.test_hashtree import tree_of

#: What a pool that does not zero its blocks may have had in them.
OLD = b"\xaa"
GIB = 1 << 30
CHUNK = 256 << 10


def written(
    folder: Path, image: bytes, data: Extents, block: int, room: int
) -> tuple[TreeWriter, Manifest, bytes]:
    """The writer, the image's manifest, and all that the device has then.

    :param room: size of the device
    """
    source, device = folder / "source", folder / "device"
    source.write_bytes(image)
    content = bytearray(image.ljust(room, OLD))
    for start, end in data.touched_blocks(block, room).complement(room):
        content[start:end] = OLD * (end - start)
    device.write_bytes(content)
    writer = TreeWriter(str(device), len(image), data, block, CHUNK)
    transfer = Transfer(Disk(str(source), len(image), data), writer, digest=True, chunk=CHUNK)
    transfer.run()
    assert transfer.wait(0)
    assert transfer.manifest is not None
    return writer, transfer.manifest, device.read_bytes()


@pytest.mark.parametrize("block", [64 << 10, 192 << 10, 512 << 10])
@pytest.mark.parametrize("chunks", [1, 3, 4, 300])
@pytest.mark.parametrize("ends_with", ["data", "hole", "zeroes"])
def test_a_tree(tmp_path: Path, block: int, chunks: int, ends_with: str) -> None:
    """Data, a hole, zeroes that are allocated: the tree is that of all the bytes."""
    size = chunks * CHUNK
    rng = random.Random(size)
    ranges = [(at, at + GRAIN) for at in range(0, size // 2, 3 * GRAIN)]
    if ends_with != "hole":
        ranges.append((size - GRAIN, size))
    data = Extents.of(ranges).touched_blocks(block, size)
    image = bytearray(size)
    for start, end in data:
        image[start:end] = rng.randbytes(end - start)
    if ends_with == "zeroes":
        image[size - GRAIN :] = bytes(GRAIN)
    root, tree = tree_of(bytes(image))
    end = size + len(tree)
    cleared = -(-end // block) * block
    writer, found, content = written(tmp_path, bytes(image), data, block, cleared + block)
    assert content[size:end] == tree
    assert writer.root == root
    whole = Manifest(end, CHUNK, found.digests + writer.digests)
    digests = (
        manifest.digest(content[at : min(at + CHUNK, end)]) for at in range(size, end, CHUNK)
    )
    assert whole.digests[size // CHUNK * manifest.WIDTH :] == b"".join(digests)
    assert all(whole.fits(at, bytes(image[at : at + CHUNK])) for at in range(0, size, CHUNK))
    # What the pool leaves in a new block is not exported; a block that is not new is as it was.
    assert content[end:cleared] == bytes(cleared - end)
    assert content[cleared:] == OLD * block
    for start, upto in Extents.of([(size // block * block, size)]).union(data):
        assert content[start:upto] == image[start:upto]


def test_zeroes_are_cleared_to_the_end_of_the_device_at_most(tmp_path: Path) -> None:
    image = bytes(CHUNK)
    room = CHUNK + hashtree.length(CHUNK) + 512
    _, _, content = written(tmp_path, image, Extents(), 1 << 20, room)
    assert len(content) == room
    assert content[:CHUNK] == image
    assert content[-512:] == bytes(512)


def test_a_hole_is_not_looked_at(tmp_path: Path) -> None:
    """A hash is computed for each block of data, however large the image is."""
    path, size, at = tmp_path / "device", 4 * GIB, 3 * GIB
    with path.open("wb") as file:
        file.truncate(size + hashtree.length(size))
        file.seek(at)
        file.write(b"x" * GRAIN)
    read: list[tuple[int, int]] = []
    data = Extents.of([(at, at + GRAIN)])
    source = Disk(str(path), size, data, forget=lambda a, b: read.append((a, b)))
    writer = TreeWriter(str(path), size, data, GRAIN, CHUNK)
    transfer = Transfer(source, writer, digest=True, chunk=CHUNK)
    transfer.run()
    assert transfer.wait(0)
    assert read == [(at, at + CHUNK)]
    leaves, _ = hashtree.levels(size)[0]
    with path.open("rb") as file:
        file.seek(size + leaves + at // hashtree.BLOCK * hashtree.WIDTH - hashtree.WIDTH)
        found = file.read(18 * hashtree.WIDTH)
    zero = hashtree.hash_of_zeroes()
    assert found == zero + hashtree.hashes(b"x" * GRAIN) + zero
