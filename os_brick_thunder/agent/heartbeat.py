"""The heartbeat: the trackers learn that this host is alive, and answer with orders."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence

from os_brick_thunder.agent.ports import Host
from os_brick_thunder.common import errors, wire
from os_brick_thunder.common.periodic import PeriodicThread, Task

LOG = logging.getLogger(__name__)


class Heartbeat:
    """Beats every few seconds. A host whose heartbeat is late is taken for dead, so nothing that
    waits for a disk belongs in this thread.
    """

    def __init__(
        self,
        host: Host,
        interval: float,
        obey: Callable[[wire.Orders], None],
        release: Callable[[], None],
        chores: Sequence[Callable[[], None]],
    ) -> None:
        """
        :param interval: seconds between two beats, unless the trackers order more
        :param obey: gets the orders, and carries them out in the background
        :param release: tells the trackers which stacks were removed: at once after
            :meth:`release_soon`, and after every beat
        :param chores: what else has to wait until a tracker answers, in this order
        """
        self._host = host
        self._interval = interval
        self._ordered = 0.0
        self._obey = obey
        self._release = release
        self._chores = (release, *chores)
        self._due = 0.0  # time.monotonic() of the next beat
        self._thread = PeriodicThread(Task("heartbeat", interval, self._woken, at_once=True))

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._thread.stop()
        self._thread.join(self._interval)

    def release_soon(self) -> None:
        """Have removed stacks released without waiting for the next beat; does not block."""
        self._thread.wake()

    def _woken(self) -> float:
        """:returns: seconds until the next beat"""
        if time.monotonic() < self._due:
            try:
                self._release()
            except errors.ThunderError as error:
                LOG.warning("a release waits: %s", error)
        else:
            self.beat()
            self._due = time.monotonic() + max(self._interval, self._ordered)
        return max(0.0, self._due - time.monotonic())

    def beat(self) -> None:
        """One heartbeat, and the chores."""
        try:
            orders = self._host.tracker.heartbeat(self._host.topology)
            self._ordered = orders.interval
            self._obey(orders)
            self.catch_up()
        except errors.ThunderError as error:
            LOG.warning("heartbeat: %s", error)

    def catch_up(self) -> None:
        """Do the chores; one that fails is done the next time, and the others all the same.

        :raises errors.TrackerUnavailable: not now: no tracker answers
        """
        for chore in self._chores:
            try:
                chore()
            except errors.TrackerUnavailable:
                raise
            except errors.ThunderError as error:
                LOG.warning("after the heartbeat: %s", error)
