"""What is needed to find the sources of a plan without reading the whole tree

Revision ID: 0007
Revises: 0006
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

from cinder_thunder.db import steps

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None

LOCATIONS = "thunder_locations"


def upgrade() -> None:
    # The defaults are for trackers of an older version, which insert rows without these columns.
    place = {"nullable": False, "server_default": ""}
    steps.add_column(LOCATIONS, sa.Column("rack", sa.String(255), **place))
    steps.add_column(LOCATIONS, sa.Column("zone", sa.String(255), **place))
    children = sa.Column("children", sa.Integer(), nullable=False, server_default="0")
    steps.add_column(LOCATIONS, children)
    _fill()
    for name, columns in (
        ("ix_thunder_locations_rack", ["image_id", "zone", "rack", "children", "depth"]),
        ("ix_thunder_locations_zone", ["image_id", "zone", "children", "depth"]),
        ("ix_thunder_locations_kind", ["image_id", "kind", "children", "depth"]),
    ):
        steps.create_index(name, LOCATIONS, columns)


def _fill() -> None:
    name = sa.String()
    locations = sa.table(
        LOCATIONS,
        sa.column("id", name),
        sa.column("host", name),
        sa.column("parent_id", name),
        sa.column("rack", name),
        sa.column("zone", name),
        sa.column("children", sa.Integer()),
    )
    hosts = sa.table(
        "thunder_hosts", sa.column("host", name), sa.column("rack", name), sa.column("zone", name)
    )
    for column in ("rack", "zone"):
        found = sa.select(hosts.c[column]).where(hosts.c.host == locations.c.host)
        known = sa.exists().where(hosts.c.host == locations.c.host)
        op.execute(sa.update(locations).where(known).values({column: found.scalar_subquery()}))
    parent = locations.c.parent_id
    counts = op.get_bind().execute(
        sa.select(parent, sa.func.count()).where(parent.is_not(None)).group_by(parent)
    )
    for location_id, count in counts.all():
        op.execute(sa.update(locations).where(locations.c.id == location_id).values(children=count))
