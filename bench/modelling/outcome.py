"""What a run did and found."""

from __future__ import annotations

import threading
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from bench.modelling.steps import Step
from os_brick_thunder.common.policy import devnames


@dataclass
class Outcome:
    """Filled by several threads.

    ``attached`` counts the ways in which volumes were attached: cached, direct or plain.
    ``failed`` has the numbers of the steps in which something went wrong, ``seconds`` those of all
    steps of a kind; ``wrong`` and ``lost`` are bytes, ``errors_seen`` calls of guests that had to
    be tried again, ``longest_s`` the longest call.
    """

    done: Counter[str] = field(default_factory=Counter)
    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    attached: Counter[str] = field(default_factory=Counter)
    faults: Counter[str] = field(default_factory=Counter)
    errors_seen: int = 0
    longest_s: float = 0.0
    wrong: int = 0
    lost: int = 0
    problems: list[str] = field(default_factory=list)
    leftovers: list[str] = field(default_factory=list)
    failed: list[int] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def is_good(self) -> bool:
        return not (self.problems or self.leftovers or self.wrong)

    def did(self, step: Step, seconds: float) -> None:
        """A step went as it must."""
        with self._lock:
            self.done[step.kind] += 1
            self.seconds[step.kind] += seconds

    def opened(self, path: str, cached: bool) -> None:
        """A volume was attached as this device, with a cache at once or not."""
        accelerated = path.startswith(devnames.path(devnames.PREFIX))
        with self._lock:
            self.attached["plain" if not accelerated else "cached" if cached else "direct"] += 1

    def fault(self, kind: str) -> None:
        """Something was broken on purpose."""
        with self._lock:
            self.faults[kind] += 1

    def problem(self, where: object, error: Exception, number: int | None = None) -> None:
        """:param number: of the step"""
        with self._lock:
            self.problems.append(f"{where}: {error}")
            self.failed += [] if number is None else [number]

    def saw(self, answer: Mapping[str, Any]) -> None:
        """What calls of a guest took: the answer of a worker's ``io``."""
        with self._lock:
            self.errors_seen += answer["failed"]
            self.longest_s = max(self.longest_s, answer["longest_s"])

    def bytes(self, wrong: int, lost: int) -> None:
        with self._lock:
            self.wrong += wrong
            self.lost += lost
