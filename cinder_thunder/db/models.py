"""The tracker's tables. They may live in Cinder's database or in one of their own.

Sizes and offsets are in bytes, times are UTC without a zone, ids are UUIDs as text.
"""

from __future__ import annotations

from datetime import datetime
from typing import Any

from sqlalchemy import BigInteger, Double, ForeignKey, Index, String, Text, UniqueConstraint
from sqlalchemy.dialects import mysql
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

#: Prefix of the only tables that alembic may see: the rest of the database is Cinder's.
TABLE_PREFIX = "thunder_"

_ID = String(36)
_NAME = String(255)
#: TEXT ends at 64 KiB on MariaDB; the extents of a fragmented image are longer.
_LONG_TEXT = Text().with_variant(mysql.MEDIUMTEXT(), "mysql", "mariadb")


class TableRow(DeclarativeBase):
    __table_args__: Any = {"mysql_engine": "InnoDB", "mysql_charset": "utf8mb4"}  # noqa: RUF012


class HostRow(TableRow):
    """A host that reads or serves images: a compute host, or a storage backend."""

    __tablename__ = "thunder_hosts"

    host: Mapped[str] = mapped_column(_NAME, primary_key=True)
    kind: Mapped[str] = mapped_column(String(16))
    rack: Mapped[str] = mapped_column(_NAME)
    zone: Mapped[str] = mapped_column(_NAME)
    address: Mapped[str] = mapped_column(_NAME)
    #: Queried with every heartbeat.
    initiator: Mapped[str] = mapped_column(_NAME, index=True)
    #: The operator has excluded it as a source.
    drained: Mapped[bool] = mapped_column(default=False)
    #: Bytes that a storage host can still allocate; None for a compute host.
    free: Mapped[int | None] = mapped_column(BigInteger)
    heartbeat_at: Mapped[datetime]
    #: When it was heard of again after a silence; None if it never was silent.
    back_at: Mapped[datetime | None]
    #: Address and initiator of another host that uses this one's name or initiator, and when it
    #: was last heard of.
    rival: Mapped[str | None] = mapped_column(_NAME)
    rival_at: Mapped[datetime | None]


class ImageRow(TableRow):
    """An image as its masters hold it: one of Glance's, or a template. Its row is the lock of its
    tree of locations.
    """

    __tablename__ = "thunder_images"

    id: Mapped[str] = mapped_column(_ID, primary_key=True)
    size: Mapped[int] = mapped_column(BigInteger)
    #: JSON, ``[[start, length], …]``: what is not a hole.
    allocated: Mapped[str] = mapped_column(_LONG_TEXT)
    #: None: Cinder was not configured to verify signatures when the first master was made.
    signature_verified: Mapped[bool | None]
    #: JSON of wire.ImageDigests; None for an image whose first master was made before there were
    #: manifests. Deferred: it has megabytes where the image has terabytes.
    manifest: Mapped[str | None] = mapped_column(_LONG_TEXT, deferred=True)
    #: Deleted in Glance, or a template that was given up or whose volume or snapshot was deleted:
    #: its replicas are removed as soon as no volume needs them.
    deleted: Mapped[bool] = mapped_column("gone", default=False)
    #: Whether it is a template: its id is that of a volume or snapshot of Cinder's.
    template: Mapped[bool] = mapped_column(default=False)
    created_at: Mapped[datetime]
    #: What Glance said of the data when the first master was made; None if that is not known.
    os_hash_algo: Mapped[str | None] = mapped_column(String(64))
    os_hash_value: Mapped[str | None] = mapped_column(_NAME)
    #: Of the hash tree that the manifest includes; empty if there is none.
    root: Mapped[str] = mapped_column(String(64), server_default="")


class LocationRow(TableRow):
    """A replica of an image on one host, and what it reads from while it fills."""

    __tablename__ = "thunder_locations"
    __table_args__ = (
        UniqueConstraint("image_id", "host", name="uniq_thunder_locations0image_id0host"),
        # For the sources of a plan, see cinder_thunder.db.candidates.
        Index("ix_thunder_locations_rack", "image_id", "zone", "rack", "children", "depth"),
        Index("ix_thunder_locations_zone", "image_id", "zone", "children", "depth"),
        Index("ix_thunder_locations_kind", "image_id", "kind", "children", "depth"),
        TableRow.__table_args__,
    )

    id: Mapped[str] = mapped_column(_ID, primary_key=True)
    image_id: Mapped[str] = mapped_column(ForeignKey("thunder_images.id", ondelete="CASCADE"))
    #: Queried by itself with every heartbeat.
    host: Mapped[str] = mapped_column(_NAME, index=True)
    kind: Mapped[str] = mapped_column(String(16))
    state: Mapped[str] = mapped_column(String(16))
    parent_id: Mapped[str | None] = mapped_column(_ID, index=True)
    depth: Mapped[int]
    filled: Mapped[int] = mapped_column(BigInteger)
    portal: Mapped[str] = mapped_column(_NAME)
    iqn: Mapped[str] = mapped_column(_NAME)
    lun: Mapped[int]
    updated_at: Mapped[datetime]
    #: Those of its host.
    rack: Mapped[str] = mapped_column(_NAME, server_default="")
    zone: Mapped[str] = mapped_column(_NAME, server_default="")
    #: How many locations have it as their parent. Those of dead hosts are among them until they
    #: are counted again, see LocationTable.recount.
    children: Mapped[int] = mapped_column(server_default="0")


class VolumeRow(TableRow):
    """A volume whose LV shares blocks with the master of an image on the same backend."""

    __tablename__ = "thunder_volumes"

    id: Mapped[str] = mapped_column(_ID, primary_key=True)
    image_id: Mapped[str] = mapped_column(_ID, index=True)
    host: Mapped[str] = mapped_column(_NAME)


class StackRow(TableRow):
    """A host has (or is about to have) the devices of a volume."""

    __tablename__ = "thunder_stacks"

    volume_id: Mapped[str] = mapped_column(_ID, primary_key=True)
    #: Queried by itself with every heartbeat.
    host: Mapped[str] = mapped_column(_NAME, primary_key=True, index=True)
    mode: Mapped[str] = mapped_column(String(16))
    created_at: Mapped[datetime]
    #: Chosen by the agent for each stack; None if it is an older one.
    stack_id: Mapped[str | None] = mapped_column(_ID)
    #: Since when Cinder does not list the volume as attached to the host; None while it does.
    unlisted_at: Mapped[datetime | None]


class ProfileRow(TableRow):
    """In which order boots read an image: what plans say of it, and the lock of its boots.

    It is read by every plan. It is not in the image's row, which is the lock of the image's tree.
    """

    __tablename__ = "thunder_profiles"

    #: No foreign key: an insert would wait for the image's row.
    image_id: Mapped[str] = mapped_column(_ID, primary_key=True)
    #: Of the image whose boots they are, as wire.ImageInfo.content.
    content: Mapped[str] = mapped_column(_NAME)
    state: Mapped[str] = mapped_column(String(16))
    #: How often ``body`` was changed.
    version: Mapped[int]
    #: An encoded profile; empty if nothing is known yet.
    body: Mapped[str] = mapped_column(_LONG_TEXT)
    #: Since when boots are recorded that may settle it.
    opened_at: Mapped[datetime]
    updated_at: Mapped[datetime]


class BootRow(TableRow):
    """A boot of an image that is or was recorded."""

    __tablename__ = "thunder_boots"

    #: The ``record`` of the plan.
    id: Mapped[str] = mapped_column(_ID, primary_key=True)
    image_id: Mapped[str] = mapped_column(
        ForeignKey("thunder_profiles.image_id", ondelete="CASCADE"), index=True
    )
    host: Mapped[str] = mapped_column(_NAME)
    #: It has ended, and ``body`` is all that it read.
    whole: Mapped[bool]
    body: Mapped[str] = mapped_column(_LONG_TEXT)
    #: What it read of the profile of the boots before it, and what it did not, as shares.
    coverage: Mapped[float | None] = mapped_column(Double)
    waste: Mapped[float | None] = mapped_column(Double)
    #: As in wire.Recording.
    prefetched: Mapped[int] = mapped_column(BigInteger)
    wasted: Mapped[int] = mapped_column(BigInteger)
    #: When nothing more is expected of it, unless it is whole.
    expires_at: Mapped[datetime]
    updated_at: Mapped[datetime]


class LeaseRow(TableRow):
    """The storage host that does a piece of work that only one should do, and until when."""

    __tablename__ = "thunder_leases"

    name: Mapped[str] = mapped_column(_NAME, primary_key=True)
    owner: Mapped[str] = mapped_column(_NAME)
    expires_at: Mapped[datetime]
