"""thunder-agent, which copies nothing to a base while the file /run/lab/hold exists, and gives no
attached volume a cache while /run/lab/hold.caches does.

For measurements of what hosts fill while guests boot, from one moment on: the nodes share few
cores, so that their attaches, and what is filled after them, begin long after each other.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import ParamSpec

from os_brick_thunder.agent import app, main
from os_brick_thunder.agent.base import filler
from os_brick_thunder.agent.stack import recache
from os_brick_thunder.common.state import Base

HOLD = Path("/run/lab/hold")
HOLD_CACHES = Path(f"{HOLD}.caches")
_POLL = 0.02

_P = ParamSpec("_P")


class HeldFiller(filler.Filler):
    """As the agent's, but copies nothing before it may."""

    def _goes_on(self, base: Base) -> bool:
        while HOLD.exists() and self._is_wanted(base):
            time.sleep(_POLL)
        return super()._goes_on(base)


class HeldRecacher(recache.Recacher):
    """As the agent's, but makes no attempt before it may."""

    def attempt(self) -> bool:
        return not HOLD_CACHES.exists() and super().attempt()


def _held(read_ahead: Callable[_P, None]) -> Callable[_P, None]:
    """What is read ahead of the first piece, which is before that may be copied."""

    def held(*args: _P.args, **kwargs: _P.kwargs) -> None:
        while HOLD.exists():
            time.sleep(_POLL)
        read_ahead(*args, **kwargs)

    return held


if __name__ == "__main__":
    # Not exported, or imported where they are used.
    setattr(filler, "_read_ahead", _held(filler._read_ahead))  # noqa: B010
    setattr(app, "Filler", HeldFiller)  # noqa: B010
    setattr(app, "Recacher", HeldRecacher)  # noqa: B010
    sys.exit(main.main())
