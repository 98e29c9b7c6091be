"""Removes masters of images that were deleted in Glance, and of templates that were given up.

Only Glance's answer marks an image as deleted, and only Cinder's a template, beside its operator.
Bases are removed first, by orders to their hosts; a master follows when no living host has a base
and no volume is a clone of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from oslo_log import log as logging

from cinder_thunder.db.api import Database
from os_brick_thunder.common import errors

LOG = logging.getLogger(__name__)


class Cleaner:
    """Removes the masters of this host."""

    def __init__(
        self,
        host: str,
        database: Database,
        present: Callable[[Iterable[str]], Mapping[str, bool]],
        remove: Callable[[str], object],
        in_cinder: Callable[[str], bool],
    ) -> None:
        """:param host: this backend's name
        :param present: asks Glance which of these images exist; an image without a clear answer
            is missing in the result
        :param remove: removes this host's master of an image with its export; absent is success
        :param in_cinder: whether there is a volume or snapshot with that id
        """
        self._host = host
        self._database = database
        self._present = present
        self._remove = remove
        self._in_cinder = in_cinder

    def run(self) -> None:
        images = self._database.images
        here, templates = images.mastered_on(self._host), images.templates()
        for image_id, present in self._present(sorted(here - templates)).items():
            self._mark(image_id, present)
        for image_id in sorted(here & templates):
            self._check_template(image_id)
        for image_id in images.useless_masters(self._host):
            try:
                self._remove(image_id)
            except errors.ThunderError as error:
                LOG.warning("Could not remove the master of image %s: %s", image_id, error)
            except Exception:  # the others are tried all the same
                LOG.exception("Could not remove the master of image %s", image_id)
            else:
                LOG.info("Removed the master of image %s, which was deleted", image_id)

    def _mark(self, image_id: str, present: bool) -> None:
        try:
            if self._database.images.set_deleted(image_id, not present):
                LOG.info(
                    "Image %s %s in Glance", image_id, "exists again" if present else "was deleted"
                )
        except Exception:  # the others are marked all the same
            LOG.exception("Could not record whether image %s is in Glance", image_id)

    def _check_template(self, image_id: str) -> None:
        """One that its operator has given up stays so while its volume or snapshot is there."""
        try:
            if not self._in_cinder(image_id) and self._database.images.set_deleted(image_id, True):
                LOG.info("Template %s was deleted in Cinder", image_id)
        except Exception:  # the others are checked all the same
            LOG.exception("Could not look for template %s in Cinder", image_id)
