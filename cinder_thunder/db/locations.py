"""Locations: the trees of replicas.

The row of an image is the lock of its tree: a plan takes it (``SELECT … FOR UPDATE``), so that two
trackers that plan at once see each other's load. What is planned, what a report changes and what a
host is ordered to do is decided in :mod:`cinder_thunder.policy.tree`.
"""

from __future__ import annotations

import functools
import json
import math
import time
import uuid
from collections.abc import Collection
from datetime import datetime, timedelta
from typing import Any

import sqlalchemy as sa
from sqlalchemy.orm import Session

from cinder_thunder.db import models, orders
from cinder_thunder.db.candidates import location_of, surroundings
from cinder_thunder.db.engine import Transactions, retried
from cinder_thunder.db.values import Image, PlannedSources
from cinder_thunder.db.volumes import write_stack
from cinder_thunder.policy import ranking, tree
from os_brick_thunder.common import errors, wire
from os_brick_thunder.common.policy.extents import Extents

#: Seconds between two counts of an image's children for want of room.
RECOUNT_AFTER = 10.0


class LocationTable:
    """The locations of all images."""

    def __init__(self, transactions: Transactions) -> None:
        self._transactions = transactions
        self._recounted: dict[str, float] = {}  # image -> time.monotonic()

    @retried
    def plan(
        self,
        image_id: str,
        child: wire.Topology,
        limits: ranking.Limits,
        volume_id: str | None = None,
        stack_id: str = "",
        keep: bool = False,
        exclude: Collection[str] = (),
        answering: str = "",
    ) -> PlannedSources | None:
        """Choose the sources of ``child``'s replica, and record it as a child of the first one.

        With ``volume_id`` its stack, ``stack_id``, is recorded in the same transaction. The other
        parameters and the cases are those of :func:`cinder_thunder.policy.tree.assign`.

        :returns: None if there is nothing that it could read from
        :raises errors.NoReplica: it has a base of what the image was before
        """
        with self._transactions.write() as session:
            # First the lock, then the first plain read: InnoDB takes its snapshot there, and so
            # sees what the last holder of the lock wrote.
            image = _locked(session, image_id, "size", "allocated", "root", *_HASH)
            if image is None:
                return None
            for again in (False, True):
                around = surroundings(
                    self._transactions, session, image_id, child, limits, exclude, answering
                )
                tree.check_own(child.host, image_id, around.locations)
                assignment = tree.assign(
                    ranking.HostState(child.host, child.rack, child.zone),
                    around.hosts,
                    around.locations,
                    limits,
                    for_volume=volume_id is not None,
                    keep=keep,
                    exclude=exclude,
                    answering=answering,
                    served=around.served,
                )
                if again or (assignment is not None and not assignment.overflow):
                    break
                if not self._recount_full(session, image_id, limits):
                    break
            if assignment is None:
                return None
            location_id = self._put_assignment(session, image_id, child, assignment)
            if volume_id is not None:
                write_stack(self._transactions, session, volume_id, child.host, "cached", stack_id)
        hosts = around.hosts
        return PlannedSources(
            Image(
                image_id,
                image.size,
                _extents(image.allocated),
                content=content_of(image.os_hash_algo, image.os_hash_value),
                root=image.root,
            ),
            location_id,
            tuple(
                wire.Source(found.id, found.host, found.kind, found.host, hosts[found.host].address)
                for found in assignment.sources
            ),
        )

    def _put_assignment(
        self, session: Session, image_id: str, child: wire.Topology, assignment: tree.Assignment
    ) -> str:
        """:returns: the id of the host's location"""
        own, parent = assignment.own, assignment.parent
        row: Any = models.LocationRow.__table__
        now = self._transactions.now()
        if own is None:
            location_id = str(uuid.uuid4())
            values = {
                "id": location_id, "image_id": image_id, "host": child.host,
                "rack": child.rack, "zone": child.zone,
                "kind": ranking.BASE, "state": ranking.CREATING, "parent_id": parent,
                "depth": assignment.depth, "filled": 0, "portal": "", "iqn": "", "lun": 0,
                "children": 0, "updated_at": now,
            }  # fmt: skip
            session.execute(sa.insert(row), values)
            move_child(session, None, parent)
            return location_id
        if parent is not None:
            session.execute(
                sa.update(row).where(row.c.id == own.id), {"parent_id": parent, "updated_at": now}
            )
            move_child(session, own.parent, parent)
        return own.id

    def _recount_full(self, session: Session, image_id: str, limits: ranking.Limits) -> bool:
        """Count children again, as there is no room left for one: some may be dead.

        :returns: False if it was done a moment ago, or changes nothing
        """
        now = time.monotonic()
        if now - self._recounted.get(image_id, -math.inf) < RECOUNT_AFTER:
            return False
        self._recounted[image_id] = now
        return self._recount(session, image_id, limits.creating)

    @retried
    def recount(self, image_id: str, creating: float) -> None:
        """Count the children of an image's locations anew: hosts have died, or have returned.

        Those on dead hosts do not count, nor do those that were planned ``creating`` seconds ago
        and never reported.
        """
        with self._transactions.write() as session:
            if lock_tree(session, image_id):
                self._recount(session, image_id, creating)

    def _recount(self, session: Session, image_id: str, creating: float) -> bool:
        """:returns: whether a number has changed"""
        row, host, now = models.LocationRow, models.HostRow, self._transactions.now()
        dead = now - timedelta(seconds=self._transactions.heartbeat_timeout)
        late = now - timedelta(seconds=creating)
        counted = (
            sa.select(row.parent_id, sa.func.count().label("found"))
            .join(host, host.host == row.host)
            .where(
                row.image_id == image_id,
                host.heartbeat_at >= dead,
                sa.or_(row.state != ranking.CREATING, row.updated_at >= late),
            )
            .group_by(row.parent_id)
            .subquery()
        )
        found = sa.func.coalesce(counted.c.found, 0)
        wrong = session.execute(
            sa.select(row.id, found)
            .join(counted, counted.c.parent_id == row.id, isouter=True)
            .where(row.image_id == image_id, row.children != found)
        ).all()
        for location_id, children in wrong:
            session.execute(sa.update(row).where(row.id == location_id).values(children=children))
        return bool(wrong)

    def report(self, report: wire.LocationReport) -> None:
        """Record what an agent says of its base. One whose row was lost is recorded again.

        A base of other content than the image's is no replica of it, and is to be removed. Only
        what changes the tree takes its lock.
        """
        if not self._refresh(report):
            self._record(report)

    @retried
    def _refresh(self, report: wire.LocationReport) -> bool:
        """Record what does not change the tree, without its lock.

        :returns: False if the report changes the tree, or somebody else has meanwhile
        """
        now, row, image = self._transactions.now(), models.LocationRow, models.ImageRow
        here = row.image_id == report.image_id
        with self._transactions.read() as session:
            known = session.execute(
                sa.select(row.__table__, image.os_hash_algo, image.os_hash_value)
                .join(image, image.id == row.image_id)
                .where(here, row.host == report.host)
            ).one_or_none()
            if known is None or report.state == tree.GONE:
                return False
            source = None
            if report.source:
                source = session.execute(
                    sa.select(row.__table__).where(here, row.host == report.source)
                ).one_or_none()
        if known.kind == ranking.MASTER:
            raise _not_a_base(report)
        own = location_of(known, now)
        content = content_of(known.os_hash_algo, known.os_hash_value)
        base = tree.reported(own, report, source and location_of(source, now), content)
        if (base.parent, base.depth) != (own.parent, own.depth):
            return False
        values = {
            "state": base.state, "filled": base.filled,
            "portal": report.portal, "iqn": report.iqn, "lun": report.lun,
        }  # fmt: skip
        if all(getattr(known, name) == value for name, value in values.items()):
            return True
        table: Any = row.__table__
        as_known = [table.c[name] == getattr(known, name) for name in ("id", "state", "parent_id")]
        with self._transactions.write() as session:
            done: Any = session.execute(
                sa.update(table).where(*as_known), {**values, "updated_at": now}
            )
        return bool(done.rowcount)

    @retried
    def _record(self, report: wire.LocationReport) -> None:
        now = self._transactions.now()
        with self._transactions.write() as session:
            image = _locked(session, report.image_id, *_HASH)
            row = location_on(session, report.image_id, report.host)
            if row is not None and row.kind == ranking.MASTER:
                raise _not_a_base(report)
            if report.state == tree.GONE:
                if row is not None:
                    delete_location(session, row)
                return
            if image is None:
                return  # nothing can use it: the image has neither a master nor a volume
            source = report.source and location_on(session, report.image_id, report.source)
            if row is None:
                own = tree.found_again(report, _deepest(session, report.image_id))
                row = new_location(session, report.image_id, report.host, own.id)
                row.kind = own.kind
            else:
                own = location_of(row, now)
            content = content_of(image.os_hash_algo, image.os_hash_value)
            base = tree.reported(own, report, location_of(source, now) if source else None, content)
            row.state, row.filled = base.state, base.filled
            row.parent_id, row.depth = base.parent, base.depth
            row.portal, row.iqn, row.lun = report.portal, report.iqn, report.lun
            row.updated_at = now
            session.add(row)
            session.flush()
            move_child(session, own.parent, base.parent)

    def of(self, image_id: str) -> list[ranking.Location]:
        """Every known replica of the image."""
        with self._transactions.read() as session:
            return self._of(session, image_id)

    def _of(self, session: Session, image_id: str) -> list[ranking.Location]:
        now = self._transactions.now()
        row = models.LocationRow
        rows = session.execute(
            sa.select(
                row.id, row.host, row.kind, row.state, row.parent_id, row.depth, row.filled,
                row.updated_at,
            ).where(row.image_id == image_id)
        )  # fmt: skip
        return [location_of(found, now) for found in rows]

    @retried
    def drop(self, image_id: str, host: str) -> None:
        """Forget the host's replica, of whatever kind; absent is success."""
        with self._transactions.write() as session:
            lock_tree(session, image_id)
            row = location_on(session, image_id, host)
            if row is not None:
                delete_location(session, row)

    def images_on(self, host: str) -> list[str]:
        """Images of which a host has, or is to have, a replica."""
        row = models.LocationRow
        with self._transactions.read() as session:
            return list(session.scalars(sa.select(row.image_id).where(row.host == host)))

    def reap(self, left: float) -> int:
        """Delete bases that were planned ``left`` seconds ago, and never reported.

        :returns: how many
        """
        row = models.LocationRow
        since = self._transactions.now() - timedelta(seconds=left)
        with self._transactions.read() as session:
            found = session.execute(
                sa.select(row.image_id, row.host).where(
                    row.state == ranking.CREATING, row.updated_at < since
                )
            ).all()
        for image_id, host in found:
            self._drop_unreported(image_id, host, since)
        return len(found)

    @retried
    def _drop_unreported(self, image_id: str, host: str, since: datetime) -> None:
        with self._transactions.write() as session:
            lock_tree(session, image_id)
            row = location_on(session, image_id, host)
            if row is not None and row.state == ranking.CREATING and row.updated_at < since:
                delete_location(session, row)

    def orders(self, child: wire.Topology, limits: ranking.Limits) -> wire.Orders:
        """What should change on a host that has just sent a heartbeat."""
        return orders.of_host(self._transactions, child, limits)


# What several subjects do with rows of locations


def content_of(algorithm: str | None, value: str | None) -> str:
    """As :data:`.formats.Content`; empty if it is not known."""
    return f"{algorithm}:{value}" if algorithm and value else ""


def _not_a_base(report: wire.LocationReport) -> errors.InvalidRequest:
    return errors.InvalidRequest(
        f"{report.host} is a storage host with a master of image {report.image_id}, and agents "
        "report bases: give the agent another name (host in [thunder])"
    )


def lock_tree(session: Session, image_id: str) -> bool:
    """Take the lock of an image's tree until the transaction ends.

    :returns: False if there is no such image
    """
    return _locked(session, image_id, "id") is not None


#: What tells an image's content, see :func:`content_of`.
_HASH = "os_hash_algo", "os_hash_value"


def _locked(session: Session, image_id: str, *columns: str) -> Any:
    """Take the lock of an image's tree, and read columns of its row with it; None: no such image"""
    return session.execute(_lock(*columns), {"image": image_id}).one_or_none()


@functools.cache
def _lock(*columns: str) -> Any:
    image = models.ImageRow.__table__.c
    return (
        sa.select(*(image[name] for name in columns))
        .where(image.id == sa.bindparam("image"))
        .with_for_update()
    )


@functools.lru_cache(maxsize=32)
def _extents(allocated: str) -> Extents:
    """What is allocated of an image, which may be many ranges, and is the same in each plan."""
    return Extents.from_wire(json.loads(allocated))


def location_on(session: Session, image_id: str, host: str) -> models.LocationRow | None:
    row = models.LocationRow
    return session.scalar(sa.select(row).where(row.image_id == image_id, row.host == host))


def _deepest(session: Session, image_id: str) -> int:
    row = models.LocationRow
    found = session.scalar(sa.select(sa.func.max(row.depth)).where(row.image_id == image_id))
    return int(found or 0)


def new_location(
    session: Session, image_id: str, host: str, location_id: str = ""
) -> models.LocationRow:
    """A row of which kind, state, parent and depth are still missing.

    :param location_id: empty for a new one
    """
    known = models.HostRow
    place = session.execute(
        sa.select(known.rack, known.zone).where(known.host == host)
    ).one_or_none()
    rack, zone = place or ("", "")
    return models.LocationRow(
        id=location_id or str(uuid.uuid4()),
        image_id=image_id,
        host=host,
        rack=rack,
        zone=zone,
        children=0,
        filled=0,
        portal="",
        iqn="",
        lun=0,
    )


def move_child(session: Session, before: str | None, after: str | None) -> None:
    """Count a location that has another parent now; None is no parent."""
    if before == after:
        return
    if before is not None:
        session.execute(_counted(-1), {"location": before})
    if after is not None:
        session.execute(_counted(1), {"location": after})


@functools.cache
def _counted(more: int) -> Any:
    row: Any = models.LocationRow.__table__
    update = sa.update(row).where(row.c.id == sa.bindparam("location"), row.c.children + more >= 0)
    return update.values(children=row.c.children + more)


def delete_location(session: Session, row: models.LocationRow) -> None:
    """Delete a location, and the image with its last one. Its children lose their parent."""
    location, image, profile = models.LocationRow, models.ImageRow, models.ProfileRow
    session.execute(sa.update(location).where(location.parent_id == row.id).values(parent_id=None))
    move_child(session, row.parent_id, None)
    session.delete(row)
    session.flush()
    others = sa.select(location.id).where(location.image_id == row.image_id)
    if session.scalars(others.limit(1)).first() is None:
        session.execute(sa.delete(image).where(image.id == row.image_id))
        session.execute(sa.delete(profile).where(profile.image_id == row.image_id))
