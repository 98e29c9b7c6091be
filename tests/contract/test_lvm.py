"""Behaviour of a real thin pool; not collected without a kernel."""

from __future__ import annotations

import contextlib
import os
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from cinder_thunder import privileged
from cinder_thunder.db.values import Image
from cinder_thunder.masters.clones import FILLING, MASTER, TREE
from cinder_thunder.masters.trees import Trees
from cinder_thunder.mechanism.thinpool import dm_name
from os_brick_thunder.common import errors
from os_brick_thunder.common.mechanism import dmioctl
from os_brick_thunder.common.mechanism.thinmeta import Reservation
from os_brick_thunder.common.policy import dmstatus, hashtree
from os_brick_thunder.common.policy.extents import Extents
from os_brick_thunder.common.run import run
from tests.contract.conftest import read_direct
from tests.contract.test_storage import BLOCK, MIB, SIZE, Storage, storage

__all__ = ["storage"]


def held(storage: Storage, verb: str = "") -> str:
    """The held root of the pool's status, after a message."""
    pool = dm_name(storage.group, f"{storage.group}-pool", "tpool")
    if verb:
        run("dmsetup", "message", pool, "0", f"{verb}_metadata_snap")
    return dmstatus.held_root(dmioctl.status(pool))


def test_what_a_crash_leaves_of_a_metadata_snapshot_is_released(
    storage: Storage, tmp_path: Path
) -> None:
    storage.volumes.create("v", SIZE)
    assert held(storage) == ""
    assert held(storage, "reserve")
    Reservation(tmp_path / "note").begin()
    storage.pool.release_stale()
    assert held(storage) == ""
    storage.write("v", 0)
    assert storage.pool.allocated("v").ranges == ((0, BLOCK),)
    assert held(storage) == ""


def test_a_metadata_snapshot_of_another_program_is_left_alone(storage: Storage) -> None:
    storage.volumes.create("v", SIZE)
    root = held(storage, "reserve")
    storage.pool.release_stale()
    storage.write("v", 0)  # after the snapshot, whose map would not include it
    with pytest.raises(errors.DeviceBusy, match="in use by another program"):
        storage.pool.allocated("v")
    assert held(storage) == root
    threading.Timer(1, held, (storage, "release")).start()
    assert storage.pool.allocated("v").ranges == ((0, BLOCK),)


def test_a_metadata_snapshot_that_is_taken_away_shows_in_the_status(storage: Storage) -> None:
    storage.volumes.create("v", SIZE)
    root = held(storage, "reserve")
    held(storage, "release")
    assert held(storage, "reserve") != root
    held(storage, "release")


def test_a_block_given_back_is_modified(storage: Storage) -> None:
    """Zeros after a discard, data in the master: no longer shared with the image."""
    storage.volumes.create("master", SIZE)
    storage.write("master", 0, 2 * BLOCK)
    storage.volumes.snapshot("clone", "master")
    subprocess.run(
        ["blkdiscard", "--offset", "0", "--length", str(BLOCK), storage.volumes.path("clone")],
        check=True,
    )
    assert storage.pool.modified("clone", "master").ranges == ((0, BLOCK),)


@pytest.mark.parametrize(
    "storage",
    [("--chunksize", "512k", "-Zn"), ("--chunksize", "192k", "-Zn"), ("--chunksize", "64k")],
    indirect=True,
)
@pytest.mark.parametrize("source", ["file", "disk"])
def test_a_master_has_nothing_of_deleted_volumes(
    storage: Storage, tmp_path: Path, source: str
) -> None:
    """64 KiB of data each 512 KiB, in a pool that is full of another tenant's bytes."""
    block, size = storage.pool.block(), 20 * SIZE // 4 + 512
    leave_old_bytes(storage)
    data = bytearray(size)
    for at in range(0, size, 512 << 10):
        end = min(at + BLOCK, size)
        data[at:end] = os.urandom(end - at)
    image = tmp_path / "image"
    image.write_bytes(data)
    allocated = None
    if source == "disk":  # as another storage host's master, of a pool with smaller blocks
        allocated = Extents.of((at, min(at + BLOCK, size)) for at in range(0, size, 512 << 10))
    manifest = privileged.copy(str(image), made(storage, size), size, block)
    assert manifest is not None
    if allocated is not None:
        storage.volumes.remove("master")
        privileged.copy(str(image), made(storage, size), size, block, allocated, manifest)
    with open(storage.volumes.path("master"), "rb") as volume:
        content = volume.read()
    assert content[:size] == data
    assert not any(content[size:])
    mapped = storage.pool.allocated("master").intersection(Extents.of([(0, size)]))
    found, _ = privileged.manifest_of(storage.volumes.path("master"), size, mapped)
    assert found == manifest
    zeroing = storage.pool.zeroes_blocks()
    assert zeroing == (block == BLOCK)


@pytest.mark.parametrize(
    "storage",
    [("--chunksize", "512k", "-Zn"), ("--chunksize", "192k", "-Zn"), ("--chunksize", "64k")],
    indirect=True,
)
def test_the_kernel_checks_a_master_with_its_hash_tree(storage: Storage, tmp_path: Path) -> None:
    """The image ends with a hole within a block, and in the middle of an extent."""
    volumes, block, size = storage.volumes, storage.pool.block(), 8 * MIB + (256 << 10)
    leave_old_bytes(storage)
    data = bytearray(size)
    for at in range(0, size - 2 * MIB, MIB):
        data[at : at + BLOCK] = os.urandom(BLOCK)
    (tmp_path / "image").write_bytes(data)
    filling, master, whole = FILLING + "i", MASTER + "i", TREE + "i"
    volumes.create(filling, size)
    manifest = privileged.copy(str(tmp_path / "image"), volumes.path(filling), size, block)
    volumes.protect(filling)
    mapped = storage.pool.allocated(filling).intersection(Extents.of([(0, size)]))
    trees = Trees(None, volumes, True)  # type: ignore[arg-type]
    found, tree = trees.manifest_of(filling, Image("i", size, mapped), block)
    assert found == manifest
    assert whole in volumes.names()
    volumes.rename(filling, master)
    volumes.snapshot("clone", master)
    assert storage.pool.modified("clone", master) == Extents()

    path, length = trees.exported("i", size)
    assert (path, length) == (volumes.path(whole), size + hashtree.length(size))
    with open(path, "rb") as volume:
        content = volume.read()
    assert content[:size] == data
    assert not any(content[length:])
    with pytest.raises(OSError, match=r"not permitted|Read-only"):
        storage.write(whole, 0)

    with verified(path, size, tree.root) as device:
        assert read_direct(device, 0, size) == data
    volumes.snapshot("spoilt", whole)
    with open(volumes.path("spoilt"), "r+b") as volume:
        for at in (MIB + 77, size - 77):  # data, and a hole
            volume.seek(at)
            volume.write(bytes([data[at] ^ 1]))
    with verified(volumes.path("spoilt"), size, tree.root) as device:
        for at in (MIB, size - 4096):
            with pytest.raises(OSError, match="Input/output error"):
                read_direct(device, at)
        assert read_direct(device, 2 * MIB) == data[2 * MIB : 2 * MIB + 4096]

    run("lvchange", "--activate", "n", f"{storage.group}/{whole}")  # as after a reboot
    assert trees.exported("i", size) == (volumes.path(master), size)
    volumes.activate(master, whole)
    assert trees.exported("i", size) == (path, length)
    volumes.remove(master)
    with open(path, "rb") as volume:
        assert volume.read(BLOCK) == data[:BLOCK]
    volumes.remove(whole)


@contextlib.contextmanager
def verified(path: str, size: int, root: str) -> Iterator[str]:
    """A device through which the kernel checks the image of an exported master."""
    name, blocks = "t-verified", size // hashtree.BLOCK
    table = (
        f"0 {size // 512} verity 1 {path} {path} {hashtree.BLOCK} {hashtree.BLOCK} "
        f"{blocks} {blocks} sha256 {root} -"
    )
    run("dmsetup", "create", name, "--readonly", "--table", table)
    try:
        yield f"/dev/mapper/{name}"
    finally:
        run("dmsetup", "remove", "--retry", name)


def leave_old_bytes(storage: Storage) -> None:
    """Have the pool's free blocks be full of what a volume had."""
    storage.volumes.create("old", 15 * SIZE)
    with open(storage.volumes.path("old"), "r+b") as volume:
        for _ in range(15 * SIZE // MIB):
            volume.write(b"\xaa" * MIB)
        volume.flush()
        os.fsync(volume.fileno())
    storage.volumes.remove("old")


def made(storage: Storage, size: int) -> str:
    storage.volumes.create("master", size)
    return str(storage.volumes.path("master"))


def test_a_volume_that_is_not_thin(storage: Storage) -> None:
    run("lvcreate", "--yes", "--size", "4M", "--name", "thick", storage.group)
    with pytest.raises(errors.DeviceError, match="thick is not a thin volume"):
        storage.pool.allocated("thick")
