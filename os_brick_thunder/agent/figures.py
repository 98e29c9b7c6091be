"""What the kernel counts of a stack, as the agent's status and ``thunder stack list`` show it."""

from __future__ import annotations

import dataclasses
from typing import Any, Protocol

from os_brick_thunder import errors
from os_brick_thunder.agent.state import Stack
from os_brick_thunder.policy import dmstatus
from os_brick_thunder.policy.layout import VolumeNames


class _Kernel(Protocol):
    def status(self, name: str) -> str: ...


def of_stack(dm: _Kernel, stack: Stack) -> dict[str, Any]:
    """A stack's entry and its figures, in JSON types.

    ``cache`` is None for a stack without one and for one whose devices are not there; ``failed``
    counts paths of the volume that the kernel has given up; ``present``: its device is there.
    """
    names = VolumeNames(stack.volume_id)
    entry: dict[str, Any] = dataclasses.asdict(stack)
    entry |= {"cache": None, "failed": 0, "present": True}
    try:
        vol = dm.status(names.vol)
        cached = dm.status(names.cached) if stack.image_id else None
    except errors.ProcessError:  # still being built, or on its way out
        vol = ""
    if not vol or cached == "":
        entry["present"] = False
        return entry
    entry["failed"] = list(dmstatus.paths(vol).values()).count(False)
    if cached and (found := dmstatus.cache(cached)):
        entry["cache"] = dataclasses.asdict(found)
    return entry
