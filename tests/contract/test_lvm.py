"""Behaviour of a real thin pool; not collected without a kernel."""

from __future__ import annotations

import os
import subprocess
import threading
from pathlib import Path

import pytest

from cinder_thunder import privileged
from cinder_thunder.mechanism.thinpool import dm_name
from os_brick_thunder.common import errors
from os_brick_thunder.common.mechanism import dmioctl
from os_brick_thunder.common.mechanism.thinmeta import Reservation
from os_brick_thunder.common.policy import dmstatus
from os_brick_thunder.common.policy.extents import Extents
from os_brick_thunder.common.run import run
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
    storage.volumes.create("old", 15 * SIZE)
    with open(storage.volumes.path("old"), "r+b") as volume:
        for _ in range(15 * SIZE // MIB):
            volume.write(b"\xaa" * MIB)
        volume.flush()
        os.fsync(volume.fileno())
    storage.volumes.remove("old")
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
    found = privileged.manifest_of(storage.volumes.path("master"), size, mapped)
    assert found == manifest
    zeroing = storage.pool.zeroes_blocks()
    assert zeroing == (block == BLOCK)


def made(storage: Storage, size: int) -> str:
    storage.volumes.create("master", size)
    return str(storage.volumes.path("master"))


def test_a_volume_that_is_not_thin(storage: Storage) -> None:
    run("lvcreate", "--yes", "--size", "4M", "--name", "thick", storage.group)
    with pytest.raises(errors.DeviceError, match="thick is not a thin volume"):
        storage.pool.allocated("thick")
