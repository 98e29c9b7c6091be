"""What a plan reads of a tree: a few rows, and the numbers of children that are kept for it."""

from __future__ import annotations

import random
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import datetime, timedelta
from typing import Any

import pytest
import sqlalchemy as sa

from cinder_thunder.db import candidates, migration, models
from cinder_thunder.db.api import Database
from cinder_thunder.db.engine import HEARTBEATS
from cinder_thunder.db.locations import RECOUNT_AFTER
from cinder_thunder.db.values import Image
from cinder_thunder.policy.ranking import Limits
from os_brick_thunder.common.policy.extents import Extents
from os_brick_thunder.common.wire import LocationReport, Topology
from tests.mariadb import new_database

STORAGE, IMAGE = "stor1@thunder", "image"
LIMITS = Limits(fanout=2, storage_fanout=2)
MIB = 1 << 20


class World:
    """Hosts in four racks of two zones, and an image."""

    def __init__(self, url: str) -> None:
        self.now = datetime(2026, 11, 1)
        self.database = Database(url, heartbeat_timeout=60, clock=lambda: self.now)
        migration.upgrade(self.database.engine)
        self.database.hosts.heartbeat(Topology(STORAGE, "10.0.0.1", "s", "z0", "", "storage"))
        self.database.images.add_master(Image(IMAGE, MIB, Extents.of([(0, MIB)])), STORAGE)

    def host(self, number: int, rack: int | None = None) -> Topology:
        rack = number % 4 if rack is None else rack
        name = f"c{number:04}"
        return Topology(name, "10.0.0.1", f"r{rack}", f"z{rack // 2}", f"iqn.2026-11.org.x:{name}")

    def plan(self, number: int, **options: Any) -> list[str]:
        """The hosts that this one may read from."""
        self.database.hosts.heartbeat(self.host(number))
        planned = self.database.locations.plan(IMAGE, self.host(number), LIMITS, **options)
        return [source.host for source in planned.sources] if planned else []

    def report(self, number: int, state: str, source: str | None = None) -> None:
        name = self.host(number).host
        self.database.locations.report(
            LocationReport("", IMAGE, name, state, MIB, "p", "iqn", 0, source)
        )

    def counted(self) -> dict[str, int]:
        """The recorded numbers of children that are not 0."""
        with self.database.engine.connect() as connection:
            row = models.LocationRow
            rows = connection.execute(sa.select(row.id, row.children).where(row.children != 0))
            return {row.id: row.children for row in rows}

    def children(self) -> dict[str, int]:
        """Those that there are."""
        locations = self.database.locations.of(IMAGE)
        return dict(Counter(location.parent for location in locations if location.parent))


@pytest.fixture
def world(url: str) -> World:
    return World(url)


def test_children_are_counted_whatever_happens(world: World) -> None:
    chance = random.Random(7)
    for number in range(12):
        world.database.hosts.heartbeat(world.host(number))
    for _ in range(120):
        number = chance.randrange(12)
        match chance.choice(("plan", "plan", "report", "report", "gone", "evicted", "master")):
            case "plan":
                exclude = [world.host(chance.randrange(12)).host] if chance.random() < 0.3 else []
                world.plan(number, exclude=exclude, keep=chance.random() < 0.5)
            case "report":
                state = chance.choice(("filling", "filling", "complete", "draining"))
                source = chance.choice((None, STORAGE, world.host(chance.randrange(12)).host))
                world.report(number, state, source)
            case "gone":
                world.report(number, "gone")
            case "evicted":
                world.database.locations.drop(IMAGE, world.host(number).host)
            case "master":
                image = Image(IMAGE, MIB, Extents.of([(0, MIB)]), content=f"sha512:{'ab' * 64}")
                world.database.images.add_master(image, STORAGE)
        assert world.counted() == world.children()


def test_a_plan_reads_a_few_rows_of_a_large_tree(world: World) -> None:
    """And still finds the nearest base that has room."""
    now, row, known = world.now, models.LocationRow, models.HostRow
    hosts = [world.host(number, number // 500) for number in range(2000)]
    with world.database.engine.begin() as connection:
        connection.execute(
            sa.insert(known),
            [
                {
                    "host": h.host, "kind": "compute", "rack": h.rack, "zone": h.zone,
                    "address": h.address, "initiator": h.initiator, "drained": False,
                    "heartbeat_at": now,
                }
                for h in hosts
            ],
        )  # fmt: skip
        connection.execute(
            sa.insert(row),
            [
                {
                    "id": f"l{h.host}", "image_id": IMAGE, "host": h.host, "kind": "base",
                    "state": "filling", "depth": 1 + number % 9, "filled": 0, "portal": "",
                    "iqn": "", "lun": 0, "updated_at": now, "rack": h.rack, "zone": h.zone,
                    "children": 2 if number % 100 else 1,
                }
                for number, h in enumerate(hosts)
            ],
        )  # fmt: skip
    read: list[int] = []
    surroundings = candidates.surroundings

    def counting(*arguments: Any) -> candidates.Surroundings:
        found = surroundings(*arguments)
        read.append(len(found.locations))
        return found

    world.database.hosts.heartbeat(world.host(3000, 2))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("cinder_thunder.db.locations.surroundings", counting)
        planned = world.database.locations.plan(IMAGE, world.host(3000, 2), LIMITS)
    assert planned is not None
    # Of rack 2, hosts 1000, 1100 … have room; the first of these has the smallest depth.
    depths = {1 + number % 9: number for number in (1400, 1300, 1200, 1100, 1000)}
    assert planned.sources[0].host == world.host(depths[min(depths)]).host
    assert read
    assert max(read) <= 3 * LIMITS.fanout * candidates.EACH + 3


def test_children_that_died_make_room_again(world: World) -> None:
    for number in range(3):
        world.plan(number)
        world.report(number, "filling", STORAGE)  # they read from the storage host, all three
    world.now += timedelta(seconds=61)
    world.database.hosts.heartbeat(Topology(STORAGE, "10.0.0.1", "s", "z0", "", "storage"))
    assert world.plan(5) == [STORAGE]  # there is no other source
    assert list(world.counted().values()) == [1]  # the dead ones no longer count
    world.database.hosts.heartbeat(world.host(0))
    world.database.locations.recount(IMAGE, 120)
    assert list(world.counted().values()) == [2]
    assert RECOUNT_AFTER < 60


def test_a_host_that_is_moved_is_near_others(world: World) -> None:
    for number in (0, 1):
        world.plan(number)
        world.report(number, "complete")
    assert world.plan(4)[0] == world.host(0).host  # in rack 0
    world.database.hosts.heartbeat(world.host(0, rack=3))
    world.database.hosts.heartbeat(world.host(1, rack=0))
    assert world.plan(8)[0] == world.host(1, rack=0).host


def test_only_what_changes_the_tree_takes_its_lock(mariadb: str) -> None:
    """Its first report, and how much is filled, are recorded while another transaction holds it."""
    world = World(new_database(mariadb))
    for number in (0, 1):
        world.plan(number)
        world.report(number, "filling", STORAGE)
    parent = world.plan(2)[0]
    lock = sa.select(models.ImageRow.id).where(models.ImageRow.id == IMAGE).with_for_update()
    report = LocationReport("", IMAGE, "c0000", "filling", MIB // 2, "p", "iqn", 0, STORAGE)
    engine = world.database.engine
    with engine.connect() as holder, ThreadPoolExecutor(1) as thread:
        holder.execute(lock)
        thread.submit(world.database.locations.report, report).result(20)
        filled = {each.host: each.filled for each in world.database.locations.of(IMAGE)}
        assert filled["c0000"] == MIB // 2
        first = replace(report, host="c0002", filled=0, source=parent)
        thread.submit(world.database.locations.report, first).result(20)
        assert {each.host: each.state for each in world.database.locations.of(IMAGE)} == {
            STORAGE: "complete",
            "c0000": "filling",
            "c0001": "filling",
            "c0002": "filling",
        }
        moved = thread.submit(world.database.locations.report, replace(report, source="c0001"))
        with pytest.raises(TimeoutError):
            moved.result(1)
        holder.rollback()
        moved.result(20)
    assert world.counted() == world.children()


def test_a_large_cloud_has_a_slower_heartbeat(world: World) -> None:
    """The timeouts grow with the interval, which bounds the load of all heartbeats together."""
    database, known = world.database, models.HostRow
    assert database.hosts.interval() == 0
    hosts = [world.host(number) for number in range(4000)]
    with database.engine.begin() as connection:
        connection.execute(
            sa.insert(known),
            [
                {
                    "host": h.host, "kind": "compute", "rack": h.rack, "zone": h.zone,
                    "address": h.address, "initiator": h.initiator, "drained": False,
                    "heartbeat_at": world.now,
                }
                for h in hosts
            ],
        )  # fmt: skip
    database = Database(str(database.engine.url.render_as_string(False)), 60, lambda: world.now)
    assert database.hosts.interval() == 4000 / HEARTBEATS == 20
    world.now += timedelta(seconds=79)
    assert {host.state for host in database.hosts.all() if host.kind == "compute"} == {"suspect"}
    world.now += timedelta(seconds=2)
    assert {host.state for host in database.hosts.all() if host.kind == "compute"} == {"dead"}
