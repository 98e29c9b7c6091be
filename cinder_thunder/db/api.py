"""The tracker's store: every access to its tables, each method one short transaction.

Methods take and return plain values; no session or row leaves this module, and no device is
touched inside a transaction. The row of an image is the lock of its tree of locations: who plans
takes it (``SELECT … FOR UPDATE``), so two trackers that plan at once see each other's load.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import Any, ParamSpec, TypeVar

import sqlalchemy as sa
from oslo_db import api as oslo_db_api
from oslo_db import exception as db_exc
from oslo_db.sqlalchemy import enginefacade
from oslo_utils import timeutils
from sqlalchemy.orm import Session, aliased

from cinder_thunder.db import models
from cinder_thunder.policy import ranking
from os_brick_thunder.common import errors, wire
from os_brick_thunder.common.policy.extents import Extents

#: Seconds of silence after which a host counts as dead, unless configured otherwise.
HEARTBEAT_TIMEOUT = 20.0

_P = ParamSpec("_P")
_R = TypeVar("_R")


def _retried(method: Callable[_P, _R]) -> Callable[_P, _R]:
    """Two that insert the same row at once, or deadlock: the one that lost tries again."""
    retry = oslo_db_api.wrap_db_retry(
        max_retries=8,
        retry_interval=0.05,
        inc_retry_interval=True,
        max_retry_interval=1,
        jitter=True,
        retry_on_deadlock=True,
        exception_checker=lambda error: isinstance(error, db_exc.DBDuplicateEntry),
    )
    retried: Callable[_P, _R] = retry(method)
    return retried


@enginefacade.transaction_context_provider
class _Context:
    """Carries the session of one transaction, as oslo.db wants it."""


@dataclass(frozen=True)
class Image:
    """An image as a master holds it; ``size`` and ``allocated`` in bytes.

    ``signature_verified`` is None where nobody asked for a verification, ``manifest`` where there
    is none, or the answer is one without it. ``gone``: Glance has it no more.
    """

    id: str
    size: int
    allocated: Extents
    signature_verified: bool | None = None
    manifest: wire.Manifest | None = None
    gone: bool = False


@dataclass(frozen=True)
class KnownHost:
    """A host and when it was heard of last (seconds ago).

    :ivar state: "alive", "suspect" or "dead"
    :ivar drained: by its operator's wish nobody is to read from it
    :ivar free: bytes that a storage host can still allocate; None if it did not say
    """

    host: str
    kind: str
    rack: str
    zone: str
    address: str
    silent: float
    state: str
    drained: bool = False
    free: int | None = None

    @property
    def alive(self) -> bool:
        return self.state != ranking.DEAD


@dataclass(frozen=True)
class Master:
    """What a clone of a master needs to know: the image's size in bytes, and its signature."""

    size: int
    signature_verified: bool | None


@dataclass(frozen=True)
class Holders:
    """Who holds the masters of an image that Glance still has; ``size``: bytes of each."""

    image_id: str
    size: int
    hosts: frozenset[str]


@dataclass(frozen=True)
class Volume:
    """A volume that shares blocks with its image's master on ``host`` (a backend)."""

    id: str
    image_id: str
    host: str


@dataclass(frozen=True)
class Stack:
    """``host`` has devices for a volume; ``alive``: its heartbeats are not overdue."""

    volume_id: str
    host: str
    mode: str
    alive: bool


@dataclass(frozen=True)
class Planned:
    """Where a host reads an image from: its own location and its sources, best first."""

    image: Image
    location_id: str
    sources: tuple[wire.Source, ...]


class Store:
    """The tables behind one connection URL."""

    def __init__(
        self,
        connection: str,
        heartbeat_timeout: float = HEARTBEAT_TIMEOUT,
        clock: Callable[[], datetime] = timeutils.utcnow,
        **options: Any,
    ) -> None:
        """:param heartbeat_timeout: seconds of silence after which a host counts as dead; after
            half of them it is suspect
        :param options: oslo.db's engine options, as in Cinder's ``[database]``
        """
        self._transactions = enginefacade.transaction_context()
        self._transactions.configure(connection=connection, **options)
        self._timeout = heartbeat_timeout
        self._clock = clock

    @property
    def engine(self) -> sa.Engine:
        engine: sa.Engine = self._transactions.writer.get_engine()
        return engine

    def _read(self) -> Any:
        return self._transactions.reader.using(_Context())

    def _write(self) -> Any:
        return self._transactions.writer.using(_Context())

    # Hosts

    @_retried
    def heartbeat(self, topology: wire.Topology, free: int | None = None) -> None:
        """Register a host, or note that it is alive and where it is.

        :param free: bytes that it can still allocate for masters; None: as it said before
        """
        now = self._clock()
        with self._write() as session:
            row = session.get(models.Host, topology.host)
            if row is None:
                row = models.Host(host=topology.host)
            elif self._state(row.heartbeat_at, now) != ranking.ALIVE:
                row.back_at = now
            row.kind = topology.kind
            row.rack, row.zone = topology.rack, topology.zone
            row.address, row.initiator = topology.address, topology.initiator
            row.heartbeat_at = now
            if free is not None:
                row.free = free
            session.add(row)

    def _state(self, heartbeat_at: datetime, now: datetime) -> str:
        return ranking.state_of((now - heartbeat_at).total_seconds(), self._timeout)

    def _hosts(self, session: Session, among: sa.Select[Any]) -> dict[str, ranking.Host]:
        """:param among: names of those that matter"""
        now = self._clock()
        found = models.Host
        rows = session.execute(
            sa.select(found.host, found.rack, found.zone, found.heartbeat_at, found.drained).where(
                found.host.in_(among)
            )
        )
        return {
            host: ranking.Host(host, rack, zone, self._state(heartbeat_at, now), drained)
            for host, rack, zone, heartbeat_at, drained in rows
        }

    def hosts(self) -> list[KnownHost]:
        """Every host that was ever heard of, by name."""
        now = self._clock()
        with self._read() as session:
            rows = session.scalars(sa.select(models.Host).order_by(models.Host.host))
            return [
                KnownHost(
                    host=row.host,
                    kind=row.kind,
                    rack=row.rack,
                    zone=row.zone,
                    address=row.address,
                    silent=(now - row.heartbeat_at).total_seconds(),
                    state=self._state(row.heartbeat_at, now),
                    drained=row.drained,
                    free=row.free,
                )
                for row in rows
            ]

    @_retried
    def set_drained(self, host: str, drained: bool) -> None:
        """Say whether others may read from a host; those that do are given another parent.

        :raises errors.InvalidRequest: there is no such host
        """
        with self._write() as session:
            row = session.get(models.Host, host)
            if row is None:
                known = ", ".join(
                    session.scalars(sa.select(models.Host.host).order_by(models.Host.host))
                )
                raise errors.InvalidRequest(
                    f"there is no host {host}: known are {known or 'none, as none was heard of'}"
                )
            row.drained = drained

    def orders(self, host: str) -> wire.Orders:
        """What is to change on a host that has just been heard of.

        A host that comes back after silence may have missed the others' return, or whatever kept
        it from us kept them, too: it is not told of dead parents before they had their time.
        """
        now = self._clock()
        above = aliased(models.Location)
        needed = sa.exists().where(models.Volume.image_id == models.Location.image_id)
        here = (models.Location.host == host, models.Location.kind == ranking.BASE)
        with self._read() as session:
            rows = session.execute(
                sa.select(models.Location, above, models.Image.gone & ~needed)
                .join(models.Image, models.Image.id == models.Location.image_id)
                .join(above, above.id == models.Location.parent_id, isouter=True)
                .where(*here)
                .order_by(models.Location.image_id)
            ).all()
            if not rows:
                return wire.Orders()
            parents = sa.select(models.Location.parent_id).where(*here)
            hosts = self._hosts(session, sa.select(above.host).where(above.id.in_(parents)))
            back_at = session.scalar(sa.select(models.Host.back_at).where(models.Host.host == host))
        if back_at is not None and (now - back_at).total_seconds() <= self._timeout:
            hosts = {name: replace(known, state=ranking.ALIVE) for name, known in hosts.items()}
        reparent, remove = [], []
        for row, parent, useless in rows:
            location = _location(row, now)
            if useless:
                remove.append(row.image_id)
            elif ranking.bereft(location, parent and _location(parent, now), hosts):
                reparent.append(row.image_id)
        return wire.Orders(tuple(reparent), tuple(remove))

    # Masters

    def images(self) -> list[Image]:
        """Every image that has a replica."""
        with self._read() as session:
            rows = session.scalars(sa.select(models.Image).order_by(models.Image.created_at))
            return [
                Image(
                    row.id,
                    row.size,
                    Extents.from_wire(json.loads(row.allocated)),
                    row.signature_verified,
                    gone=row.gone,
                )
                for row in rows
            ]

    def image(self, image_id: str) -> Image | None:
        """An image that has a replica, its manifest included."""
        with self._read() as session:
            row = session.get(models.Image, image_id)
            return row and Image(
                row.id,
                row.size,
                Extents.from_wire(json.loads(row.allocated)),
                row.signature_verified,
                _manifest(row.manifest),
                row.gone,
            )

    def manifest(self, image_id: str) -> wire.Manifest | None:
        """The digests of an image; None if there are none, or no such image."""
        with self._read() as session:
            return _manifest(
                session.scalar(sa.select(models.Image.manifest).where(models.Image.id == image_id))
            )

    @_retried
    def add_master(self, image: Image, host: str) -> None:
        """Record that ``host`` (a backend) holds the whole image as a master.

        What the image's first master said of it stays.
        """
        now = self._clock()
        with self._write() as session:
            known = session.get(models.Image, image.id)
            if known is None:
                known = models.Image(
                    id=image.id,
                    size=image.size,
                    allocated=_json(image.allocated.to_wire()),
                    signature_verified=image.signature_verified,
                    manifest=None,
                    created_at=now,
                )
                session.add(known)
                session.flush()
            if known.manifest is None and image.manifest is not None:
                known.manifest = _json(image.manifest.to_wire())
            row = self._location_on(session, image.id, host)
            if row is None:
                row = models.Location(id=str(uuid.uuid4()), image_id=image.id, host=host)
            row.kind, row.state, row.parent_id = ranking.MASTER, ranking.COMPLETE, None
            row.depth, row.filled = 0, image.allocated.length
            row.portal, row.iqn, row.lun = "", "", 0
            row.updated_at = now
            session.add(row)

    def master(self, image_id: str, host: str) -> Master | None:
        """The master of the image on ``host``; None if it holds none."""
        with self._read() as session:
            row = session.execute(
                sa.select(models.Image.size, models.Image.signature_verified)
                .join(models.Location, models.Location.image_id == models.Image.id)
                .where(
                    models.Image.id == image_id,
                    models.Location.host == host,
                    models.Location.kind == ranking.MASTER,
                )
            ).one_or_none()
            return row and Master(row.size, row.signature_verified)

    def masters(self, host: str) -> set[str]:
        """Ids of the images whose masters ``host`` is said to hold."""
        with self._read() as session:
            return set(
                session.scalars(
                    sa.select(models.Location.image_id).where(
                        models.Location.host == host, models.Location.kind == ranking.MASTER
                    )
                )
            )

    def holders(self) -> list[Holders]:
        """All masters of all images that Glance still has."""
        with self._read() as session:
            rows = session.execute(
                sa.select(models.Location.image_id, models.Location.host, models.Location.filled)
                .join(models.Image, models.Image.id == models.Location.image_id)
                .where(models.Location.kind == ranking.MASTER, ~models.Image.gone)
            ).all()
        sizes = {image_id: filled for image_id, _host, filled in rows}
        hosts: dict[str, set[str]] = {image_id: set() for image_id in sizes}
        for image_id, host, _filled in rows:
            hosts[image_id].add(host)
        return [Holders(image, size, frozenset(hosts[image])) for image, size in sizes.items()]

    @_retried
    def set_gone(self, image_id: str, gone: bool) -> bool:
        """Note whether Glance has an image no more.

        :returns: whether that is news
        """
        with self._write() as session:
            done = session.execute(
                sa.update(models.Image)
                .where(models.Image.id == image_id, models.Image.gone != gone)
                .values(gone=gone)
            )
            return bool(done.rowcount)

    def useless_masters(self, host: str) -> list[str]:
        """Images that Glance has no more and whose masters on ``host`` nobody needs: no volume
        there is made of them, and no host that is alive has a base that may read from them."""
        with self._read() as session:
            bases = sa.select(models.Location.host).where(models.Location.kind == ranking.BASE)
            hosts = self._hosts(session, bases)
            living = {name for name, known in hosts.items() if known.alive}
            made = sa.exists().where(
                models.Volume.image_id == models.Location.image_id, models.Volume.host == host
            )
            images = session.scalars(
                sa.select(models.Location.image_id)
                .join(models.Image, models.Image.id == models.Location.image_id)
                .where(
                    models.Location.host == host,
                    models.Location.kind == ranking.MASTER,
                    models.Image.gone,
                    ~made,
                )
                .order_by(models.Location.image_id)
            ).all()
            readers = session.execute(
                sa.select(models.Location.image_id, models.Location.host).where(
                    models.Location.image_id.in_(images), models.Location.kind == ranking.BASE
                )
            )
            needed = {image_id for image_id, reader in readers if reader in living}
            return [image_id for image_id in images if image_id not in needed]

    @_retried
    def drop_master(self, image_id: str, host: str) -> None:
        """The master is gone; absent is success."""
        with self._write() as session:
            self._lock(session, image_id)
            row = self._location_on(session, image_id, host)
            if row is not None and row.kind == ranking.MASTER:
                self._delete_location(session, row)

    @_retried
    def drop_location(self, image_id: str, host: str) -> None:
        """The host's replica, of whatever kind, is gone; absent is success."""
        with self._write() as session:
            self._lock(session, image_id)
            row = self._location_on(session, image_id, host)
            if row is not None:
                self._delete_location(session, row)

    # Leases

    @_retried
    def acquire_lease(self, name: str, owner: str, seconds: float) -> bool:
        """Take a lease, or keep one that is ``owner``'s, for ``seconds`` from now.

        :returns: False while another owner has it
        """
        now = self._clock()
        with self._write() as session:
            row = session.get(models.Lease, name, with_for_update=True)
            if row is None:
                row = models.Lease(name=name)
                session.add(row)
            elif row.owner != owner and row.expires_at > now:
                return False
            row.owner, row.expires_at = owner, now + timedelta(seconds=seconds)
            return True

    @_retried
    def renew_lease(self, name: str, owner: str, seconds: float) -> bool:
        """:returns: False if it is ``owner``'s no more: it expired, and another one took it"""
        with self._write() as session:
            row = session.get(models.Lease, name, with_for_update=True)
            if row is None or row.owner != owner:
                return False
            row.expires_at = self._clock() + timedelta(seconds=seconds)
            return True

    @_retried
    def release_lease(self, name: str, owner: str) -> None:
        """Give a lease back; one that is not ``owner``'s (any more) stays."""
        with self._write() as session:
            session.execute(
                sa.delete(models.Lease).where(
                    models.Lease.name == name, models.Lease.owner == owner
                )
            )

    @_retried
    def release_leases(self, owner: str) -> None:
        """Give back whatever ``owner`` held before it was restarted."""
        with self._write() as session:
            session.execute(sa.delete(models.Lease).where(models.Lease.owner == owner))

    # Volumes

    @_retried
    def put_volume(self, volume: Volume) -> None:
        with self._write() as session:
            session.merge(models.Volume(id=volume.id, image_id=volume.image_id, host=volume.host))

    def volume(self, volume_id: str) -> Volume | None:
        with self._read() as session:
            row = session.get(models.Volume, volume_id)
            return row and Volume(row.id, row.image_id, row.host)

    def volumes(self, host: str) -> set[str]:
        """Ids of the volumes that share an image on ``host``."""
        with self._read() as session:
            return set(
                session.scalars(sa.select(models.Volume.id).where(models.Volume.host == host))
            )

    def known_volumes(self) -> set[str]:
        """Ids of all volumes that share an image, or have devices on some host."""
        with self._read() as session:
            sharing = session.scalars(sa.select(models.Volume.id)).all()
            return {*sharing, *session.scalars(sa.select(models.Stack.volume_id))}

    def volumes_of(self, image_id: str, host: str) -> int:
        """How many volumes on ``host`` (a backend) share blocks with its master of the image."""
        with self._read() as session:
            found = session.scalar(
                sa.select(sa.func.count())
                .select_from(models.Volume)
                .where(models.Volume.image_id == image_id, models.Volume.host == host)
            )
            return int(found or 0)

    @_retried
    def inherit(self, volume_id: str, source_id: str, host: str) -> None:
        """The volume was cloned on ``host`` from another one: it shares the same image, if any."""
        with self._write() as session:
            source = session.get(models.Volume, source_id)
            if source is not None and source.host == host:
                session.merge(models.Volume(id=volume_id, image_id=source.image_id, host=host))

    @_retried
    def drop_volume(self, volume_id: str) -> None:
        """The volume is gone, or shares no blocks any more; absent is success."""
        with self._write() as session:
            session.execute(sa.delete(models.Stack).where(models.Stack.volume_id == volume_id))
            session.execute(sa.delete(models.Volume).where(models.Volume.id == volume_id))

    # Stacks

    def stacks(self, volume_id: str) -> list[Stack]:
        """Every host that has, or is about to have, devices for the volume."""
        with self._read() as session:
            mine = models.Stack.volume_id == volume_id
            hosts = self._hosts(session, sa.select(models.Stack.host).where(mine))
            rows = session.scalars(sa.select(models.Stack).where(mine))
            return [
                Stack(
                    row.volume_id, row.host, row.mode, row.host in hosts and hosts[row.host].alive
                )
                for row in rows
            ]

    def direct(self, host: str) -> list[str]:
        """Volumes that share an image and that a host was told to use without a cache."""
        with self._read() as session:
            return list(
                session.scalars(
                    sa.select(models.Stack.volume_id)
                    .join(models.Volume, models.Volume.id == models.Stack.volume_id)
                    .where(models.Stack.host == host, models.Stack.mode == "direct")
                    .order_by(models.Stack.volume_id)
                )
            )

    @_retried
    def put_stack(self, volume_id: str, host: str, mode: str) -> None:
        with self._write() as session:
            self._put_stack(session, volume_id, host, mode)

    def _put_stack(self, session: Session, volume_id: str, host: str, mode: str) -> None:
        row = session.get(models.Stack, (volume_id, host))
        if row is None:
            row = models.Stack(volume_id=volume_id, host=host, created_at=self._clock())
            session.add(row)
        row.mode = mode

    @_retried
    def release(self, volume_id: str, host: str) -> None:
        """The host has no devices for the volume any more; absent is success."""
        with self._write() as session:
            session.execute(
                sa.delete(models.Stack).where(
                    models.Stack.volume_id == volume_id, models.Stack.host == host
                )
            )

    # Locations

    @_retried
    def plan(
        self,
        image_id: str,
        child: wire.Topology,
        limits: ranking.Limits,
        volume_id: str | None = None,
        keep: bool = False,
        exclude: Collection[str] = (),
        answering: str = "",
    ) -> Planned | None:
        """Choose the sources of ``child``'s replica, and record it as the first one's child.

        With ``volume_id`` its stack is recorded in the same transaction. A volume whose host has a
        complete base needs no sources.

        :param keep: a base that has a fit parent stays with it
        :param exclude: hosts that do not work for ``child``
        :param answering: the storage host that asks here: it lives, however late its heartbeats are
        :returns: None if there is nothing that it could read from
        """
        with self._write() as session:
            # First the lock, then the first plain read: InnoDB takes its snapshot there, and so
            # sees what the last holder of the lock wrote.
            image = session.execute(
                sa.select(models.Image.size, models.Image.allocated)
                .where(models.Image.id == image_id)
                .with_for_update()
            ).one_or_none()
            if image is None:
                return None
            holders = sa.select(models.Location.host).where(models.Location.image_id == image_id)
            hosts = self._hosts(session, holders)
            if answering in hosts:
                hosts[answering] = replace(hosts[answering], state=ranking.ALIVE)
            locations = self._locations(session, image_id)
            here = ranking.Host(child.host, child.rack, child.zone)
            own = next((loc for loc in locations if loc.host == child.host), None)
            chosen = ranking.choose(here, hosts, locations, limits, keep, exclude)
            complete = own is not None and own.state == ranking.COMPLETE
            if not chosen and not (complete and volume_id is not None):
                return None
            if own is None:
                row = self._new_base(image_id, child.host, ranking.depth_below(chosen[0]))
                row.parent_id = chosen[0].id
                session.add(row)
                location_id = row.id
            else:
                location_id = own.id
                if not complete:
                    session.execute(
                        sa.update(models.Location)
                        .where(models.Location.id == own.id)
                        .values(parent_id=chosen[0].id, updated_at=self._clock())
                    )
            if volume_id is not None:
                self._put_stack(session, volume_id, child.host, "cached")
        return Planned(
            Image(image_id, image.size, Extents.from_wire(json.loads(image.allocated))),
            location_id,
            tuple(wire.Source(loc.id, loc.host, loc.kind, loc.host) for loc in chosen),
        )

    @_retried
    def report(self, report: wire.LocationReport) -> None:
        """Note what an agent says of its base.

        A base that is not known (its row was lost) becomes known again, deeper than all others:
        nobody can be its source that might read from it. One that is complete reads from nobody.
        """
        with self._write() as session:
            image = self._lock(session, report.image_id)
            row = self._location_on(session, report.image_id, report.host)
            if report.state == "gone":
                if row is not None:
                    self._delete_location(session, row)
                return
            if not image:
                return  # of no use to anybody: no master, no volume
            if row is None:
                known = self._locations(session, report.image_id)
                depth = 1 + max((location.depth for location in known), default=0)
                row = self._new_base(report.image_id, report.host, depth, report.location_id)
                session.add(row)
            row.state, row.filled = report.state, report.filled
            row.portal, row.iqn, row.lun = report.portal, report.iqn, report.lun
            row.updated_at = self._clock()
            source = report.source and self._location_on(session, report.image_id, report.source)
            if source:
                row.parent_id = source.id
            elif report.source is None and report.state == ranking.COMPLETE:
                row.parent_id = None
            if report.state == ranking.COMPLETE:
                row.depth = 0

    def locations(self, image_id: str) -> list[ranking.Location]:
        """Every known replica of the image."""
        with self._read() as session:
            return self._locations(session, image_id)

    def _lock(self, session: Session, image_id: str) -> bool:
        """Take the lock of an image's tree until the transaction ends.

        :returns: False if there is no such image
        """
        found = session.scalar(
            sa.select(models.Image.id).where(models.Image.id == image_id).with_for_update()
        )
        return found is not None

    def _locations(self, session: Session, image_id: str) -> list[ranking.Location]:
        now = self._clock()
        found = models.Location
        rows = session.execute(
            sa.select(
                found.id, found.host, found.kind, found.state, found.parent_id, found.depth,
                found.filled, found.updated_at,
            ).where(found.image_id == image_id)
        )  # fmt: skip
        return [_location(row, now) for row in rows]

    def _location_on(self, session: Session, image_id: str, host: str) -> models.Location | None:
        return session.scalar(
            sa.select(models.Location).where(
                models.Location.image_id == image_id, models.Location.host == host
            )
        )

    def _new_base(
        self, image_id: str, host: str, depth: int, location_id: str | None = None
    ) -> models.Location:
        return models.Location(
            id=location_id or str(uuid.uuid4()),
            image_id=image_id,
            host=host,
            kind=ranking.BASE,
            state=ranking.CREATING,
            parent_id=None,
            depth=depth,
            filled=0,
            portal="",
            iqn="",
            lun=0,
            updated_at=self._clock(),
        )

    def _delete_location(self, session: Session, row: models.Location) -> None:
        session.execute(
            sa.update(models.Location)
            .where(models.Location.parent_id == row.id)
            .values(parent_id=None)
        )
        session.delete(row)
        session.flush()
        others = sa.select(models.Location.id).where(models.Location.image_id == row.image_id)
        if session.scalars(others).first() is None:
            session.execute(sa.delete(models.Image).where(models.Image.id == row.image_id))


def _json(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"))


def _manifest(text: str | None) -> wire.Manifest | None:
    return None if text is None else wire.parse(wire.Manifest, json.loads(text))


def _location(row: Any, now: datetime) -> ranking.Location:
    """:param row: a location, or its columns"""
    return ranking.Location(
        id=row.id,
        host=row.host,
        kind=row.kind,
        state=row.state,
        parent=row.parent_id,
        depth=row.depth,
        filled=row.filled,
        age=(now - row.updated_at).total_seconds(),
    )
