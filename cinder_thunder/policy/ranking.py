"""Who reads an image from whom: nearest first, load bounded, no cycles, a storage host last.

Pure functions on frozen values; the tracker and the simulator run the same code. Times are in
seconds, amounts in bytes.

The edges of one image form a tree. A location's *depth* is fixed when it is planned (a base's is
its first parent's plus one), and whatever a location may ever read from, its spare sources
included, has a smaller depth, also when it is given another parent. So no chain of fail-overs can
close a circle, however old the plans are. What reads from nobody has depth 0: masters, and bases
from the moment that they are complete.
"""

from __future__ import annotations

import enum
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

MASTER = "master"
BASE = "base"
CREATING = "creating"
FILLING = "filling"
COMPLETE = "complete"
DRAINING = "draining"

ALIVE = "alive"
SUSPECT = "suspect"
DEAD = "dead"
#: Silence after which a host is suspect, as a share of that after which it is dead.
SUSPECT_SHARE = 0.5


class Distance(enum.IntEnum):
    """How far apart two hosts are."""

    HOST = 0
    RACK = 1
    ZONE = 2
    ELSEWHERE = 3


@dataclass(frozen=True)
class HostState:
    """A host that reads or serves images.

    :ivar state: "alive"; "suspect" when heartbeats are overdue: nobody new reads from it; "dead"
    :ivar drained: by its operator's wish nobody is to read from it
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
        """Whether it may still serve those that read from it."""
        return self.state != DEAD


@dataclass(frozen=True)
class Location:
    """A replica of the image in question.

    :ivar kind: "master" (on a storage host) or "base" (on a compute host)
    :ivar state: "creating", "filling", "complete" or "draining" (about to go)
    :ivar parent: id of the location that it reads from, None if it needs none
    :ivar age: seconds since it was last heard of
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

    :ivar fanout: children of one base, never more
    :ivar storage_fanout: children of all masters of an image together, while another location
        has room
    :ivar creating: seconds for which a location that is being created is believed in
    :ivar sources: length of a plan
    """

    fanout: int = 2
    storage_fanout: int = 2
    creating: float = 120.0
    sources: int = 3


def distance(one: HostState, other: HostState) -> Distance:
    """Racks are named within their zone, so equal rack names in two zones are two racks."""
    if one.host == other.host:
        return Distance.HOST
    if one.zone != other.zone:
        return Distance.ELSEWHERE
    return Distance.RACK if one.rack == other.rack else Distance.ZONE


def state_of(silent: float, timeout: float) -> str:
    """What a host is that was last heard of ``silent`` seconds ago.

    :param timeout: seconds of silence after which it is dead
    """
    if silent > timeout:
        return DEAD
    return SUSPECT if silent > timeout * SUSPECT_SHARE else ALIVE


def choose(
    child: HostState,
    hosts: Mapping[str, HostState],
    locations: Iterable[Location],
    limits: Limits,
    keep: bool = False,
    exclude: Collection[str] = (),
) -> tuple[Location, ...]:
    """The locations that ``child`` may read the image from, best first, a master last.

    The first is its parent, the others are spares. There is no master among them when ``child``
    excludes all that are fit; and when none is alive, complete bases alone can be sources: whatever
    else there is still reads from somebody. Empty if nothing is left.

    :param hosts: every known host by its name
    :param locations: every location of the image, the child's own (if any) among them
    :param keep: stay with the present parent if it still serves
    :param exclude: names of hosts that do not work for ``child``
    """
    everything = {location.id: location for location in locations}
    own = next((loc for loc in everything.values() if loc.host == child.host), None)
    served = _served(everything.values(), hosts, own, limits)
    living_masters = [
        loc for loc in everything.values() if loc.kind == MASTER and _alive(loc.host, hosts)
    ]
    storage_load = sum(served[loc.id] for loc in living_masters) / limits.storage_fanout

    def allowed(location: Location) -> bool:
        """Whether ``child`` might read from it, be its host suspect or not."""
        if location == own or location.host in exclude or not _serves(location, hosts, limits):
            return False
        if location.kind == MASTER:
            return True
        if own is not None and location.depth >= own.depth:
            return False
        return bool(living_masters) or location.state == COMPLETE

    def load(location: Location) -> float:
        """Children against fan-out; 1 is full. All masters together have one bound."""
        return storage_load if location.kind == MASTER else served[location.id] / limits.fanout

    def rank(location: Location) -> tuple[Distance, bool, int, int, int, str]:
        """Load is a bound, and decides among equals only: who went where nobody is yet would go to
        the end of a chain, and through all of it come the blocks that a boot waits for."""
        return (
            distance(child, hosts[location.host]),
            location.kind == MASTER,
            location.depth,
            served[location.id],
            -location.filled,
            location.id,
        )

    ranked = sorted(filter(allowed, everything.values()), key=rank)
    fit = [location for location in ranked if hosts[location.host].state == ALIVE]
    masters = [location for location in fit if location.kind == MASTER] or [
        location
        for location in ranked
        if location.kind == MASTER  # suspect: better than none
    ]
    room = [location for location in fit if load(location) < 1]
    if not (room or masters):
        return ()
    first = (room or masters)[0]
    if keep and own is not None:
        stay = (loc for loc in ranked if loc.id == own.parent and load(loc) < 1)
        first = next(stay, first)
    if first.kind == MASTER:
        return (first, *(master for master in masters if master != first))[: limits.sources]
    # A spare is not a child, yet it may become one: so spares have room, too.
    depth = depth_below(first) if own is None else own.depth
    spares = [
        location
        for location in room
        if location.kind != MASTER and location != first and location.depth < depth
    ]
    return (first, *spares[: max(limits.sources - 2, 0)], *masters[:1])


def depth_below(parent: Location) -> int:
    """The depth of a new child of ``parent``."""
    return parent.depth + 1


def needs_new_parent(
    child: Location, parent: Location | None, hosts: Mapping[str, HostState]
) -> bool:
    """Whether a base that still fills has lost what it reads from, or is about to lose it.

    :param parent: None if it has none that is known
    """
    if child.state not in {FILLING, DRAINING}:
        return False
    if parent is None:
        return child.state == FILLING  # one that drains may be complete, and need nobody
    host = hosts.get(parent.host)
    return host is None or not host.alive or host.drained or parent.state == DRAINING


def _alive(name: str, hosts: Mapping[str, HostState]) -> bool:
    host = hosts.get(name)
    return host is not None and host.alive


def _believed(location: Location, limits: Limits) -> bool:
    """Whether it is there, or is soon."""
    return location.state != CREATING or location.age <= limits.creating


def _serves(location: Location, hosts: Mapping[str, HostState], limits: Limits) -> bool:
    return (
        _alive(location.host, hosts)
        and not hosts[location.host].drained
        and location.state != DRAINING
        and _believed(location, limits)
    )


def _served(
    locations: Iterable[Location],
    hosts: Mapping[str, HostState],
    own: Location | None,
    limits: Limits,
) -> Counter[str]:
    """Children of every location; those that are dead, given up or the asking host's own are not
    a load."""
    return Counter(
        location.parent
        for location in locations
        if location.parent is not None
        and location != own
        and _alive(location.host, hosts)
        and _believed(location, limits)
    )
