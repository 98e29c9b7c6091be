"""When a volume leaves its cache for its LUN, and what becomes of its I/O in flight.

A volume with a cache maps a multipath device of two paths: its cache, then its LUN. The kernel
fails over from the one to the other by itself. The failover watcher then has the volume map its LUN
directly, so that an error of the LUN concerns the I/O that met it and nothing else, as with plain
iSCSI. While it does so, the multipath device keeps the I/O that found no path, rather than fail it.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from enum import Enum

from os_brick_thunder.common.policy import dmstatus

#: Of the watcher's behaviour: an agent replaces a running watcher of another version.
VERSION = 1
#: Reinstatements of a LUN in a row after which nothing had ended: what is left is refused by it.
_IN_VAIN = 3


@dataclass(frozen=True)
class Path:
    number: str  # major:minor
    active: bool  # the kernel uses it


@dataclass(frozen=True)
class Paths:
    """The paths of a volume: its cache, and its LUN."""

    cached: Path
    lun: Path

    @classmethod
    def of(cls, status: str) -> Paths | None:
        """From the status of a multipath device; None if it has not got two paths."""
        found = [Path(number, active) for number, active in dmstatus.paths(status).items()]
        return cls(*found) if len(found) == 2 else None


def trouble(pool: str, metadata: str, data: str) -> str:
    """Why no volume may go on with its cache, from the status of the local pool and of the two
    devices under it; empty if there is nothing. A pool that is full is none.

    A pool whose metadata cannot be written has lost what was mapped last: reads of that return the
    image's bytes.
    """
    words = pool.split()
    if words[:1] == ["thin-pool"]:
        for word in ("Fail", "Error", "ro", "needs_check"):
            if word in words:
                return f"the local pool has failed ({word})"
    if dmstatus.has_failed_io(metadata):
        return "the local pool's metadata had an I/O error"
    if dmstatus.has_failed_io(data):
        return "the local pool's device had an I/O error"
    return ""


def is_full(pool: str) -> bool:
    """Whether writes wait for space in the local pool."""
    return "out_of_data_space" in pool.split()


class Action(Enum):
    WAIT = "wait"
    REINSTATE = "reinstate"  # send what waits to the LUN again
    REFUSE = "refuse"  # fail what waits


@dataclass(frozen=True)
class Release:
    """How far the release of a volume's I/O in flight has come, while new I/O waits above it.

    I/O that was in flight when the LUN failed for another request is sent again, and succeeds. What
    the LUN refuses again and again fails in the end.

    :ivar in_flight: requests at the last reinstatement
    :ivar in_vain: reinstatements in a row since anything ended
    """

    in_flight: int | None = None
    in_vain: int = 0

    def step(self, lun_active: bool, in_flight: int) -> tuple[Release, Action]:
        """What to do now."""
        if lun_active:
            return self, Action.WAIT
        if self.in_flight is None or in_flight < self.in_flight:
            return Release(in_flight), Action.REINSTATE
        if self.in_vain + 1 < _IN_VAIN:
            return dataclasses.replace(self, in_vain=self.in_vain + 1), Action.REINSTATE
        return self, Action.REFUSE
