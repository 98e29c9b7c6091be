"""Whether this process runs on eventlet, as every cinder-volume before Cinder 29 does."""

from __future__ import annotations

import sys


def is_green() -> bool:
    """Whether threads are eventlet's, so that a call that blocks stops all of them.

    eventlet itself is asked, as ``cinder.monkey_patch`` does not exist before Cinder 29.
    """
    patcher = sys.modules.get("eventlet.patcher")
    return patcher is not None and bool(patcher.is_monkey_patched("thread"))
