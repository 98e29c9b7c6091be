"""Which data an image has, which stack a row is of, and who else uses a host's name

Revision ID: 0006
Revises: 0005
"""

from __future__ import annotations

import sqlalchemy as sa

from cinder_thunder.db import steps

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None


def upgrade() -> None:
    steps.add_column("thunder_images", sa.Column("os_hash_algo", sa.String(64), nullable=True))
    steps.add_column("thunder_images", sa.Column("os_hash_value", sa.String(255), nullable=True))
    steps.add_column("thunder_stacks", sa.Column("stack_id", sa.String(36), nullable=True))
    steps.add_column("thunder_stacks", sa.Column("unlisted_at", sa.DateTime(), nullable=True))
    steps.add_column("thunder_hosts", sa.Column("rival", sa.String(255), nullable=True))
    steps.add_column("thunder_hosts", sa.Column("rival_at", sa.DateTime(), nullable=True))
    steps.create_index("ix_thunder_hosts_initiator", "thunder_hosts", ["initiator"])
