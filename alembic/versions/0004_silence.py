"""When a host's heartbeats resumed

Revision ID: 0004
Revises: 0003
"""

from __future__ import annotations

import sqlalchemy as sa

from cinder_thunder.db import steps

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None


def upgrade() -> None:
    steps.add_column("thunder_hosts", sa.Column("back_at", sa.DateTime(), nullable=True))
