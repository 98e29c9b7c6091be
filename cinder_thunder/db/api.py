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

from cinder_thunder.db.engine import Transactions
from cinder_thunder.db.hosts import HostTable
from cinder_thunder.db.images import ImageTable
from cinder_thunder.db.leases import LeaseTable
from cinder_thunder.db.locations import LocationTable
from cinder_thunder.db.profiles import ProfileTable
from cinder_thunder.db.volumes import VolumeTable
from os_brick_thunder.common.policy.timelimits import HEARTBEAT_TIMEOUT


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
        self.hosts = HostTable(self._transactions)
        self.images = ImageTable(self._transactions)
        self.locations = LocationTable(self._transactions)
        self.volumes = VolumeTable(self._transactions)
        self.leases = LeaseTable(self._transactions)
        self.profiles = ProfileTable(self._transactions)

    @property
    def engine(self) -> sa.Engine:
        return self._transactions.engine
