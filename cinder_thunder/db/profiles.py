"""Boot profiles of images, and the boots that they are made of.

What a boot changes is decided in :mod:`cinder_thunder.policy.profiles`. Nothing here takes the lock
of an image's tree, so that no plan waits for a recording: the row of a profile is the lock of its
boots.
"""

from __future__ import annotations

import functools
from collections.abc import Collection
from datetime import datetime, timedelta
from typing import Any

import sqlalchemy as sa
from oslo_db import exception as db_exc
from oslo_log import log as logging
from sqlalchemy.orm import Session

from cinder_thunder.db import models
from cinder_thunder.db.engine import Transactions, retried
from cinder_thunder.db.values import KnownProfile, ProfileDetails, RecordedBoot, Recorder
from cinder_thunder.policy import profiles, ranking
from os_brick_thunder.common import wire
from os_brick_thunder.common.policy.content import may_be_same
from os_brick_thunder.common.policy.profile import Profile

LOG = logging.getLogger(__name__)


class ProfileTable:
    """The profiles of all images."""

    def __init__(self, transactions: Transactions) -> None:
        self._transactions = transactions

    def of(self, image_id: str) -> KnownProfile | None:
        """What a plan needs to know, in one query; None if no boot was ever recorded."""
        values = {"image": image_id, "now": self._transactions.now()}
        with self._transactions.read() as session:
            found = session.execute(_known(), values).one_or_none()
        return found and KnownProfile(*found)

    def popular(self, most: int) -> tuple[str, ...]:
        """Images of which something is known, those with the most volumes first."""
        row, volume, image = models.ProfileRow, models.VolumeRow, models.ImageRow
        with self._transactions.read() as session:
            return tuple(
                session.scalars(
                    sa.select(row.image_id)
                    .join(image, image.id == row.image_id)
                    .join(volume, volume.image_id == row.image_id)
                    .where(row.state != profiles.EMPTY, ~image.deleted)
                    .group_by(row.image_id)
                    .order_by(sa.func.count().desc(), row.image_id)
                    .limit(most)
                )
            )

    def changed(self, seconds: float, most: int) -> tuple[wire.BootProfile, ...]:
        """What was learned in the last ``seconds``, the newest first."""
        row = models.ProfileRow
        since = self._transactions.now() - timedelta(seconds=seconds)
        with self._transactions.read() as session:
            found = session.execute(
                sa.select(row.image_id, row.content, row.body)
                .where(row.updated_at > since, row.body != "")
                .order_by(row.updated_at.desc(), row.image_id)
                .limit(most)
            )
            return tuple(wire.BootProfile(*each) for each in found)

    def filled_by(self, host: str, images: Collection[str]) -> frozenset[str]:
        """Those of some images whose bases on a host are being filled."""
        row = models.LocationRow
        with self._transactions.read() as session:
            found = session.scalars(
                sa.select(row.image_id).where(
                    row.host == host,
                    row.state.in_((ranking.CREATING, ranking.FILLING)),
                    row.image_id.in_(images),
                )
            )
            return frozenset(found)

    def start(self, record: str, image: wire.ImageInfo, host: str, seconds: float) -> bool:
        """Record that a host is asked to record a boot.

        The boots of what the image was before are forgotten, as are recorders that are overdue.

        :param record: the recording's id
        :param seconds: in which it has to report for the first time
        :returns: False if as many others record as may
        """
        self._create(image)
        return self._start(record, image, host, seconds)

    def _create(self, image: wire.ImageInfo) -> None:
        """By itself: a lock of a row that is missing would make all others who insert it fail."""
        with self._transactions.read() as session:
            if session.get(models.ProfileRow, image.id) is not None:
                return
        try:
            with self._transactions.write() as session:
                row = models.ProfileRow(image_id=image.id, version=0, content=image.content)
                _clear(row, self._transactions.now())
                session.add(row)
        except db_exc.DBDuplicateEntry:
            LOG.debug("Another tracker has just made the profile of image %s", image.id)

    @retried
    def _start(self, record: str, image: wire.ImageInfo, host: str, seconds: float) -> bool:
        now, boot = self._transactions.now(), models.BootRow
        with self._transactions.write() as session:
            row = _locked(session, image.id)
            if row is None:
                return False
            if not may_be_same(row.content, image.content):
                session.execute(sa.delete(boot).where(boot.image_id == image.id))
                _clear(row, now)
                row.content = image.content
            row.content = row.content or image.content
            recorders = session.scalar(_recorders(), {"image": image.id, "now": now})
            if (recorders or 0) >= profiles.RECORDERS:
                return False
            session.execute(
                sa.delete(boot).where(
                    boot.image_id == image.id, ~boot.whole, boot.expires_at <= now
                )
            )
            session.add(
                models.BootRow(
                    id=record, image_id=image.id, host=host, whole=False, body="",
                    prefetched=0, wasted=0, updated_at=now,
                    expires_at=now + timedelta(seconds=seconds),
                )
            )  # fmt: skip
            return True

    def recorder(self, record: str) -> Recorder | None:
        """Who was asked for a recording; None if nobody was, or it is forgotten."""
        boot, image = models.BootRow, models.ImageRow
        with self._transactions.read() as session:
            found = session.execute(
                sa.select(boot.image_id, boot.host, image.size)
                .join(image, image.id == boot.image_id)
                .where(boot.id == record, ~boot.whole)
            ).one_or_none()
        return found and Recorder(*found)

    @retried
    def report(
        self, recording: wire.Recording, read: Profile, size: int, seconds: float
    ) -> profiles.Learned | None:
        """Record what a boot has read.

        :param read: the recording's part
        :param size: of the image
        :param seconds: in which it has to report again
        :returns: what is known now, if a boot has ended
        """
        now = self._transactions.now()
        with self._transactions.write() as session:
            row = _locked(session, recording.image_id)
            boot = session.get(models.BootRow, recording.record)
            if (
                row is None
                or boot is None
                or boot.whole
                or not may_be_same(row.content, recording.content)
            ):
                return None
            boot.body, boot.updated_at = read.encode(), now
            boot.prefetched, boot.wasted = recording.prefetched, recording.wasted
            boot.expires_at = now + timedelta(seconds=seconds)
            if recording.last:
                return _end(session, row, boot, read, size)
            if row.state in (profiles.EMPTY, profiles.LIVE):
                known = _decoded(row.body, size, read.chunk)
                _put(row, profiles.live(known, read), profiles.LIVE, now)
            return None

    def show(self, image_id: str) -> ProfileDetails | None:
        """A profile and its boots, the oldest first; None if no boot was ever recorded."""
        values = {"image": image_id, "now": self._transactions.now()}
        with self._transactions.read() as session:
            row = session.get(models.ProfileRow, image_id)
            if row is None:
                return None
            recorders = session.scalar(_recorders(), values) or 0
            whole = [
                RecordedBoot(
                    found.host, found.body, found.coverage, found.waste,
                    found.prefetched, found.wasted,
                )
                for found in _whole(session, image_id)
            ]  # fmt: skip
            return ProfileDetails(row.state, row.version, row.body, recorders, tuple(whole))

    @retried
    def open(self, image_id: str) -> bool:
        """Have boots recorded again, until they agree.

        :returns: False if none was ever recorded: they will be, without this
        """
        with self._transactions.write() as session:
            row = _locked(session, image_id)
            if row is None:
                return False
            if row.state == profiles.SETTLED:
                row.state = profiles.OPEN
            row.opened_at = self._transactions.now()
            return True

    def left(self) -> list[str]:
        """Images that are no longer known, and whose profiles are to be forgotten."""
        row, image = models.ProfileRow, models.ImageRow
        with self._transactions.read() as session:
            return list(
                session.scalars(
                    sa.select(row.image_id).where(~sa.exists().where(image.id == row.image_id))
                )
            )

    @retried
    def reset(self, image_id: str) -> bool:
        """Forget a profile and its boots.

        :returns: False if there was none
        """
        row, boot = models.ProfileRow, models.BootRow
        with self._transactions.write() as session:
            if _locked(session, image_id) is None:
                return False
            session.execute(sa.delete(boot).where(boot.image_id == image_id))
            session.execute(sa.delete(row).where(row.image_id == image_id))
            return True


@functools.cache
def _recorders() -> Any:
    """The number of boots that are being recorded, by recorders that are not overdue."""
    boot = models.BootRow.__table__.c
    return (
        sa.select(sa.func.count())
        .select_from(models.BootRow.__table__)
        .where(
            boot.image_id == sa.bindparam("image"),
            ~boot.whole,
            boot.expires_at > sa.bindparam("now"),
        )
    )


@functools.cache
def _known() -> Any:
    """:class:`.values.KnownProfile`"""
    row = models.ProfileRow.__table__.c
    recorders = _recorders().scalar_subquery()
    return sa.select(row.content, row.state, row.body, recorders).where(
        row.image_id == sa.bindparam("image")
    )


def _locked(session: Session, image_id: str) -> models.ProfileRow | None:
    return session.get(models.ProfileRow, image_id, with_for_update=True)


def _clear(row: models.ProfileRow, now: datetime) -> None:
    row.state, row.body = profiles.EMPTY, ""
    row.opened_at = row.updated_at = now


def _put(row: models.ProfileRow, profile: Profile, state: str, now: datetime) -> None:
    body = profile.encode()
    if body != row.body:
        row.body, row.version = body, row.version + 1
    row.state, row.updated_at = state, now


def _whole(session: Session, image_id: str) -> list[models.BootRow]:
    """The boots that have ended, the oldest first."""
    boot = models.BootRow
    return list(
        session.scalars(
            sa.select(boot)
            .where(boot.image_id == image_id, boot.whole)
            .order_by(boot.updated_at, boot.id)
        )
    )


def _end(
    session: Session, row: models.ProfileRow, boot: models.BootRow, read: Profile, size: int
) -> profiles.Learned | None:
    """A boot has ended; what is none is forgotten."""
    before: list[profiles.Boot] = []
    kept: list[models.BootRow] = []
    for each in _whole(session, row.image_id):
        known = _decoded(each.body, size, read.chunk)
        if known is None:
            session.delete(each)
            continue
        recent = each.updated_at >= row.opened_at
        before.append(profiles.Boot(each.host, known, each.coverage, recent))
        kept.append(each)
    if not profiles.is_boot(read, [each.read for each in before]):
        session.delete(boot)
        return None
    learned = profiles.learn(row.state, before, boot.host, read)
    boot.whole, boot.coverage, boot.waste = True, learned.coverage, learned.waste
    if row.state == profiles.SETTLED and learned.state == profiles.OPEN:
        row.opened_at = boot.updated_at
    _put(row, learned.profile, learned.state, boot.updated_at)
    for each in kept[: -(profiles.KEPT - 1)]:
        session.delete(each)
    return learned


def _decoded(body: str, size: int, chunk: int) -> Profile | None:
    """Cut into chunks of this size; None if it is empty, or has smaller ones: an image may get
    other content.
    """
    try:
        found = Profile.decode(body, size)
    except ValueError:
        return None
    return found.cut(chunk, size) if found.chunk >= chunk else None
