"""The tracker's tables: every access to them, each method one short transaction.

Methods take and return plain values (:mod:`cinder_thunder.db.values`); no session or row leaves
this package, and no device is touched inside a transaction.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime
from typing import Any

import sqlalchemy as sa
from oslo_utils import timeutils

from cinder_thunder.db.engine import HEARTBEAT_TIMEOUT, Transactions
from cinder_thunder.db.hosts import Hosts
from cinder_thunder.db.images import Images
from cinder_thunder.db.leases import Leases
from cinder_thunder.db.locations import Locations
from cinder_thunder.db.volumes import Volumes


class Database:
    """The tables behind one connection URL, by subject."""

    def __init__(
        self,
        connection: str,
        heartbeat_timeout: float = HEARTBEAT_TIMEOUT,
        clock: Callable[[], datetime] = timeutils.utcnow,
        **options: Any,
    ) -> None:
        """:param heartbeat_timeout: seconds of silence after which a host counts as dead; after
            half of them it is suspect
        :param options: oslo.db's engine options, as in Cinder's ``[database]``
        """
        self._transactions = Transactions(connection, heartbeat_timeout, clock, **options)
        self.hosts = Hosts(self._transactions)
        self.images = Images(self._transactions)
        self.locations = Locations(self._transactions)
        self.volumes = Volumes(self._transactions)
        self.leases = Leases(self._transactions)

    @property
    def engine(self) -> sa.Engine:
        return self._transactions.engine
