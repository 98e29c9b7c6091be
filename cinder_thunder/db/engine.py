"""Connections, transactions and their retries."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from datetime import datetime
from typing import Any, ParamSpec, TypeVar

import sqlalchemy as sa
from oslo_db import api as oslo_db_api
from oslo_db import exception as db_exc
from oslo_db.sqlalchemy import enginefacade

from cinder_thunder.db import models
from cinder_thunder.policy import ranking

#: Heartbeats that all trackers together are to get in a second. A cloud of more hosts than that
#: allows at their configured interval has a longer one.
HEARTBEATS = 200.0
#: Heartbeats that a host may miss before it counts as dead, if its interval is longer.
HEARTBEATS_MISSED = 4
#: Seconds between two counts of the hosts.
COUNT_AFTER = 60.0

_P = ParamSpec("_P")
_R = TypeVar("_R")


def retried(method: Callable[_P, _R]) -> Callable[_P, _R]:
    """Repeat a transaction that lost a deadlock or a race to insert the same row."""
    retry = oslo_db_api.wrap_db_retry(
        max_retries=8,
        retry_interval=0.05,
        inc_retry_interval=True,
        max_retry_interval=1,
        jitter=True,
        retry_on_deadlock=True,
        exception_checker=lambda error: isinstance(error, db_exc.DBDuplicateEntry),
    )
    repeated: Callable[_P, _R] = retry(method)
    return repeated


@enginefacade.transaction_context_provider
class _Context:
    """Carries the session of one transaction, as oslo.db requires."""


class Transactions:
    """Transactions on one database, and the clock that its times are compared with."""

    def __init__(
        self,
        connection: str,
        heartbeat_timeout: float,
        clock: Callable[[], datetime],
        **options: Any,
    ) -> None:
        """The parameters are those of :class:`cinder_thunder.db.api.Database`."""
        self._context = enginefacade.transaction_context()
        self._context.configure(connection=connection, sqlite_fk=True, **options)
        self._configured_timeout = heartbeat_timeout
        self.now = clock
        self._interval, self._counted = 0.0, -math.inf  # the second is of time.monotonic()

    @property
    def engine(self) -> sa.Engine:
        engine: sa.Engine = self._context.writer.get_engine()
        return engine

    @property
    def heartbeat_interval(self) -> float:
        """Seconds between two heartbeats of a compute host, by the size of the cloud."""
        now = time.monotonic()
        if now - self._counted >= COUNT_AFTER:
            self._counted = now
            host = models.HostRow
            with self.read() as session:
                hosts = session.scalar(
                    sa.select(sa.func.count()).select_from(host).where(host.kind == "compute")
                )
            self._interval = (hosts or 0) / HEARTBEATS
        return self._interval

    @property
    def heartbeat_timeout(self) -> float:
        """Seconds of silence after which a host counts as dead."""
        return max(self._configured_timeout, HEARTBEATS_MISSED * self.heartbeat_interval)

    def read(self) -> Any:
        """A context manager: the session of one read-only transaction."""
        return self._context.reader.using(_Context())

    def write(self) -> Any:
        """A context manager: the session of one transaction, committed at its end."""
        return self._context.writer.using(_Context())

    def state(self, heartbeat_at: datetime, now: datetime) -> str:
        """The state of a host by its last heartbeat: alive, suspect or dead."""
        return ranking.state_of((now - heartbeat_at).total_seconds(), self.heartbeat_timeout)
