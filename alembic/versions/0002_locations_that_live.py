"""Manifests and deleted images; drained hosts, and free space of storage hosts

Revision ID: 0002
Revises: 0001
"""

from __future__ import annotations

import sqlalchemy as sa
from sqlalchemy.dialects import mysql

from cinder_thunder.db import steps

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    steps.add_column(
        "thunder_hosts",
        sa.Column("drained", sa.Boolean(), nullable=False, server_default=sa.false()),
    )
    steps.add_column("thunder_hosts", sa.Column("free", sa.BigInteger(), nullable=True))
    steps.add_column(
        "thunder_images",
        sa.Column(
            "manifest",
            sa.Text().with_variant(mysql.MEDIUMTEXT(), "mysql", "mariadb"),
            nullable=True,
        ),
    )
    steps.add_column(
        "thunder_images",
        sa.Column("gone", sa.Boolean(), nullable=False, server_default=sa.false()),
    )
