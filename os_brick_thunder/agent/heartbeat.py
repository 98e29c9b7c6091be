"""The heartbeat: the trackers learn that this host is alive, and answer with orders."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence

from os_brick_thunder.agent.ports import Host
from os_brick_thunder.common import errors, wire
from os_brick_thunder.common.periodic import PeriodicThread, Task

LOG = logging.getLogger(__name__)


class Heartbeat:
    """Beats every few seconds. A host whose heartbeat is late is taken for dead, so nothing else is
    done in its thread: what else the trackers are to be told has a thread of its own.
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
        self._answered = threading.Event()  # a beat, since the chores were done
        self._beats = PeriodicThread(Task("heartbeat", interval, self.beat, at_once=True))
        self._reports = PeriodicThread(Task("reports", interval, self._report))

    def start(self) -> None:
        self._beats.start()
        self._reports.start()

    def stop(self) -> None:
        for thread in (self._beats, self._reports):
            thread.stop()
        for thread in (self._beats, self._reports):
            thread.join(self._interval)

    def release_soon(self) -> None:
        """Have removed stacks released without waiting for the next beat; does not block."""
        self._reports.wake()

    def beat(self) -> float:
        """One heartbeat; the chores are done after it, in their thread.

        :returns: seconds until the next one
        """
        try:
            orders = self._host.tracker.heartbeat(self._host.topology)
            self._ordered = orders.interval
            self._obey(orders)
            self._answered.set()
            self._reports.wake()
        except errors.ThunderError as error:
            LOG.warning("heartbeat: %s", error)
        return max(self._interval, self._ordered)

    def _report(self) -> None:
        try:
            if self._answered.is_set():
                self._answered.clear()
                self.catch_up()
            else:
                self._release()
        except errors.ThunderError as error:
            LOG.warning("the trackers are told later: %s", error)

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
