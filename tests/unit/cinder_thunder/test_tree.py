"""What is planned, recorded and ordered, on values alone."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from cinder_thunder.policy import ranking, tree
from cinder_thunder.policy.ranking import HostState, Limits, Location
from cinder_thunder.policy.tree import HeldBase, HeldMaster
from os_brick_thunder.common.wire import LocationReport, Orders

HOSTS = {name: HostState(name, "r1", "z1") for name in ("s", "c1", "c2")}
MASTER = Location("m", "s", "master", "complete", filled=9)
BASE = Location("b1", "c1", "base", "filling", "m", 1, 5)
COMPLETE = replace(BASE, state="complete", parent=None, depth=0)


def assign(child: str, *locations: Location, **options: Any) -> tree.Assignment | None:
    hosts = options.pop("hosts", HOSTS)
    here = HostState(child, "r1", "z1")
    return tree.assign(here, hosts, locations, Limits(), **options)


# Plans


def test_a_new_base_is_below_its_parent() -> None:
    found = assign("c2", MASTER, BASE)
    assert found is not None
    assert found.own is None
    assert [source.id for source in found.sources] == ["b1", "m"]
    assert (found.parent, found.depth) == ("b1", 2)


def test_a_base_that_a_master_serves_for_want_of_room_is_below_all_others() -> None:
    crowd = [replace(BASE, id=f"b{n}", host=f"h{n}", state="draining") for n in range(2)]
    hosts = {**HOSTS, **{at.host: HostState(at.host, "r1", "z1") for at in crowd}}
    found = assign("c2", MASTER, *crowd, hosts=hosts)
    assert found is not None
    assert (found.parent, found.depth) == ("m", ranking.OVERFLOW)
    found = assign("c2", MASTER, crowd[0], hosts=hosts)
    assert found is not None
    assert (found.parent, found.depth) == ("m", 1)


def test_a_base_that_is_planned_again_keeps_its_depth() -> None:
    own = Location("b2", "c2", "base", "filling", "b1", 7)
    found = assign("c2", MASTER, BASE, own, exclude=["c1"])
    assert found is not None
    assert (found.own, found.parent, found.depth) == (own, "m", 7)


def test_a_complete_base_needs_no_source_for_a_volume_but_for_itself() -> None:
    dead = {**HOSTS, "s": HostState("s", "r1", "z1", "dead")}
    found = assign("c1", MASTER, COMPLETE, hosts=dead, for_volume=True)
    assert found == tree.Assignment(COMPLETE, ())
    assert (found.parent, found.depth) == (None, 0)
    assert assign("c1", MASTER, COMPLETE, hosts=dead) is None
    assert assign("c1", MASTER, BASE, hosts=dead, for_volume=True) is None


def test_a_complete_base_gets_no_parent() -> None:
    found = assign("c1", MASTER, COMPLETE, for_volume=True)
    assert found is not None
    assert found.sources == (MASTER,)
    assert found.parent is None


def test_the_storage_host_that_answers_is_alive() -> None:
    late = {**HOSTS, "s": HostState("s", "r1", "z1", "dead")}
    assert assign("c2", MASTER, hosts=late) is None
    found = assign("c2", MASTER, hosts=late, answering="s")
    assert found is not None
    assert found.sources == (MASTER,)
    assert assign("c2", MASTER, hosts=late, answering="unknown") is None


# Reports


def report(state: str, source: str | None = None, location_id: str = "b1") -> LocationReport:
    return LocationReport(location_id, "i", "c1", state, 7, "p", "iqn", 0, source)


@pytest.mark.parametrize(
    ("said", "source", "expected"),
    [
        (report("filling", "s"), MASTER, {"parent": "m"}),
        (report("filling", "c2"), replace(BASE, id="b2", host="c2"), {"parent": "b2"}),
        (report("filling", "unknown"), None, {}),
        (report("filling"), None, {}),
        (report("draining"), None, {"state": "draining"}),
        (report("complete"), None, {"state": "complete", "parent": None, "depth": 0}),
        (report("complete", "s"), MASTER, {"state": "complete", "depth": 0}),
        (report("complete", "unknown"), None, {"state": "complete", "depth": 0}),
    ],
)
def test_a_report(said: LocationReport, source: Location | None, expected: dict[str, Any]) -> None:
    assert tree.reported(BASE, said, source) == replace(BASE, filled=7, **expected)


def test_a_base_whose_record_was_lost_is_deeper_than_all_others() -> None:
    found = tree.found_again(report("filling", location_id="lost"), 4)
    assert (found.id, found.host, found.kind, found.depth) == ("lost", "c1", "base", 5)
    assert tree.found_again(report("filling"), 0).depth == 1


# Orders


def held(**changes: Any) -> HeldBase:
    known = {"location": BASE, "parent": MASTER, "deleted": False, "needed": True}
    return HeldBase("i", **{**known, **changes})


@pytest.mark.parametrize(
    ("base", "expected"),
    [
        (held(), Orders()),
        (held(parent=None), Orders(reparent=("i",))),
        (held(deleted=True), Orders()),
        (held(deleted=True, parent=None), Orders(reparent=("i",))),
        (held(needed=False), Orders()),
        (held(deleted=True, needed=False), Orders(remove=("i",))),
        (held(deleted=True, needed=False, parent=None), Orders(remove=("i",))),
        (held(location=COMPLETE, parent=None), Orders()),
        (held(movable=True), Orders(reparent=("i",))),
        (held(movable=True, deleted=True, needed=False), Orders(remove=("i",))),
    ],
)
def test_orders(base: HeldBase, expected: Orders) -> None:
    assert tree.orders([base], HOSTS, None, 60) == expected


def test_a_host_that_was_silent_itself_is_told_of_dead_parents_later() -> None:
    dead = {"s": HostState("s", "r1", "z1", "dead")}
    assert tree.orders([held()], dead, None, 60) == Orders(reparent=("i",))
    assert tree.orders([held()], dead, 60, 60) == Orders()
    assert tree.orders([held()], dead, 61, 60) == Orders(reparent=("i",))
    drained = {"s": HostState("s", "r1", "z1", drained=True)}
    assert tree.orders([held()], drained, 1, 60) == Orders(reparent=("i",))


# Masters


@pytest.mark.parametrize(
    ("master", "useless"),
    [
        (HeldMaster("i", True, False, frozenset()), True),
        (HeldMaster("i", False, False, frozenset()), False),
        (HeldMaster("i", True, True, frozenset()), False),
        (HeldMaster("i", True, False, frozenset({"c1"})), False),
        (HeldMaster("i", True, False, frozenset({"c1", "c2"})), False),
        (HeldMaster("i", True, False, frozenset({"c2", "never heard of"})), True),
    ],
)
def test_useless_masters(master: HeldMaster, useless: bool) -> None:
    hosts = {**HOSTS, "c2": HostState("c2", "r1", "z1", "dead")}
    assert tree.useless_masters([master], hosts) == (["i"] if useless else [])
