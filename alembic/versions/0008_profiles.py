"""Boot profiles, and the boots that they are made of

Revision ID: 0008
Revises: 0007
"""

from __future__ import annotations

import sqlalchemy as sa
from sqlalchemy.dialects import mysql

from cinder_thunder.db import steps

revision = "0008"
down_revision = "0007"
branch_labels = None
depends_on = None

OPTIONS = {"mysql_engine": "InnoDB", "mysql_charset": "utf8mb4"}
BODY = sa.Text().with_variant(mysql.MEDIUMTEXT(), "mysql", "mariadb")


def upgrade() -> None:
    steps.create_table(
        "thunder_profiles",
        # No foreign key: an insert would wait for the image's row, which is locked by each plan.
        sa.Column("image_id", sa.String(36), primary_key=True),
        sa.Column("content", sa.String(255), nullable=False),
        sa.Column("state", sa.String(16), nullable=False),
        sa.Column("version", sa.Integer(), nullable=False),
        sa.Column("body", BODY, nullable=False),
        sa.Column("opened_at", sa.DateTime(), nullable=False),
        sa.Column("updated_at", sa.DateTime(), nullable=False),
        **OPTIONS,
    )
    steps.create_table(
        "thunder_boots",
        sa.Column("id", sa.String(36), primary_key=True),
        sa.Column(
            "image_id",
            sa.String(36),
            sa.ForeignKey("thunder_profiles.image_id", ondelete="CASCADE"),
            nullable=False,
        ),
        sa.Column("host", sa.String(255), nullable=False),
        sa.Column("whole", sa.Boolean(), nullable=False),
        sa.Column("body", BODY, nullable=False),
        sa.Column("coverage", sa.Double(), nullable=True),
        sa.Column("waste", sa.Double(), nullable=True),
        sa.Column("prefetched", sa.BigInteger(), nullable=False),
        sa.Column("wasted", sa.BigInteger(), nullable=False),
        sa.Column("expires_at", sa.DateTime(), nullable=False),
        sa.Column("updated_at", sa.DateTime(), nullable=False),
        **OPTIONS,
    )
    steps.create_index("ix_thunder_boots_image_id", "thunder_boots", ["image_id"])
