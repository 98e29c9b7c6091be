"""What the trackers are told of this host's bases."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import defaultdict

from os_brick_thunder.agent.availability import Availability
from os_brick_thunder.agent.policy import layout
from os_brick_thunder.agent.ports import Host
from os_brick_thunder.common import errors, wire
from os_brick_thunder.common.policy import devnames, dmstatus
from os_brick_thunder.common.policy.devnames import ImageNames
from os_brick_thunder.common.policy.iscsinames import LUN, iqn_of
from os_brick_thunder.common.state import READY, Base

LOG = logging.getLogger(__name__)

#: Seconds after which a complete base is reported again although nothing has changed.
AGAIN = 300.0


class Reporter:
    """Reports bases to the trackers, and withdraws those that were removed."""

    def __init__(self, host: Host, availability: Availability, portal: str) -> None:
        """:param portal: "address:port" of this host's exports"""
        self._host = host
        self._availability = availability
        self._portal = portal
        self._reporting: dict[str, threading.Lock] = defaultdict(threading.Lock)
        #: By image, the last report of a complete base, and its time.monotonic().
        self._said: dict[str, tuple[wire.LocationReport, float]] = {}

    # -- figures ----------------------------------------------------------------------------

    def filled(self, base: Base) -> int:
        """Bytes of its image that a base holds. No disk is read: heartbeats must not hang."""
        kit = self._host.kit
        needed = layout.fill_extents(base.size, base.extents, kit.pool.block).length
        if base.complete:
            return needed
        try:
            return min(needed, dmstatus.mapped(kit.dm.status(ImageNames(base.image_id).base)))
        except errors.ProcessError:  # it is absent since a reboot
            return 0

    def from_network(self, base: Base) -> int:
        """Image bytes that a base has read from replicas since it was built or restored."""
        if not base.complete:
            read = self._host.kit.blocks.bytes_read
            try:
                return base.fetched + sum(map(read, map(devnames.path, layout.multipaths(base))))
            except errors.DeviceNotFound:  # it may just have become complete
                base = self._host.store.bases.get(base.image_id, base)
        return base.fetched

    # -- reports ----------------------------------------------------------------------------

    def report_all(self) -> None:
        """Report every base, but a complete one only after :data:`AGAIN`: a tracker may have lost
        its row. One that cannot be reported does not keep the others from it.

        :raises errors.TrackerUnavailable:
        """
        for base in self._host.store.bases.values():
            if base.phase == READY:
                try:
                    self._report(base, self._state(base), self.filled(base), repeat=False)
                except errors.TrackerUnavailable:
                    raise
                except errors.ThunderError as error:
                    LOG.warning("base of image %s is not reported: %s", base.image_id, error)

    def report(self, base: Base) -> None:
        """Report a base now; if no tracker answers, the next heartbeat does it."""
        try:
            self._report(base, self._state(base), self.filled(base))
        except errors.ThunderError as error:
            LOG.warning("base of image %s: it is reported later: %s", base.image_id, error)

    def report_gone(self, image_id: str) -> None:
        """Tell the trackers that there is no base of this image.

        :raises errors.TrackerUnavailable:
        """
        self._report(Base(image_id, 0, (), "", 0), "gone", 0)

    def withdraw_all(self) -> None:
        """Tell the trackers of the bases that were removed since they last answered.

        Those of images of which a base is being built just now are left to the next time: that may
        wait for other hosts.
        """
        for image_id in self._host.store.withdrawals:
            lock = self._availability.lock(image_id)
            if lock.acquire(blocking=False):
                try:
                    self.withdraw(image_id)
                finally:
                    lock.release()

    def withdraw(self, image_id: str) -> None:
        """Tell the trackers that there is no base of this image, unless there is one again."""
        store = self._host.store
        with self._availability.lock(image_id):
            location_id = store.withdrawal(image_id)
            if location_id is None:
                return
            try:
                self._report(Base(image_id, 0, (), location_id, 0), "gone", 0)
                store.withdrawn(image_id)
            except errors.ThunderError as error:
                LOG.warning("image %s: its base is withdrawn later: %s", image_id, error)

    def _state(self, base: Base) -> str:
        if base.thin_id in self._availability.draining:
            return "draining"
        return "complete" if base.complete else "filling"

    def _report(self, base: Base, state: str, filled: int, repeat: bool = True) -> None:
        """:param repeat: even if that was reported a moment ago"""
        # One at a time for each image: no report may follow the one that says "gone".
        with self._reporting[base.image_id]:
            known = self._host.store.bases.get(base.image_id)
            if state == "gone" or (known and _same(known, base)):
                self._send(self._made(base, state, filled), repeat)

    def _send(self, report: wire.LocationReport, repeat: bool) -> None:
        now = time.monotonic()
        said, when = self._said.pop(report.image_id, (None, -math.inf))
        if repeat or said != report or now - when >= AGAIN:
            self._host.tracker.report(report)
            when = now
        if report.state == "complete":
            self._said[report.image_id] = report, when

    def _made(self, base: Base, state: str, filled: int) -> wire.LocationReport:
        name = self._host.topology.host
        return wire.LocationReport(
            location_id=base.location_id,
            image_id=base.image_id,
            host=name,
            state=state,
            filled=filled,
            portal=self._portal,
            iqn=iqn_of(name, base.image_id),
            lun=LUN,
            source=next((path.host for path in base.paths if path.is_open), None),
            content=base.content,
        )


def _same(base: Base, other: Base) -> bool:
    return (base.thin_id, base.location_id) == (other.thin_id, other.location_id)
