"""What a host is ordered to do about its bases, read for each of its heartbeats.

It is decided in :func:`cinder_thunder.policy.tree.orders`.
"""

from __future__ import annotations

from collections.abc import Collection

import sqlalchemy as sa
from sqlalchemy.orm import Session, aliased

from cinder_thunder.db import models
from cinder_thunder.db.candidates import location_of, surroundings
from cinder_thunder.db.engine import Transactions
from cinder_thunder.db.hosts import host_states
from cinder_thunder.policy import ranking, tree
from os_brick_thunder.common import wire


def of_host(
    transactions: Transactions, child: wire.Topology, limits: ranking.Limits
) -> wire.Orders:
    """What should change on a host that has just sent a heartbeat."""
    host, now = child.host, transactions.now()
    location, parent = models.LocationRow, aliased(models.LocationRow)
    here = (location.host == host, location.kind == ranking.BASE)
    is_needed = sa.exists().where(models.VolumeRow.image_id == location.image_id)
    with transactions.read() as session:
        rows = session.execute(
            sa.select(location, parent, models.ImageRow.deleted, is_needed)
            .join(models.ImageRow, models.ImageRow.id == location.image_id)
            .join(parent, parent.id == location.parent_id, isouter=True)
            .where(*here)
            .order_by(location.image_id)
        ).all()
        if not rows:
            return wire.Orders()
        hosts: dict[str, ranking.HostState] = {}
        back_at, movable = None, set[str]()
        if any(above is not None for _base, above, *_image in rows):  # complete bases have none
            parents = sa.select(location.parent_id).where(*here)
            among = sa.select(parent.host).where(parent.id.in_(parents))
            hosts = host_states(transactions, session, among)
            back_at = session.scalar(
                sa.select(models.HostRow.back_at).where(models.HostRow.host == host)
            )
        served = [
            base.image_id
            for base, above, *_image in rows
            if base.state == ranking.FILLING and above and above.kind == ranking.MASTER
        ]
        if served:
            movable = _movable(transactions, session, served, child, limits)
    bases = [
        tree.HeldBase(
            base.image_id,
            location_of(base, now),
            above and location_of(above, now),
            deleted,
            needed,
            base.image_id in movable,
        )
        for base, above, deleted, needed in rows
    ]
    returned = None if back_at is None else (now - back_at).total_seconds()
    return tree.orders(bases, hosts, returned, transactions.heartbeat_timeout)


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
