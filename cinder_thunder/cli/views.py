"""Read models: what commands show of hosts, images, replicas and volumes, as values.

They come from the tables and, for local pools and caches, from the status of agents. Sizes are in
bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from cinder_thunder.cli import caches, names
from cinder_thunder.db.api import Database
from cinder_thunder.db.values import Image, KnownHost
from cinder_thunder.policy.ranking import BASE, COMPLETE, MASTER, Location
from os_brick_thunder.common import errors
from os_brick_thunder.common.policy.dmstatus import CacheStatus
from os_brick_thunder.common.policy.iscsinames import iqn_of

#: Calls ``status`` of the agent on a host; raises ThunderError if there is no answer.
Ask = Callable[[str], Mapping[str, Any]]


@dataclass(frozen=True)
class AgentView:
    """The status of a host's agent.

    :ivar status: empty if it did not answer, or the host has no agent
    :ivar trouble: why it did not answer; empty if it did
    """

    status: Mapping[str, Any] = field(default_factory=dict)
    trouble: str = ""

    @property
    def summary(self) -> str:
        """Empty for a host without an agent."""
        return self.trouble or ("answers" if self.status else "")


@dataclass(frozen=True)
class HostView:
    """A host, the replicas on it, and its agent's status."""

    host: KnownHost
    replicas: int
    complete: int
    agent: AgentView


@dataclass(frozen=True)
class ImageView:
    """An image with at least one replica.

    :ivar masters: the storage hosts that have a master, sorted
    :ivar volumes: how many volumes were created from its masters
    :ivar depth: levels of the relay tree below the masters
    """

    image: Image
    masters: tuple[str, ...]
    volumes: int
    bases: int
    complete: int
    depth: int


@dataclass(frozen=True)
class LocationView:
    """A replica in its relay tree.

    :ivar percent: how much of the image's allocated bytes it holds
    :ivar depth: how many replicas it reads through
    :ivar parent: the host that it reads from; empty for a master
    :ivar children: the hosts that read from it, sorted
    """

    image_id: str
    location: Location
    address: str
    iqn: str
    percent: int
    depth: int
    parent: str
    children: tuple[str, ...]


@dataclass(frozen=True)
class VolumeView:
    """How a volume is attached.

    :ivar image_id: empty if it shares no blocks with a master
    :ivar hosts: where it is attached, sorted
    :ivar entry: its stack as an agent describes it; empty if none answered
    :ivar agent: what became of asking the agents
    """

    id: str
    image_id: str
    backend: str
    hosts: tuple[str, ...]
    modes: tuple[str, ...]
    agent: str
    entry: Mapping[str, Any]
    cache: CacheStatus | None


def known_host(database: Database, name: str) -> KnownHost:
    """:raises errors.InvalidRequest: there is no such host"""
    hosts = {host.host: host for host in database.hosts.all()}
    if name not in hosts:
        raise errors.InvalidRequest(
            f"there is no host {name}: known are {', '.join(hosts) or 'none'}"
        )
    return hosts[name]


def agent(host: KnownHost, ask: Ask) -> AgentView:
    """Ask the agent of a compute host for its status; a dead host is not asked."""
    if host.kind != "compute":
        return AgentView()
    if not host.alive:
        return AgentView(trouble=f"silent for {host.silent:.0f} s: is thunder-agent running there?")
    try:
        return AgentView(ask(host.host))
    except errors.ThunderError as error:
        return AgentView(trouble=str(error))


def host(database: Database, name: str, ask: Ask) -> HostView:
    """:raises errors.InvalidRequest: there is no such host"""
    found = known_host(database, name)
    here = [
        location
        for image in database.images.all()
        for location in database.locations.of(image.id)
        if location.host == found.host
    ]
    complete = sum(location.state == COMPLETE for location in here)
    return HostView(found, len(here), complete, agent(found, ask))


def image(database: Database, image_id: str) -> ImageView:
    """:param image_id: of an image that has a replica"""
    (found,) = [image for image in database.images.all() if image.id == image_id]
    locations = database.locations.of(image_id)
    masters = tuple(sorted(loc.host for loc in locations if loc.kind == MASTER))
    bases = [location for location in locations if location.kind == BASE]
    return ImageView(
        found,
        masters,
        volumes=sum(database.volumes.count(image_id, host) for host in masters),
        bases=len(bases),
        complete=sum(location.state == COMPLETE for location in bases),
        depth=max(levels(locations).values(), default=0),
    )


def locations(database: Database, image_ids: Iterable[str]) -> list[tuple[str, Location, str]]:
    """Replicas by image and depth: the image's id, the replica, the host that it reads from."""
    found = []
    for image_id in image_ids:
        known = {location.id: location for location in database.locations.of(image_id)}
        for location in sorted(known.values(), key=lambda loc: (loc.depth, loc.host)):
            parent = known.get(location.parent or "")
            found.append((image_id, location, parent.host if parent else ""))
    return found


def location(database: Database, word: str) -> LocationView:
    """:param word: the id of a replica, or its beginning
    :raises errors.InvalidRequest: there is none, or more than one
    """
    everywhere = {
        location.id: (image, location)
        for image in database.images.all()
        for location in database.locations.of(image.id)
    }
    match = names.only("location", word, names.beginning(word, everywhere))
    if match is None:
        raise errors.InvalidRequest(
            f"there is no location {word}: thunder location list shows all of them"
        )
    image, found = everywhere[match]
    parent = everywhere.get(found.parent or "")
    return LocationView(
        image.id,
        found,
        address={host.host: host.address for host in database.hosts.all()}.get(found.host, ""),
        iqn=iqn_of(found.host, image.id),
        percent=percent(found, image.allocated.length),
        depth=levels(loc for _, loc in everywhere.values())[found.id],
        parent=parent[1].host if parent else "",
        children=tuple(
            sorted(loc.host for _, loc in everywhere.values() if loc.parent == found.id)
        ),
    )


def volume(database: Database, volume_id: str, ask: Ask) -> VolumeView:
    """:param volume_id: of a volume that shares an image or has a stack"""
    found, stacks = database.volumes.get(volume_id), database.volumes.stacks(volume_id)
    hosts = {host.host: host for host in database.hosts.all()}
    agents = [agent(hosts[stack.host], ask) for stack in stacks if stack.host in hosts]
    entries = [
        entry
        for each in agents
        for entry in each.status.get("stacks", [])
        if entry["volume_id"] == volume_id
    ]
    # A live migration has two: show the cached one.
    entries.sort(key=lambda entry: entry.get("mode") != "cached")
    entry = entries[0] if entries else {}
    troubles = [each.trouble for each in agents if each.trouble]
    return VolumeView(
        volume_id,
        image_id=found.image_id if found else "",
        backend=found.host if found else "",
        hosts=tuple(sorted(stack.host for stack in stacks)),
        modes=tuple(sorted({stack.mode for stack in stacks})),
        agent="; ".join(troubles) or ("answers" if stacks else ""),
        entry=entry,
        cache=caches.counters(entry),
    )


def levels(locations: Iterable[Location]) -> dict[str, int]:
    """How many other replicas each of an image's replicas reads through, by id."""
    parents = {location.id: location.parent for location in locations}
    found: dict[str, int] = {}
    for each in parents:
        level, parent, passed = 0, parents[each], {each}
        while parent in parents and parent not in passed:  # a table may have been edited
            level, passed, parent = level + 1, {*passed, parent}, parents[parent]
        found[each] = level
    return found


def percent(location: Location, allocated: int) -> int:
    """How much of an image's ``allocated`` bytes a replica holds.

    Below 100 until it is complete: whole pool blocks may add up to more than the image has.
    """
    if location.state == COMPLETE or not allocated:
        return 100
    return min(99, 100 * location.filled // allocated)


def tree(locations: Iterable[Location], allocated: int) -> list[str]:
    """The relay tree of an image, one line a replica, with the share of ``allocated`` bytes."""
    ordered = sorted(locations, key=lambda location: (location.depth, location.host))
    known = {location.id for location in ordered}
    children: dict[str | None, list[Location]] = {}
    for location in ordered:
        # A replica whose parent has been removed since is shown at the top.
        parent = location.parent if location.parent in known else None
        children.setdefault(parent, []).append(location)

    def below(parent: str | None, indent: str) -> Iterable[str]:
        level = children.get(parent, [])
        for location in level:
            last = location is level[-1]
            share = percent(location, allocated)
            branch = "" if parent is None else ("└── " if last else "├── ")
            yield f"{indent}{branch}{location.host}  {location.kind} {location.state} {share}%"
            deeper = "" if parent is None else ("    " if last else "│   ")
            yield from below(location.id, indent + deeper)

    return list(below(None, ""))
