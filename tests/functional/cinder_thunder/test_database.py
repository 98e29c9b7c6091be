"""The tracker's tables, on the databases that Cinder supports."""

from __future__ import annotations

import uuid
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest
import sqlalchemy as sa

from bench import plans
from cinder_thunder.db import hosts as host_tables
from cinder_thunder.db import migration
from cinder_thunder.db.api import Database
from cinder_thunder.db.values import ClonedVolume, Heard, Image, Master, PlannedSources
from cinder_thunder.db.volumes import write_stack
from cinder_thunder.policy.ranking import Limits, Location
from os_brick_thunder.common import errors
from os_brick_thunder.common.policy.extents import Extents
from os_brick_thunder.common.wire import ImageDigests, LocationReport, Orders, Topology
from tests.functional.conftest import Clock
from tests.mariadb import new_database

STORAGE = "stor1@thunder"
MIB = 1 << 20


def topology(host: str, rack: str = "r1", kind: str = "compute") -> Topology:
    return Topology(host, "10.0.0.1", rack, "z1", f"iqn.2026-11.org.example:{host}", kind)


@pytest.fixture
def image(database: Database) -> str:
    """An image with its master on the storage host."""
    image_id = str(uuid.uuid4())
    database.hosts.heartbeat(topology(STORAGE, "r0", "storage"))
    database.images.add_master(
        Image(image_id, 8 * MIB, Extents.of([(0, MIB), (4 * MIB, 5 * MIB)])), STORAGE
    )
    return image_id


def plan(database: Database, image_id: str, host: str, **kwargs: Any) -> PlannedSources:
    database.hosts.heartbeat(topology(host))
    planned = database.locations.plan(image_id, topology(host), Limits(), **kwargs)
    assert planned is not None
    return planned


def orders(database: Database, host: str) -> Orders:
    return database.locations.orders(topology(host), Limits())


def hosts(planned: PlannedSources) -> list[str]:
    return [source.host for source in planned.sources]


def test_master(database: Database, image: str) -> None:
    assert database.images.master(image, STORAGE) == Master(8 * MIB, None)
    assert database.images.master(image, "stor2@thunder") is None
    assert database.images.mastered_on(STORAGE) == {image}
    database.images.drop_master(image, STORAGE)
    database.images.drop_master(image, STORAGE)
    assert database.images.mastered_on(STORAGE) == set()


def test_long_map_survives(database: Database) -> None:
    """Far more than the 64 KiB of a TEXT column."""
    allocated = Extents.of((n * 131072, n * 131072 + 65536) for n in range(50_000))
    database.hosts.heartbeat(topology(STORAGE))
    database.images.add_master(Image("big", 50_000 * 131072, allocated), STORAGE)
    assert plan(database, "big", "c1").image.allocated == allocated


def test_the_manifest_of_the_first_master_stays(database: Database, image: str) -> None:
    assert database.images.manifest(image) is None
    assert database.images.manifest("unknown") is None
    assert database.images.get("unknown") is None
    first, other = (ImageDigests(image, MIB, text * 100_000, text) for text in ("abcd", "efgh"))
    for manifest, root in ((None, ""), (first, "a" * 64), (other, "b" * 64)):
        database.images.add_master(
            Image(image, 8 * MIB, Extents(), None, manifest, root=root), "stor2@thunder"
        )
        assert database.images.manifest(image) == (manifest and first)
    found = database.images.get(image)
    assert found is not None
    assert (found.size, found.allocated.length, found.manifest) == (8 * MIB, 2 * MIB, first)
    assert found.root == plan(database, image, "c1").image.root == "a" * 64
    assert [known.manifest for known in database.images.all()] == [None]  # not for lists: too long


def test_a_root_belongs_to_a_manifest_and_a_content(database: Database, image: str) -> None:
    """What an older version recorded gets none, and other content gets its own."""
    old, new = (ImageDigests(image, MIB, text) for text in ("abcd", "efgh"))

    def recorded(manifest: ImageDigests, content: str, root: str) -> str:
        made = Image(image, 8 * MIB, Extents(), None, manifest, content=content, root=root)
        database.images.add_master(made, "stor2@thunder")
        found = database.images.get(image)
        assert found is not None
        return found.root

    assert recorded(old, "sha512:1", "") == ""
    assert recorded(old, "sha512:1", "a" * 64) == ""
    assert recorded(new, "sha512:2", "b" * 64) == "b" * 64
    assert recorded(old, "sha512:3", "") == ""


def test_plan_records_the_edge(database: Database, image: str) -> None:
    first = plan(database, image, "c1", volume_id="v1")
    assert hosts(first) == [STORAGE]
    assert [source.address for source in first.sources] == ["10.0.0.1"]
    assert first.image.allocated.length == 2 * MIB
    assert [(s.host, s.mode, s.alive) for s in database.volumes.stacks("v1")] == [
        ("c1", "cached", True)
    ]
    second = plan(database, image, "c2", volume_id="v2")
    assert hosts(second) == ["c1", STORAGE]
    by_host = {location.host: location for location in database.locations.of(image)}
    assert by_host["c2"].parent == first.location_id == by_host["c1"].id
    assert [by_host[h].depth for h in (STORAGE, "c1", "c2")] == [0, 1, 2]


def test_planning_again_is_the_same_location(database: Database, image: str) -> None:
    one = plan(database, image, "c1", volume_id="v1")
    two = plan(database, image, "c1", volume_id="v2", keep=True)
    assert one.location_id == two.location_id
    assert hosts(one) == hosts(two)
    assert len(database.locations.of(image)) == 2


def test_dead_hosts_are_no_sources_and_come_back(
    database: Database, image: str, clock: Clock
) -> None:
    plan(database, image, "c1")
    clock.passes(61)
    database.hosts.heartbeat(topology(STORAGE, "r0", "storage"))
    assert hosts(plan(database, image, "c2")) == [STORAGE]
    database.hosts.heartbeat(topology("c1"))
    location = plan(database, image, "c1").location_id
    filling = ("filling", 5, "10.0.0.1:3260", "iqn", 0, STORAGE)
    database.locations.report(LocationReport(location, image, "c1", *filling))
    assert "c1" in hosts(plan(database, image, "c3"))


def test_no_live_master_no_plan(database: Database, image: str, clock: Clock) -> None:
    clock.passes(61)
    assert database.locations.plan(image, topology("c1"), Limits()) is None
    assert database.locations.plan("unknown", topology("c1"), Limits()) is None


def test_report_completes_and_goes(database: Database, image: str) -> None:
    location = plan(database, image, "c1").location_id
    report = LocationReport(location, image, "c1", "complete", 2 * MIB, "p", "iqn", 0)
    database.locations.report(report)
    [base] = [loc for loc in database.locations.of(image) if loc.kind == "base"]
    assert (base.state, base.parent, base.filled) == ("complete", None, 2 * MIB)
    child = plan(database, image, "c2")
    assert hosts(child)[0] == "c1"
    database.locations.report(LocationReport(location, image, "c1", "gone", 0, "", "", 0))
    [left] = [loc for loc in database.locations.of(image) if loc.kind == "base"]
    assert (left.host, left.parent) == ("c2", None)


def test_a_base_whose_row_was_lost_is_deeper_than_all(database: Database, image: str) -> None:
    plan(database, image, "c1")
    plan(database, image, "c2")
    database.locations.report(
        LocationReport("lost", image, "c9", "filling", 7, "p", "iqn", 0, "c1")
    )
    [found] = [loc for loc in database.locations.of(image) if loc.host == "c9"]
    assert found.id == "lost"
    assert found.depth > max(loc.depth for loc in database.locations.of(image) if loc.host != "c9")
    [parent] = [loc for loc in database.locations.of(image) if loc.host == "c1"]
    assert found.parent == parent.id


def fills(
    database: Database, image_id: str, host: str, source: str | None, state: str = "filling"
) -> None:
    """A heartbeat of ``host``, and its report of its base."""
    database.hosts.heartbeat(topology(host))
    database.locations.report(LocationReport("", image_id, host, state, 5, "p", "iqn", 0, source))


def test_children_of_a_dead_host_are_ordered_to_find_another_parent(
    database: Database, image: str, clock: Clock
) -> None:
    plan(database, image, "c1")
    plan(database, image, "c2")
    fills(database, image, "c1", STORAGE)
    fills(database, image, "c2", "c1")
    assert orders(database, "c2") == Orders()
    for _ in range(12):
        clock.passes(5)
        database.hosts.heartbeat(topology(STORAGE, "r0", "storage"))
        fills(database, image, "c2", "c1")
        assert orders(database, "c2") == Orders()  # c1 is merely late
    clock.passes(5)
    database.hosts.heartbeat(topology(STORAGE, "r0", "storage"))
    assert orders(database, "c2") == Orders(reparent=(image,))
    assert hosts(plan(database, image, "c2", exclude=["c1"])) == [STORAGE]
    assert orders(database, "c2") == Orders()
    fills(database, image, "c2", None, "complete")
    [base] = [loc for loc in database.locations.of(image) if loc.host == "c2"]
    assert (base.parent, base.depth) == (None, 0)


def test_a_host_that_was_silent_itself_is_told_of_dead_parents_later(
    database: Database, image: str, clock: Clock
) -> None:
    """The tracker or RabbitMQ was away: other hosts will be heard of again, too."""
    plan(database, image, "c1")
    fills(database, image, "c1", STORAGE)
    clock.passes(300)
    database.hosts.heartbeat(topology("c1"))
    assert orders(database, "c1") == Orders()
    for _ in range(13):
        clock.passes(5)
        database.hosts.heartbeat(topology("c1"))
    assert orders(database, "c1") == Orders(reparent=(image,))


def test_a_host_is_heard_of_without_a_write_while_its_row_is_fresh(
    database: Database, clock: Clock
) -> None:
    def silent() -> float:
        return {host.host: host.silent for host in database.hosts.all()}["c1"]

    database.hosts.heard_of(topology("c1"))
    clock.passes(15)
    database.hosts.heard_of(topology("c1"))
    assert silent() == 15
    clock.passes(1)
    database.hosts.heard_of(topology("c1"))
    assert silent() == 0
    clock.passes(1)
    database.hosts.heard_of(topology("c1", "r9"))  # it was moved
    assert silent() == 0
    with pytest.raises(errors.HostConflict):
        database.hosts.heard_of(replace(topology("c1", "r9"), initiator="iqn.x:other"))


def test_heartbeats_of_many_hosts_are_one_write(
    database: Database, image: str, clock: Clock
) -> None:
    """Those that are as their rows say, and were not silent; what else they need is told."""
    names = "bases", "complete", "moved", "none", "silent", "stacks"
    said = {name: topology(name) for name in names}
    database.hosts.heartbeat(said["silent"])
    clock.passes(40)
    for name in set(names) - {"silent"}:
        database.hosts.heartbeat(said[name])
    plan(database, image, "bases")
    plan(database, image, "complete")
    database.locations.report(LocationReport("", image, "complete", "complete", 9, "p", "iqn", 0))
    database.volumes.put_stack("v", "stacks", "direct")
    said["moved"] = topology("moved", "r9")
    clock.passes(10)
    written: list[str] = []
    sa.event.listen(
        database.engine, "before_cursor_execute", lambda _c, _u, text, *_: written.append(text)
    )
    nobody = topology("nobody")
    found = database.hosts.heard([*said.values(), nobody])
    assert [each.split()[0] for each in written if each != "BEGIN"] == ["SELECT", "UPDATE"]
    assert dict(zip([*names, "nobody"], found, strict=True)) == {
        "bases": Heard(True, False),
        "complete": Heard(False, False),
        "moved": None,
        "none": Heard(False, False),
        "silent": None,
        "stacks": Heard(False, True),
        "nobody": None,
    }
    silent = {host.host: host.silent for host in database.hosts.all()}
    assert silent == {
        **dict.fromkeys(names, 0),
        "moved": 10,
        "silent": 50,
        STORAGE: silent[STORAGE],
    }
    assert database.hosts.heard([nobody]) == [None]
    database.images.set_deleted(image, True)
    assert database.hosts.heard([said["complete"]]) == [Heard(True, False)]


def test_hosts_whose_initiators_differ_in_case_alone_are_two(database: Database) -> None:
    """Whatever the database thinks of it."""
    database.hosts.heartbeat(topology("c1"))
    other = replace(topology("c1"), initiator=topology("c1").initiator.upper())
    for call in (database.hosts.heartbeat, database.hosts.heard_of):
        with pytest.raises(errors.HostConflict):
            call(other)


def test_suspect_hosts_get_no_new_children(database: Database, image: str, clock: Clock) -> None:
    plan(database, image, "c1")
    fills(database, image, "c1", STORAGE)
    plan(database, image, "c2")
    fills(database, image, "c2", "c1")
    clock.passes(31)
    database.hosts.heartbeat(topology(STORAGE, "r0", "storage"))
    assert {h.host: h.state for h in database.hosts.all()} == {
        STORAGE: "alive",
        "c1": "suspect",
        "c2": "suspect",
    }
    assert all(host.alive for host in database.hosts.all())
    assert hosts(plan(database, image, "c3")) == [STORAGE]
    assert hosts(plan(database, image, "c2", keep=True)) == ["c1", "c3", STORAGE]
    assert orders(database, "c2") == Orders()


def test_who_fell_back_to_a_storage_host_is_moved_to_a_peer_with_room(
    database: Database, image: str
) -> None:
    plan(database, image, "c1")
    for host in ("c2", "c3"):
        assert hosts(plan(database, image, host))[0] == "c1"
    assert orders(database, "c2") == Orders()
    for host in ("c1", "c2", "c3"):  # c1 did not answer in time
        fills(database, image, host, STORAGE)
    assert orders(database, "c1") == Orders()  # nobody has fewer replicas between it and a master
    assert orders(database, "c2") == orders(database, "c3") == Orders(reparent=(image,))
    assert hosts(plan(database, image, "c3"))[0] == "c1"
    assert orders(database, "c2") == orders(database, "c3") == Orders()  # storage_fanout holds
    fills(database, image, "c3", STORAGE)
    fills(database, image, "c2", None, "complete")
    assert orders(database, "c3") == Orders()


def test_who_was_sent_to_a_storage_host_for_want_of_room_is_moved_below_any_base(
    database: Database, image: str
) -> None:
    limits = Limits(fanout=1, storage_fanout=1)

    def sources(host: str) -> list[str]:
        database.hosts.heartbeat(topology(host))
        planned = database.locations.plan(image, topology(host), limits)
        assert planned is not None
        return hosts(planned)

    for host in ("c1", "c2", "c3"):
        sources(host)
    fills(database, image, "c1", STORAGE)
    fills(database, image, "c2", "c1")
    fills(database, image, "c3", "c2")
    fills(database, image, "c3", "c2", "draining")
    assert sources("c4") == [STORAGE]
    fills(database, image, "c4", STORAGE)
    assert database.locations.orders(topology("c4"), limits) == Orders()
    fills(database, image, "c3", None, "gone")
    assert database.locations.orders(topology("c4"), limits) == Orders(reparent=(image,))
    assert sources("c4")[0] == "c2"
    assert database.locations.orders(topology("c4"), limits) == Orders()


def test_a_drained_host_loses_its_children(database: Database, image: str) -> None:
    for host, source in (("c1", STORAGE), ("c2", "c1")):
        plan(database, image, host)
        fills(database, image, host, source)
    database.hosts.set_drained("c1", True)
    assert {h.host: h.drained for h in database.hosts.all()}["c1"] is True
    assert orders(database, "c2") == Orders(reparent=(image,))
    assert "c1" not in hosts(plan(database, image, "c3"))
    database.hosts.heartbeat(topology("c1"))  # which does not change it
    database.hosts.set_drained(STORAGE, True)
    assert database.locations.plan(image, topology("c4"), Limits(), exclude=["c2", "c3"]) is None
    database.hosts.set_drained("c1", False)
    database.hosts.set_drained(STORAGE, False)
    assert orders(database, "c2") == Orders()


def test_draining_an_unknown_host(database: Database, image: str) -> None:
    with pytest.raises(errors.InvalidRequest) as caught:
        database.hosts.set_drained("c7", True)
    assert str(caught.value) == f"there is no host c7: known are {STORAGE}"


def test_a_draining_base(database: Database, image: str) -> None:
    plan(database, image, "c1")
    fills(database, image, "c1", None, "complete")
    plan(database, image, "c2")
    fills(database, image, "c2", "c1")
    fills(database, image, "c1", None, "draining")
    assert orders(database, "c1") == Orders()  # it holds everything
    assert orders(database, "c2") == Orders(reparent=(image,))
    assert hosts(plan(database, image, "c2")) == [STORAGE]
    assert orders(database, "c2") == Orders()
    fills(database, image, "c1", None, "gone")
    fills(database, image, "c2", "c1")  # a late report
    assert orders(database, "c2") == Orders()


def test_a_parent_that_was_dropped(database: Database, image: str) -> None:
    for host, source in (("c1", STORAGE), ("c2", "c1")):
        plan(database, image, host)
        fills(database, image, host, source)
    database.locations.drop(image, "c1")
    assert orders(database, "c2") == Orders(reparent=(image,))


def test_a_volume_on_a_host_with_a_complete_base_needs_no_source(
    database: Database, image: str
) -> None:
    plan(database, image, "c1")
    fills(database, image, "c1", None, "complete")
    database.hosts.set_drained(STORAGE, True)
    assert plan(database, image, "c1", volume_id="v1").sources == ()
    assert database.locations.plan(image, topology("c1"), Limits()) is None
    assert [stack.host for stack in database.volumes.stacks("v1")] == ["c1"]


def test_images_on_another_storage_host_survive_a_dead_one(
    database: Database, image: str, clock: Clock
) -> None:
    """Volumes of the living host are attached as before."""
    other = "stor2@thunder"
    database.hosts.heartbeat(topology(STORAGE, "r1", "storage"))
    database.hosts.heartbeat(topology(other, "r9", "storage"))
    database.images.add_master(database.images.all()[0], other)
    assert hosts(plan(database, image, "c1", volume_id="v1")) == [STORAGE, other]
    fills(database, image, "c1", STORAGE)
    clock.passes(61)
    database.hosts.heartbeat(topology(other, "r9", "storage"))
    database.hosts.heartbeat(topology("c1"))
    assert hosts(plan(database, image, "c2", volume_id="v2")) == ["c1", other]
    for _ in range(13):
        clock.passes(5)
        database.hosts.heartbeat(topology(other, "r9", "storage"))
        database.hosts.heartbeat(topology("c1"))
    assert orders(database, "c1") == Orders(reparent=(image,))
    assert hosts(plan(database, image, "c1")) == [other]
    assert [found.hosts for found in database.images.holders()] == [{STORAGE, other}]


OLD, NEW = "sha512:0a", "sha512:0b"


def content(database: Database, image_id: str, content: str, host: str = STORAGE) -> None:
    """Make a master of an image, of this content."""
    database.images.add_master(Image(image_id, 4 * MIB, Extents(), content=content), host)


def test_an_id_that_is_used_again(database: Database, clock: Clock) -> None:
    """Bases of the old content serve nobody, are not used by their hosts, and go."""
    other = "stor2@thunder"
    for host in (STORAGE, other):
        database.hosts.heartbeat(topology(host, "r0", "storage"))
        content(database, "i", OLD, host)
    location = plan(database, "i", "c1").location_id
    report = LocationReport(location, "i", "c1", "complete", 0, "p", "i", 0, content=OLD)
    database.locations.report(report)
    assert hosts(plan(database, "i", "c2"))[0] == "c1"  # and one of the two masters
    content(database, "i", NEW)
    assert [(f.host, f.state) for f in database.locations.of("i") if f.kind == "master"] == [
        (STORAGE, "complete")
    ]
    found = plan(database, "i", "c3", volume_id="v")
    assert (hosts(found), found.image.content) == ([STORAGE], NEW)
    with pytest.raises(errors.NoReplica, match="c1 has a base of what image i was before"):
        plan(database, "i", "c1", volume_id="v")
    for said in (OLD, ""):  # an older agent does not say
        database.locations.report(replace(report, content=said))
        assert orders(database, "c1") == Orders(remove=("i",))
        assert hosts(plan(database, "i", "c3")) == [STORAGE]
    database.locations.report(replace(report, state="gone"))
    assert orders(database, "c1") == Orders()
    assert hosts(plan(database, "i", "c1", volume_id="v")) == ["c3", STORAGE]


def test_a_host_that_returns_with_a_base_of_the_old_content(database: Database) -> None:
    """Its row was lost, so it is found again; but it serves nobody."""
    database.hosts.heartbeat(topology(STORAGE, "r0", "storage"))
    content(database, "i", NEW)
    database.hosts.heartbeat(topology("c1"))
    report = LocationReport("l", "i", "c1", "complete", 0, "p", "i", 0, content=OLD)
    database.locations.report(report)
    assert hosts(plan(database, "i", "c2")) == [STORAGE]
    assert orders(database, "c1") == Orders(remove=("i",))
    database.locations.report(replace(report, content=NEW))  # it was built anew
    assert hosts(plan(database, "i", "c2")) == ["c1", STORAGE]
    assert orders(database, "c1") == Orders()


def test_content_that_is_not_known_is_learnt(database: Database) -> None:
    database.hosts.heartbeat(topology(STORAGE, "r0", "storage"))
    content(database, "i", "")
    location = plan(database, "i", "c1").location_id
    content(database, "i", NEW, "stor2@thunder")
    assert plan(database, "i", "c2").image.content == NEW
    report = LocationReport(location, "i", "c1", "complete", 0, "p", "i", 0)
    database.locations.report(report)
    assert [f.state for f in database.locations.of("i") if f.host == "c1"] == ["complete"]


def test_direct_volumes_of_a_host(database: Database, image: str) -> None:
    for volume_id, host, mode in (
        ("v1", "c1", "direct"),
        ("v2", "c1", "cached"),
        ("v3", "c2", "direct"),
        ("v4", "c1", "direct"),
        ("v5", "c1", "direct"),
    ):
        database.volumes.put(ClonedVolume(volume_id, image, STORAGE))
        database.volumes.put_stack(volume_id, host, mode)
    database.volumes.put_stack("v6", "c1", "direct")  # shares no image
    database.volumes.release_stack("v5", "c1")

    def direct(host: str) -> list[str]:
        return [s.volume_id for s in database.volumes.stacks_on(host) if s.may_be_cached]

    assert direct("c1") == ["v1", "v4"]
    database.volumes.put_stack("v1", "c1", "cached")
    assert direct("c1") == ["v4"]
    assert direct("c9") == []


def test_a_stack_that_cinder_has_detached(database: Database, clock: Clock) -> None:
    """It no longer counts; its host is told of it until it says that it is gone."""

    def on(host: str) -> list[tuple[str, float | None]]:
        return [(stack.volume_id, stack.unlisted) for stack in database.volumes.stacks_on(host)]

    volumes = database.volumes
    volumes.put_stack("v1", "c1", "cached", "s1")
    assert on("c1") == [("v1", None)]
    volumes.detach_stack("v1", "c9")
    volumes.detach_stack("v1", "c1")
    clock.passes(10)
    volumes.detach_stack("v1", "c1")
    assert volumes.stacks("v1") == []
    assert on("c1") == [("v1", 10)]
    volumes.set_listed("v1", "c1", listed=True)  # attached again, while no tracker answered
    assert [stack.mode for stack in volumes.stacks("v1")] == ["direct"]
    assert on("c1") == [("v1", None)]
    volumes.set_listed("v1", "c1", listed=False)
    clock.passes(5)
    volumes.set_listed("v1", "c1", listed=False)
    assert on("c1") == [("v1", 5)]
    assert len(volumes.stacks("v1")) == 1  # an attachment may be under way
    volumes.put_stack("v1", "c1", "cached", "s2")
    assert on("c1") == [("v1", None)]
    volumes.drop("v1")
    assert on("c1") == [("v1", 0)]
    volumes.release_stack("v1", "c1", "s2")
    assert on("c1") == []


def conflict(database: Database, host: Topology) -> str:
    with pytest.raises(errors.HostConflict) as caught:
        database.hosts.heartbeat(host)
    return str(caught.value)


def test_two_hosts_of_one_name(database: Database, clock: Clock) -> None:
    first = topology("c1")
    second = replace(first, address="10.0.0.2", initiator="iqn.x:other")
    database.hosts.heartbeat(first)
    assert conflict(database, second) == (
        "c1 at 10.0.0.2 (iqn.x:other) is not admitted: c1 at 10.0.0.1 "
        "(iqn.2026-11.org.example:c1) is alive and uses the same name or initiator name. Give each "
        "host a name (host in [thunder]) and an initiator name "
        "(/etc/iscsi/initiatorname.iscsi) of its own"
    )
    (known,) = database.hosts.all()
    assert (known.address, known.rival) == ("10.0.0.1", "c1 at 10.0.0.2 (iqn.x:other)")
    clock.passes(30)  # suspect, and not kept alive by the other one
    conflict(database, replace(first, address="10.0.0.2"))
    database.hosts.heartbeat(first)
    clock.passes(61)
    database.hosts.heartbeat(second)
    assert [known.initiator for known in database.hosts.all()] == ["iqn.x:other"]
    clock.passes(601)
    assert [known.rival for known in database.hosts.all()] == [""]


def test_two_hosts_of_one_initiator_name(database: Database, clock: Clock) -> None:
    first = topology("c1")
    second = replace(first, host="c2", address="10.0.0.2")
    database.hosts.heartbeat(first)
    assert conflict(database, second).startswith("c2 at 10.0.0.2 (iqn.2026-11.org.example:c1)")
    assert [(k.host, k.rival[:2]) for k in database.hosts.all()] == [("c1", "c2")]
    clock.passes(61)
    database.hosts.heartbeat(second)
    assert "c2 at" in conflict(database, first)
    for name in ("stor1@thunder", "stor2@thunder"):  # which have none
        storage = topology(name, "r0", "storage")
        database.hosts.heartbeat(replace(storage, initiator=""))


def test_an_image_that_was_deleted_in_glance(database: Database, image: str, clock: Clock) -> None:
    """Its bases stay while it has volumes, its masters while living hosts have bases."""
    other = "stor2@thunder"
    database.images.add_master(database.images.all()[0], other)
    for number in (1, 2):
        database.volumes.put(ClonedVolume(f"v{number}", image, STORAGE))
        plan(database, image, f"c{number}", volume_id=f"v{number}")
        fills(database, image, f"c{number}", None, "complete")
    assert database.images.set_deleted(image, True)
    assert not database.images.set_deleted(image, True)
    assert not database.images.set_deleted("unknown", True)
    assert database.images.holders() == []
    assert [found.deleted for found in database.images.all()] == [True]
    assert orders(database, "c1") == Orders()
    assert [database.images.useless_masters(host) for host in (STORAGE, other)] == [[], []]
    database.volumes.drop("v1")
    assert orders(database, "c1") == Orders()
    database.volumes.drop("v2")
    assert orders(database, "c1") == orders(database, "c2") == Orders(remove=(image,))
    assert database.images.useless_masters(STORAGE) == []
    fills(database, image, "c1", None, "gone")
    assert database.images.useless_masters(STORAGE) == []
    clock.passes(61)  # c2 has died, and gets its orders when it returns
    assert (
        database.images.useless_masters(STORAGE)
        == database.images.useless_masters(other)
        == [image]
    )
    for host in (STORAGE, other):
        database.images.drop_master(image, host)
    database.hosts.heartbeat(topology("c2"))
    assert orders(database, "c2") == Orders(remove=(image,))
    fills(database, image, "c2", None, "gone")
    assert database.images.all() == []


def test_an_image_that_exists_again(database: Database, image: str) -> None:
    database.images.set_deleted(image, True)
    assert database.images.useless_masters(STORAGE) == [image]
    assert database.images.set_deleted(image, False)
    assert database.images.useless_masters(STORAGE) == []
    assert [(found.image_id, found.size) for found in database.images.holders()] == [
        (image, 2 * MIB)
    ]


def test_free_space(database: Database) -> None:
    database.hosts.heartbeat(topology(STORAGE, "r0", "storage"), free=7 << 40)
    database.hosts.heartbeat(topology(STORAGE, "r0", "storage"))
    assert [host.free for host in database.hosts.all()] == [7 << 40]


def test_volumes(database: Database) -> None:
    database.volumes.put(ClonedVolume("v1", "i1", STORAGE))
    database.volumes.put(ClonedVolume("v1", "i1", STORAGE))
    database.volumes.inherit("v2", ["v1"], STORAGE)
    # Copied to another host: it shares nothing.
    database.volumes.inherit("v3", ["v1"], "stor2@thunder")
    database.volumes.inherit("v4", ["unknown"], STORAGE)
    assert database.volumes.get("v2") == ClonedVolume("v2", "i1", STORAGE)
    assert database.volumes.get("v3") is None
    assert database.volumes.get("v4") is None
    database.volumes.put_stack("v1", "c1", "direct")
    database.volumes.drop("v1")
    database.volumes.drop("v1")
    assert database.volumes.get("v1") is None
    assert database.volumes.stacks("v1") == []


def test_release(database: Database) -> None:
    database.volumes.put_stack("v1", "c1", "cached")
    database.volumes.put_stack("v1", "c1", "direct")
    assert [stack.mode for stack in database.volumes.stacks("v1")] == ["direct"]
    database.volumes.release_stack("v1", "c1")
    database.volumes.release_stack("v1", "c1")
    assert database.volumes.stacks("v1") == []


def test_a_failed_plan_leaves_nothing(database: Database, image: str, clock: Clock) -> None:
    clock.passes(61)
    assert database.locations.plan(image, topology("c1"), Limits(), volume_id="v1") is None
    assert database.volumes.stacks("v1") == []
    assert len(database.locations.of(image)) == 1


def at_once(work: list[Callable[[], object]]) -> list[object]:
    with ThreadPoolExecutor(len(work)) as pool:
        return [future.result() for future in [pool.submit(one) for one in work]]


def test_trackers_that_plan_at_once_keep_the_fanout(mariadb: str, clock: Clock) -> None:
    """Each thread is a tracker of its own, with its own engine, on one real database."""
    url = new_database(mariadb)
    trackers = [Database(url, clock=clock) for _ in range(8)]
    migration.upgrade(trackers[0].engine)
    trackers[0].hosts.heartbeat(topology(STORAGE, "r0", "storage"))
    trackers[0].images.add_master(Image("i", MIB, Extents.of([(0, MIB)])), STORAGE)
    limits = Limits(fanout=1, storage_fanout=2)

    def attach(number: int) -> PlannedSources | None:
        tracker = trackers[number % len(trackers)]
        host = topology(f"c{number:02}")
        tracker.hosts.heartbeat(host)
        return tracker.locations.plan("i", host, limits, volume_id=f"v{number}")

    planned = at_once([lambda n=n: attach(n) for n in range(16)])  # type: ignore[misc]
    assert all(planned)
    locations = trackers[0].locations.of("i")
    assert len(locations) == 17
    children: dict[str | None, int] = {}
    for location in locations:
        children[location.parent] = children.get(location.parent, 0) + 1
    [master] = [location.id for location in locations if location.kind == "master"]
    assert children.pop(None) == 1  # the master itself
    assert children.pop(master) <= 2
    assert max(children.values()) == 1


def test_a_lease_has_one_owner(database: Database, clock: Clock) -> None:
    assert database.leases.acquire("image-i", "stor1", 30)
    assert not database.leases.acquire("image-i", "stor2", 30)
    assert database.leases.acquire("image-j", "stor2", 30)
    clock.passes(20)
    assert database.leases.renew("image-i", "stor1", 30)
    assert not database.leases.renew("image-i", "stor2", 30)
    assert not database.leases.renew("unknown", "stor1", 30)
    clock.passes(20)
    assert not database.leases.acquire("image-i", "stor2", 30)
    database.leases.release("image-i", "stor2")  # not its own
    assert not database.leases.acquire("image-i", "stor2", 30)
    database.leases.release("image-i", "stor1")
    database.leases.release("image-i", "stor1")
    assert database.leases.acquire("image-i", "stor2", 30)


def test_the_lease_of_a_dead_owner_is_taken_over(database: Database, clock: Clock) -> None:
    assert database.leases.acquire("image-i", "stor1", 30)
    clock.passes(30)
    assert database.leases.acquire("image-i", "stor2", 30)
    assert not database.leases.renew("image-i", "stor1", 30)
    assert database.leases.acquire("image-i", "stor2", 30)  # again: its own
    assert not database.leases.acquire("image-i", "stor1", 30)


def test_only_one_of_many_gets_a_lease(mariadb: str, clock: Clock) -> None:
    url = new_database(mariadb)
    databases = [Database(url, clock=clock) for _ in range(8)]
    migration.upgrade(databases[0].engine)
    for _ in range(5):  # first without a row, then with one that has expired
        won = at_once(
            [lambda n=n, s=s: s.leases.acquire("i", f"s{n}", 30) for n, s in enumerate(databases)]  # type: ignore[misc]
        )
        assert sorted(won) == [False] * 7 + [True]  # type: ignore[type-var]
        clock.passes(31)


@pytest.fixture
def two(mariadb: str, clock: Clock) -> tuple[Database, Database]:
    """Those of two trackers, which write at once: SQLite has one writer at a time."""
    url = new_database(mariadb)
    one, other = (Database(url, heartbeat_timeout=60, clock=clock) for _ in range(2))
    migration.upgrade(one.engine)
    one.hosts.heartbeat(topology(STORAGE, "r0", "storage"))
    one.images.add_master(Image("i", 8 * MIB, Extents()), STORAGE)
    return one, other


def test_a_late_release_does_not_take_the_row_of_the_next_devices(
    two: tuple[Database, Database], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tracker that plans them has seen the row of those before."""
    database, other = two
    plan(database, "i", "c1", volume_id="v", stack_id="a" * 36)

    def late(*arguments: Any) -> None:
        other.volumes.release_stack("v", "c1", "a" * 36)
        write_stack(*arguments)

    monkeypatch.setattr("cinder_thunder.db.locations.write_stack", late)
    plan(database, "i", "c1", volume_id="v", stack_id="b" * 36)
    assert [stack.host for stack in database.volumes.stacks("v")] == ["c1"]
    database.volumes.release_stack("v", "c1", "b" * 36)
    assert database.volumes.stacks("v") == []


def test_two_hosts_of_one_initiator_name_at_the_same_moment(
    two: tuple[Database, Database], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Machines that were cloned, and switched on together."""
    database, other = two
    first = topology("c1")
    second = replace(first, host="c2", address="10.0.0.2")
    rival = host_tables.HostTable._rival

    def meanwhile(self: Any, *arguments: Any) -> Any:
        found = rival(self, *arguments)  # of a transaction that does not see the other one
        monkeypatch.setattr(host_tables.HostTable, "_rival", rival)
        other.hosts.heartbeat(second)
        return found

    monkeypatch.setattr(host_tables.HostTable, "_rival", meanwhile)
    assert "c2 at 10.0.0.2" in conflict(database, first)
    assert "c2 at 10.0.0.2" in conflict(database, first)  # c2 goes on
    states = {known.host: known.state for known in database.hosts.all()}
    assert states == {"c1": "dead", "c2": "alive", STORAGE: "alive"}


@pytest.mark.parametrize("state", ["gone", "draining", "filling"])
def test_a_report_cannot_change_a_master(database: Database, image: str, state: str) -> None:
    """An agent may have been given a storage host's name."""
    before = database.locations.of(image)
    report = LocationReport(before[0].id, image, STORAGE, state, 0, "", "", 0)
    with pytest.raises(errors.InvalidRequest, match="agents report bases: give the agent another"):
        database.locations.report(report)
    assert database.locations.of(image) == before


def test_two_trackers_and_forty_hosts_at_once(mariadb: str) -> None:
    """Two processes, as on two storage hosts: every host gets a plan, and the tree is valid."""
    limits = Limits(fanout=2, storage_fanout=2)
    result = plans.run(new_database(mariadb), hosts=40, limits=limits)
    assert result.problems == ()
    assert len(result.locations) == 42
    children = Counter(location.parent for location in result.locations)
    masters = [location.id for location in result.locations if location.kind == "master"]
    assert children.pop(None) == len(masters) == 2
    assert 1 <= sum(children.pop(master, 0) for master in masters) <= limits.storage_fanout
    assert max(children.values()) <= limits.fanout


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"c2": {"parent": "b3"}}, "c2 has no path to a master"),
        ({"c3": {"parent": "m", "depth": 1}, "c4": {"parent": "m"}}, "3 hosts read from storage"),
        ({"c4": {"parent": "b1"}, "c3": {"parent": "b1"}}, "c1 has 3 children"),
        ({"c2": {"depth": 1}}, "c2 may read from a location that is as deep as its own"),
    ],
)
def test_the_benchmark_finds_what_is_wrong(change: dict[str, Any], problem: str) -> None:
    tree = [
        Location("m", "s", "master", "complete"),
        *(
            Location(f"b{n}", f"c{n}", "base", "creating", "m" if n == 1 else f"b{n - 1}", n)
            for n in range(1, 5)
        ),
    ]
    told = {loc.host: [str(loc.parent), "m"] for loc in tree[1:]}
    assert plans.check(tree, told, Limits()) == []
    tree = [replace(loc, **change.get(loc.host, {})) for loc in tree]
    assert any(found.startswith(problem) for found in plans.check(tree, told, Limits()))
    assert plans.check(tree, {**told, "c9": ["m"]}, Limits())[0] == "c9 has no plan"
