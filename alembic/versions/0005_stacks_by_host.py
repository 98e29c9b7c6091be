"""An index on the stacks' host, which every heartbeat queries

Revision ID: 0005
Revises: 0004
"""

from __future__ import annotations

from cinder_thunder.db import steps

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None


def upgrade() -> None:
    steps.create_index("ix_thunder_stacks_host", "thunder_stacks", ["host"])
