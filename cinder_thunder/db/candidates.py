"""The part of an image's tree that a plan needs: a few rows, however many replicas there are.

It is enough for :func:`cinder_thunder.policy.ranking.choose`: the host's own location and its
parent, all masters, and of the bases those that come first, by distance, depth and children. Each
query of bases follows an index and ends after :data:`EACH` rows.
"""

from __future__ import annotations

import functools
from collections.abc import Collection
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

import sqlalchemy as sa
from sqlalchemy.orm import Session

from cinder_thunder.db import models
from cinder_thunder.db.engine import Transactions
from cinder_thunder.db.hosts import host_state
from cinder_thunder.policy import ranking
from os_brick_thunder.common import wire
from os_brick_thunder.common.policy.timelimits import SUSPECT_SHARE

#: Bases of one distance and one number of children. More than :attr:`.ranking.Limits.sources`,
#: as some may be of no use to a host that has a location already.
EACH = 8
#: More than the depth of any location.
_DEEPEST = 1 << 30

_L, _H = models.LocationRow.__table__.c, models.HostRow.__table__.c
_COLUMNS = (
    _L.id, _L.host, _L.kind, _L.state, _L.parent_id, _L.depth, _L.filled, _L.updated_at,
    _L.children, _H.rack, _H.zone, _H.heartbeat_at, _H.drained, _H.address,
)  # fmt: skip


@dataclass(frozen=True)
class Surroundings:
    """The locations that a plan needs, by the names that the policy has for them.

    :ivar served: location id -> number of children, without the host that is planned for
    """

    hosts: dict[str, ranking.HostState]
    locations: list[ranking.Location]
    served: dict[str, int]


def surroundings(
    transactions: Transactions,
    session: Session,
    image_id: str,
    child: wire.Topology,
    limits: ranking.Limits,
    exclude: Collection[str] = (),
    answering: str = "",
) -> Surroundings:
    """Read them, while the lock of the image's tree is held.

    The parameters are those of :func:`cinder_thunder.policy.tree.assign`.
    """
    now = transactions.now()
    rows = {
        row.id: row for row in session.execute(_fixed(), {"image": image_id, "own": child.host})
    }
    own = next((row for row in rows.values() if row.host == child.host), None)
    alive = any(
        row.host == answering
        or (
            row.heartbeat_at is not None
            and transactions.state(row.heartbeat_at, now) != ranking.DEAD
        )
        for row in rows.values()
        if row.kind == ranking.MASTER
    )
    suspect = transactions.heartbeat_timeout * SUSPECT_SHARE
    bases = session.execute(
        _bases(limits.fanout),
        {
            "image": image_id,
            "zone": child.zone,
            "rack": child.rack,
            "heard": now - timedelta(seconds=suspect),
            "planned": now - timedelta(seconds=limits.creating),
            "depth": _DEEPEST if own is None else own.depth,
            "states": [ranking.COMPLETE, ranking.FILLING, ranking.CREATING]
            if alive
            else [ranking.COMPLETE],
            "without": [child.host, *exclude],
        },
    )
    rows.update((row.id, row) for row in bases)
    served = {row.id: row.children for row in rows.values()}
    if own is not None and own.parent_id in served:
        served[own.parent_id] = max(0, served[own.parent_id] - 1)
    return Surroundings(
        {
            row.host: host_state(transactions, row, now)
            for row in rows.values()
            if row.heartbeat_at is not None
        },
        [location_of(row, now) for row in rows.values()],
        served,
    )


def location_of(row: Any, now: datetime) -> ranking.Location:
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


def _joined() -> Any:
    return models.LocationRow.__table__.outerjoin(models.HostRow.__table__, _H.host == _L.host)


@functools.cache
def _fixed() -> Any:
    """The host's own location, its parent, and the masters."""
    image: Any = sa.bindparam("image")
    own: Any = sa.bindparam("own")
    other = models.LocationRow.__table__.alias()
    parent = (
        sa.select(other.c.parent_id)
        .where(other.c.image_id == image, other.c.host == own)
        .scalar_subquery()
    )
    return sa.union_all(
        *(
            sa.select(*_COLUMNS).select_from(_joined()).where(*which)
            for which in (
                (_L.image_id == image, _L.kind == ranking.MASTER),
                (_L.image_id == image, _L.host == own),
                (_L.id == parent,),
            )
        )
    )


@functools.cache
def _bases(fanout: int) -> Any:
    """Bases with room for one more child: the nearest, then the highest in the tree."""
    usable = (
        _L.image_id == sa.bindparam("image"),
        _L.kind == ranking.BASE,
        _L.state.in_(sa.bindparam("states", expanding=True)),
        sa.or_(_L.state != ranking.CREATING, _L.updated_at >= sa.bindparam("planned")),
        _L.depth < sa.bindparam("depth"),
        _L.host.not_in(sa.bindparam("without", expanding=True)),
        _H.heartbeat_at >= sa.bindparam("heard"),
        ~_H.drained,
    )
    zone, rack = _L.zone == sa.bindparam("zone"), _L.rack == sa.bindparam("rack")
    arms = (
        sa.select(*_COLUMNS)
        .select_from(_joined())
        .where(*usable, *near, _L.children == children)
        .order_by(_L.depth)
        .limit(EACH)
        .subquery()
        for near in ((zone, rack), (zone,), ())
        for children in range(fanout)
    )
    return sa.union_all(*(sa.select(arm) for arm in arms))
