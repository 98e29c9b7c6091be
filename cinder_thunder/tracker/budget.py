"""So many a second, whoever wants them."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable


class Budget:
    """So many a second, on average; what is not used is kept for some time."""

    def __init__(
        self, rate: float, most: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """:param most: how many there are at most at once"""
        self._rate, self._most, self._clock = rate, most, clock
        self._lock = threading.Lock()
        self._left, self._at = most, clock()

    def take(self, wanted: int) -> int:
        """:returns: how many of ``wanted`` there are now; they are used then"""
        with self._lock:
            now = self._clock()
            self._left = min(self._most, self._left + (now - self._at) * self._rate)
            self._at = now
            taken = min(wanted, int(self._left))
            self._left -= taken
            return taken
