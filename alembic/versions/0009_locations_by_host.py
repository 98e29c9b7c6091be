"""An index on the locations' host, which every heartbeat queries

Revision ID: 0009
Revises: 0008
"""

from __future__ import annotations

from cinder_thunder.db import steps

revision = "0009"
down_revision = "0008"
branch_labels = None
depends_on = None


def upgrade() -> None:
    steps.create_index("ix_thunder_locations_host", "thunder_locations", ["host"])
