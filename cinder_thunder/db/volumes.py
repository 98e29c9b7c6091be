"""Volumes that share blocks with a master, and the hosts that have devices for them."""

from __future__ import annotations

import sqlalchemy as sa
from sqlalchemy.orm import Session

from cinder_thunder.db import models
from cinder_thunder.db.engine import Transactions, retried
from cinder_thunder.db.hosts import host_states
from cinder_thunder.db.values import ClonedVolume, RecordedStack


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
            row = session.get(models.VolumeRow, volume_id)
            return row and ClonedVolume(row.id, row.image_id, row.host)

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
    def inherit(self, volume_id: str, source_id: str, host: str) -> None:
        """Record a clone on ``host`` of another volume: it shares the same image, if any."""
        with self._transactions.write() as session:
            source = session.get(models.VolumeRow, source_id)
            if source is not None and source.host == host:
                session.merge(_row(volume_id, source.image_id, host))

    @retried
    def drop(self, volume_id: str) -> None:
        """Forget a volume that was deleted, or no longer shares blocks; absent is success."""
        with self._transactions.write() as session:
            session.execute(
                sa.delete(models.StackRow).where(models.StackRow.volume_id == volume_id)
            )
            session.execute(sa.delete(models.VolumeRow).where(models.VolumeRow.id == volume_id))

    # Stacks

    def stacks(self, volume_id: str) -> list[RecordedStack]:
        """Every host that has, or is about to have, devices for the volume."""
        with self._transactions.read() as session:
            mine = models.StackRow.volume_id == volume_id
            among = sa.select(models.StackRow.host).where(mine)
            hosts = host_states(self._transactions, session, among)
            rows = session.scalars(sa.select(models.StackRow).where(mine))
            return [
                RecordedStack(
                    row.volume_id, row.host, row.mode, row.host in hosts and hosts[row.host].alive
                )
                for row in rows
            ]

    def direct(self, host: str) -> list[str]:
        """Volumes that share an image and that a host was told to use without a cache."""
        with self._transactions.read() as session:
            return list(
                session.scalars(
                    sa.select(models.StackRow.volume_id)
                    .join(models.VolumeRow, models.VolumeRow.id == models.StackRow.volume_id)
                    .where(models.StackRow.host == host, models.StackRow.mode == "direct")
                    .order_by(models.StackRow.volume_id)
                )
            )

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
    row = session.get(models.StackRow, (volume_id, host))
    if row is None:
        row = models.StackRow(volume_id=volume_id, host=host, created_at=transactions.now())
        session.add(row)
    row.mode, row.stack_id, row.unlisted_at = mode, stack_id or None, None


def _row(volume_id: str, image_id: str, host: str) -> models.VolumeRow:
    return models.VolumeRow(id=volume_id, image_id=image_id, host=host)
