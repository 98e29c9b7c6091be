"""Thin volumes of a storage host: the same assertions on files and on LVM."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from cinder_thunder.mechanism.lvm import ThinVolumes
from cinder_thunder.mechanism.thinpool import StoragePool, dm_name
from os_brick_thunder.common import errors
from os_brick_thunder.common.mechanism.thinmeta import Reservation
from os_brick_thunder.common.policy.extents import Extents
from os_brick_thunder.common.run import run
from tests.contract.conftest import KERNEL
from tests.fake_storage import FileVolumes

MIB = 1 << 20
BLOCK = 64 << 10
SIZE = 8 * MIB


@dataclass(frozen=True)
class Storage:
    """``volumes`` creates volumes, ``pool`` reports their contents."""

    volumes: Any
    pool: Any
    group: str
    kernel: bool

    def write(self, name: str, *offsets: int) -> None:
        with open(self.volumes.path(name), "r+b") as volume:
            for offset in offsets:
                volume.seek(offset)
                volume.write(b"x" * 512)
            volume.flush()
            os.fsync(volume.fileno())


@pytest.fixture
def storage(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Storage]:
    """A test may set further options of the pool by an indirect parameter."""
    options = getattr(request, "param", ("--chunksize", "64k"))
    if not KERNEL:
        files = FileVolumes(tmp_path / "vg")
        yield Storage(files, files, "vg", kernel=False)
        return
    disk = tmp_path / "disk"
    with disk.open("wb") as file:
        file.truncate(256 * MIB)
    loop = run("losetup", "--find", "--show", str(disk)).strip()
    group = f"t-{uuid.uuid4().hex[:8]}"  # with a hyphen, which LVM doubles in device names
    run("vgcreate", group, loop)
    run("lvcreate", "--type", "thin-pool", "--size", "128M", *options, "--name",
        f"{group}-pool", group)  # fmt: skip
    yield Storage(
        ThinVolumes(group, f"{group}-pool", run, ["env", "LC_ALL=C"]),
        StoragePool(group, f"{group}-pool", run, reservation=Reservation(tmp_path / "note")),
        group,
        kernel=True,
    )
    run("vgremove", "--force", "--yes", group)
    run("losetup", "--detach", loop)


def test_life_of_a_master(storage: Storage) -> None:
    volumes, pool = storage.volumes, storage.pool
    volumes.create("filling", SIZE + 512)
    assert pool.allocated("filling") == Extents()
    storage.write("filling", 0, 3 * BLOCK + 512, 4 * BLOCK)
    volumes.protect("filling")
    assert pool.allocated("filling").ranges == ((0, BLOCK), (3 * BLOCK, 5 * BLOCK))
    volumes.rename("filling", "master")
    assert "master" in volumes.names()
    assert "filling" not in volumes.names()
    volumes.snapshot("clone", "master")
    assert pool.modified("clone", "master") == Extents()
    volumes.extend("clone", 3 * SIZE)
    assert pool.modified("clone", "master") == Extents()
    # Over the image's data, into one of its holes, and beyond its end.
    storage.write("clone", 512, 20 * BLOCK, 2 * SIZE)
    changed = ((0, BLOCK), (20 * BLOCK, 21 * BLOCK), (2 * SIZE, 2 * SIZE + BLOCK))
    assert pool.modified("clone", "master").ranges == changed
    assert pool.allocated("master").ranges == ((0, BLOCK), (3 * BLOCK, 5 * BLOCK))
    if storage.kernel:
        with pytest.raises(OSError, match=r"not permitted|Read-only"):
            storage.write("master", 0)
    volumes.remove("clone")
    volumes.remove("master")
    assert not {"clone", "master"} & volumes.names()


def test_a_volume_of_a_sized_snapshot_is_a_clone_of_the_master(storage: Storage) -> None:
    volumes, pool = storage.volumes, storage.pool
    volumes.create("master", SIZE)
    storage.write("master", 0, 3 * BLOCK)
    volumes.protect("master")
    volumes.snapshot_without_device("filling", "master")
    volumes.extend("filling", 3 * SIZE)
    volumes.rename("filling", "sized")
    volumes.activate("master")  # as all masters are after a restart
    assert not volumes.is_active("sized")
    for name in ("clone", "other"):
        volumes.snapshot(name, "sized")
        assert volumes.is_active(name)
        with open(volumes.path(name), "rb") as volume, open(volumes.path("master"), "rb") as master:
            assert volume.seek(0, os.SEEK_END) == 3 * SIZE
            volume.seek(0)
            assert volume.read(SIZE) == master.read()
            assert not any(volume.read())
        assert pool.modified(name, "master") == Extents()
    storage.write("clone", BLOCK, 2 * SIZE)
    changed = ((BLOCK, 2 * BLOCK), (2 * SIZE, 2 * SIZE + BLOCK))
    assert pool.modified("clone", "master").ranges == changed
    assert pool.modified("other", "master") == Extents()
    for name in ("other", "master", "sized", "clone"):
        volumes.remove(name)
    assert not {"master", "sized", "clone", "other"} & volumes.names()


def test_maps_that_are_asked_for_at_once_are_of_that_moment(storage: Storage) -> None:
    volumes, pool = storage.volumes, storage.pool
    volumes.create("master", SIZE)
    storage.write("master", 0)
    names = [f"clone-{i}" for i in range(4)]
    for name in names:
        volumes.snapshot(name, "master")

    def write_and_ask(name: str) -> None:
        for block in (1, 5, 7):
            storage.write(name, block * BLOCK)
            found = pool.modified(name, "master")
            assert (block * BLOCK, (block + 1) * BLOCK) in found.ranges

    with ThreadPoolExecutor(len(names)) as threads:
        list(threads.map(write_and_ask, names))
    for name in names:
        volumes.remove(name)


def test_a_volume_that_came_back_under_its_name_has_a_map_of_its_own(storage: Storage) -> None:
    """As in Cinder's revert to a snapshot: removed, and created again from the snapshot."""
    volumes, pool = storage.volumes, storage.pool
    volumes.create("master", SIZE)
    storage.write("master", 0)
    volumes.snapshot("volume", "master")
    storage.write("volume", BLOCK)
    volumes.snapshot("saved", "volume")
    storage.write("volume", 2 * BLOCK)
    assert pool.modified("volume", "master").ranges == ((BLOCK, 3 * BLOCK),)
    volumes.remove("volume")
    volumes.snapshot("volume", "saved")
    assert pool.modified("volume", "master").ranges == ((BLOCK, 2 * BLOCK),)


def test_sizes_are_rounded_up_to_extents(storage: Storage) -> None:
    assert storage.volumes.rounded(1) == storage.volumes.rounded(4 * MIB) == 4 * MIB
    assert storage.volumes.rounded(4 * MIB + 1) == 8 * MIB
    storage.volumes.create("v", 5 * MIB)
    with open(storage.volumes.path("v"), "rb") as volume:
        assert volume.seek(0, os.SEEK_END) == 8 * MIB
    with pytest.raises(errors.ProcessError, match="matches existing size"):
        storage.volumes.extend("v", 8 * MIB)


def test_refusals(storage: Storage) -> None:
    storage.volumes.create("v", SIZE)
    for method, *arguments in (
        (storage.volumes.create, "v", SIZE),
        (storage.volumes.snapshot, "w", "absent"),
        (storage.volumes.rename, "absent", "w"),
        (storage.volumes.remove, "absent"),
    ):
        with pytest.raises(errors.ProcessError):
            method(*arguments)
    with pytest.raises(errors.DeviceNotFound, match="absent"):
        storage.pool.modified("v", "absent")


def test_names_of_devices() -> None:
    assert dm_name("cinder-volumes", "volume-1-2") == "cinder--volumes-volume--1--2"
    assert dm_name("vg", "vg-pool", "tpool") == "vg-vg--pool-tpool"
    assert dm_name("vg", "vg-pool", "tmeta") == "vg-vg--pool_tmeta"


def test_how_full_the_pool_is(storage: Storage) -> None:
    before = storage.pool.status()
    assert (before.used, before.total, before.healthy) == (0, 128 * MIB, True)
    storage.volumes.create("v", SIZE)
    storage.write("v", 0, 5 * BLOCK, 5 * BLOCK + 512)
    assert storage.pool.status().used == 2 * BLOCK
    storage.volumes.remove("v")
    assert storage.pool.status().used == 0


def test_a_clone_that_was_never_written_needs_no_thin_delta(
    storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that was written, or from which something was discarded, does."""
    volumes, pool = storage.volumes, storage.pool
    volumes.create("master", SIZE)
    storage.write("master", 0, 3 * BLOCK)
    started: list[str] = []

    def counted(*argv: str) -> str:
        started.append(argv[0])
        return run(*argv)

    if storage.kernel:
        monkeypatch.setattr(pool._metadata, "_run", counted)
    for name in ("fresh", "written", "discarded", "spoilt"):
        volumes.snapshot(name, "master")
        volumes.extend(name, 2 * SIZE)
    volumes.snapshot("saved", "fresh")
    with open(volumes.path("fresh"), "rb") as volume:
        assert volume.read(512) == b"x" * 512  # reading changes nothing
    for name in ("fresh", "saved"):
        assert pool.modified(name, "master") == Extents()
    assert started == []
    storage.write("written", 4 * BLOCK)
    assert pool.modified("written", "master").ranges == ((4 * BLOCK, 5 * BLOCK),)
    if not storage.kernel:
        return
    assert started == ["thin_delta"]
    run("blkdiscard", "--offset", "0", "--length", str(BLOCK), volumes.path("discarded"))
    assert pool.modified("discarded", "master").ranges == ((0, BLOCK),)
    assert started == ["thin_delta"] * 2
    # Its tree cannot be read: thin_delta is asked.
    monkeypatch.setattr(pool._metadata, "_metadata", "/dev/null")
    with pytest.raises(errors.ProcessError):
        pool.modified("spoilt", "master")
    assert started == ["thin_delta"] * 3
