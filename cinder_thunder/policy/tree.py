"""The decisions about an image's tree of replicas: plans, reports, orders, useless masters.

Pure functions on values; :mod:`cinder_thunder.db` reads the values, and writes what is decided in
the same transaction. :mod:`cinder_thunder.policy.ranking` compares possible parents. Times are in
seconds, amounts in bytes.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from cinder_thunder.policy import ranking
from cinder_thunder.policy.ranking import HostState, Limits, Location
from os_brick_thunder.common import errors, wire
from os_brick_thunder.common.policy.content import may_be_same

#: In a report: the base was removed. A location never has this state.
GONE = "gone"
#: States that an agent may report of its base.
REPORTABLE = frozenset({ranking.FILLING, ranking.COMPLETE, ranking.DRAINING, GONE})


@dataclass(frozen=True)
class Assignment:
    """The place of a host in an image's tree.

    :ivar own: its location; None if one is to be made
    :ivar sources: what it may read from, best first; empty if it needs nothing
    :ivar overflow: its parent is a master, which serves as many as it should without it
    """

    own: Location | None
    sources: tuple[Location, ...]
    overflow: bool = False

    @property
    def parent(self) -> str | None:
        """Id of the location that it is a child of from now on; None leaves it as it is."""
        complete = self.own is not None and self.own.state == ranking.COMPLETE
        return None if complete else self.sources[0].id

    @property
    def depth(self) -> int:
        """That of its location: it is fixed when the location is made."""
        if self.own is not None:
            return self.own.depth
        return ranking.OVERFLOW if self.overflow else ranking.depth_below(self.sources[0])


def assign(
    child: HostState,
    hosts: Mapping[str, HostState],
    locations: Collection[Location],
    limits: Limits,
    *,
    for_volume: bool = False,
    keep: bool = False,
    exclude: Collection[str] = (),
    answering: str = "",
    served: Mapping[str, int] | None = None,
) -> Assignment | None:
    """Choose the sources of a host's replica.

    :param hosts: the hosts of these locations, by name
    :param locations: and ``served``: as for :func:`.ranking.choose`
    :param for_volume: a volume is attached: a complete base of its host needs no sources
    :param keep: a base stays with its parent if that still serves
    :param exclude: hosts that do not work for ``child``
    :param answering: the storage host that plans: it is alive, however late its heartbeats are
    :returns: None if there is nothing to read from
    """
    if answering in hosts:
        hosts = {**hosts, answering: replace(hosts[answering], state=ranking.ALIVE)}
    own = next((location for location in locations if location.host == child.host), None)
    if served is None:
        served = ranking.count(locations, hosts, own, limits)
    sources = ranking.choose(child, hosts, locations, limits, keep, exclude, served)
    complete = own is not None and own.state == ranking.COMPLETE
    if not sources and not (complete and for_volume):
        return None
    return Assignment(own, sources, _overflows(sources, served, limits))


def _overflows(sources: Sequence[Location], served: Mapping[str, int], limits: Limits) -> bool:
    if not sources or sources[0].kind != ranking.MASTER:
        return False  # otherwise all of them are masters
    return sum(served.get(source.id, 0) for source in sources) >= limits.storage_fanout


def check_own(host: str, image_id: str, locations: Iterable[Location]) -> None:
    """Check that a host has no base of what an image was before its id was used again.

    :raises errors.NoReplica: it has; it would be taken for one of the image
    """
    if any(found.host == host and found.state == ranking.STALE for found in locations):
        raise errors.NoReplica(
            f"{host} has a base of what image {image_id} was before: it is removed first"
        )


def reported(
    own: Location, report: wire.LocationReport, source: Location | None, content: str = ""
) -> Location:
    """A base's location after its agent's report. A complete base reads from nothing.

    :param content: of the image
    :param report: of a base that exists: its state is not "gone"
    :param source: the location on the host that the report names; None if it names none, or one
        without a location, which leaves the parent as it is
    """
    parent, depth = own.parent, own.depth
    rebuilt = bool(content) and report.content == content
    if not may_be_same(report.content, content) or (own.state == ranking.STALE and not rebuilt):
        return replace(own, state=ranking.STALE, filled=report.filled, parent=None)
    if source is not None:
        parent = source.id
    elif report.source is None and report.state == ranking.COMPLETE:
        parent = None
    if report.state == ranking.COMPLETE:
        depth = 0
    return replace(own, state=report.state, filled=report.filled, parent=parent, depth=depth)


def found_again(report: wire.LocationReport, deepest: int) -> Location:
    """A location for a base whose row was lost.

    It is deeper than all others, since nothing that may read from it may be a source of its own.

    :param deepest: the depth of the deepest location of the image
    """
    return Location(
        report.location_id,
        report.host,
        ranking.BASE,
        ranking.CREATING,
        None,
        deepest + 1,
        report.filled,
    )


@dataclass(frozen=True)
class HeldBase:
    """A base, as far as its host's orders depend on it.

    :ivar parent: None if it has none, or one that is not recorded
    :ivar deleted: the image was deleted
    :ivar needed: some volume is a clone of the image
    :ivar movable: its parent is a master that serves too many, and a base has room for it
    """

    image_id: str
    location: Location
    parent: Location | None
    deleted: bool
    needed: bool
    movable: bool = False


def orders(
    bases: Iterable[HeldBase],
    hosts: Mapping[str, HostState],
    returned: float | None,
    timeout: float,
) -> wire.Orders:
    """What a host should change about its bases.

    A host that returns after a silence may have missed the heartbeats of others, or the cause of
    its silence may have silenced them, too: their deaths count only once they had the time to be
    heard of again.

    :param hosts: those of the parents, by name
    :param returned: seconds since the host was heard of again; None if it never was silent
    :param timeout: seconds of silence after which a host is dead
    """
    if returned is not None and returned <= timeout:
        hosts = {name: replace(host, state=ranking.ALIVE) for name, host in hosts.items()}
    reparent, remove = [], []
    for base in bases:
        if base.location.state == ranking.STALE or (base.deleted and not base.needed):
            remove.append(base.image_id)
        elif base.movable or ranking.needs_new_parent(base.location, base.parent, hosts):
            reparent.append(base.image_id)
    return wire.Orders(tuple(reparent), tuple(remove))


@dataclass(frozen=True)
class HeldMaster:
    """A master, as far as it depends on it whether it stays.

    :ivar deleted: the image was deleted
    :ivar cloned: volumes on the same storage host share blocks with it
    :ivar readers: hosts that have a base of the image
    """

    image_id: str
    deleted: bool
    cloned: bool
    readers: frozenset[str]


def useless_masters(masters: Iterable[HeldMaster], hosts: Mapping[str, HostState]) -> list[str]:
    """Images whose masters can be removed: no volume is a clone, no living base may read from it.

    :param hosts: those of the readers, by name
    """
    alive = {name for name, host in hosts.items() if host.alive}
    return [
        master.image_id
        for master in masters
        if master.deleted and not master.cloned and not master.readers & alive
    ]
