"""A lease: agreement between storage hosts about who does a piece of work, in our own tables.

Cinder's coordination locks may know one host only (``file://``, its default).
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

from oslo_log import log as logging

from cinder_thunder.db.api import Database

LOG = logging.getLogger(__name__)

#: Seconds for which a lease is believed in; a holder that died is waited for no longer.
LENGTH = 30.0
#: Seconds between renewals.
RENEWAL = 8.0


class Lease:
    """``owner``'s lease of the name."""

    def __init__(self, database: Database, name: str, owner: str) -> None:
        self._database = database
        self._name = name
        self._owner = owner

    def acquire(self) -> bool:
        """:returns: False while somebody else has it"""
        return self._database.leases.acquire(self._name, self._owner, LENGTH)

    @contextlib.contextmanager
    def kept(self) -> Iterator[None]:
        """Renew the lease, which has been acquired, while the body runs; then give it back."""
        done = threading.Event()
        renewal = threading.Thread(
            target=self._renew, args=(done,), name="thunder-lease", daemon=True
        )
        renewal.start()
        try:
            yield
        finally:
            done.set()
            renewal.join()
            try:
                self._database.leases.release(self._name, self._owner)
            except Exception:  # of the database; the work itself has come to its end
                LOG.exception("Lease %s could not be given back: it expires by itself", self._name)

    def _renew(self, done: threading.Event) -> None:
        while not done.wait(RENEWAL):
            try:
                if not self._database.leases.renew(self._name, self._owner, LENGTH):
                    LOG.warning("Lease %s expired; its work may be done twice", self._name)
                    return
            except Exception:  # whatever the database does, the next renewal must be tried
                LOG.exception("Lease %s could not be renewed", self._name)
