"""Pauses that grow with each attempt at something that may fail for a while.

A value, where tenacity has a loop that sleeps: the agent tries many things in turn from one thread,
with a clock that tests set.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

#: Seconds after the first and later attempts; the last one is repeated.
PAUSES = (5.0, 10.0, 20.0, 40.0, 60.0)


@dataclass(frozen=True)
class Backoff:
    """``attempts`` made so far; the next one is not to be made before ``due`` (seconds)."""

    attempts: int = 0
    due: float = 0.0

    def after_attempt(self, now: float, pauses: Sequence[float] = PAUSES) -> Backoff:
        """One more attempt has ended at ``now``.

        :param pauses: as :data:`PAUSES`
        """
        pause = pauses[min(self.attempts, len(pauses) - 1)]
        return Backoff(self.attempts + 1, now + pause)
