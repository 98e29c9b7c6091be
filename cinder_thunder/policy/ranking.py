"""The choice of sources: nearest first, load bounded, no cycles, a storage host last.

Pure functions on frozen values. Times are in seconds, amounts in bytes.

The edges of one image form a tree. A location's *depth* is fixed when it is planned (for a base,
its first parent's plus one). All that a location may ever read from has a smaller depth: its
spare sources, and every later parent. So no sequence of fail-overs can close a cycle, however old
the plans are. Locations that read from no other have depth 0: masters, and complete bases. A base
that a master serves for want of other room has depth :data:`OVERFLOW`.
"""

from __future__ import annotations

import enum
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

from os_brick_thunder.common.policy import timelimits

MASTER = "master"
BASE = "base"
CREATING = "creating"
FILLING = "filling"
COMPLETE = "complete"
DRAINING = "draining"
#: A base of what the image was before its id was used again: about to be removed.
STALE = "stale"

#: Depth of a base whose parent is a master only because nobody else had room: greater than that of
#: all others, so that it can be moved below any of them later.
OVERFLOW = 1 << 20

ALIVE = "alive"
SUSPECT = "suspect"
DEAD = "dead"


class Distance(enum.IntEnum):
    """How far apart two hosts are."""

    HOST = 0
    RACK = 1
    ZONE = 2
    ELSEWHERE = 3


@dataclass(frozen=True)
class HostState:
    """The place of a host, and whether others may read from it.

    :ivar state: "alive"; "suspect" when heartbeats are overdue: it gets no new children; "dead"
    :ivar drained: the operator has excluded it as a source
    :ivar address: its IP address or name; empty if it is not known
    """

    host: str
    rack: str
    zone: str
    state: str = ALIVE
    drained: bool = False
    address: str = ""

    @property
    def alive(self) -> bool:
        """Whether it may keep its children."""
        return self.state != DEAD


@dataclass(frozen=True)
class Location:
    """A replica of an image.

    :ivar kind: "master" (on a storage host) or "base" (on a compute host)
    :ivar state: "creating", "filling", "complete", "draining" (about to be removed) or "stale" (of
        other content)
    :ivar parent: id of the location that it reads from, None if it needs none
    :ivar age: seconds since its last report
    """

    id: str
    host: str
    kind: str
    state: str
    parent: str | None = None
    depth: int = 0
    filled: int = 0
    age: float = 0.0


@dataclass(frozen=True)
class Limits:
    """Bounds of the tree.

    :ivar fanout: maximum of children of one base
    :ivar storage_fanout: maximum of children of all masters of an image together, as long as
        another location can take one more
    :ivar creating: seconds within which a location that is being created must be reported
    :ivar sources: maximum number of sources in a plan
    """

    fanout: int = 2
    storage_fanout: int = 2
    creating: float = timelimits.CREATING_TIMEOUT
    sources: int = timelimits.SOURCES


def distance(one: HostState, other: HostState) -> Distance:
    """Racks are named within their zone, so equal rack names in two zones are two racks."""
    if one.host == other.host:
        return Distance.HOST
    if one.zone != other.zone:
        return Distance.ELSEWHERE
    return Distance.RACK if one.rack == other.rack else Distance.ZONE


def state_of(silent: float, timeout: float) -> str:
    """The state of a host whose last heartbeat is ``silent`` seconds old.

    :param timeout: seconds of silence after which it is dead
    """
    if silent > timeout:
        return DEAD
    return SUSPECT if silent > timeout * timelimits.SUSPECT_SHARE else ALIVE


def choose(
    child: HostState,
    hosts: Mapping[str, HostState],
    locations: Iterable[Location],
    limits: Limits,
    keep: bool = False,
    exclude: Collection[str] = (),
    served: Mapping[str, int] | None = None,
) -> tuple[Location, ...]:
    """The locations that ``child`` may read the image from, best first, a master last.

    The first is its parent, the others are spares. The list has no master if ``child`` excludes
    every master that can serve. If no master is alive, only complete bases can be sources, since
    all other bases still depend on one. Empty if there is no source.

    :param hosts: every known host by its name
    :param locations: every location of the image, the child's own (if any) among them; or, with
        ``served``, those that come first by distance, load and depth
    :param keep: stay with the present parent if it still serves
    :param exclude: names of hosts that do not work for ``child``
    :param served: the children of each location by its id, without ``child``; None to count them
    """
    candidates = _Candidates(child, hosts, locations, limits, exclude, served)
    own, ranked = candidates.own, candidates.ranked()
    fit = [location for location in ranked if hosts[location.host].state == ALIVE]
    masters = [location for location in fit if location.kind == MASTER] or [
        location
        for location in ranked
        if location.kind == MASTER  # on a suspect host, which is better than no master
    ]
    room = [location for location in fit if candidates.load(location) < 1]
    if not (room or masters):
        return ()
    first = (room or masters)[0]
    if keep and own is not None:
        stay = (loc for loc in ranked if loc.id == own.parent and candidates.load(loc) < 1)
        first = next(stay, first)
    if first.kind == MASTER:
        return (first, *(master for master in masters if master != first))[: limits.sources]
    # A spare source may become the parent, so it must have room for one more child, too.
    depth = depth_below(first) if own is None else own.depth
    spares = [
        location
        for location in room
        if location.kind != MASTER and location != first and location.depth < depth
    ]
    return (first, *spares[: max(limits.sources - 2, 0)], *masters[:1])


class _Candidates:
    """The locations that one host might read from, and the load of each."""

    def __init__(
        self,
        child: HostState,
        hosts: Mapping[str, HostState],
        locations: Iterable[Location],
        limits: Limits,
        exclude: Collection[str],
        served: Mapping[str, int] | None,
    ) -> None:
        self._child = child
        self._hosts = hosts
        self._locations = {location.id: location for location in locations}
        self._limits = limits
        self._exclude = exclude
        everything = self._locations.values()
        self.own = next((loc for loc in everything if loc.host == child.host), None)
        self._served = (
            Counter(served) if served is not None else count(everything, hosts, self.own, limits)
        )
        masters = [loc for loc in everything if loc.kind == MASTER and _alive(loc.host, hosts)]
        self._master_alive = bool(masters)
        self._storage_load = sum(self._served[loc.id] for loc in masters) / limits.storage_fanout

    def ranked(self) -> list[Location]:
        """Those that the host may read from, the best first; their hosts may be suspect."""
        return sorted(filter(self._allowed, self._locations.values()), key=self._rank)

    def load(self, location: Location) -> float:
        """Children as a share of the maximum, which all masters have together."""
        if location.kind == MASTER:
            return self._storage_load
        return self._served[location.id] / self._limits.fanout

    def _allowed(self, location: Location) -> bool:
        if location == self.own or location.host in self._exclude:
            return False
        if not _serves(location, self._hosts, self._limits):
            return False
        if location.kind == MASTER:
            return True
        if self.own is not None and location.depth >= self.own.depth:
            return False
        return self._master_alive or location.state == COMPLETE

    def _rank(self, location: Location) -> tuple[Distance, bool, int, int, int, str]:
        """Load is a bound, and otherwise decides only between equals: preferring idle parents
        would build long chains, and every block that a boot waits for would cross all of them."""
        return (
            distance(self._child, self._hosts[location.host]),
            location.kind == MASTER,
            location.depth,
            self._served[location.id],
            -location.filled,
            location.id,
        )


def depth_below(parent: Location) -> int:
    """The depth of a new child of ``parent``."""
    return parent.depth + 1


def needs_new_parent(
    child: Location, parent: Location | None, hosts: Mapping[str, HostState]
) -> bool:
    """Whether a base that is still filling has lost its parent, or is about to lose it.

    :param parent: None if it has none, or one that is not recorded
    """
    if child.state not in {FILLING, DRAINING}:
        return False
    if parent is None:
        return child.state == FILLING  # a draining base may be complete, and need no parent
    host = hosts.get(parent.host)
    return host is None or not host.alive or host.drained or parent.state == DRAINING


def nearest_masters(
    here: HostState, hosts: Mapping[str, HostState], locations: Iterable[Location]
) -> list[Location]:
    """Masters on other hosts that are alive, in the order in which they should be copied.

    A drained host comes last: copying from it still is better than a download.
    """
    masters = [
        location
        for location in locations
        if location.kind == MASTER
        and location.host != here.host
        and location.host in hosts
        and hosts[location.host].state == ALIVE
    ]

    def rank(master: Location) -> tuple[bool, Distance, str]:
        host = hosts[master.host]
        return host.drained, distance(here, host), master.host

    return sorted(masters, key=rank)


def _alive(name: str, hosts: Mapping[str, HostState]) -> bool:
    host = hosts.get(name)
    return host is not None and host.alive


def _expected(location: Location, limits: Limits) -> bool:
    """Whether it exists, or can still be expected to."""
    return location.state != CREATING or location.age <= limits.creating


def _serves(location: Location, hosts: Mapping[str, HostState], limits: Limits) -> bool:
    return (
        _alive(location.host, hosts)
        and not hosts[location.host].drained
        and location.state not in {DRAINING, STALE}
        and _expected(location, limits)
    )


def count(
    locations: Iterable[Location],
    hosts: Mapping[str, HostState],
    own: Location | None,
    limits: Limits,
) -> Counter[str]:
    """Children of every location, without those on dead hosts, those that were never reported,
    and ``own``."""
    return Counter(
        location.parent
        for location in locations
        if location.parent is not None
        and location != own
        and _alive(location.host, hosts)
        and _expected(location, limits)
    )
