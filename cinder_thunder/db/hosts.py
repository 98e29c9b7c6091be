"""Hosts: heartbeats, and what operators exclude."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import Any

import sqlalchemy as sa
from sqlalchemy.orm import Session

from cinder_thunder.db import models
from cinder_thunder.db.engine import Transactions, retried
from cinder_thunder.db.values import Heard, KnownHost
from cinder_thunder.policy import ranking
from os_brick_thunder.common import errors, wire
from os_brick_thunder.common.policy.timelimits import SUSPECT_SHARE

#: Seconds for which a host that was refused is shown beside the one that has its name.
RIVAL_COUNTS = 600.0


class HostTable:
    """Hosts with replicas, or with space for them."""

    def __init__(self, transactions: Transactions) -> None:
        self._transactions = transactions

    @retried
    def heard(self, topologies: Sequence[wire.Topology]) -> list[Heard | None]:
        """Record that compute hosts are alive, with two statements for all of them.

        :returns: for each of them; None: its row is not as it says, or it was silent for long, and
            :meth:`heartbeat` has to see to it
        """
        now = self._transactions.now()
        since = now - timedelta(seconds=self._transactions.heartbeat_timeout * SUSPECT_SHARE)
        with self._transactions.write() as session:
            rows = session.execute(_heard(), {"hosts": [each.host for each in topologies]})
            found = {row.host: row for row in rows}
            answers = [_answer(found.get(each.host), each, since) for each in topologies]
            alive = [
                each.host
                for each, answer in zip(topologies, answers, strict=True)
                if answer is not None
            ]
            if alive:
                row: Any = models.HostRow.__table__  # not the ORM, which would take longer
                session.execute(sa.update(row).where(row.c.host.in_(alive)), {"heartbeat_at": now})
        return answers

    @retried
    def heartbeat(self, topology: wire.Topology, free: int | None = None) -> None:
        """Register a host, or record that it is alive and where it is.

        :param free: bytes that it can still allocate for masters; None leaves the last value
        :raises errors.HostConflict: another host that is alive has its name or its initiator name.
            That a host has another address than before counts only after it was dead
        """
        now = self._transactions.now()
        with self._transactions.write() as session:
            alive = self._transactions.heartbeat_timeout * SUSPECT_SHARE
            if self._is_recorded(session, topology, alive):  # no other can be taken for it
                known, values = models.HostRow, dict[str, Any](heartbeat_at=now)
                if free is not None:
                    values["free"] = free
                session.execute(
                    sa.update(known).where(known.host == topology.host).values(**values)
                )
                return
            row = session.get(models.HostRow, topology.host)
            rival = self._rival(session, row, topology)
            if rival is not None:
                rival.rival, rival.rival_at = _described(topology), now
                conflict = errors.HostConflict(_described(topology), _described(rival))
            elif row is None:
                self._register(session, models.HostRow(host=topology.host), topology, free)
            else:
                if self._transactions.state(row.heartbeat_at, now) != ranking.ALIVE:
                    row.back_at = now
                self._register(session, row, topology, free)
        if rival is not None:
            raise conflict
        self._check_alone(topology)

    def _check_alone(self, topology: wire.Topology) -> None:
        """Another host of this initiator name may have been registered at the same moment, so that
        neither saw the other. A locking read would have the hosts of a storm deadlock.

        :raises errors.HostConflict: it was: this one counts as dead
        """
        with self._transactions.write() as session:
            row = session.get(models.HostRow, topology.host)
            rival = None if row is None else self._rival(session, row, topology)
            if row is None or rival is None or rival is row:
                return
            now = self._transactions.now()
            rival.rival, rival.rival_at = _described(topology), now
            row.heartbeat_at = now - timedelta(seconds=2 * self._transactions.heartbeat_timeout)
            conflict = errors.HostConflict(_described(topology), _described(rival))
        raise conflict

    def heard_of(self, topology: wire.Topology) -> None:
        """Record that a host is alive, unless its row, which is as it says, has that already.

        :raises errors.HostConflict: as :meth:`heartbeat`
        """
        with self._transactions.read() as session:
            fresh = self._is_recorded(session, topology, self._transactions.heartbeat_timeout / 4)
        if not fresh:
            self.heartbeat(topology)

    def _is_recorded(self, session: Session, topology: wire.Topology, silent: float) -> bool:
        """Whether the row of a host is as it says, and was written in the last ``silent`` seconds.

        It is compared here, as a database may ignore the case of letters.
        """
        since = self._transactions.now() - timedelta(seconds=silent)
        found = session.execute(_said(), {"host": topology.host}).one_or_none()
        return _is_as_said(found, topology, since)

    def _register(
        self, session: Session, row: models.HostRow, topology: wire.Topology, free: int | None
    ) -> None:
        if (row.rack, row.zone) != (topology.rack, topology.zone):
            location = models.LocationRow
            session.execute(
                sa.update(location)
                .where(location.host == topology.host)
                .values(rack=topology.rack, zone=topology.zone)
            )
        row.kind = topology.kind
        row.rack, row.zone = topology.rack, topology.zone
        row.address, row.initiator = topology.address, topology.initiator
        row.heartbeat_at = self._transactions.now()
        if free is not None:
            row.free = free
        session.add(row)

    def _rival(
        self, session: Session, own: models.HostRow | None, topology: wire.Topology
    ) -> models.HostRow | None:
        """Another host that is alive and has this one's name or initiator name.

        :param own: the row with its name
        """
        now, found = self._transactions.now(), models.HostRow
        identity = topology.address, topology.initiator
        if (
            own is not None
            and (own.address, own.initiator) != identity
            and self._transactions.state(own.heartbeat_at, now) != ranking.DEAD
        ):
            return own
        if not topology.initiator:  # a storage host
            return None
        alive = now - timedelta(seconds=self._transactions.heartbeat_timeout)
        return session.scalars(
            sa.select(found).where(
                found.initiator == topology.initiator,
                found.host != topology.host,
                found.heartbeat_at > alive,
            )
        ).first()

    def interval(self) -> float:
        """Seconds between two heartbeats of a compute host, at least; 0 in a small cloud."""
        return self._transactions.heartbeat_interval

    def all(self) -> list[KnownHost]:
        """Every host that ever sent a heartbeat, by name."""
        now = self._transactions.now()
        with self._transactions.read() as session:
            rows = session.scalars(sa.select(models.HostRow).order_by(models.HostRow.host))
            return [
                KnownHost(
                    host=row.host,
                    kind=row.kind,
                    rack=row.rack,
                    zone=row.zone,
                    address=row.address,
                    silent=(now - row.heartbeat_at).total_seconds(),
                    state=self._transactions.state(row.heartbeat_at, now),
                    drained=row.drained,
                    free=row.free,
                    initiator=row.initiator,
                    rival=self._recent_rival(row, now),
                )
                for row in rows
            ]

    @retried
    def forget(self, host: str, silent: float) -> None:
        """Delete the row of a host that has been silent for ``silent`` seconds, and still is."""
        since = self._transactions.now() - timedelta(seconds=silent)
        row = models.HostRow
        with self._transactions.write() as session:
            session.execute(sa.delete(row).where(row.host == host, row.heartbeat_at <= since))

    @staticmethod
    def _recent_rival(row: models.HostRow, now: datetime) -> str:
        if row.rival is None or row.rival_at is None:
            return ""
        return row.rival if (now - row.rival_at).total_seconds() < RIVAL_COUNTS else ""

    @retried
    def set_drained(self, host: str, drained: bool) -> None:
        """Exclude a host as a source, or admit it again; its readers are given another parent.

        :raises errors.InvalidRequest: there is no such host
        """
        with self._transactions.write() as session:
            row = session.get(models.HostRow, host)
            if row is None:
                known = ", ".join(
                    session.scalars(sa.select(models.HostRow.host).order_by(models.HostRow.host))
                )
                raise errors.InvalidRequest(
                    f"there is no host {host}: known are "
                    f"{known or 'none, as no host has sent a heartbeat'}"
                )
            row.drained = drained


def _described(host: wire.Topology | models.HostRow) -> str:
    """At most 255 characters, as its column holds."""
    return f"{host.host} at {host.address} ({host.initiator or 'no initiator'})"[:255]


#: What a host says of itself, and its row has.
_SAID = "kind", "rack", "zone", "address", "initiator"


def _is_as_said(row: Any, topology: wire.Topology, since: datetime) -> bool:
    """:param row: a host's columns; None if there is none"""
    return (
        row is not None
        and all(getattr(row, name) == getattr(topology, name) for name in _SAID)
        and row.heartbeat_at >= since
    )


def _answer(row: Any, topology: wire.Topology, since: datetime) -> Heard | None:
    if not _is_as_said(row, topology, since):
        return None
    return Heard(bool(row.bases), bool(row.stacks))


@functools.cache
def _said() -> Any:
    row = models.HostRow.__table__.c
    names = *_SAID, "heartbeat_at"
    return sa.select(*(row[name] for name in names)).where(row.host == sa.bindparam("host"))


@functools.cache
def _heard() -> Any:
    """What hosts said of themselves, and :class:`.values.Heard`. Nothing is ordered of a complete
    base without a parent, unless its image was deleted.
    """
    host, stack = models.HostRow.__table__, models.StackRow.__table__
    base, image = models.LocationRow.__table__, models.ImageRow.__table__
    bases = sa.exists().where(
        base.c.host == host.c.host,
        base.c.kind == ranking.BASE,
        image.c.id == base.c.image_id,
        sa.or_(
            base.c.state != ranking.COMPLETE, base.c.parent_id.is_not(None), models.ImageRow.deleted
        ),
    )
    return sa.select(
        host.c.host,
        host.c.heartbeat_at,
        *(host.c[name] for name in _SAID),
        bases.label("bases"),
        sa.exists().where(stack.c.host == host.c.host).label("stacks"),
    ).where(host.c.host.in_(sa.bindparam("hosts", expanding=True)))


def host_states(
    transactions: Transactions, session: Session, among: sa.Select[Any]
) -> dict[str, ranking.HostState]:
    """Place and state of hosts, by name.

    :param among: a query of their names
    """
    now = transactions.now()
    found = models.HostRow
    columns = found.host, found.rack, found.zone, found.heartbeat_at, found.drained, found.address
    rows = session.execute(sa.select(*columns).where(found.host.in_(among)))
    return {row.host: host_state(transactions, row, now) for row in rows}


def host_state(transactions: Transactions, row: Any, now: datetime) -> ranking.HostState:
    """:param row: a host, or its columns"""
    return ranking.HostState(
        host=row.host,
        rack=row.rack,
        zone=row.zone,
        state=transactions.state(row.heartbeat_at, now),
        drained=row.drained,
        address=row.address,
    )
