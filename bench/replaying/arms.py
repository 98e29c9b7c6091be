"""What bench.replay has measured, as values, and as rows of a table."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

#: In the order in which they are shown.
ARMS = (
    "plain", "copied", "nbd", "ceph", "multicast", "cold", "cold, nearest", "cold, storage",
    "cold, profile", "nearest, profile", "storage, profile", "late, profile", "warm",
    "warm, recorded", "local",
)  # fmt: skip
#: Without Thunder, and without its cache.
OTHERS = {"plain", "copied", "nbd", "ceph", "multicast", "local"}
#: Of :meth:`Arm.row`.
HEADINGS = (
    "hosts", "boots", "attach s", "reads s", "median s", "last s", "longest read s", "cached",
    "egress / boot's bytes", "cores busy",
)  # fmt: skip


@dataclass(frozen=True)
class Boot:
    """Seconds of one server's attach, of its reads after it, and of the longest of these."""

    attach: float
    reads: float
    longest: float

    @property
    def seconds(self) -> float:
        return self.attach + self.reads


@dataclass(frozen=True)
class Arm:
    """One way to boot on some hosts at once.

    :ivar egress: bytes that the storage hosts sent
    :ivar cached: volumes that had a cache at the end
    :ivar at_once: those that had it when their attach was answered; not known of older figures
    :ivar busy: share of the lab's cores that was busy while they read; not known of all ways
    """

    name: str
    hosts: int
    boots: tuple[Boot, ...]
    egress: int
    cached: int
    at_once: int | None = None
    busy: float | None = None

    @classmethod
    def of(cls, raw: Mapping[str, Any]) -> Arm:
        """Of the JSON that bench.replay wrote."""
        return cls(**{**raw, "boots": tuple(Boot(**boot) for boot in raw["boots"])})

    @property
    def median(self) -> float:
        return statistics.median(boot.seconds for boot in self.boots)

    @property
    def reads(self) -> float:
        return statistics.median(boot.reads for boot in self.boots)

    @property
    def last(self) -> float:
        return max(boot.seconds for boot in self.boots)

    def row(self, size: int) -> tuple[str, ...]:
        """:param size: distinct bytes that a boot reads"""
        return (
            str(self.hosts),
            self.name,
            f"{statistics.median(boot.attach for boot in self.boots):.1f}",
            f"{self.reads:.1f}",
            f"{self.median:.1f}",
            f"{self.last:.1f}",
            f"{max(boot.longest for boot in self.boots):.2f}",
            "-" if self.name in OTHERS else self._cached(),
            f"{self.egress / size:.2f}",
            "-" if self.busy is None else f"{self.busy:.0%}",
        )

    def _cached(self) -> str:
        if self.at_once is None:
            return f"{self.cached} of {self.hosts}"
        return f"{self.at_once} at once, {self.cached - self.at_once} later"
