"""Images and their masters."""

from __future__ import annotations

import json
from typing import Any

import sqlalchemy as sa
from sqlalchemy.orm import Session

from cinder_thunder.db import models
from cinder_thunder.db.engine import Transactions, retried
from cinder_thunder.db.hosts import host_states
from cinder_thunder.db.locations import (
    content_of,
    delete_location,
    location_on,
    lock_tree,
    move_child,
    new_location,
)
from cinder_thunder.db.values import Image, Master, MasterHolders
from cinder_thunder.policy import ranking, tree
from os_brick_thunder.common import wire
from os_brick_thunder.common.policy.content import may_be_same
from os_brick_thunder.common.policy.extents import Extents


class ImageTable:
    """Images, and the masters of each."""

    def __init__(self, transactions: Transactions) -> None:
        self._transactions = transactions

    def all(self) -> list[Image]:
        """Every image that has a replica, without its manifest; the oldest first."""
        row = models.ImageRow
        with self._transactions.read() as session:
            return [
                _image(found) for found in session.scalars(sa.select(row).order_by(row.created_at))
            ]

    def get(self, image_id: str) -> Image | None:
        """An image that has a replica, its manifest included."""
        with self._transactions.read() as session:
            row = session.get(models.ImageRow, image_id)
            return row and _image(row, _manifest(row.manifest))

    def manifest(self, image_id: str) -> wire.ImageDigests | None:
        """The digests of an image; None if there are none, or no such image."""
        row = models.ImageRow
        with self._transactions.read() as session:
            return _manifest(session.scalar(sa.select(row.manifest).where(row.id == image_id)))

    def templates(self) -> set[str]:
        """Ids of the images that are templates."""
        row = models.ImageRow
        with self._transactions.read() as session:
            return set(session.scalars(sa.select(row.id).where(row.template)))

    @retried
    def set_deleted(self, image_id: str, deleted: bool) -> bool:
        """Record whether an image was deleted.

        :returns: whether that is a change
        """
        row = models.ImageRow
        with self._transactions.write() as session:
            done = session.execute(
                sa.update(row)
                .where(row.id == image_id, row.deleted != deleted)
                .values(deleted=deleted)
            )
            return bool(done.rowcount)

    # Masters

    @retried
    def add_master(self, image: Image, host: str) -> None:
        """Record that ``host`` (a backend) holds the whole image as a master.

        What the image's first master recorded of it stays, unless its content is another one now:
        the replicas of that do not count any longer. A template is no longer deleted.
        """
        now = self._transactions.now()
        with self._transactions.write() as session:
            known = session.get(models.ImageRow, image.id, with_for_update=True)
            if known is not None and not may_be_same(_content(known), image.content):
                _replace(session, known, image)
            if known is not None and image.template:
                known.deleted = False
            if known is None:
                known = models.ImageRow(id=image.id, created_at=now, template=image.template)
                _describe(known, image)
                session.add(known)
                session.flush()
            if not _content(known):
                _set_content(known, image.content)
            if known.manifest is None and image.manifest is not None:
                known.manifest, known.root = _json(image.manifest.to_wire()), image.root
            row = location_on(session, image.id, host)
            if row is None:
                row = new_location(session, image.id, host)
            move_child(session, row.parent_id, None)
            row.kind, row.state, row.parent_id = ranking.MASTER, ranking.COMPLETE, None
            row.depth, row.filled = 0, image.allocated.length
            row.portal, row.iqn, row.lun = "", "", 0
            row.updated_at = now
            session.add(row)

    @retried
    def set_verified(self, image_id: str, verified: bool | None, content: str) -> None:
        """Record that an image's signature was checked, and of which content it is; nothing if that
        is no longer the image's.
        """
        with self._transactions.write() as session:
            row = session.get(models.ImageRow, image_id, with_for_update=True)
            if row is not None and may_be_same(_content(row), content):
                row.signature_verified = verified
                _set_content(row, content)

    @retried
    def drop_master(self, image_id: str, host: str) -> None:
        """Forget a master that was removed; absent is success."""
        with self._transactions.write() as session:
            lock_tree(session, image_id)
            row = location_on(session, image_id, host)
            if row is not None and row.kind == ranking.MASTER:
                delete_location(session, row)

    def master(self, image_id: str, host: str) -> Master | None:
        """The master of the image on ``host``; None if it holds none."""
        image, location = models.ImageRow, models.LocationRow
        with self._transactions.read() as session:
            row = session.execute(
                sa.select(
                    image.size, image.signature_verified, image.os_hash_algo, image.os_hash_value
                )
                .join(location, location.image_id == image.id)
                .where(
                    image.id == image_id,
                    location.host == host,
                    location.kind == ranking.MASTER,
                )
            ).one_or_none()
            return row and Master(
                row.size,
                row.signature_verified,
                content_of(row.os_hash_algo, row.os_hash_value),
            )

    def mastered_on(self, host: str) -> set[str]:
        """Ids of the images of which ``host`` holds a master, by the records."""
        location = models.LocationRow
        with self._transactions.read() as session:
            return set(
                session.scalars(
                    sa.select(location.image_id).where(
                        location.host == host, location.kind == ranking.MASTER
                    )
                )
            )

    def holders(self) -> list[MasterHolders]:
        """The masters of all images that were not deleted."""
        image, location = models.ImageRow, models.LocationRow
        with self._transactions.read() as session:
            rows = session.execute(
                sa.select(location.image_id, location.host, location.filled)
                .join(image, image.id == location.image_id)
                .where(location.kind == ranking.MASTER, ~image.deleted)
            ).all()
        sizes = {image_id: filled for image_id, _host, filled in rows}
        hosts: dict[str, set[str]] = {image_id: set() for image_id in sizes}
        for image_id, host, _filled in rows:
            hosts[image_id].add(host)
        return [
            MasterHolders(found, size, frozenset(hosts[found])) for found, size in sizes.items()
        ]

    def useless_masters(self, host: str) -> list[str]:
        """Images that were deleted and whose masters on ``host`` can be removed."""
        image, location, volume = models.ImageRow, models.LocationRow, models.VolumeRow
        cloned = sa.exists().where(volume.image_id == location.image_id, volume.host == host)
        with self._transactions.read() as session:
            bases = sa.select(location.host).where(location.kind == ranking.BASE)
            hosts = host_states(self._transactions, session, bases)
            deleted = session.execute(
                sa.select(location.image_id, cloned)
                .join(image, image.id == location.image_id)
                .where(location.host == host, location.kind == ranking.MASTER, image.deleted)
                .order_by(location.image_id)
            ).all()
            readers: dict[str, set[str]] = {image_id: set() for image_id, _cloned in deleted}
            for image_id, reader in session.execute(
                sa.select(location.image_id, location.host).where(
                    location.image_id.in_(readers), location.kind == ranking.BASE
                )
            ):
                readers[image_id].add(reader)
        masters = [
            tree.HeldMaster(image_id, True, is_cloned, frozenset(readers[image_id]))
            for image_id, is_cloned in deleted
        ]
        return tree.useless_masters(masters, hosts)


def _image(row: models.ImageRow, manifest: wire.ImageDigests | None = None) -> Image:
    return Image(
        row.id,
        row.size,
        Extents.from_wire(json.loads(row.allocated)),
        row.signature_verified,
        manifest,
        row.deleted,
        _content(row),
        row.template,
        row.root,
    )


def _content(row: models.ImageRow) -> str:
    return content_of(row.os_hash_algo, row.os_hash_value)


def _set_content(row: models.ImageRow, content: str) -> None:
    algorithm, _, value = content.partition(":")
    row.os_hash_algo, row.os_hash_value = algorithm or None, value or None


def _describe(row: models.ImageRow, image: Image) -> None:
    row.size = image.size
    row.allocated = _json(image.allocated.to_wire())
    row.signature_verified = image.signature_verified
    row.manifest, row.root = None, ""
    _set_content(row, image.content)


def _replace(session: Session, row: models.ImageRow, image: Image) -> None:
    """Give an image other content. Its masters and its boots are forgotten, and its bases are to
    be removed.
    """
    location, profile = models.LocationRow, models.ProfileRow
    here = location.image_id == image.id
    session.execute(sa.delete(location).where(here, location.kind == ranking.MASTER))
    session.execute(
        sa.update(location)
        .where(here, location.kind == ranking.BASE)
        .values(state=ranking.STALE, parent_id=None, children=0)
    )
    session.execute(sa.delete(profile).where(profile.image_id == image.id))
    _describe(row, image)


def _json(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"))


def _manifest(text: str | None) -> wire.ImageDigests | None:
    return None if text is None else wire.parse(wire.ImageDigests, json.loads(text))
