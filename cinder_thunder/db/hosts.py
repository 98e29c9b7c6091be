"""Hosts: heartbeats, and what operators exclude."""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa
from sqlalchemy.orm import Session

from cinder_thunder.db import models
from cinder_thunder.db.engine import Transactions, retried
from cinder_thunder.db.values import KnownHost
from cinder_thunder.policy import ranking
from os_brick_thunder.common import errors, wire


class HostTable:
    """Hosts with replicas, or with space for them."""

    def __init__(self, transactions: Transactions) -> None:
        self._transactions = transactions

    @retried
    def heartbeat(self, topology: wire.Topology, free: int | None = None) -> None:
        """Register a host, or record that it is alive and where it is.

        :param free: bytes that it can still allocate for masters; None leaves the last value
        """
        now = self._transactions.now()
        with self._transactions.write() as session:
            row = session.get(models.HostRow, topology.host)
            if row is None:
                row = models.HostRow(host=topology.host)
            elif self._transactions.state(row.heartbeat_at, now) != ranking.ALIVE:
                row.back_at = now
            row.kind = topology.kind
            row.rack, row.zone = topology.rack, topology.zone
            row.address, row.initiator = topology.address, topology.initiator
            row.heartbeat_at = now
            if free is not None:
                row.free = free
            session.add(row)

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
                )
                for row in rows
            ]

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
    return {
        host: ranking.HostState(
            host, rack, zone, transactions.state(heartbeat_at, now), drained, address
        )
        for host, rack, zone, heartbeat_at, drained, address in rows
    }
