"""Checking an image and its hash tree from the root alone."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from os_brick_thunder.agent.base import treecheck
from os_brick_thunder.agent.base.treecheck import TreeCheck
from os_brick_thunder.common import errors
from os_brick_thunder.common.copyends import Disk
from os_brick_thunder.common.policy.hashtree import BLOCK
from tests.unit.os_brick_thunder.test_hashtree import tree_of

CHUNK, SIZE = TreeCheck.chunk, 3 << 20
IMAGE = bytes(256 << 10) + os.urandom(SIZE - (256 << 10))
ROOT, TREE = tree_of(IMAGE)
BOTH = IMAGE + TREE


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "replica"
    path.write_bytes(BOTH)
    return path


def check_of(path: Path, root: str = ROOT) -> TreeCheck:
    return TreeCheck(SIZE, root, Disk(str(path), len(BOTH), cached=True))


def change(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def test_all_of_an_image_and_its_tree_fits(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(treecheck, "_KEPT", 1)  # no block needs that another one is kept
    check = check_of(file)
    for chunk in (CHUNK, BLOCK, SIZE, 7 * BLOCK):
        for at in range(0, len(BOTH), chunk):
            assert check.fits(at, BOTH[at : at + chunk])


def test_a_changed_byte_does_not_fit(file: Path) -> None:
    check = check_of(file)
    for at in range(0, len(BOTH), BLOCK):
        chunk = bytearray(BOTH[at : at + BLOCK])
        chunk[at % 4093 % BLOCK] ^= 1
        assert not check.fits(at, bytes(chunk))


def test_blocks_of_one_place_do_not_fit_at_another(file: Path) -> None:
    check = check_of(file)
    assert not check.fits(SIZE - CHUNK, BOTH[SIZE - 2 * CHUNK : SIZE - CHUNK])
    assert not check.fits(SIZE, TREE[BLOCK : 2 * BLOCK])


@pytest.mark.parametrize("block", range(len(TREE) // BLOCK))
def test_a_source_with_another_tree_is_found_out(file: Path, block: int) -> None:
    """Each block of it, the root's included, with the image's own bytes."""
    change(file, SIZE + block * BLOCK + 9)
    found: list[str] = []
    for at in range(0, SIZE, CHUNK):
        try:
            assert check_of(file).fits(at, IMAGE[at : at + CHUNK])
        except errors.WrongDigest as error:
            found.append(str(error))
    assert found
    assert all(f"the block at {SIZE + block * BLOCK} is not of" in each for each in found)


def test_a_wrong_block_of_a_tree_is_not_kept(file: Path) -> None:
    forgotten: list[tuple[int, int]] = []
    source = Disk(str(file), len(BOTH), cached=True, forget=lambda *place: forgotten.append(place))
    check = TreeCheck(SIZE, ROOT, source)
    change(file, SIZE + 5)
    with pytest.raises(errors.WrongDigest):
        check.fits(0, IMAGE[:CHUNK])
    assert forgotten == [(SIZE, SIZE + BLOCK)]
    file.write_bytes(BOTH)
    assert check.fits(0, IMAGE[:CHUNK])


def test_another_root_fits_nothing(file: Path) -> None:
    with pytest.raises(errors.WrongDigest):
        check_of(file, "5a" * 32).fits(0, IMAGE[:CHUNK])


def test_a_source_that_is_too_short(tmp_path: Path) -> None:
    path = tmp_path / "short"
    path.write_bytes(IMAGE)
    with pytest.raises(errors.TransferError, match=r"short ends at \d+"):
        check_of(path).fits(0, IMAGE[:CHUNK])


@pytest.mark.parametrize(("size", "root"), [(SIZE + BLOCK, ROOT), (SIZE, ""), (SIZE, "5a")])
def test_what_has_no_tree_is_refused(file: Path, size: int, root: str) -> None:
    with pytest.raises(ValueError, match="no hash tree"):
        TreeCheck(size, root, Disk(str(file), len(BOTH), cached=True))


def test_only_these_leaves_are_needed(file: Path) -> None:
    """With nothing else of the tree but what is above them, all fits."""
    start = SIZE // 2
    ((first, last),) = check_of(file).beside(start, start + CHUNK)
    assert (first % BLOCK, last - first) == (0, BLOCK)
    for at in range(SIZE + BLOCK, len(BOTH), BLOCK):
        if not first <= at < last:
            change(file, at)
    assert check_of(file).fits(start, IMAGE[start : start + CHUNK])


def test_what_is_read_beside_a_piece_is_in_the_tree(file: Path) -> None:
    """Of a piece of the tree, too; the root's block needs none."""
    check = check_of(file)
    for at in range(0, len(BOTH), BLOCK):
        places = list(check.beside(at, at + BLOCK))
        assert all(SIZE <= first < last <= len(BOTH) for first, last in places)
        assert len(places) == (at != SIZE)
