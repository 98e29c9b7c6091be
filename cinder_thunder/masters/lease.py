"""Leases: only one storage host at a time does a piece of work.

They are rows in our own tables, since Cinder's coordination locks may be valid on one host only
(``file://``, the default).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from oslo_log import log as logging

from cinder_thunder.db.api import Database
from os_brick_thunder.common.periodic import PeriodicThread, Task

LOG = logging.getLogger(__name__)

#: Lease duration in seconds.
DURATION = 30.0
#: Seconds between renewals.
RENEWAL_INTERVAL = 8.0


class Lease:
    """A lease by name, for one owner."""

    def __init__(self, database: Database, name: str, owner: str) -> None:
        self._database = database
        self._name = name
        self._owner = owner

    def acquire(self) -> bool:
        """:returns: False while another owner has it"""
        return self._database.leases.acquire(self._name, self._owner, DURATION)

    @contextlib.contextmanager
    def kept(self) -> Iterator[None]:
        """Renew the lease, which has been acquired, while the body runs; then release it."""

        def renew() -> None:
            if not self._database.leases.renew(self._name, self._owner, DURATION):
                LOG.warning("Lost lease %s; its work may be done twice", self._name)
                renewal.stop()

        renewal = PeriodicThread(Task("thunder-lease", RENEWAL_INTERVAL, renew))
        renewal.start()
        try:
            yield
        finally:
            renewal.stop()
            renewal.join(DURATION)
            try:
                self._database.leases.release(self._name, self._owner)
            except Exception:  # of the database; the work itself is done
                LOG.exception("Could not release lease %s: it will expire", self._name)
