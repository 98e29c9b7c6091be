"""Properties of the choice of sources that hold for all trees."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cinder_thunder.policy import ranking
from cinder_thunder.policy.ranking import Distance, HostState, Limits, Location

STORES = ("stor1@thunder", "stor2@thunder")
HOSTS = st.integers(1, 24)

Cloud = tuple[dict[str, HostState], list[Location], Limits]


@st.composite
def clouds(draw: st.DrawFn) -> Cloud:
    """Hosts over racks and zones, and the tree that arose as they came, went silent and were
    drained. The first store is alive, and others may read from it."""
    limits = Limits(fanout=draw(st.integers(1, 3)), storage_fanout=draw(st.integers(1, 3)))
    stores = STORES[: draw(st.integers(1, 2))]
    hosts = {name: HostState(name, f"r{n}", "z0") for n, name in enumerate(stores)}
    locations = [Location(f"m{name}", name, "master", "complete", filled=100) for name in stores]
    for number in range(draw(HOSTS)):
        host = HostState(
            f"c{number:02}", f"r{draw(st.integers(0, 2))}", f"z{draw(st.integers(0, 1))}"
        )
        hosts[host.host] = host
        sources = ranking.choose(host, hosts, locations, limits)
        state = draw(st.sampled_from(["creating", "filling", "complete", "draining"]))
        complete = state == "complete"
        locations.append(
            Location(
                id=f"b{number:02}",
                host=host.host,
                kind="base",
                state=state,
                parent=None if complete else sources[0].id,
                depth=0 if complete else ranking.depth_below(sources[0]),
                filled=draw(st.integers(0, 100)),
                age=draw(st.sampled_from([0.0, 1000.0])),
            )
        )
        for name in draw(st.sets(st.sampled_from(sorted(hosts)), max_size=2)):
            if name != stores[0]:
                hosts[name] = replace(
                    hosts[name],
                    state=draw(st.sampled_from(["alive", "suspect", "dead"])),
                    drained=draw(st.booleans()),
                )
        if draw(st.booleans()):  # one of them is given another parent
            reparent(draw(st.sampled_from(locations)), hosts, locations, limits)
    return hosts, locations, limits


def reparent(
    location: Location, hosts: dict[str, HostState], locations: list[Location], limits: Limits
) -> None:
    """Plan as the tracker does: the depth stays."""
    if location.kind == "master" or location.state == "complete":
        return
    chosen = ranking.choose(hosts[location.host], hosts, locations, limits)
    locations[locations.index(location)] = replace(location, parent=chosen[0].id)


CHILDREN = st.builds(
    HostState,
    st.sampled_from([f"c{n:02}" for n in range(26)]),
    st.sampled_from(["r0", "r1", "r2"]),
    st.sampled_from(["z0", "z1"]),
)
EXCLUDED = st.frozensets(st.sampled_from([*STORES, *(f"c{n:02}" for n in range(24))]), max_size=6)


def served(
    hosts: dict[str, HostState], locations: list[Location], child: HostState, of: str
) -> int:
    return sum(
        1
        for loc in locations
        if loc.parent == of
        and loc.host != child.host
        and hosts[loc.host].state != "dead"
        and (loc.state != "creating" or loc.age <= Limits().creating)
    )


def usable(
    hosts: dict[str, HostState],
    location: Location,
    child: HostState,
    exclude: frozenset[str] = frozenset(),
) -> bool:
    """Whether it can be a source at all."""
    host = hosts[location.host]
    return (
        host.state == "alive"
        and not host.drained
        and location.host not in exclude | {child.host}
        and location.state != "draining"
        and (location.state != "creating" or location.age <= Limits().creating)
    )


def bases_with_room(
    cloud: Cloud, child: HostState, exclude: frozenset[str] = frozenset()
) -> list[Location]:
    hosts, locations, limits = cloud
    own = next((loc for loc in locations if loc.host == child.host), None)
    return [
        loc
        for loc in locations
        if loc.kind == "base"
        and usable(hosts, loc, child, exclude)
        and (own is None or loc.depth < own.depth)
        and served(hosts, locations, child, loc.id) < limits.fanout
    ]


@given(clouds(), CHILDREN, EXCLUDED)
def test_sources_can_serve_and_a_storage_host_is_last(
    cloud: Cloud, child: HostState, exclude: frozenset[str]
) -> None:
    hosts, locations, limits = cloud
    chosen = ranking.choose(child, hosts, locations, limits, exclude=exclude)
    assert len({location.id for location in chosen}) == len(chosen) <= limits.sources
    assert all(usable(hosts, location, child, exclude) for location in chosen if location.depth)
    for location in chosen:
        host = hosts[location.host]
        assert host.state != "dead"
        assert not host.drained
        assert host.host not in exclude
        assert location.state != "draining"
        assert location.state != "creating" or location.age <= limits.creating
        if host.state == "suspect":  # nothing else was left, or nothing but itself last
            assert location.kind == "master"
    masters = [
        loc
        for loc in locations
        if loc.kind == "master"
        and loc.host not in exclude | {child.host}
        and hosts[loc.host].state != "dead"
        and not hosts[loc.host].drained
    ]
    if masters:
        assert chosen[-1].kind == "master"
        if any(hosts[loc.host].state == "alive" for loc in masters):
            assert hosts[chosen[-1].host].state == "alive"
    else:
        assert bool(chosen) == bool(bases_with_room(cloud, child, exclude))


@given(clouds(), CHILDREN, EXCLUDED)
def test_without_a_living_master_only_complete_bases_are_sources(
    cloud: Cloud, child: HostState, exclude: frozenset[str]
) -> None:
    hosts, locations, limits = cloud
    hosts = {
        name: replace(host, state="dead") if name in STORES else host
        for name, host in hosts.items()
    }
    chosen = ranking.choose(child, hosts, locations, limits, exclude=exclude)
    assert all(location.state == "complete" for location in chosen)
    complete = [
        loc
        for loc in bases_with_room((hosts, locations, limits), child, exclude)
        if loc.state == "complete"
    ]
    assert bool(chosen) == bool(complete)


@given(clouds(), CHILDREN, st.booleans(), EXCLUDED)
def test_no_sequence_of_sources_closes_a_cycle(
    cloud: Cloud, child: HostState, keep: bool, exclude: frozenset[str]
) -> None:
    hosts, locations, limits = cloud
    chosen = ranking.choose(child, hosts, locations, limits, keep, exclude)
    if not chosen:
        return
    own = next((loc for loc in locations if loc.host == child.host), None)
    depth = own.depth if own else ranking.depth_below(chosen[0])
    assert all(location.depth < depth or location.kind == "master" for location in chosen)
    assert all(location.host != child.host for location in chosen)
    # Follow the parents from there: never through the child, and to an end.
    known = {location.id: location for location in locations}
    for location in chosen:
        seen = {location.id}
        while location.parent is not None:
            location = known[location.parent]
            assert location.id not in seen
            assert location.host != child.host
            seen.add(location.id)


@given(clouds(), CHILDREN, EXCLUDED, st.booleans())
def test_fanout_is_kept(
    cloud: Cloud, child: HostState, exclude: frozenset[str], keep: bool
) -> None:
    hosts, locations, limits = cloud
    chosen = ranking.choose(child, hosts, locations, limits, keep, exclude)
    if not chosen:
        return
    first = chosen[0]
    for base in chosen:
        if base.kind == "base":
            assert served(hosts, locations, child, base.id) < limits.fanout
    storage = sum(
        served(hosts, locations, child, loc.id)
        for loc in locations
        if loc.kind == "master" and hosts[loc.host].state != "dead"
    )
    if first.kind == "master" and storage >= limits.storage_fanout:
        assert not bases_with_room(cloud, child, exclude), (
            "the bound on storage was passed although another location had room"
        )


@given(clouds(), CHILDREN, EXCLUDED)
def test_the_nearest_below_its_fanout_is_chosen(
    cloud: Cloud, child: HostState, exclude: frozenset[str]
) -> None:
    hosts, locations, limits = cloud
    chosen = ranking.choose(child, hosts, locations, limits, exclude=exclude)
    if not chosen or hosts[chosen[0].host].state == "suspect":
        return
    first = chosen[0]
    for loc in bases_with_room(cloud, child, exclude):
        nearest = ranking.distance(child, hosts[loc.host])
        assert ranking.distance(child, hosts[first.host]) <= nearest


@given(clouds(), CHILDREN)
def test_the_choice_does_not_depend_on_order(cloud: Cloud, child: HostState) -> None:
    hosts, locations, limits = cloud
    one = ranking.choose(child, hosts, locations, limits)
    assert one == ranking.choose(child, hosts, list(reversed(locations)), limits)


def test_distance() -> None:
    here = HostState("a", "r1", "z1")
    assert ranking.distance(here, here) is Distance.HOST
    assert ranking.distance(here, HostState("b", "r1", "z1")) is Distance.RACK
    assert ranking.distance(here, HostState("b", "r2", "z1")) is Distance.ZONE
    assert ranking.distance(here, HostState("b", "r1", "z2")) is Distance.ELSEWHERE


def test_hosts_that_come_one_by_one_relay() -> None:
    hosts = {
        "stor1@thunder": HostState("stor1@thunder", "r0", "z"),
        "c1": HostState("c1", "r1", "z"),
        "c2": HostState("c2", "r1", "z"),
        "c3": HostState("c3", "r2", "z"),
    }
    master = Location("m", "stor1@thunder", "master", "complete")
    tree = [master]
    parents = {}
    for name in ("c1", "c2", "c3"):
        chosen = ranking.choose(hosts[name], hosts, tree, Limits())
        parents[name] = [location.host for location in chosen]
        tree.append(
            Location(name, name, "base", "creating", chosen[0].id, ranking.depth_below(chosen[0]))
        )
    assert parents == {
        "c1": ["stor1@thunder"],
        "c2": ["c1", "stor1@thunder"],
        # Of those that are as near, a compute host, and the one that is nearer to the image.
        "c3": ["c1", "stor1@thunder"],
    }


def test_without_a_master_a_complete_base_serves() -> None:
    hosts = {"s": HostState("s", "r", "z", state="dead"), "c": HostState("c", "r", "z")}
    master, base = Location("m", "s", "master", "complete"), Location("b", "c", "base", "filling")
    asking = HostState("d", "r", "z")
    assert ranking.choose(asking, hosts, [master, base], Limits()) == ()
    whole = replace(base, state="complete")
    assert ranking.choose(asking, hosts, [master, whole], Limits()) == (whole,)


def test_a_base_keeps_its_parent_while_that_can_serve() -> None:
    hosts = {n: HostState(n, "r", "z") for n in ("s", "a", "b", "c")}
    tree = [
        Location("m", "s", "master", "complete"),
        Location("a", "a", "base", "complete", None, 0, filled=9),
        Location("b", "b", "base", "filling", "m", 1),
        Location("c", "c", "base", "filling", "b", 2),
    ]
    assert ranking.choose(hosts["c"], hosts, tree, Limits())[0].id == "a"

    def kept() -> str:
        return ranking.choose(hosts["c"], hosts, tree, Limits(), keep=True)[0].id

    assert kept() == "b"
    hosts["b"] = replace(hosts["b"], state="suspect")
    assert kept() == "b"
    for change in ({"state": "dead"}, {"drained": True}):
        hosts["b"] = replace(HostState("b", "r", "z"), **change)
        assert kept() == "a"
    hosts["b"] = HostState("b", "r", "z")
    tree[2] = replace(tree[2], state="draining")
    assert kept() == "a"


def test_a_base_that_is_complete_reads_from_masters_alone_when_it_is_built_again() -> None:
    """Others chose it as complete, so none of its readers may become its source."""
    hosts = {n: HostState(n, "r", "z") for n in ("s", "a", "b", "c")}
    tree = [
        Location("m", "s", "master", "complete"),
        Location("a", "a", "base", "complete"),
        Location("b", "b", "base", "filling", "a", 1),
        Location("c", "c", "base", "complete"),
    ]
    assert [found.id for found in ranking.choose(hosts["a"], hosts, tree, Limits())] == ["m"]


def test_states_of_hosts() -> None:
    assert [ranking.state_of(silent, 20) for silent in (0, 10, 10.1, 20, 20.1)] == [
        "alive",
        "alive",
        "suspect",
        "suspect",
        "dead",
    ]


@pytest.mark.parametrize(
    ("child", "parent", "host", "wanted"),
    [
        ({}, {}, {}, False),
        ({}, {}, {"state": "suspect"}, False),
        ({}, {}, {"state": "dead"}, True),
        ({}, {}, {"drained": True}, True),
        ({}, {"state": "draining"}, {}, True),
        ({}, {"host": "unknown"}, {}, True),
        ({}, None, {}, True),
        ({"state": "draining"}, {}, {"state": "dead"}, True),
        ({"state": "draining"}, None, {}, False),  # may be complete
        ({"state": "creating"}, None, {}, False),  # on its way, with sources of its own
        ({"state": "complete"}, None, {}, False),
        ({"state": "complete"}, {}, {"state": "dead"}, False),
    ],
)
def test_needs_new_parent(
    child: dict[str, Any], parent: dict[str, Any] | None, host: dict[str, Any], wanted: bool
) -> None:
    base = Location("c", "c", "base", "filling", "a", 2)
    above = Location("a", "a", "base", "filling", "m", 1)
    hosts = {"a": replace(HostState("a", "r", "z"), **host), "c": HostState("c", "r", "z")}
    found = None if parent is None else replace(above, **parent)
    assert ranking.needs_new_parent(replace(base, **child), found, hosts) is wanted
