"""The kernel's statistics of a stack, for the agent's status and ``thunder stack list``."""

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
    """A stack's entry in the state file and its statistics, in JSON types.

    ``cache`` is None for a stack without a cache, and while its devices do not exist; ``failed``
    counts the paths of the volume that have failed; ``present``: its device exists.
    """
    names = VolumeNames(stack.volume_id)
    vol = _status(dm, names.vol)
    paths = dmstatus.paths(_status(dm, names.failover)) or dmstatus.paths(vol)
    cached = _status(dm, names.cached) if vol and stack.base_image_id else ""
    found = dmstatus.cache(cached) if cached else None
    return stack.to_json() | {
        "cache": dataclasses.asdict(found) if found else None,
        "failed": list(paths.values()).count(False),
        "present": bool(vol) and bool(cached or not stack.base_image_id),
    }


def _status(dm: _Kernel, name: str) -> str:
    """The status of a device; empty while it is being built or removed."""
    try:
        return dm.status(name)
    except errors.ProcessError:
        return ""
