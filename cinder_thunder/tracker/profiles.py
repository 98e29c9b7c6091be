"""Boot profiles: which boots are recorded, and what plans say of earlier ones.

Nothing here may fail or delay an attach: without a profile a base is filled from its start to its
end.
"""

from __future__ import annotations

import math
import random
import time
import uuid
from collections.abc import Callable
from dataclasses import replace

from oslo_log import log as logging

from cinder_thunder.db.profiles import ProfileTable
from cinder_thunder.policy import profiles
from os_brick_thunder.common import errors, wire
from os_brick_thunder.common.policy.content import may_be_same
from os_brick_thunder.common.policy.profile import Profile, chunk_size

LOG = logging.getLogger(__name__)

#: Seconds after which a recorder that has not reported (again) no longer counts. A recording takes
#: two minutes at most; before it begins, Nova starts the server.
EXPIRES = 180.0
#: Seconds for which the answer to heartbeats is not computed again, and images that it names.
POPULAR_FOR = 60.0
MOST_POPULAR = 16
#: Seconds for which hosts are told of a change, which is several heartbeats also in a large cloud,
#: and for which all changes are not read again.
TOLD_FOR, CHANGES_FOR = 120.0, 1.0


class BootProfiles:
    """The boot profiles of all images, for agents."""

    def __init__(
        self,
        table: ProfileTable,
        draw: Callable[[], float] = random.random,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """:param draw: random numbers from 0 to 1"""
        self._table = table
        self._draw = draw
        self._clock = clock
        self._popular: tuple[str, ...] = ()
        self._popular_until = -math.inf
        self._changes: tuple[wire.BootProfile, ...] = ()
        self._changes_until = -math.inf

    def popular(self) -> tuple[str, ...]:
        """Images whose boots were recorded, those with the most volumes first."""
        now = self._clock()
        if now >= self._popular_until:
            self._popular_until = now + POPULAR_FOR  # first: other heartbeats do not ask, too
            try:
                self._popular = self._table.popular(MOST_POPULAR)
            except Exception:  # the other orders of a heartbeat do not need it
                LOG.exception("The most used images are not known now")
        return self._popular

    def changed(self, host: str) -> tuple[wire.BootProfile, ...]:
        """What was learned lately of images whose bases a host fills: so that the first boots of an
        image help all that boot at the same time.
        """
        now = self._clock()
        try:
            if now >= self._changes_until:
                self._changes_until = now + CHANGES_FOR  # first: other heartbeats do not ask, too
                self._changes = self._table.changed(TOLD_FOR, wire.MOST_PROFILES)
            changes = self._changes
            if not changes:
                return ()
            here = self._table.filled_by(host, [each.image_id for each in changes])
            return tuple(each for each in changes if each.image_id in here)
        except Exception:  # the other orders of a heartbeat do not need it
            LOG.exception("What was learned of boots is not known now")
            return ()

    def added(self, plan: wire.Plan, host: str = "") -> wire.Plan:
        """A plan with the profile of its image.

        :param host: that a boot may be recorded on; empty: this plan is not for one
        """
        if plan.image is None:
            return plan
        try:
            return self._added(plan, plan.image, host)
        except Exception:  # it does without
            LOG.exception("No boot profile for image %s", plan.image.id)
            return plan

    def _added(self, plan: wire.Plan, image: wire.ImageInfo, host: str) -> wire.Plan:
        known = self._table.of(image.id)
        if known is not None and not may_be_same(known.content, image.content):
            known = None  # of what the image was before
        state, recorders = (
            (known.state, known.recorders) if known is not None else (profiles.EMPTY, 0)
        )
        record = ""
        if host and profiles.wanted(state, recorders, self._draw()):
            record = str(uuid.uuid4())
            if not self._table.start(record, image, host, EXPIRES):
                record = ""
        return replace(plan, profile=known.body if known is not None else "", record=record)

    def report(self, recording: wire.Recording) -> None:
        """Take what a boot has read. What nobody asked for, or came too late, is dropped.

        :raises errors.InvalidRequest: it is not of that image
        """
        recorder = self._table.recorder(recording.record)
        if recorder is None or (recorder.image_id, recorder.host) != (
            recording.image_id, recording.host
        ):  # fmt: skip
            LOG.debug("Nobody asked %s for recording %s", recording.host, recording.record)
            return
        try:
            read = Profile.decode(recording.part, recorder.size)
        except ValueError as error:
            raise errors.InvalidRequest(
                f"recording of image {recording.image_id}: {error}"
            ) from error
        chunk = chunk_size(recorder.size)  # boots are merged chunk by chunk
        if read.chunk < chunk:
            raise errors.InvalidRequest(
                f"recording of image {recording.image_id}: chunks of {read.chunk} bytes"
            )
        read = read.cut(chunk, recorder.size)
        learned = self._table.report(recording, read, recorder.size, EXPIRES)
        if learned is not None:
            LOG.info(
                "Boot of image %s on %s: %s, coverage %s, waste %s",
                recording.image_id, recording.host, learned.state,
                profiles.percent(learned.coverage), profiles.percent(learned.waste),
            )  # fmt: skip
