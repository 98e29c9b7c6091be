"""Behaviour of a real thin pool; not collected without a kernel."""

from __future__ import annotations

import subprocess

import pytest

from cinder_thunder.mechanism.thinpool import dm_name
from os_brick_thunder.common import errors
from os_brick_thunder.common.run import run
from tests.contract.test_storage import BLOCK, SIZE, Storage, storage

__all__ = ["storage"]


def test_what_a_crash_leaves_of_a_metadata_snapshot_is_released(storage: Storage) -> None:
    storage.volumes.create("v", SIZE)
    pool = dm_name(storage.group, f"{storage.group}-pool", "tpool")
    run("dmsetup", "message", pool, "0", "reserve_metadata_snap")
    storage.write("v", 0)  # after the snapshot, whose map would not include it
    assert storage.pool.allocated("v").ranges == ((0, BLOCK),)


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


def test_a_volume_that_is_not_thin(storage: Storage) -> None:
    run("lvcreate", "--yes", "--size", "4M", "--name", "thick", storage.group)
    with pytest.raises(errors.DeviceError, match="thick is not a thin volume"):
        storage.pool.allocated("thick")
