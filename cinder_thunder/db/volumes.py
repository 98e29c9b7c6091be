"""Volumes that share blocks with a master, and the hosts that have devices for them."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import sqlalchemy as sa
from sqlalchemy.orm import Session

from cinder_thunder.db import models
from cinder_thunder.db.engine import Transactions, retried
from cinder_thunder.db.values import ClonedVolume, HostedStack, RecordedStack
from cinder_thunder.policy.ranking import DEAD, MASTER

#: The mode of a stack that Cinder has detached, but whose host has not released it.
DETACHED = "detached"


class VolumeTable:
    """Volumes that are clones of masters, and their stacks."""

    def __init__(self, transactions: Transactions) -> None:
        self._transactions = transactions

    @retried
    def put(self, volume: ClonedVolume) -> None:
        with self._transactions.write() as session:
            session.merge(_row(volume.id, volume.image_id, volume.host))

    def get(self, volume_id: str) -> ClonedVolume | None:
        with self._transactions.read() as session:
            found = session.execute(_volume(), {"volume": volume_id}).one_or_none()
        return found and ClonedVolume(*found)

    def ids_on(self, host: str) -> set[str]:
        """Ids of the volumes that share an image on ``host`` (a backend)."""
        volume = models.VolumeRow
        with self._transactions.read() as session:
            return set(session.scalars(sa.select(volume.id).where(volume.host == host)))

    def known_ids(self) -> set[str]:
        """Ids of all volumes that share an image, or have devices on some host."""
        with self._transactions.read() as session:
            sharing = session.scalars(sa.select(models.VolumeRow.id)).all()
            return {*sharing, *session.scalars(sa.select(models.StackRow.volume_id))}

    def count(self, image_id: str, host: str) -> int:
        """How many volumes on ``host`` (a backend) share blocks with its master of the image."""
        with self._transactions.read() as session:
            found = session.scalar(
                sa.select(sa.func.count())
                .select_from(models.VolumeRow)
                .where(models.VolumeRow.image_id == image_id, models.VolumeRow.host == host)
            )
            return int(found or 0)

    @retried
    def inherit(self, volume_id: str, sources: Sequence[str], host: str) -> None:
        """Record a clone on ``host`` of a volume.

        It shares the image that this volume shares, if any, or the template that was made of what
        it is a clone of.

        :param sources: what may be that template, the most specific first; the last is the volume
        """
        with self._transactions.write() as session:
            template = next((i for i in sources if _is_template(session, i, host)), None)
            source = session.get(models.VolumeRow, sources[-1])
            if template is not None:
                session.merge(_row(volume_id, template, host))
            elif source is not None and source.host == host:
                session.merge(_row(volume_id, source.image_id, host))

    @retried
    def drop(self, volume_id: str) -> None:
        """Forget a volume that was deleted, or no longer shares blocks; absent is success.

        Hosts that still have devices for it are ordered to remove them.
        """
        with self._transactions.write() as session:
            self._detach(session, models.StackRow.volume_id == volume_id)
            session.execute(sa.delete(models.VolumeRow).where(models.VolumeRow.id == volume_id))

    # Stacks

    def stacks(self, volume_id: str) -> list[RecordedStack]:
        """Every host that has, or is about to have, devices for the volume.

        Without those that Cinder has detached, which may have devices left.
        """
        now = self._transactions.now()
        with self._transactions.read() as session:
            rows = session.execute(_stacks(), {"volume": volume_id})
            return [
                RecordedStack(
                    volume_id,
                    host,
                    mode,
                    alive=heard is not None and self._transactions.state(heard, now) != DEAD,
                )
                for host, mode, heard in rows
            ]

    def stacks_on(self, host: str) -> list[HostedStack]:
        """What a host has, or may have left, by volume."""
        now, row, volume = self._transactions.now(), models.StackRow, models.VolumeRow
        with self._transactions.read() as session:
            rows = session.execute(
                sa.select(row.volume_id, row.mode, row.unlisted_at, volume.id)
                .join(volume, volume.id == row.volume_id, isouter=True)
                .where(row.host == host)
                .order_by(row.volume_id)
            )
            return [
                HostedStack(
                    volume_id,
                    may_be_cached=mode == "direct" and sharing is not None,
                    unlisted=None if since is None else (now - since).total_seconds(),
                )
                for volume_id, mode, since, sharing in rows
            ]

    @retried
    def set_listed(self, volume_id: str, host: str, listed: bool) -> None:
        """Record whether Cinder lists the volume as attached to a host that has a stack of it.

        One that Cinder lists again after it was detached has devices of an unknown kind.
        """
        row = models.StackRow
        mine = row.volume_id == volume_id, row.host == host
        with self._transactions.write() as session:
            if not listed:
                session.execute(
                    sa.update(row)
                    .where(*mine, row.unlisted_at.is_(None))
                    .values(unlisted_at=self._transactions.now())
                )
                return
            session.execute(sa.update(row).where(*mine).values(unlisted_at=None))
            session.execute(sa.update(row).where(*mine, row.mode == DETACHED).values(mode="direct"))

    @retried
    def reap_stacks(self, left: float) -> int:
        """Delete the rows of stacks that Cinder has not listed for ``left`` seconds: the order to
        drop them was not carried out, by an older agent or by none.

        :returns: how many
        """
        since = self._transactions.now() - timedelta(seconds=left)
        with self._transactions.write() as session:
            done = session.execute(
                sa.delete(models.StackRow).where(models.StackRow.unlisted_at < since)
            )
            return int(done.rowcount)

    @retried
    def drop_stacks_on(self, host: str) -> None:
        """Forget all stacks of a host that is gone for good."""
        with self._transactions.write() as session:
            session.execute(sa.delete(models.StackRow).where(models.StackRow.host == host))

    @retried
    def detach_stack(self, volume_id: str, host: str) -> None:
        """Record that Cinder has detached the volume from a host; absent is success.

        The row stays until the host's agent, which may be down, has removed the devices.
        """
        with self._transactions.write() as session:
            self._detach(
                session, models.StackRow.volume_id == volume_id, models.StackRow.host == host
            )

    def _detach(self, session: Session, *which: Any) -> None:
        row = models.StackRow
        since = sa.func.coalesce(row.unlisted_at, self._transactions.now())
        session.execute(sa.update(row).where(*which).values(mode=DETACHED, unlisted_at=since))

    @retried
    def put_stack(self, volume_id: str, host: str, mode: str, stack_id: str = "") -> None:
        """:param stack_id: as the agent calls it; empty if it is an older one"""
        with self._transactions.write() as session:
            write_stack(self._transactions, session, volume_id, host, mode, stack_id)

    @retried
    def release_stack(self, volume_id: str, host: str, stack_id: str = "") -> None:
        """Record that the host no longer has devices for the volume; absent is success.

        :param stack_id: of the stack that was removed: a release may be late, and does not concern
            the next stack; empty for whatever stack there is
        """
        row = models.StackRow
        mine = [row.volume_id == volume_id, row.host == host]
        if stack_id:
            mine.append(sa.or_(row.stack_id == stack_id, row.stack_id.is_(None)))
        with self._transactions.write() as session:
            session.execute(sa.delete(row).where(*mine))


def write_stack(
    transactions: Transactions,
    session: Session,
    volume_id: str,
    host: str,
    mode: str,
    stack_id: str = "",
) -> None:
    row: Any = models.StackRow.__table__
    said = {"mode": mode, "stack_id": stack_id or None, "unlisted_at": None}
    mine = row.c.volume_id == volume_id, row.c.host == host
    # An update of a row that is missing would lock the gap, against all who insert there.
    if session.execute(sa.select(row.c.mode).where(*mine)).one_or_none() is not None:
        done: Any = session.execute(sa.update(row).where(*mine), said)
        if done.rowcount:
            return
        # What was selected is this transaction's snapshot: the row was released since.
    key = {"volume_id": volume_id, "host": host, "created_at": transactions.now()}
    session.execute(sa.insert(row), {**key, **said})


@functools.cache
def _volume() -> Any:
    row = models.VolumeRow.__table__.c
    return sa.select(row.id, row.image_id, row.host).where(row.id == sa.bindparam("volume"))


@functools.cache
def _stacks() -> Any:
    row, known = models.StackRow.__table__, models.HostRow.__table__
    return (
        sa.select(row.c.host, row.c.mode, known.c.heartbeat_at)
        .join(known, known.c.host == row.c.host, isouter=True)
        .where(row.c.volume_id == sa.bindparam("volume"), row.c.mode != DETACHED)
        .order_by(row.c.host)
    )


def _is_template(session: Session, image_id: str, host: str) -> bool:
    """Whether it is a template that has its master on a host."""
    image, location = models.ImageRow, models.LocationRow
    found = session.scalar(
        sa.select(image.id)
        .join(location, location.image_id == image.id)
        .where(
            image.id == image_id,
            image.template,
            ~image.deleted,
            location.host == host,
            location.kind == MASTER,
        )
    )
    return found is not None


def _row(volume_id: str, image_id: str, host: str) -> models.VolumeRow:
    return models.VolumeRow(id=volume_id, image_id=image_id, host=host)
