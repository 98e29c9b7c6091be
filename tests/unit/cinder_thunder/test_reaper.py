"""Rows that nobody goes back to are removed, and no others."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest

from cinder_thunder.db.api import Database
from cinder_thunder.db.values import ClonedVolume, Image
from cinder_thunder.policy.ranking import Limits
from cinder_thunder.tracker.reaper import FORGOTTEN, LEFT, Reaper
from os_brick_thunder.common.policy.extents import Extents
from os_brick_thunder.common.wire import ImageInfo, LocationReport, Topology
from tests.unit.cinder_thunder.conftest import STORAGE

Passes = Callable[[float], None]


def host(name: str) -> Topology:
    return Topology(name, f"{name}.example", "r1", "z1", f"iqn.x:{name}")


@pytest.fixture
def passes(database: Database, monkeypatch: pytest.MonkeyPatch) -> Passes:
    """Lets seconds pass, in which the storage host is alive."""
    start, passed = database._transactions.now(), 0.0
    monkeypatch.setattr(database._transactions, "now", lambda: start + timedelta(seconds=passed))

    def passes(seconds: float) -> None:
        nonlocal passed
        passed += seconds
        database.hosts.heartbeat(Topology(STORAGE, "10.0.0.1", "r0", "z1", "", "storage"))

    return passes


@pytest.fixture
def cinder() -> set[str]:
    """The volumes that Cinder has on this backend."""
    return set()


@pytest.fixture
def reaper(database: Database, cinder: set[str]) -> Reaper:
    return Reaper(STORAGE, database, lambda volume_id, backend: volume_id in cinder)


def stacks(database: Database, name: str) -> list[str]:
    return [stack.volume_id for stack in database.volumes.stacks_on(name)]


def test_stacks_that_were_not_dropped(database: Database, passes: Passes, reaper: Reaper) -> None:
    for volume_id in ("used", "detached", "unlisted"):
        database.volumes.put_stack(volume_id, "c1", "cached")
    database.volumes.detach_stack("detached", "c1")
    database.volumes.set_listed("unlisted", "c1", listed=False)
    passes(LEFT - 1)
    reaper.run()
    assert stacks(database, "c1") == ["detached", "unlisted", "used"]
    passes(2)
    reaper.run()
    assert stacks(database, "c1") == ["used"]


def test_plans_that_came_to_nothing(database: Database, passes: Passes, reaper: Reaper) -> None:
    database.images.add_master(Image("i", 1 << 20, Extents()), STORAGE)
    for name in ("c1", "c2"):
        planned = database.locations.plan("i", host(name), Limits())
        assert planned is not None
    database.locations.report(LocationReport("", "i", "c2", "filling", 0, "p", "q", 0))
    passes(LEFT + 1)
    reaper.run()
    assert {found.host for found in database.locations.of("i")} == {STORAGE, "c2"}


def test_hosts_that_are_gone_for_good(database: Database, passes: Passes, reaper: Reaper) -> None:
    database.images.add_master(Image("i", 1 << 20, Extents()), STORAGE)
    database.images.add_master(Image("j", 1 << 20, Extents()), "stor2@thunder")
    for name in ("c1", "c2", "drained"):
        database.hosts.heartbeat(host(name))
        database.locations.plan("i", host(name), Limits(), volume_id=f"of-{name}")
        database.locations.report(LocationReport("", "i", name, "filling", 0, "p", "q", 0))
    database.hosts.heartbeat(Topology("stor2@thunder", "10.0.0.2", "r0", "z1", "", "storage"))
    database.hosts.set_drained("drained", True)
    passes(FORGOTTEN - 1)
    database.hosts.heartbeat(host("c2"))
    reaper.run()
    assert len(database.hosts.all()) == 5
    passes(1)
    reaper.run()
    kept = [known.host for known in database.hosts.all()]
    assert kept == ["c2", "drained", STORAGE, "stor2@thunder"]
    assert {found.host for found in database.locations.of("i")} == {STORAGE, "c2", "drained"}
    assert (stacks(database, "c1"), stacks(database, "c2")) == ([], ["of-c2"])
    assert database.images.mastered_on("stor2@thunder") == {"j"}  # on its disks


def test_volumes_that_cinder_has_no_more(
    database: Database, reaper: Reaper, cinder: set[str]
) -> None:
    for volume_id, backend in (("v1", STORAGE), ("v2", STORAGE), ("v3", "stor2@thunder")):
        database.volumes.put(ClonedVolume(volume_id, "i", backend))
    cinder.add("v1")
    reaper.run()
    assert database.volumes.known_ids() == {"v1", "v3"}


def test_old_leases(database: Database, passes: Passes, reaper: Reaper) -> None:
    database.leases.acquire("old", STORAGE, 30)
    passes(LEFT + 31)
    database.leases.acquire("new", STORAGE, 30)
    reaper.run()
    assert not database.leases.renew("old", STORAGE, 30)
    assert database.leases.renew("new", STORAGE, 30)


def test_one_failure_does_not_keep_the_others(
    database: Database, reaper: Reaper, cinder: set[str], caplog: pytest.LogCaptureFixture
) -> None:
    database.volumes.put(ClonedVolume("v1", "i", STORAGE))
    with database.engine.begin() as connection:
        connection.exec_driver_sql("DROP TABLE thunder_leases")
    reaper.run()
    assert database.volumes.get("v1") is None
    assert "Could not look for left rows of leases" in caplog.text


def test_one_that_cannot_be_removed_keeps_no_other(
    database: Database, passes: Passes, monkeypatch: pytest.MonkeyPatch, reaper: Reaper, caplog: Any
) -> None:
    for name in ("a", "b"):
        database.images.add_master(Image(name, 1 << 20, Extents()), STORAGE)
        database.profiles.start("r" + name, ImageInfo("gone-" + name, 1 << 20, ()), "c1", 60)
        database.hosts.heartbeat(host(name))
    counted: list[str] = []
    for table, verb in (
        (database.hosts, "forget"),
        (database.profiles, "reset"),
        (database.locations, "recount"),
    ):
        monkeypatch.setattr(table, verb, failing(getattr(table, verb), counted))
    passes(FORGOTTEN + 1)
    reaper.run()
    assert [known.host for known in database.hosts.all()] == ["a", STORAGE]
    left = [database.profiles.show("gone-" + name) is not None for name in ("a", "b")]
    assert left == [True, False]
    assert sorted(counted) == ["b", "b", "gone-b"]
    assert caplog.text.count("is looked at again later") == 3


def failing(call: Callable[..., Any], done: list[str]) -> Callable[..., Any]:
    """Fails for whatever is called "a"."""

    def instead(name: str, *args: Any) -> Any:
        if name.endswith("a"):
            raise RuntimeError("lock wait timeout")
        done.append(name)
        return call(name, *args)

    return instead
