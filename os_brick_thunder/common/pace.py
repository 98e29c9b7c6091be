"""A rate of bytes that several threads keep together."""

from __future__ import annotations

import threading
import time

#: Seconds of a pause that may be made up for.
_LEEWAY = 1.0


class Pace:
    """Tells those who share it how long to wait, so that all of them together keep a rate."""

    def __init__(self, rate: int = 0) -> None:
        """:param rate: bytes a second; 0 is no limit"""
        self._rate = rate
        self._due = time.monotonic()
        self._lock = threading.Lock()

    def after(self, count: int) -> float:
        """When, by ``time.monotonic()``, somebody may go on who has just copied ``count`` bytes."""
        now = time.monotonic()
        if not self._rate:
            return now
        with self._lock:
            self._due = max(self._due, now - _LEEWAY) + count / self._rate
            return self._due


class LinkPaces:
    """The same rate for each of several links: for all that is copied over one of them together."""

    def __init__(self, rate: int = 0) -> None:
        """:param rate: bytes a second; 0 is no limit"""
        self._rate = rate
        self._paces: dict[str, Pace] = {}
        self._lock = threading.Lock()

    def after(self, link: str, count: int) -> float:
        """As :meth:`Pace.after`, for those who copy over a link."""
        with self._lock:
            pace = self._paces.setdefault(link, Pace(self._rate))
        return pace.after(count)
