"""Background tasks of trackers: missing masters are made, those of deleted images removed."""

from __future__ import annotations

import threading
from collections.abc import Iterable

import pytest

from cinder_thunder.db.api import Database
from cinder_thunder.db.values import ClonedVolume, Image
from cinder_thunder.masters.cleaning import Cleaner
from cinder_thunder.masters.freespace import FreeSpace
from cinder_thunder.masters.replicas import Replicas
from cinder_thunder.policy.ranking import Limits
from os_brick_thunder.common import errors
from os_brick_thunder.common.periodic import Periodic, Task
from os_brick_thunder.common.policy.dmstatus import PoolStatus
from os_brick_thunder.common.policy.extents import Extents
from os_brick_thunder.common.wire import LocationReport, Topology
from tests.unit.cinder_thunder.conftest import STORAGE

OTHER, THIRD = "stor2@thunder", "stor3@thunder"
MIB = 1 << 20


def storage(name: str, rack: str, zone: str = "z1") -> Topology:
    return Topology(name, "10.0.0.1", rack, zone, "", "storage")


# Threads


def test_a_task_is_repeated_after_failures_until_it_is_stopped() -> None:
    calls: list[str] = []
    enough, opened = threading.Semaphore(0), threading.Event()

    def fails() -> None:
        calls.append("fails")
        enough.release()
        raise RuntimeError("the database is away")

    def waits() -> None:
        calls.append("waits")
        enough.release()

    tasks = [Task("fails", 0.001, fails), Task("waits", 0.001, waits, opened.is_set)]
    periodic = Periodic(tasks)
    periodic.start()
    for _ in range(3):
        assert enough.acquire(timeout=10)
    assert "waits" not in calls
    opened.set()
    while "waits" not in calls:
        assert enough.acquire(timeout=10)
    periodic.stop()
    for thread in threading.enumerate():
        if thread.name in ("fails", "waits"):
            thread.join(timeout=10)
            assert not thread.is_alive()


# Free space


def test_free_space_is_measured_once_a_minute() -> None:
    now, looks = [0.0], [PoolStatus(30, 100, True), PoolStatus(95, 100, True)]
    looks += [PoolStatus(0, 0, False)]
    space = FreeSpace(lambda: looks.pop(0), 0.1, 60, lambda: now[0])
    found = []
    for now[0] in (0, 59, 60, 119, 120):
        found.append(space.bytes())
    assert found == [60, 60, 0, 0, 0]


def test_a_pool_without_a_status() -> None:
    def broken() -> PoolStatus:
        raise errors.ProcessError(("dmsetup",), 1, "no such device")

    assert FreeSpace(broken, 0.0).bytes() is None


# Replicas


class World:
    """Three storage hosts, one tracker each; their copies take no time."""

    def __init__(self, database: Database, wanted: int = 2) -> None:
        self.database = database
        self.copied: list[tuple[str, str]] = []
        self.broken: dict[str, Exception] = {}
        for name, rack in ((STORAGE, "r0"), (OTHER, "r0"), (THIRD, "r1")):
            database.hosts.heartbeat(storage(name, rack), free=100 * MIB)
        self.trackers = {
            name: Replicas(name, database, wanted, 600, lambda i, n=name: self.replicate(i, n))  # type: ignore[misc]
            for name in (STORAGE, OTHER, THIRD)
        }

    def replicate(self, image_id: str, host: str) -> None:
        self.copied.append((image_id, host))
        if image_id in self.broken:
            raise self.broken[image_id]
        [image] = [image for image in self.database.images.all() if image.id == image_id]
        self.database.images.add_master(image, host)

    def run(self) -> list[tuple[str, str]]:
        self.copied = []
        for tracker in self.trackers.values():
            tracker.run()
        return self.copied


def add(database: Database, image_id: str, size: int = MIB) -> None:
    database.images.add_master(Image(image_id, size, Extents.of([(0, size)])), STORAGE)


def test_missing_masters_are_made_once(database: Database) -> None:
    world = World(database)
    for name in ("i", "j"):
        add(database, name)
    assert world.run() == [("i", THIRD), ("j", THIRD)]  # the other rack
    assert world.run() == []


def test_a_host_without_free_space_makes_none(database: Database) -> None:
    world = World(database)
    add(database, "big", 90 * MIB)
    add(database, "small", 20 * MIB)
    # Each would fit on the third host, in another rack, but not both.
    assert world.run() == [("big", OTHER), ("small", THIRD)]


def test_a_drained_host_does_not_count_and_makes_none(database: Database) -> None:
    world = World(database)
    add(database, "i")
    database.hosts.set_drained(THIRD, True)
    assert world.run() == [("i", OTHER)]
    database.hosts.set_drained(OTHER, True)
    database.hosts.set_drained(THIRD, False)
    assert world.run() == [("i", THIRD)]


def test_an_image_that_cannot_be_copied_does_not_delay_the_others(database: Database) -> None:
    world = World(database)
    for name in ("i", "j", "k"):
        add(database, name)
    world.broken = {"i": errors.NoReplica("nobody answered"), "j": RuntimeError("a bug")}
    assert world.run() == [("i", THIRD), ("j", THIRD), ("k", THIRD)]
    world.broken.popitem()
    assert world.run() == [("i", THIRD), ("j", THIRD)]  # tried again the next time
    assert database.images.mastered_on(THIRD) == {"j", "k"}


def test_an_image_that_was_deleted_in_glance_is_not_copied(database: Database) -> None:
    world = World(database)
    add(database, "i")
    database.images.set_deleted("i", True)
    assert world.run() == []


# Images that were deleted in Glance


def test_masters_of_deleted_images_are_removed_when_they_are_unused(database: Database) -> None:
    answers: dict[str, bool] = {}
    asked: list[list[str]] = []
    removed: list[str] = []

    def present(image_ids: Iterable[str]) -> dict[str, bool]:
        asked.append(list(image_ids))
        return answers

    def remove(image_id: str) -> None:
        removed.append(image_id)
        if image_id == "busy":
            raise errors.DeviceBusy("master", "1 volume(s)")
        database.images.drop_master(image_id, STORAGE)

    for name in ("busy", "kept", "lost", "unclear", "used"):
        add(database, name)
    database.volumes.put(ClonedVolume("v", "used", STORAGE))
    cleaner = Cleaner(STORAGE, database, present, remove, lambda found: True)
    cleaner.run()
    assert asked == [["busy", "kept", "lost", "unclear", "used"]]
    assert removed == []
    answers.update(kept=True, lost=False, busy=False, used=False)
    cleaner.run()
    assert removed == ["busy", "lost"]
    assert database.images.mastered_on(STORAGE) == {"busy", "kept", "unclear", "used"}
    database.volumes.drop("v")
    cleaner.run()
    assert database.images.mastered_on(STORAGE) == {"busy", "kept", "unclear"}
    assert {image.id for image in database.images.all() if image.deleted} == {"busy"}


def test_an_image_that_cannot_be_marked_keeps_no_other(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    for image_id in ("a", "b"):
        add(database, image_id)
    set_deleted, removed = database.images.set_deleted, list[str]()

    def locked(image_id: str, deleted: bool) -> bool:
        if image_id == "a":
            raise RuntimeError("lock wait timeout")
        return set_deleted(image_id, deleted)

    monkeypatch.setattr(database.images, "set_deleted", locked)
    absent = dict.fromkeys(("a", "b"), False)
    Cleaner(STORAGE, database, lambda _: absent, removed.append, lambda found: True).run()
    assert removed == ["b"]


def test_masters_are_removed_after_bases(database: Database) -> None:
    add(database, "i")
    c1 = Topology("c1", "10.0.0.9", "r1", "z1", "iqn.x:c1")
    database.hosts.heartbeat(c1)
    database.locations.report(LocationReport("l", "i", "c1", "filling", 0, "p", "iqn", 0, STORAGE))
    gone = Cleaner(
        STORAGE,
        database,
        lambda ids: dict.fromkeys(ids, False),
        lambda i: database.images.drop_master(i, STORAGE),
        lambda found: True,
    )
    gone.run()
    assert database.images.mastered_on(STORAGE) == {"i"}
    assert database.locations.orders(c1, Limits()).remove == ("i",)
    database.locations.report(LocationReport("l", "i", "c1", "gone", 0, "p", "iqn", 0))
    gone.run()
    assert database.images.all() == []
