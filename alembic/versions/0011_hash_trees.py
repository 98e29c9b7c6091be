"""The roots of images' hash trees

Revision ID: 0011
Revises: 0010
"""

from __future__ import annotations

import sqlalchemy as sa

from cinder_thunder.db import steps

revision = "0011"
down_revision = "0010"
branch_labels = None
depends_on = None


def upgrade() -> None:
    steps.add_column(
        "thunder_images", sa.Column("root", sa.String(64), nullable=False, server_default="")
    )
