"""The tracker on a real database and a pool of files."""

from __future__ import annotations

import dataclasses
import time
from datetime import timedelta
from typing import Any

import oslo_messaging
import pytest

from cinder_thunder.db.api import Database
from cinder_thunder.db.values import ClonedVolume, Image
from cinder_thunder.masters.clones import MASTER
from cinder_thunder.masters.exporter import MasterExporter
from cinder_thunder.mechanism.thinpool import StoragePool
from cinder_thunder.policy.ranking import Limits
from cinder_thunder.tracker.budget import Budget
from cinder_thunder.tracker.server import MasterExporterEndpoint, TrackerEndpoint
from cinder_thunder.tracker.service import (
    CHECKS_A_SECOND,
    DROP_AFTER,
    MAP_RANGES,
    MAX_CHECKS_PER_HEARTBEAT,
    MOST_FAILED_CHECKS,
    TrackerService,
)
from cinder_thunder.volumes import Attachment, CinderVolume
from os_brick_thunder.common import errors, wire
from os_brick_thunder.common.policy.extents import Extents
from os_brick_thunder.common.policy.iscsinames import iqn_of
from os_brick_thunder.common.wire import LocationReport, Orders, Topology
from tests.fake_storage import FileVolumes, Targets
from tests.unit.cinder_thunder.conftest import STORAGE

BLOCK = 65536
SIZE = 4 << 20
#: Of a hash tree.
TREE = 8192


def host(name: str, rack: str = "r1") -> Topology:
    return Topology(name, "10.0.0.9", rack, "z1", f"iqn.2026-11.org.example:{name}")


@dataclasses.dataclass
class World:
    tracker: TrackerService
    database: Database
    volumes: FileVolumes
    cinder: dict[str, CinderVolume]

    def attached(self, *hosts: str, multiattach: bool = False) -> None:
        found = frozenset(Attachment(name, host(name).initiator) for name in hosts)
        self.cinder["v"] = CinderVolume("volume-v", multiattach, found)


@pytest.fixture
def world(database: Database, volumes: FileVolumes) -> World:
    """Volume ``v`` is a clone of image ``i``; Cinder says that it is attached to ``c1``."""
    volumes.create(MASTER + "i", SIZE)
    (volumes.folder / (MASTER + "i")).write_bytes(b"i" * SIZE)
    volumes.snapshot("volume-v", MASTER + "i")
    database.images.add_master(Image("i", SIZE, Extents.of([(0, SIZE)])), STORAGE)
    database.volumes.put(ClonedVolume("v", "i", STORAGE))
    cinder: dict[str, CinderVolume] = {}
    world = World(
        TrackerService(STORAGE, database, volumes, Limits(), cinder.get, checks=Budget(1e9, 1e9)),
        database,
        volumes,
        cinder,
    )
    world.attached("c1")
    return world


def test_a_fresh_clone_is_all_image(world: World) -> None:
    plan = world.tracker.plan_attach("v", host("c1"))
    assert (plan.mode, plan.reason) == ("cached", "")
    assert plan.image == wire.ImageInfo("i", SIZE, ((0, SIZE),))
    assert plan.unmodified == ((0, SIZE),)
    assert [(source.exporter, source.address) for source in plan.sources] == [(STORAGE, "10.0.0.1")]
    assert [stack.mode for stack in world.database.volumes.stacks("v")] == ["cached"]
    assert wire.parse(wire.Plan, plan.to_wire()) == plan


def test_written_blocks_are_not_in_the_map(world: World) -> None:
    world.tracker.plan_attach("v", host("c1"))
    with (world.volumes.folder / "volume-v").open("r+b") as volume:
        volume.seek(3 * BLOCK + 5)
        volume.write(b"x")
    plan = world.tracker.plan_attach("v", host("c1"))
    assert plan.unmodified == ((0, 3 * BLOCK), (4 * BLOCK, SIZE - 4 * BLOCK))


def test_nothing_is_mapped_past_the_end_of_the_image(world: World) -> None:
    world.volumes.extend("volume-v", 2 * SIZE)
    plan = world.tracker.plan_attach("v", host("c1"))
    assert plan.unmodified == ((0, SIZE),)


def test_the_length_of_a_map_is_bounded(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cinder_thunder.tracker.service.MAP_RANGES", 2)
    assert MAP_RANGES > 2
    with (world.volumes.folder / "volume-v").open("r+b") as volume:
        for block in (1, 10, 40):
            volume.seek(block * BLOCK)
            volume.write(b"x")
    plan = world.tracker.plan_attach("v", host("c1"))
    assert plan.unmodified == ((11 * BLOCK, 29 * BLOCK), (41 * BLOCK, 23 * BLOCK))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda w: w.database.volumes.drop("v"), "the volume shares no image with a master on"),
        (
            lambda w: w.database.volumes.put(ClonedVolume("v", "i", "stor2@thunder")),
            "shares no image",
        ),
        (lambda w: w.cinder.clear(), "Cinder has no such volume"),
        (lambda w: w.attached("c1", multiattach=True), "may be attached more than once"),
        (lambda w: w.attached("c1", "c2"), "the volume is attached to c2 too"),
        (lambda w: w.volumes.remove(MASTER + "i"), f"there is no block device {MASTER}i"),
    ],
)
def test_direct(world: World, change: Any, reason: str) -> None:
    change(world)
    plan = world.tracker.plan_attach("v", host("c1"))
    assert plan.mode == "direct"
    assert reason in plan.reason
    assert (plan.image, plan.sources, plan.unmodified) == (None, (), ())
    assert [stack.mode for stack in world.database.volumes.stacks("v")] == ["direct"]


def test_a_thin_delta_that_is_not_believed_makes_every_plan_direct(world: World) -> None:
    """Not an error: the volume is attached."""

    def modified(volume: str, master: str) -> Extents:
        raise AssertionError("the tool must not be asked")

    pool = StoragePool("vg", "pool", modified, flaw=lambda: "thin_delta is wrong")  # type: ignore[arg-type]
    world.tracker._pool = pool
    plan = world.tracker.plan_attach("v", host("c1"))
    assert (plan.mode, plan.reason, plan.unmodified) == ("direct", "thin_delta is wrong", ())


def test_no_live_storage_host(world: World) -> None:
    world.database.images.drop_master("i", STORAGE)
    plan = world.tracker.plan_attach("v", host("c1"))
    assert (plan.mode, plan.reason) == ("direct", f"{STORAGE} has no master of image i any longer")
    plan = world.tracker.plan_sources("i", host("c1"))
    assert (plan.mode, plan.reason) == ("direct", "no storage host with image i is alive")


def test_a_storage_host_that_answers_is_alive_however_late_its_heartbeats_are(
    world: World,
) -> None:
    with world.database.engine.begin() as connection:
        connection.exec_driver_sql("UPDATE thunder_hosts SET heartbeat_at = '2020-01-01 00:00:00'")
    assert [host.state for host in world.database.hosts.all()] == ["dead"]
    plan = world.tracker.plan_attach("v", host("c1"))
    assert [source.host for source in plan.sources] == [STORAGE]


def test_a_second_attachment_is_direct_until_the_first_is_released(world: World) -> None:
    """A live migration: the source is released last, and then there is a new plan."""
    assert world.tracker.plan_attach("v", host("c1")).mode == "cached"
    world.attached("c1", "c2")
    assert world.tracker.plan_attach("v", host("c2")).mode == "direct"
    world.tracker.release("v", "c1")
    world.attached("c2")
    assert world.tracker.plan_attach("v", host("c2")).mode == "cached"


def test_a_direct_volume_is_ordered_to_have_a_cache_when_it_is_alone(world: World) -> None:
    """A live migration from c1 to c2, and the next one to c3 at the worst moment."""
    orders = world.tracker.heartbeat
    world.tracker.plan_attach("v", host("c1"))
    world.attached("c1", "c2")
    world.tracker.plan_attach("v", host("c2"))
    assert orders(host("c2")) == orders(host("c1")) == Orders()
    world.attached("c2")  # Cinder's half of the detach
    assert orders(host("c2")) == Orders()
    world.attached("c1", "c2")
    world.tracker.release("v", "c1")  # the agent's half
    assert orders(host("c2")) == Orders()
    world.attached("c2")
    assert orders(host("c2")) == Orders(recache=("v",))
    assert (
        orders(host("c1"))
        == orders(Topology(STORAGE, "10.0.0.1", "r0", "z1", "", "storage"))
        == Orders()
    )
    # Cinder lists c3 just before the plan: no cache. Just after it: c3 has none.
    world.attached("c2", "c3")
    assert world.tracker.plan_attach("v", host("c2")).mode == "direct"
    world.attached("c2")
    assert world.tracker.plan_attach("v", host("c2")).mode == "cached"
    world.attached("c2", "c3")
    assert world.tracker.plan_attach("v", host("c3")).mode == "direct"
    assert {stack.host: stack.mode for stack in world.database.volumes.stacks("v")} == {
        "c2": "cached",
        "c3": "direct",
    }
    assert orders(host("c2")) == orders(host("c3")) == Orders()


def test_volumes_that_get_no_order(world: World, caplog: pytest.LogCaptureFixture) -> None:
    """Volumes of other hosts, multiattach volumes, and all while Cinder's database is away."""
    orders = world.tracker.heartbeat
    assert orders(host("c1")) == Orders()  # plain iSCSI: there is no stack
    world.database.volumes.put_stack("v", "c1", "direct")
    assert orders(host("c1")) == Orders(recache=("v",))
    world.attached("c1", multiattach=True)
    assert orders(host("c1")) == Orders()
    world.attached()
    assert orders(host("c1")) == Orders()
    world.cinder.clear()
    assert orders(host("c1")) == Orders()
    del world.tracker._volumes  # an error, like one of Cinder's database
    assert orders(host("c1")) == Orders()
    assert "Could not check volume v" in caplog.text


def test_a_volume_that_cannot_be_looked_up_keeps_no_other(world: World, later: Any) -> None:
    world.database.volumes.put_stack("v", "c1", "direct")
    for volume_id in ("bad", "gone"):
        world.database.volumes.put_stack(volume_id, "c1", "cached")
    later(DROP_AFTER + 100)

    def find(volume_id: str) -> CinderVolume | None:
        if volume_id == "bad":
            raise ValueError("an attachment that cannot be read")
        return world.cinder.get(volume_id)

    world.tracker._volumes = find
    assert later(5) == Orders(drop=("gone",), recache=("v",))


def test_a_heartbeat_does_not_wait_for_long_for_cinders_database(world: World) -> None:
    asked: list[str] = []

    def find(volume_id: str) -> CinderVolume | None:
        asked.append(volume_id)
        raise TimeoutError

    world.tracker._volumes = find
    for number in range(20):
        world.database.volumes.put(ClonedVolume(f"v{number}", "i", STORAGE))
        world.database.volumes.put_stack(f"v{number}", "c1", "direct")
    assert world.tracker.heartbeat(host("c1")) == Orders()
    assert len(asked) == 1 + MOST_FAILED_CHECKS


def test_the_checks_of_a_heartbeat_are_bounded(world: World) -> None:
    asked: set[str] = set()

    def volumes(volume_id: str) -> CinderVolume:
        asked.add(volume_id)
        return CinderVolume(volume_id, False, frozenset({Attachment("c1")}))

    world.tracker._volumes = volumes
    expected = {f"v{number}" for number in range(MAX_CHECKS_PER_HEARTBEAT + 4)}
    for volume_id in expected:
        world.database.volumes.put(ClonedVolume(volume_id, "i", STORAGE))
        world.database.volumes.put_stack(volume_id, "c1", "direct")
    assert len(world.tracker.heartbeat(host("c1")).recache) == MAX_CHECKS_PER_HEARTBEAT
    assert len(asked) <= MAX_CHECKS_PER_HEARTBEAT + 1  # and one that may be there no longer
    for _ in range(200):
        world.tracker.heartbeat(host("c1"))
    assert asked == expected


def test_the_checks_of_all_heartbeats_are_bounded(world: World) -> None:
    """However many hosts there are, and however long their volumes stay direct."""
    asked: list[str] = []

    def volumes(volume_id: str) -> CinderVolume:
        asked.append(volume_id)
        return CinderVolume(volume_id, False, frozenset({Attachment("elsewhere")}))

    world.tracker._volumes = volumes
    now = 0.0
    world.tracker._checks = Budget(CHECKS_A_SECOND, CHECKS_A_SECOND, lambda: now)
    for number in range(20):
        for name in range(20):
            world.database.volumes.put(ClonedVolume(f"v{number}-{name}", "i", STORAGE))
            world.database.volumes.put_stack(f"v{number}-{name}", f"c{number}", "direct")
    for second in (1, 2, 3):
        for number in range(20):
            world.tracker.heartbeat(host(f"c{number}"))
        assert len(asked) == second * CHECKS_A_SECOND
        now += 1


def test_a_stack_that_was_not_released(world: World) -> None:
    """A live host's stack counts even without an attachment in Cinder, a dead host's does not."""
    assert world.tracker.plan_attach("v", host("c9")).mode == "direct"  # Cinder says c1
    world.attached("c9")
    world.database.volumes.put_stack("v", "never-heard-of", "cached")
    assert world.tracker.plan_attach("v", host("c9")).mode == "cached"
    assert {stack.host for stack in world.database.volumes.stacks("v")} == {"c9"}
    world.attached("c1")
    assert world.tracker.plan_attach("v", host("c1")).reason == "the volume is attached to c9 too"


def test_two_hosts_of_one_name_are_never_cached_side_by_side(world: World) -> None:
    """In a live migration between them, each would count as the only one."""
    first = host("c1")
    second = dataclasses.replace(first, address="10.0.0.8", initiator="iqn.x:c1")
    assert world.tracker.plan_attach("v", first).mode == "cached"
    plan = world.tracker.plan_attach("v", second)
    assert plan.mode == "direct"
    assert plan.reason.startswith("c1 at 10.0.0.8 (iqn.x:c1) is not admitted: c1 at 10.0.0.9 ")
    with pytest.raises(errors.HostConflict):
        world.tracker.heartbeat(second)
    assert world.tracker.plan_sources("i", second).mode == "direct"
    # The first one's row is still its own, and its next plan counts the other's attachment.
    assert [stack.mode for stack in world.database.volumes.stacks("v")] == ["cached"]
    both = frozenset({Attachment("c1", first.initiator), Attachment("c1", "iqn.x:c1")})
    world.cinder["v"] = CinderVolume("volume-v", False, both)
    plan = world.tracker.plan_attach("v", first)
    assert (plan.mode, plan.reason) == ("direct", "the volume is attached to c1 too")


def test_an_attachment_without_an_initiator_is_of_the_host_of_its_name(world: World) -> None:
    world.cinder["v"] = CinderVolume("volume-v", False, frozenset({Attachment("c1")}))
    assert world.tracker.plan_attach("v", host("c1")).mode == "cached"


# What is left on a host of volumes that Cinder has detached


@pytest.fixture
def later(world: World, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Lets seconds pass, with a heartbeat of c1 every five; returns its last orders."""
    start = world.database._transactions.now()
    passed = 0.0
    monkeypatch.setattr(
        world.database._transactions, "now", lambda: start + timedelta(seconds=passed)
    )

    def passes(seconds: float) -> Orders:
        nonlocal passed
        for _ in range(int(seconds // 5)):
            passed += 5
            orders = world.tracker.heartbeat(host("c1"))
        return orders

    return passes


def test_what_cinder_has_detached_while_the_agent_was_down(world: World, later: Any) -> None:
    """terminate_connection takes the guard away, but the host is not forgotten."""
    world.tracker.plan_attach("v", host("c1"), "stack-1")
    world.attached("c2")
    world.database.volumes.detach_stack("v", "c1")
    assert world.tracker.plan_attach("v", host("c2")).mode == "cached"
    assert later(DROP_AFTER - 5).drop == ()
    assert later(10).drop == ("v",)
    assert later(10).drop == ("v",)  # until it is done
    world.tracker.release("v", "c1", "stack-1")
    assert later(10).drop == ()


def test_what_is_left_of_a_deleted_volume(world: World, later: Any) -> None:
    world.tracker.plan_attach("v", host("c1"))
    world.cinder.clear()
    world.database.volumes.drop("v")
    assert later(DROP_AFTER + 10).drop == ("v",)


def test_a_volume_that_cinder_no_longer_lists(world: World, later: Any) -> None:
    """Nobody told us: the connection was terminated by force, without a connector."""
    world.tracker.plan_attach("v", host("c1"))
    assert later(3 * DROP_AFTER).drop == ()  # it is listed
    world.attached()
    assert later(DROP_AFTER - 5).drop == ()
    assert later(15).drop == ("v",)


def test_what_is_never_dropped(world: World, later: Any) -> None:
    """An attachment under way, the two hosts of a live migration, one that came back."""
    world.attached()  # older clients: Cinder learns of it only after the attach
    world.tracker.plan_attach("v", host("c1"))
    assert later(DROP_AFTER - 10).drop == ()
    world.attached("c1")
    assert later(2 * DROP_AFTER).drop == ()
    world.attached("c1", "c2")
    assert later(2 * DROP_AFTER).drop == ()
    world.database.volumes.detach_stack("v", "c1")
    world.attached("c2")
    assert later(DROP_AFTER - 10).drop == ()
    world.attached("c1")  # back again, directly, while no tracker answered
    assert later(2 * DROP_AFTER).drop == ()
    # Cinder may know the host by another name.
    other_name = frozenset({Attachment("nova-c1", host("c1").initiator)})
    world.cinder["v"] = CinderVolume("volume-v", False, other_name)
    assert later(2 * DROP_AFTER).drop == ()


def test_the_cost_of_a_heartbeat_does_not_grow_with_the_volumes(world: World) -> None:
    asked: list[str] = []

    def volumes(volume_id: str) -> CinderVolume:
        asked.append(volume_id)
        return CinderVolume(volume_id, False, frozenset({Attachment("c1")}))

    world.tracker._volumes = volumes
    for number in range(200):
        world.database.volumes.put_stack(f"v{number}", "c1", "cached")
    world.tracker.heartbeat(host("c1"))
    assert len(asked) == 1


def test_a_late_release_leaves_the_next_stack_alone(world: World) -> None:
    """The row is the only guard where Cinder does not list the host."""
    tracker, stacks = world.tracker, world.database.volumes.stacks
    tracker.plan_attach("v", host("c1"), "stack-1")
    tracker.plan_attach("v", host("c1"), "stack-2")
    tracker.release("v", "c1", "stack-1")
    assert [stack.host for stack in stacks("v")] == ["c1"]
    world.attached("c2")
    assert tracker.plan_attach("v", host("c2"), "stack-3").mode == "direct"
    tracker.release("v", "c1", "stack-2")
    assert [stack.host for stack in stacks("v")] == ["c2"]


@pytest.mark.parametrize(("planned", "released"), [("", ""), ("", "stack-1"), ("stack-1", "")])
def test_releases_of_older_agents(world: World, planned: str, released: str) -> None:
    """One was upgraded or downgraded between the two."""
    world.tracker.plan_attach("v", host("c1"), planned)
    world.tracker.release("v", "c1", released)
    assert world.database.volumes.stacks("v") == []


def test_a_dead_host_that_cinder_lists_still_counts(world: World) -> None:
    """Its agent is silent, but its guest may still write."""
    world.database.volumes.put_stack("v", "silent", "cached")
    world.attached("c1", "silent")
    assert world.tracker.plan_attach("v", host("c1")).mode == "direct"


def test_relay(world: World) -> None:
    world.tracker.plan_attach("v", host("c1"))
    plan = world.tracker.plan_sources("i", host("c2"))
    assert [source.host for source in plan.sources] == ["c1", STORAGE]
    assert (plan.volume_id, plan.unmodified) == ("", ())


def test_plans_have_the_root_of_the_hash_tree(world: World) -> None:
    root = "5a" * 32
    manifest = wire.ImageDigests("i", BLOCK, "digests", "tail")
    again = Image("i", SIZE, Extents(), manifest=manifest, root=root)
    world.database.images.add_master(again, "stor2@thunder")
    plans = (
        world.tracker.plan_attach("v", host("c1")),
        world.tracker.plan_sources("i", host("c1")),
    )
    for plan in plans:
        assert plan.image is not None
        assert plan.image.root == root
        assert wire.parse(wire.Plan, plan.to_wire()) == plan
    assert world.tracker.manifest("i") == manifest


# RPC


def test_manifest(world: World) -> None:
    endpoint = TrackerEndpoint(world.tracker)
    with pytest.raises(oslo_messaging.ExpectedException) as error:
        endpoint.manifest({}, "i")
    assert isinstance(error.value.exc_info[1], errors.NoReplica)
    manifest = wire.ImageDigests("i", 1 << 20, "digests")
    world.database.images.add_master(Image("i", SIZE, Extents(), None, manifest), "stor2@thunder")
    assert wire.parse(wire.ImageDigests, endpoint.manifest({}, "i")) == manifest


def test_rpc_is_plain_json(world: World) -> None:
    endpoint = TrackerEndpoint(world.tracker)
    assert endpoint.heartbeat({}, host("c1").to_wire()) == Orders().to_wire()
    answer = endpoint.plan_attach({}, "v", host("c1").to_wire())
    plan = wire.parse(wire.Plan, answer)
    assert plan.mode == "cached"
    portal, iqn = "10.0.0.9:3260", iqn_of("c1", "i")
    report = LocationReport(str(plan.location_id), "i", "c1", "complete", SIZE, portal, iqn, 0)
    assert endpoint.report({}, report.to_wire()) == {}
    assert endpoint.plan_sources({}, "i", host("c2").to_wire())["sources"][0]["host"] == "c1"
    assert endpoint.release({}, "v", "c1") == {}
    assert world.database.volumes.stacks("v") == []


def test_an_invalid_request_is_the_callers_error(world: World) -> None:
    endpoint = TrackerEndpoint(world.tracker)
    with pytest.raises(oslo_messaging.ExpectedException) as error:
        endpoint.heartbeat({}, {"host": 5})
    assert isinstance(error.value.exc_info[1], wire.MalformedValue)
    bogus = LocationReport("l", "i", "c1", "burning", 0, "", "", 0)
    with pytest.raises(oslo_messaging.ExpectedException) as error:
        endpoint.report({}, bogus.to_wire())
    assert "LocationReport.state: one of filling, complete, draining, gone was expected" in str(
        error.value.exc_info[1]
    )


def exporter(database: Database, targets: Targets, ready: bool = True) -> MasterExporter:
    def remove(image_id: str) -> None:
        database.images.drop_master(image_id, STORAGE)

    def exported(image_id: str, size: int) -> tuple[str, int]:
        return f"/dev/{image_id}", size + TREE

    return MasterExporter(
        STORAGE, "10.0.0.1:3260", database, targets, exported, remove, lambda: ready
    )


def test_open_and_close(database: Database) -> None:
    database.images.add_master(Image("i", SIZE, Extents()), STORAGE)
    targets = Targets()
    endpoint = MasterExporterEndpoint(exporter(database, targets), None)  # type: ignore[arg-type]
    answer = endpoint.open_export({}, "i", "iqn.x:c1", 0)
    export = wire.parse(wire.Export, answer)
    iqn = "iqn.2026-11.org.thunder:stor1.thunder:i"
    assert export == wire.Export("10.0.0.1:3260", iqn, 0, "u0", "secret", SIZE + TREE)
    assert "secret" not in repr(export)
    assert endpoint.open_export({}, "i", "iqn.x:c1", 0) == answer
    assert targets.devices == {iqn: "/dev/i"}
    assert endpoint.close_export({}, "i", "iqn.x:c1") == {}
    assert endpoint.close_export({}, "i", "iqn.x:c1") == {}
    assert targets.admitted[iqn] == {}


def test_no_such_master(database: Database) -> None:
    targets = Targets()
    with pytest.raises(errors.NoReplica, match=f"{STORAGE} has no master of image i"):
        exporter(database, targets).open_export("i", "iqn.x:c1", 0)
    assert targets.devices == {}


def test_nothing_is_exported_before_cinder_is_ready(database: Database) -> None:
    database.images.add_master(Image("i", SIZE, Extents()), STORAGE)
    targets = Targets()
    with pytest.raises(errors.NoReplica, match="still starting"):
        exporter(database, targets, ready=False).open_export("i", "iqn.x:c1", 0.2)
    assert targets.devices == {}


def test_exports_of_missing_masters_are_removed(database: Database) -> None:
    database.images.add_master(Image("i", SIZE, Extents()), STORAGE)
    targets = Targets()
    for image, backend in (("i", STORAGE), ("old", STORAGE), ("old", "stor1@other")):
        targets.export("/dev/x", iqn_of(backend, image), "p")
    exporter(database, targets).reconcile()
    assert set(targets.devices) == {iqn_of(STORAGE, "i"), iqn_of("stor1@other", "old")}


def test_an_export_that_cannot_be_removed_stops_neither_the_others_nor_the_start(
    database: Database, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    targets = Targets()
    for image in ("a", "b"):
        targets.export("/dev/x", iqn_of(STORAGE, image), "p")
    unexport = targets.unexport

    def refuse(iqn: str) -> None:
        if iqn == iqn_of(STORAGE, "a"):
            raise errors.ExportError("LIO refused")
        unexport(iqn)

    monkeypatch.setattr(targets, "unexport", refuse)
    exporter(database, targets).reconcile()
    assert set(targets.devices) == {iqn_of(STORAGE, "a")}
    assert "LIO refused" in caplog.text


def test_a_master_is_evicted_when_it_has_no_clones(database: Database) -> None:
    database.images.add_master(Image("i", SIZE, Extents()), STORAGE)
    database.volumes.put(ClonedVolume("v", "i", STORAGE))
    targets = Targets()
    endpoint = MasterExporterEndpoint(exporter(database, targets), None)  # type: ignore[arg-type]
    endpoint.open_export({}, "i", "iqn.x:c1", 0)
    with pytest.raises(oslo_messaging.ExpectedException) as caught:
        endpoint.evict({}, "i")
    assert "master of image i is in use by 1 volume(s)" in str(caught.value.exc_info[1])
    assert len(targets.devices) == 1
    database.volumes.drop("v")
    endpoint.evict({}, "i")
    endpoint.evict({}, "i")  # absent is success
    assert targets.devices == {}
    assert database.images.mastered_on(STORAGE) == set()


def test_nobody_waits_for_the_plan_any_more(world: World) -> None:
    """Neither a map is computed nor a row written for a caller that is gone."""
    with pytest.raises(errors.RequestExpired):
        world.tracker.plan_attach("v", host("c1"), "stack-1", time.monotonic())
    assert world.database.volumes.stacks("v") == []
    assert [location.host for location in world.database.locations.of("i")] == [STORAGE]


def test_a_map_that_comes_too_late_leaves_no_location(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    until = time.monotonic() + 60

    def slow(volume: str, master: str) -> Extents:
        monkeypatch.setattr(time, "monotonic", lambda: until + 1)
        return Extents()

    monkeypatch.setattr(world.volumes, "modified", slow)
    with pytest.raises(errors.RequestExpired):
        world.tracker.plan_attach("v", host("c1"), "stack-1", until)
    assert world.database.volumes.stacks("v") == []
    assert [location.host for location in world.database.locations.of("i")] == [STORAGE]
