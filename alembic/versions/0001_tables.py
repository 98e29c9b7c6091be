"""Hosts, images, locations, volumes and stacks

Revision ID: 0001
Revises:
"""

from __future__ import annotations

import sqlalchemy as sa
from sqlalchemy.dialects import mysql

from cinder_thunder.db import steps

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

OPTIONS = {"mysql_engine": "InnoDB", "mysql_charset": "utf8mb4"}


def upgrade() -> None:
    steps.create_table(
        "thunder_hosts",
        sa.Column("host", sa.String(255), primary_key=True),
        sa.Column("kind", sa.String(16), nullable=False),
        sa.Column("rack", sa.String(255), nullable=False),
        sa.Column("zone", sa.String(255), nullable=False),
        sa.Column("address", sa.String(255), nullable=False),
        sa.Column("initiator", sa.String(255), nullable=False),
        sa.Column("heartbeat_at", sa.DateTime(), nullable=False),
        **OPTIONS,
    )
    steps.create_table(
        "thunder_images",
        sa.Column("id", sa.String(36), primary_key=True),
        sa.Column("size", sa.BigInteger(), nullable=False),
        sa.Column(
            "allocated",
            sa.Text().with_variant(mysql.MEDIUMTEXT(), "mysql", "mariadb"),
            nullable=False,
        ),
        sa.Column("signature_verified", sa.Boolean(), nullable=True),
        sa.Column("created_at", sa.DateTime(), nullable=False),
        **OPTIONS,
    )
    steps.create_table(
        "thunder_locations",
        sa.Column("id", sa.String(36), primary_key=True),
        sa.Column(
            "image_id",
            sa.String(36),
            sa.ForeignKey("thunder_images.id", ondelete="CASCADE"),
            nullable=False,
        ),
        sa.Column("host", sa.String(255), nullable=False),
        sa.Column("kind", sa.String(16), nullable=False),
        sa.Column("state", sa.String(16), nullable=False),
        sa.Column("parent_id", sa.String(36), nullable=True),
        sa.Column("depth", sa.Integer(), nullable=False),
        sa.Column("filled", sa.BigInteger(), nullable=False),
        sa.Column("portal", sa.String(255), nullable=False),
        sa.Column("iqn", sa.String(255), nullable=False),
        sa.Column("lun", sa.Integer(), nullable=False),
        sa.Column("updated_at", sa.DateTime(), nullable=False),
        sa.UniqueConstraint("image_id", "host", name="uniq_thunder_locations0image_id0host"),
        **OPTIONS,
    )
    steps.create_index("ix_thunder_locations_parent_id", "thunder_locations", ["parent_id"])
    steps.create_table(
        "thunder_volumes",
        sa.Column("id", sa.String(36), primary_key=True),
        sa.Column("image_id", sa.String(36), nullable=False),
        sa.Column("host", sa.String(255), nullable=False),
        **OPTIONS,
    )
    steps.create_index("ix_thunder_volumes_image_id", "thunder_volumes", ["image_id"])
    steps.create_table(
        "thunder_stacks",
        sa.Column("volume_id", sa.String(36), primary_key=True),
        sa.Column("host", sa.String(255), primary_key=True),
        sa.Column("mode", sa.String(16), nullable=False),
        sa.Column("created_at", sa.DateTime(), nullable=False),
        **OPTIONS,
    )
