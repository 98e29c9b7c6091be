"""Recordings of boots: what is read of a volume's image in its first two minutes, in order.

A tracker asks for one with its plan. Nothing waits for a recording, and what fails in it is logged
and forgotten.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterable
from functools import partial

from os_brick_thunder.agent.policy.recording import Reads
from os_brick_thunder.agent.ports import Host
from os_brick_thunder.common import errors, wire
from os_brick_thunder.common.mechanism import readmap
from os_brick_thunder.common.mechanism.readmap import ReadMap
from os_brick_thunder.common.policy import devnames
from os_brick_thunder.common.policy.devnames import VolumeNames
from os_brick_thunder.common.policy.extents import Extents
from os_brick_thunder.common.policy.profile import chunk_size, profiled
from os_brick_thunder.common.state import READY, Stack
from os_brick_thunder.common.threads import Jobs

LOG = logging.getLogger(__name__)

#: Recordings of a host at one time: each takes memory of the kernel.
MOST = 3
#: Seconds between two looks; what is read between them is taken to be read in ascending order.
SLOT = 0.1
#: Seconds after which a recording ends.
LIMIT = 120.0
#: Seconds without anything new after which a boot has ended.
QUIET = 15.0
#: Seconds after the beginning of a boot at which it is reported what it has read so far: those who
#: attach a volume of the image meanwhile need not wait for the end.
PARTS = (1.0, 3.0, 10.0)
#: The share of a CPU that the looks of a recording should take at most; slots are longer then, but
#: not longer than this, in seconds: a host that is busy makes everything look expensive.
SHARE, LONGEST_SLOT = 0.05, 0.5
#: Requests that a device may have had before its recording begins; after more, a boot goes on.
MISSED = 256


class Recorder:
    """Records boots of this host's volumes, each in a thread of its own, while there are any."""

    def __init__(
        self,
        host: Host,
        clock: Callable[[], float] = time.monotonic,
        wait: Callable[[float], bool] | None = None,
    ) -> None:
        """:param wait: waits for some seconds; returns whether the recorder was stopped"""
        self._host = host
        self._clock = clock
        self._stopped = threading.Event()
        self._wait = wait or self._stopped.wait
        self._jobs = Jobs("recording", MOST)
        self._reports = Jobs("recorded", MOST)

    def start(self) -> None:
        """Remove what an agent that was killed has left, in the background.

        Of the volumes that are attached now: of those to come, recordings may have begun by then.
        """
        if names := [VolumeNames(each).vol for each in self._host.store.stacks]:
            self._jobs.start("left over", partial(self._forget_left, names))

    def stop(self) -> None:
        """What is being recorded is dropped."""
        self._stopped.set()
        for jobs in (self._jobs, self._reports):
            jobs.stop()
        self._jobs.join(10 * SLOT)

    def planned(self, stack: Stack, plan: wire.Plan) -> None:
        """Start the recording that a plan asks for, if it does, in a thread of its own, which
        waits until the volume is attached. Does not block.

        While a volume is recorded, no other recording of it is begun: it would take the counters of
        the first one for left over.
        """
        if plan.record and plan.image:
            recording = _Recording(
                self._host, self._reports, stack, plan.image, plan.record, self._clock, self._wait
            )
            try:
                self._jobs.start(stack.volume_id, recording.run)
            except RuntimeError as error:  # the thread cannot be started
                LOG.warning("a boot of volume %s is not recorded: %s", stack.volume_id, error)

    def _forget_left(self, names: Iterable[str]) -> None:
        for name in names:
            with contextlib.suppress(errors.ThunderError):  # it has no device now
                readmap.forget_left(self._host.kit.dm, name)


class _Recording:
    """The recording of one boot."""

    def __init__(
        self,
        host: Host,
        reports: Jobs,
        stack: Stack,
        image: wire.ImageInfo,
        record: str,
        clock: Callable[[], float],
        wait: Callable[[float], bool],
    ) -> None:
        """:param reports: makes reports while the recording goes on, one at a time"""
        self._host = host
        self._reports = reports
        self._blocks = host.kit.blocks
        self._stack = stack
        self._record = record
        self._image = image
        self._clock = clock
        self._wait = wait
        self._name = VolumeNames(stack.volume_id).vol
        self._reads = Reads()
        #: At the last look: the requests so far, and whether some were in flight.
        self._seen = (-1, True)
        #: Of what boots read, the part that was here when this one began.
        self._prefetched = Extents()

    def run(self) -> None:
        """:raises errors.ThunderError: there can be no recording"""
        if not self._await_device():
            return
        if self._blocks.requests(devnames.path(self._name)) > MISSED:
            self._send(self._made(last=True))  # of nothing: the tracker may ask another host
            return
        data = Extents.from_wire(self._image.allocated)
        watched = ReadMap(self._host.kit.dm, self._name, data, chunk_size(self._image.size))
        try:
            ended = self._follow(watched)
        finally:
            with contextlib.suppress(errors.ThunderError):  # it went with the device
                watched.remove()
        if ended:
            while self._reports.is_busy(self._record) and not self._wait(SLOT):
                pass  # nothing may overtake another report
            self._send(self._made(last=True))

    def _await_device(self) -> bool:
        """Wait until the volume is attached.

        :returns: False if it will not be: that has failed, or it was detached
        """
        end = self._clock() + LIMIT
        while self._clock() < end:
            stack = self._host.store.stacks.get(self._stack.volume_id)
            if stack is None or stack.stack_id != self._stack.stack_id:
                return False
            if stack.phase == READY:
                return True
            if self._wait(SLOT):
                return False
        return False

    def _follow(self, watched: ReadMap) -> bool:
        """Look what is read until the boot has ended.

        :returns: False if the recorder was stopped before
        """
        end = self._clock() + LIMIT
        newest, parts, took = 0.0, list(PARTS), 0.0
        began: float | None = None
        while not self._wait(min(max(SLOT, took / SHARE), LONGEST_SLOT)):
            before, used = self._reads, time.thread_time()
            try:
                self._look(watched)
            except errors.ThunderError as error:
                LOG.debug("%s: %s", self._name, error)
                return True  # it was detached
            now, took = self._clock(), time.thread_time() - used
            if self._reads.order != before.order:
                newest = now
            if began is None and self._reads.begun:
                began, self._prefetched = now, self._present()
            if now >= end or (began is not None and now >= newest + QUIET):
                return True
            if began is not None and parts and now >= began + parts[0]:
                parts = [part for part in parts if now < began + part]
                # Not here: what is read while a tracker takes its time has an order, too.
                self._reports.start(self._record, partial(self._send, self._made(last=False)))
        return False

    def _look(self, watched: ReadMap) -> None:
        """:raises errors.ThunderError: the device is gone"""
        path = devnames.path(self._name)
        # In this order: Linux 6.1 counts a request here when it begins, and its area when it ends.
        requests, busy = self._blocks.requests(path), self._blocks.in_flight(path) > 0
        if (requests, False) != self._seen:  # much cheaper to know than where they were
            self._reads = self._reads.after(watched.touched())
        self._seen = (requests, busy)

    def _present(self) -> Extents:
        """What the base has of its profile; empty if that cannot be said."""
        base = self._host.store.bases.get(self._image.id)
        if base is None or not base.profile:
            return Extents()
        wanted = profiled(base.profile, base.size)
        try:
            mapped = self._host.kit.metadata.mapped(base.thin_id)
        except errors.ThunderError as error:
            LOG.warning("what was prefetched of image %s is not known: %s", base.image_id, error)
            return Extents()
        return wanted.intersection(base.extents).intersection(mapped)

    def _made(self, last: bool) -> wire.Recording:
        unread = self._prefetched.difference(self._reads.extents)
        return wire.Recording(
            image_id=self._image.id,
            content=self._image.content,
            record=self._record,
            host=self._host.topology.host,
            part=self._reads.profile(self._image.size).encode(),
            last=last,
            prefetched=self._prefetched.length if last else 0,
            wasted=unread.length if last else 0,
        )

    def _send(self, recording: wire.Recording) -> None:
        try:
            self._host.tracker.profile_report(recording)
        except errors.ThunderError as error:
            LOG.info("a recording of image %s is not reported: %s", recording.image_id, error)
