"""Tells agents which image is about to be attached to their host.

Cinder knows that seconds before Nova connects the volume. Nothing depends on it: what is not told
costs the head start.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

from oslo_log import log as logging

from os_brick_thunder.common import errors

LOG = logging.getLogger(__name__)

#: Announcements at one time. Agents answer at once; those that are down take up a thread for
#: :data:`TIMEOUT` each, and must not take up all of the process.
MOST = 32
#: Seconds after which an announcement is worth nothing: the attach itself has come.
TIMEOUT = 3.0


class Announcer:
    """Announces attaches in the background. No error of it reaches the caller."""

    def __init__(self, send: Callable[[str, str], None]) -> None:
        """:param send: as ``RpcTracker.announce``"""
        self._send = send
        self._slots = threading.BoundedSemaphore(MOST)

    def announce(self, host: str, image_id: str) -> None:
        """A volume of an image is about to be attached to a host. Does not block."""
        if not self._slots.acquire(blocking=False):
            LOG.debug("image %s is not announced to %s: too many others are", image_id, host)
            return
        thread = threading.Thread(
            target=self._work, args=(host, image_id), name="announce", daemon=True
        )
        try:
            thread.start()
        except RuntimeError as error:  # there are too many threads
            self._slots.release()
            LOG.warning("image %s is not announced to %s: %s", image_id, host, error)

    def _work(self, host: str, image_id: str) -> None:
        try:
            self._send(host, image_id)
        except errors.ThunderError as error:  # an older agent, or none
            LOG.debug("image %s is not announced to %s: %s", image_id, host, error)
        except Exception:
            LOG.exception("image %s is not announced to %s", image_id, host)
        finally:
            self._slots.release()
