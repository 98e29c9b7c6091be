"""The tracker's store, on the databases that Cinder runs on."""

from __future__ import annotations

import uuid
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import datetime, timedelta
from typing import Any

import pytest

from bench import plans
from cinder_thunder.db import migration
from cinder_thunder.db.api import Image, Master, Planned, Store, Volume
from cinder_thunder.policy.ranking import Limits, Location
from os_brick_thunder.common import errors
from os_brick_thunder.common.policy.extents import Extents
from os_brick_thunder.common.wire import LocationReport, Manifest, Orders, Topology
from tests.mariadb import new_database

STORAGE = "stor1@thunder"
MIB = 1 << 20


class Clock:
    """Time that passes when a test says so."""

    def __init__(self) -> None:
        self.now = datetime(2026, 11, 1)

    def __call__(self) -> datetime:
        return self.now

    def passes(self, seconds: float) -> None:
        self.now += timedelta(seconds=seconds)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def store(database: str, clock: Clock) -> Store:
    store = Store(database, heartbeat_timeout=60, clock=clock)
    migration.upgrade(store.engine)
    return store


def topology(host: str, rack: str = "r1", kind: str = "compute") -> Topology:
    return Topology(host, "10.0.0.1", rack, "z1", f"iqn.2026-11.org.example:{host}", kind)


@pytest.fixture
def image(store: Store) -> str:
    """An image with its master on the storage host."""
    image_id = str(uuid.uuid4())
    store.heartbeat(topology(STORAGE, "r0", "storage"))
    store.add_master(Image(image_id, 8 * MIB, Extents.of([(0, MIB), (4 * MIB, 5 * MIB)])), STORAGE)
    return image_id


def plan(store: Store, image_id: str, host: str, **kwargs: Any) -> Planned:
    store.heartbeat(topology(host))
    planned = store.plan(image_id, topology(host), Limits(), **kwargs)
    assert planned is not None
    return planned


def hosts(planned: Planned) -> list[str]:
    return [source.host for source in planned.sources]


def test_master(store: Store, image: str) -> None:
    assert store.master(image, STORAGE) == Master(8 * MIB, None)
    assert store.master(image, "stor2@thunder") is None
    assert store.masters(STORAGE) == {image}
    store.drop_master(image, STORAGE)
    store.drop_master(image, STORAGE)
    assert store.masters(STORAGE) == set()


def test_long_map_survives(store: Store) -> None:
    """Far more than the 64 KiB of a TEXT column."""
    allocated = Extents.of((n * 131072, n * 131072 + 65536) for n in range(50_000))
    store.heartbeat(topology(STORAGE))
    store.add_master(Image("big", 50_000 * 131072, allocated), STORAGE)
    assert plan(store, "big", "c1").image.allocated == allocated


def test_a_manifest_stays_what_the_first_master_said(store: Store, image: str) -> None:
    assert store.manifest(image) is None
    assert store.manifest("unknown") is None
    assert store.image("unknown") is None
    first, other = (Manifest(image, MIB, text * 100_000) for text in ("abcd", "efgh"))
    for manifest in (first, other):
        store.add_master(Image(image, 8 * MIB, Extents(), None, manifest), "stor2@thunder")
        assert store.manifest(image) == first
    found = store.image(image)
    assert found is not None
    assert (found.size, found.allocated.length, found.manifest) == (8 * MIB, 2 * MIB, first)
    assert [known.manifest for known in store.images()] == [None]  # not for lists: too long


def test_plan_records_the_edge(store: Store, image: str) -> None:
    first = plan(store, image, "c1", volume_id="v1")
    assert hosts(first) == [STORAGE]
    assert first.image.allocated.length == 2 * MIB
    assert [(s.host, s.mode, s.alive) for s in store.stacks("v1")] == [("c1", "cached", True)]
    second = plan(store, image, "c2", volume_id="v2")
    assert hosts(second) == ["c1", STORAGE]
    by_host = {location.host: location for location in store.locations(image)}
    assert by_host["c2"].parent == first.location_id == by_host["c1"].id
    assert [by_host[h].depth for h in (STORAGE, "c1", "c2")] == [0, 1, 2]


def test_planning_again_is_the_same_location(store: Store, image: str) -> None:
    one = plan(store, image, "c1", volume_id="v1")
    two = plan(store, image, "c1", volume_id="v2", keep=True)
    assert one.location_id == two.location_id
    assert hosts(one) == hosts(two)
    assert len(store.locations(image)) == 2


def test_dead_hosts_are_no_sources_and_come_back(store: Store, image: str, clock: Clock) -> None:
    plan(store, image, "c1")
    clock.passes(61)
    store.heartbeat(topology(STORAGE, "r0", "storage"))
    assert hosts(plan(store, image, "c2")) == [STORAGE]
    store.heartbeat(topology("c1"))
    store.report(LocationReport(plan(store, image, "c1").location_id, image, "c1", "filling", 5,
                                "10.0.0.1:3260", "iqn", 0, STORAGE))  # fmt: skip
    assert "c1" in hosts(plan(store, image, "c3"))


def test_no_live_master_no_plan(store: Store, image: str, clock: Clock) -> None:
    clock.passes(61)
    assert store.plan(image, topology("c1"), Limits()) is None
    assert store.plan("unknown", topology("c1"), Limits()) is None


def test_report_completes_and_goes(store: Store, image: str) -> None:
    location = plan(store, image, "c1").location_id
    report = LocationReport(location, image, "c1", "complete", 2 * MIB, "p", "iqn", 0)
    store.report(report)
    [base] = [loc for loc in store.locations(image) if loc.kind == "base"]
    assert (base.state, base.parent, base.filled) == ("complete", None, 2 * MIB)
    child = plan(store, image, "c2")
    assert hosts(child)[0] == "c1"
    store.report(LocationReport(location, image, "c1", "gone", 0, "", "", 0))
    [left] = [loc for loc in store.locations(image) if loc.kind == "base"]
    assert (left.host, left.parent) == ("c2", None)


def test_a_base_whose_row_was_lost_is_deeper_than_all(store: Store, image: str) -> None:
    plan(store, image, "c1")
    plan(store, image, "c2")
    store.report(LocationReport("lost", image, "c9", "filling", 7, "p", "iqn", 0, "c1"))
    [found] = [loc for loc in store.locations(image) if loc.host == "c9"]
    assert found.id == "lost"
    assert found.depth > max(loc.depth for loc in store.locations(image) if loc.host != "c9")
    [parent] = [loc for loc in store.locations(image) if loc.host == "c1"]
    assert found.parent == parent.id


def fills(
    store: Store, image_id: str, host: str, source: str | None, state: str = "filling"
) -> None:
    """What the agent of ``host`` says of its base, with its heartbeat."""
    store.heartbeat(topology(host))
    store.report(LocationReport("", image_id, host, state, 5, "p", "iqn", 0, source))


def test_children_of_a_dead_host_are_to_find_another_parent(
    store: Store, image: str, clock: Clock
) -> None:
    plan(store, image, "c1")
    plan(store, image, "c2")
    fills(store, image, "c1", STORAGE)
    fills(store, image, "c2", "c1")
    assert store.orders("c2") == Orders()
    for _ in range(12):
        clock.passes(5)
        store.heartbeat(topology(STORAGE, "r0", "storage"))
        fills(store, image, "c2", "c1")
        assert store.orders("c2") == Orders()  # c1 is merely late
    clock.passes(5)
    store.heartbeat(topology(STORAGE, "r0", "storage"))
    assert store.orders("c2") == Orders(reparent=(image,))
    assert hosts(plan(store, image, "c2", exclude=["c1"])) == [STORAGE]
    assert store.orders("c2") == Orders()
    fills(store, image, "c2", None, "complete")
    [base] = [loc for loc in store.locations(image) if loc.host == "c2"]
    assert (base.parent, base.depth) == (None, 0)


def test_who_was_silent_itself_is_told_of_no_dead_parent_at_once(
    store: Store, image: str, clock: Clock
) -> None:
    """The tracker, or what carries its messages, was away: others come back as it did."""
    plan(store, image, "c1")
    fills(store, image, "c1", STORAGE)
    clock.passes(300)
    store.heartbeat(topology("c1"))
    assert store.orders("c1") == Orders()
    for _ in range(13):
        clock.passes(5)
        store.heartbeat(topology("c1"))
    assert store.orders("c1") == Orders(reparent=(image,))


def test_suspects_are_for_nobody_new(store: Store, image: str, clock: Clock) -> None:
    plan(store, image, "c1")
    fills(store, image, "c1", STORAGE)
    plan(store, image, "c2")
    fills(store, image, "c2", "c1")
    clock.passes(31)
    store.heartbeat(topology(STORAGE, "r0", "storage"))
    assert {h.host: h.state for h in store.hosts()} == {
        STORAGE: "alive",
        "c1": "suspect",
        "c2": "suspect",
    }
    assert all(host.alive for host in store.hosts())
    assert hosts(plan(store, image, "c3")) == [STORAGE]
    assert hosts(plan(store, image, "c2", keep=True)) == ["c1", "c3", STORAGE]
    assert store.orders("c2") == Orders()


def test_a_drained_host_loses_its_children(store: Store, image: str) -> None:
    for host, source in (("c1", STORAGE), ("c2", "c1")):
        plan(store, image, host)
        fills(store, image, host, source)
    store.set_drained("c1", True)
    assert {h.host: h.drained for h in store.hosts()}["c1"] is True
    assert store.orders("c2") == Orders(reparent=(image,))
    assert "c1" not in hosts(plan(store, image, "c3"))
    store.heartbeat(topology("c1"))  # which changes nothing of it
    store.set_drained(STORAGE, True)
    assert store.plan(image, topology("c4"), Limits(), exclude=["c2", "c3"]) is None
    store.set_drained("c1", False)
    store.set_drained(STORAGE, False)
    assert store.orders("c2") == Orders()


def test_draining_a_host_that_is_not_there(store: Store, image: str) -> None:
    with pytest.raises(errors.InvalidRequest) as caught:
        store.set_drained("c7", True)
    assert str(caught.value) == f"there is no host c7: known are {STORAGE}"


def test_a_base_that_drains(store: Store, image: str) -> None:
    plan(store, image, "c1")
    fills(store, image, "c1", None, "complete")
    plan(store, image, "c2")
    fills(store, image, "c2", "c1")
    fills(store, image, "c1", None, "draining")
    assert store.orders("c1") == Orders()  # it holds everything
    assert store.orders("c2") == Orders(reparent=(image,))
    assert hosts(plan(store, image, "c2")) == [STORAGE]
    assert store.orders("c2") == Orders()
    fills(store, image, "c1", None, "gone")
    fills(store, image, "c2", "c1")  # late news
    assert store.orders("c2") == Orders()


def test_a_parent_that_is_gone(store: Store, image: str) -> None:
    for host, source in (("c1", STORAGE), ("c2", "c1")):
        plan(store, image, host)
        fills(store, image, host, source)
    store.drop_location(image, "c1")
    assert store.orders("c2") == Orders(reparent=(image,))


def test_a_volume_on_a_host_with_a_complete_base_needs_no_source(store: Store, image: str) -> None:
    plan(store, image, "c1")
    fills(store, image, "c1", None, "complete")
    store.set_drained(STORAGE, True)
    assert plan(store, image, "c1", volume_id="v1").sources == ()
    assert store.plan(image, topology("c1"), Limits()) is None
    assert [stack.host for stack in store.stacks("v1")] == ["c1"]


def test_a_storage_host_that_dies_costs_no_image_that_another_has(
    store: Store, image: str, clock: Clock
) -> None:
    """Volumes of the one that lives are attached as ever."""
    other = "stor2@thunder"
    store.heartbeat(topology(STORAGE, "r1", "storage"))
    store.heartbeat(topology(other, "r9", "storage"))
    store.add_master(store.images()[0], other)
    assert hosts(plan(store, image, "c1", volume_id="v1")) == [STORAGE, other]
    fills(store, image, "c1", STORAGE)
    clock.passes(61)
    store.heartbeat(topology(other, "r9", "storage"))
    store.heartbeat(topology("c1"))
    assert hosts(plan(store, image, "c2", volume_id="v2")) == ["c1", other]
    for _ in range(13):
        clock.passes(5)
        store.heartbeat(topology(other, "r9", "storage"))
        store.heartbeat(topology("c1"))
    assert store.orders("c1") == Orders(reparent=(image,))
    assert hosts(plan(store, image, "c1")) == [other]
    assert [found.hosts for found in store.holders()] == [{STORAGE, other}]


def test_direct_volumes_of_a_host(store: Store, image: str) -> None:
    for volume_id, host, mode in (
        ("v1", "c1", "direct"),
        ("v2", "c1", "cached"),
        ("v3", "c2", "direct"),
        ("v4", "c1", "direct"),
        ("v5", "c1", "direct"),
    ):
        store.put_volume(Volume(volume_id, image, STORAGE))
        store.put_stack(volume_id, host, mode)
    store.put_stack("v6", "c1", "direct")  # shares no image
    store.release("v5", "c1")
    assert store.direct("c1") == ["v1", "v4"]
    store.put_stack("v1", "c1", "cached")
    assert store.direct("c1") == ["v4"]
    assert store.direct("c9") == []


def test_an_image_that_glance_lost(store: Store, image: str, clock: Clock) -> None:
    """Volumes are needed for its bases to stay, bases for its masters, unless their host died."""
    other = "stor2@thunder"
    store.add_master(store.images()[0], other)
    for number in (1, 2):
        store.put_volume(Volume(f"v{number}", image, STORAGE))
        plan(store, image, f"c{number}", volume_id=f"v{number}")
        fills(store, image, f"c{number}", None, "complete")
    assert store.set_gone(image, True)
    assert not store.set_gone(image, True)
    assert not store.set_gone("unknown", True)
    assert store.holders() == []
    assert [found.gone for found in store.images()] == [True]
    assert store.orders("c1") == Orders()
    assert [store.useless_masters(host) for host in (STORAGE, other)] == [[], []]
    store.drop_volume("v1")
    assert store.orders("c1") == Orders()
    store.drop_volume("v2")
    assert store.orders("c1") == store.orders("c2") == Orders(remove=(image,))
    assert store.useless_masters(STORAGE) == []
    fills(store, image, "c1", None, "gone")
    assert store.useless_masters(STORAGE) == []
    clock.passes(61)  # c2 has died, and will be told when it is back
    assert store.useless_masters(STORAGE) == store.useless_masters(other) == [image]
    for host in (STORAGE, other):
        store.drop_master(image, host)
    store.heartbeat(topology("c2"))
    assert store.orders("c2") == Orders(remove=(image,))
    fills(store, image, "c2", None, "gone")
    assert store.images() == []


def test_an_image_that_is_back_after_all(store: Store, image: str) -> None:
    store.set_gone(image, True)
    assert store.useless_masters(STORAGE) == [image]
    assert store.set_gone(image, False)
    assert store.useless_masters(STORAGE) == []
    assert [(found.image_id, found.size) for found in store.holders()] == [(image, 2 * MIB)]


def test_free_space(store: Store) -> None:
    store.heartbeat(topology(STORAGE, "r0", "storage"), free=7 << 40)
    store.heartbeat(topology(STORAGE, "r0", "storage"))
    assert [host.free for host in store.hosts()] == [7 << 40]


def test_volumes(store: Store) -> None:
    store.put_volume(Volume("v1", "i1", STORAGE))
    store.put_volume(Volume("v1", "i1", STORAGE))
    store.inherit("v2", "v1", STORAGE)
    store.inherit("v3", "v1", "stor2@thunder")  # copied to another host: shares nothing
    store.inherit("v4", "unknown", STORAGE)
    assert store.volume("v2") == Volume("v2", "i1", STORAGE)
    assert store.volume("v3") is None
    assert store.volume("v4") is None
    store.put_stack("v1", "c1", "direct")
    store.drop_volume("v1")
    store.drop_volume("v1")
    assert store.volume("v1") is None
    assert store.stacks("v1") == []


def test_release(store: Store) -> None:
    store.put_stack("v1", "c1", "cached")
    store.put_stack("v1", "c1", "direct")
    assert [stack.mode for stack in store.stacks("v1")] == ["direct"]
    store.release("v1", "c1")
    store.release("v1", "c1")
    assert store.stacks("v1") == []


def test_a_failed_plan_leaves_nothing(store: Store, image: str, clock: Clock) -> None:
    clock.passes(61)
    assert store.plan(image, topology("c1"), Limits(), volume_id="v1") is None
    assert store.stacks("v1") == []
    assert len(store.locations(image)) == 1


def at_once(work: list[Callable[[], object]]) -> list[object]:
    with ThreadPoolExecutor(len(work)) as pool:
        return [future.result() for future in [pool.submit(one) for one in work]]


def test_trackers_that_plan_at_once_keep_the_fanout(mariadb: str, clock: Clock) -> None:
    """Each thread is a tracker of its own, with its own engine, on one real database."""
    url = new_database(mariadb)
    trackers = [Store(url, clock=clock) for _ in range(8)]
    migration.upgrade(trackers[0].engine)
    trackers[0].heartbeat(topology(STORAGE, "r0", "storage"))
    trackers[0].add_master(Image("i", MIB, Extents.of([(0, MIB)])), STORAGE)
    limits = Limits(fanout=1, storage_fanout=2)

    def attach(number: int) -> Planned | None:
        tracker = trackers[number % len(trackers)]
        host = topology(f"c{number:02}")
        tracker.heartbeat(host)
        return tracker.plan("i", host, limits, volume_id=f"v{number}")

    planned = at_once([lambda n=n: attach(n) for n in range(16)])  # type: ignore[misc]
    assert all(planned)
    locations = trackers[0].locations("i")
    assert len(locations) == 17
    children: dict[str | None, int] = {}
    for location in locations:
        children[location.parent] = children.get(location.parent, 0) + 1
    [master] = [location.id for location in locations if location.kind == "master"]
    assert children.pop(None) == 1  # the master itself
    assert children.pop(master) <= 2
    assert max(children.values()) == 1


def test_a_lease_has_one_owner(store: Store, clock: Clock) -> None:
    assert store.acquire_lease("image-i", "stor1", 30)
    assert not store.acquire_lease("image-i", "stor2", 30)
    assert store.acquire_lease("image-j", "stor2", 30)
    clock.passes(20)
    assert store.renew_lease("image-i", "stor1", 30)
    assert not store.renew_lease("image-i", "stor2", 30)
    assert not store.renew_lease("unknown", "stor1", 30)
    clock.passes(20)
    assert not store.acquire_lease("image-i", "stor2", 30)
    store.release_lease("image-i", "stor2")  # not its own
    assert not store.acquire_lease("image-i", "stor2", 30)
    store.release_lease("image-i", "stor1")
    store.release_lease("image-i", "stor1")
    assert store.acquire_lease("image-i", "stor2", 30)


def test_the_lease_of_one_that_died_is_taken_over(store: Store, clock: Clock) -> None:
    assert store.acquire_lease("image-i", "stor1", 30)
    clock.passes(30)
    assert store.acquire_lease("image-i", "stor2", 30)
    assert not store.renew_lease("image-i", "stor1", 30)
    assert store.acquire_lease("image-i", "stor2", 30)  # again: its own
    assert not store.acquire_lease("image-i", "stor1", 30)


def test_of_many_that_want_a_lease_at_once_one_gets_it(mariadb: str, clock: Clock) -> None:
    url = new_database(mariadb)
    stores = [Store(url, clock=clock) for _ in range(8)]
    migration.upgrade(stores[0].engine)
    for _ in range(5):  # first without a row, then with one that has expired
        won = at_once(
            [lambda n=n, s=s: s.acquire_lease("i", f"s{n}", 30) for n, s in enumerate(stores)]  # type: ignore[misc]
        )
        assert sorted(won) == [False] * 7 + [True]  # type: ignore[type-var]
        clock.passes(31)


def test_two_trackers_and_forty_hosts_at_once(mariadb: str) -> None:
    """Two processes, as on two storage hosts: everybody is planned, and the tree is right."""
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
