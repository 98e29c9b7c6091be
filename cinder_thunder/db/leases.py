"""Leases: which storage host does a piece of work that only one of them should do."""

from __future__ import annotations

from datetime import timedelta

import sqlalchemy as sa

from cinder_thunder.db import models
from cinder_thunder.db.engine import Transactions, retried


class LeaseTable:
    """Leases by name."""

    def __init__(self, transactions: Transactions) -> None:
        self._transactions = transactions

    @retried
    def acquire(self, name: str, owner: str, seconds: float) -> bool:
        """Take a lease, or extend one that ``owner`` has, to ``seconds`` from now.

        :returns: False while another owner has it
        """
        now = self._transactions.now()
        with self._transactions.write() as session:
            row = session.get(models.LeaseRow, name, with_for_update=True)
            if row is None:
                row = models.LeaseRow(name=name)
                session.add(row)
            elif row.owner != owner and row.expires_at > now:
                return False
            row.owner, row.expires_at = owner, now + timedelta(seconds=seconds)
            return True

    @retried
    def renew(self, name: str, owner: str, seconds: float) -> bool:
        """:returns: False if ``owner`` no longer has it: it expired, and another owner took it"""
        with self._transactions.write() as session:
            row = session.get(models.LeaseRow, name, with_for_update=True)
            if row is None or row.owner != owner:
                return False
            row.expires_at = self._transactions.now() + timedelta(seconds=seconds)
            return True

    @retried
    def release(self, name: str, owner: str) -> None:
        """Give a lease back; one that ``owner`` does not have stays."""
        with self._transactions.write() as session:
            session.execute(
                sa.delete(models.LeaseRow).where(
                    models.LeaseRow.name == name, models.LeaseRow.owner == owner
                )
            )

    @retried
    def reap(self, left: float) -> int:
        """Delete leases that expired ``left`` seconds ago; returns how many."""
        since = self._transactions.now() - timedelta(seconds=left)
        with self._transactions.write() as session:
            done = session.execute(
                sa.delete(models.LeaseRow).where(models.LeaseRow.expires_at < since)
            )
            return int(done.rowcount)

    @retried
    def release_all(self, owner: str) -> None:
        """Give back whatever ``owner`` had before it was restarted."""
        with self._transactions.write() as session:
            session.execute(sa.delete(models.LeaseRow).where(models.LeaseRow.owner == owner))
