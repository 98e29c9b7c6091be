"""What a host is ordered to do about its bases, read for each of its heartbeats.

It is decided in :func:`cinder_thunder.policy.tree.orders`.
"""

from __future__ import annotations

import functools
from collections.abc import Collection
from datetime import datetime
from types import SimpleNamespace
from typing import Any

import sqlalchemy as sa
from sqlalchemy.orm import Session

from cinder_thunder.db import models
from cinder_thunder.db.candidates import location_of, surroundings
from cinder_thunder.db.engine import Transactions
from cinder_thunder.db.hosts import host_states
from cinder_thunder.policy import ranking, tree
from os_brick_thunder.common import wire

#: What makes a :class:`.ranking.Location`.
_COLUMNS = "id", "host", "kind", "state", "parent_id", "depth", "filled", "updated_at"


def of_host(
    transactions: Transactions, child: wire.Topology, limits: ranking.Limits
) -> wire.Orders:
    """What should change on a host that has just sent a heartbeat."""
    host, now = child.host, transactions.now()
    with transactions.read() as session:
        rows = session.execute(_bases(), {"host": host}).all()
        if not rows:
            return wire.Orders()
        hosts: dict[str, ranking.HostState] = {}
        back_at, movable = None, set[str]()
        read = [(row, _parent_of(row, now)) for row in rows]
        parents = {parent.host for _row, parent in read if parent is not None}
        if parents:  # complete bases have none
            known = models.HostRow
            hosts = host_states(
                transactions, session, sa.select(known.host).where(known.host.in_(parents))
            )
            back_at = session.scalar(sa.select(known.back_at).where(known.host == host))
        served = [
            row.image_id
            for row, parent in read
            if row.state == ranking.FILLING and parent and parent.kind == ranking.MASTER
        ]
        if served:
            movable = _movable(transactions, session, served, child, limits)
    bases = [
        tree.HeldBase(
            row.image_id,
            location_of(row, now),
            parent,
            row.deleted,
            row.needed,
            row.image_id in movable,
        )
        for row, parent in read
    ]
    returned = None if back_at is None else (now - back_at).total_seconds()
    return tree.orders(bases, hosts, returned, transactions.heartbeat_timeout)


@functools.cache
def _bases() -> Any:
    """The bases of a host, each with its parent and what is known of its image."""
    base, parent = models.LocationRow.__table__, models.LocationRow.__table__.alias("parent")
    image = models.ImageRow.__table__
    needed = sa.exists().where(models.VolumeRow.image_id == base.c.image_id)
    return (
        sa.select(
            base.c.image_id,
            *(base.c[name] for name in _COLUMNS),
            *(parent.c[name].label(f"parent_{name}") for name in _COLUMNS),
            models.ImageRow.deleted.label("deleted"),
            needed.label("needed"),
        )
        .select_from(
            base.join(image, image.c.id == base.c.image_id).outerjoin(
                parent, parent.c.id == base.c.parent_id
            )
        )
        .where(base.c.host == sa.bindparam("host"), base.c.kind == ranking.BASE)
        .order_by(base.c.image_id)
    )


def _parent_of(row: Any, now: datetime) -> ranking.Location | None:
    if row.parent_host is None:
        return None
    return location_of(SimpleNamespace(**{n: getattr(row, f"parent_{n}") for n in _COLUMNS}), now)


def _movable(
    transactions: Transactions,
    session: Session,
    served: Collection[str],
    child: wire.Topology,
    limits: ranking.Limits,
) -> set[str]:
    """Images whose masters serve too many, while a base has room for this host's.

    :param served: images that the host reads from masters
    """
    row = models.LocationRow
    crowded = session.scalars(
        sa.select(row.image_id)
        .where(row.image_id.in_(served), row.kind == ranking.MASTER)
        .group_by(row.image_id)
        .having(sa.func.sum(row.children) > limits.storage_fanout)
    )
    found = set()
    for image_id in crowded.all():
        around = surroundings(transactions, session, image_id, child, limits)
        here = ranking.HostState(child.host, child.rack, child.zone)
        sources = ranking.choose(here, around.hosts, around.locations, limits, served=around.served)
        if sources and sources[0].kind == ranking.BASE:
            found.add(image_id)
    return found
