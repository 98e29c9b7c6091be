"""Lets go of images that Glance has no more.

Glance's word alone marks an image as gone. Bases go first, by the orders that their hosts get; a
master goes when nobody reads from it and no volume on its host is made of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from oslo_log import log as logging

from cinder_thunder.db.api import Database
from os_brick_thunder.common import errors

LOG = logging.getLogger(__name__)


class Cleaner:
    """Looks after the images whose masters this host has."""

    def __init__(
        self,
        host: str,
        database: Database,
        present: Callable[[Iterable[str]], Mapping[str, bool]],
        remove: Callable[[str], object],
    ) -> None:
        """:param host: this backend's name
        :param present: asks Glance which of these images it has; an image that it gave no clear
            answer for is missing in the answer
        :param remove: removes this host's master of an image with its export; absent is success
        """
        self._host = host
        self._database = database
        self._present = present
        self._remove = remove

    def run(self) -> None:
        for image_id, present in self._present(
            sorted(self._database.images.mastered_on(self._host))
        ).items():
            if self._database.images.set_deleted(image_id, not present):
                LOG.info("Image %s is %s Glance", image_id, "back in" if present else "gone from")
        for image_id in self._database.images.useless_masters(self._host):
            try:
                self._remove(image_id)
            except errors.ThunderError as error:
                LOG.warning("The master of image %s stays for now: %s", image_id, error)
            except Exception:  # one that stays keeps none of the others here
                LOG.exception("The master of image %s stays for now", image_id)
            else:
                LOG.info("The master of image %s is removed: Glance has it no more", image_id)
