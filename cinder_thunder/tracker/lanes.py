"""The tracker's RPC server: plans are computed by threads of their own.

A plan may wait for the pool's metadata and for thin_delta. In a storm hundreds of them wait, and
a heartbeat that is served behind them would have its host taken for dead.
"""

from __future__ import annotations

import contextvars
import functools
import time
from collections.abc import Callable
from typing import Any

from oslo_messaging.rpc.server import RPCServer

#: Methods that read the thin pool's metadata.
SLOW = frozenset({"plan_attach"})
#: Threads of each kind. Plans that wait at the same time share a metadata snapshot.
WORKERS = 8
#: To the database, kept at least. A thread that finds none in the pool opens one for a single call,
#: which takes more CPU time than a plan: Python reads the certificates of all authorities.
CONNECTIONS = 2 * WORKERS

_arrival: contextvars.ContextVar[float] = contextvars.ContextVar("arrival")


def waited() -> float:
    """Seconds since the request that this thread serves arrived in this process.

    The time that it was in RabbitMQ is not counted: the server takes requests as they come, and
    RabbitMQ drops what is not taken within its caller's timeout.
    """
    return time.monotonic() - _arrival.get(time.monotonic())


class TwoLaneServer(RPCServer):
    """Serves :data:`SLOW` methods by :data:`WORKERS` threads, and all others by as many. No method
    of one kind waits for the other kind.
    """

    _executor_cls: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._executor_cls = functools.partial(_Lanes, self._executor_cls)


class _Lanes:
    """An executor as oslo.messaging uses it, made of two."""

    def __init__(self, executor: Callable[..., Any], max_workers: int) -> None:
        """
        :param executor: makes an executor of ``max_workers`` threads, or green ones
        :param max_workers: what oslo.messaging would take for both kinds
        """
        threads = min(max_workers, WORKERS)
        self._fast, self._slow = executor(max_workers=threads), executor(max_workers=threads)

    def submit(self, serve: Callable[[Any], None], incoming: Any) -> None:
        slow = incoming[0].message.get("method") in SLOW
        (self._slow if slow else self._fast).submit(_serve, serve, incoming, time.monotonic())

    def shutdown(self, wait: bool = True) -> None:
        for executor in (self._fast, self._slow):
            executor.shutdown(wait=wait)


def _serve(serve: Callable[[Any], None], incoming: Any, arrival: float) -> None:
    token = _arrival.set(arrival)
    try:
        serve(incoming)
    finally:
        _arrival.reset(token)
