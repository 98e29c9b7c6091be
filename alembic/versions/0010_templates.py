"""Images that are templates: volumes or snapshots of Cinder's rather than images of Glance's

Revision ID: 0010
Revises: 0009
"""

from __future__ import annotations

import sqlalchemy as sa

from cinder_thunder.db import steps

revision = "0010"
down_revision = "0009"
branch_labels = None
depends_on = None


def upgrade() -> None:
    steps.add_column(
        "thunder_images",
        sa.Column("template", sa.Boolean(), nullable=False, server_default=sa.false()),
    )
