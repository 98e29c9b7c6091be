"""Hash trees: their layout, and that no other bytes have the same root."""

from __future__ import annotations

import hashlib
import random

import pytest

from os_brick_thunder.common.policy import hashtree
from os_brick_thunder.common.policy.hashtree import BLOCK

CHUNK = 256 << 10


def tree_of(image: bytes) -> tuple[str, bytes]:
    """Root and tree of an image."""
    tree = bytearray(hashtree.length(len(image)))
    leaves = hashtree.hashes(image)
    at, _ = hashtree.levels(len(image))[0]
    tree[at : at + len(leaves)] = leaves

    def write(offset: int, data: bytes) -> None:
        tree[offset : offset + len(data)] = data

    root = hashtree.complete(len(image), lambda at, n: bytes(tree[at : at + n]), write)
    return root, bytes(tree)


@pytest.mark.parametrize(
    ("size", "levels"),
    [
        (CHUNK, [1]),
        (2 * CHUNK, [1]),
        (3 * CHUNK, [2, 1]),
        (64 << 20, [128, 1]),
        (65 << 20, [130, 2, 1]),
        (64 << 30, [1 << 17, 1 << 10, 8, 1]),
    ],
)
def test_levels(size: int, levels: list[int]) -> None:
    found = hashtree.levels(size)
    assert [length // BLOCK for _, length in found] == levels
    assert hashtree.length(size) == sum(levels) * BLOCK
    assert found[-1][0] == 0
    for (at, length), (below, _) in zip(found[1:], found, strict=False):
        assert at + length == below


@pytest.mark.parametrize("size", [0, 512, CHUNK + 512, CHUNK - 4096, (64 << 30) + CHUNK])
def test_some_images_have_none(size: int) -> None:
    assert hashtree.length(size) == 0


def test_each_block_is_reached_from_the_root() -> None:
    image = random.Random(1).randbytes(67 << 20)
    root, tree = tree_of(image)
    wanted = [bytes.fromhex(root)]
    for at, length in reversed(hashtree.levels(len(image))):
        for number, expected in enumerate(wanted):
            block = tree[at + number * BLOCK : at + (number + 1) * BLOCK]
            assert hashlib.sha256(block).digest() == expected
        level = tree[at : at + length]
        wanted = [level[i : i + 32] for i in range(0, length, 32) if any(level[i : i + 32])]
    assert wanted == [
        hashlib.sha256(image[i : i + BLOCK]).digest() for i in range(0, len(image), BLOCK)
    ]


def test_another_byte_is_another_root() -> None:
    image = bytearray(3 * CHUNK)
    root, tree = tree_of(bytes(image))
    image[2 * CHUNK + 77] = 1
    assert tree_of(bytes(image))[0] != root
    assert tree[BLOCK : BLOCK + 32] == hashtree.hash_of_zeroes()
