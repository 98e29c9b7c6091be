"""What the kernel counts of a stack, as the agent's status and ``thunder stack list`` show it."""

from __future__ import annotations

import dataclasses
from typing import Any, Protocol

from os_brick_thunder.common import errors
from os_brick_thunder.common.policy import dmstatus
from os_brick_thunder.common.policy.devnames import VolumeNames
from os_brick_thunder.common.state import Stack


class _Kernel(Protocol):
    def status(self, name: str) -> str: ...


def of_stack(dm: _Kernel, stack: Stack) -> dict[str, Any]:
    """A stack's entry and its figures, in JSON types.

    ``cache`` is None for a stack without one and for one whose devices are not there; ``failed``
    counts paths of the volume that the kernel has given up; ``present``: its device is there.
    """
    names = VolumeNames(stack.volume_id)
    vol = _status(dm, names.vol)
    cached = _status(dm, names.cached) if vol and stack.base_image_id else ""
    found = dmstatus.cache(cached) if cached else None
    return stack.to_json() | {
        "cache": dataclasses.asdict(found) if found else None,
        "failed": list(dmstatus.paths(vol).values()).count(False),
        "present": bool(vol) and bool(cached or not stack.base_image_id),
    }


def _status(dm: _Kernel, name: str) -> str:
    """Empty while the device is being built, or on its way out."""
    try:
        return dm.status(name)
    except errors.ProcessError:
        return ""
