"""thunder-agent, which fills no base while the file /run/lab/hold exists.

For measurements of what hosts fill while guests boot, from one moment on: the nodes share few
cores, so that their attaches, and what is filled after them, begin long after each other.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

from os_brick_thunder.agent import app, main
from os_brick_thunder.agent.base.filler import Filler
from os_brick_thunder.common.state import Base

HOLD = Path("/run/lab/hold")
_POLL = 0.02


class HeldFiller(Filler):
    """As the agent's, but begins only when it may."""

    def _fill(self, base: Base) -> bool:
        while HOLD.exists():
            if not self._is_wanted(base):
                return False
            time.sleep(_POLL)
        return super()._fill(base)


if __name__ == "__main__":
    setattr(app, "Filler", HeldFiller)  # noqa: B010 (it is imported there, not exported)
    sys.exit(main.main())
