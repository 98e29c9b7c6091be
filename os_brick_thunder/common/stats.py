"""The kernel's statistics of a stack, for the agent's status and ``thunder stack list``."""

from __future__ import annotations

import dataclasses
from typing import Any, Protocol

from os_brick_thunder.common import errors
from os_brick_thunder.common.mechanism import blockdev
from os_brick_thunder.common.mechanism.blockdev import devnum
from os_brick_thunder.common.policy import dmstatus
from os_brick_thunder.common.policy.devnames import VolumeNames, path
from os_brick_thunder.common.policy.dmstatus import CacheStatus
from os_brick_thunder.common.policy.dmtable import Table
from os_brick_thunder.common.state import Stack


class _Kernel(Protocol):
    def status(self, name: str) -> str: ...
    def table(self, name: str) -> Table | None: ...


def of_stack(dm: _Kernel, stack: Stack) -> dict[str, Any]:
    """A stack's entry in the state file and its statistics, in JSON types.

    ``cache`` is None for a stack without a cache, and while its devices do not exist; ``failed``
    counts the paths of the volume that have failed; ``present``: its device exists.

    What the volume's table does not map to the cache is not in it, and a read of it is a miss,
    unlike in the kernel's own figures.
    """
    names = VolumeNames(stack.volume_id)
    vol = _status(dm, names.vol)
    paths = dmstatus.paths(_status(dm, names.failover)) or dmstatus.paths(vol)
    cached = _status(dm, names.cached) if vol and stack.base_image_id else ""
    found = dmstatus.cache(cached) if cached else None
    return stack.to_json() | {
        "cache": dataclasses.asdict(_of_volume(dm, names, found)) if found else None,
        "failed": list(paths.values()).count(False),
        "present": bool(vol) and bool(cached or not stack.base_image_id),
    }


def _of_volume(dm: _Kernel, names: VolumeNames, cache: CacheStatus) -> CacheStatus:
    vol, failover = path(names.vol), path(names.failover)
    try:
        table = dm.table(names.vol)
        number = devnum(failover)
        past = blockdev.reads(vol) - blockdev.reads(failover)
    except (errors.ProcessError, errors.DeviceNotFound):  # it is being built or removed
        return cache
    shared = table.resolved(devnum).mapped_to(number).length if table else 0
    return dataclasses.replace(
        cache,
        mapped=min(shared, cache.mapped),
        read_misses=cache.read_misses + max(0, past),
    )


def _status(dm: _Kernel, name: str) -> str:
    """The status of a device; empty while it is being built or removed."""
    try:
        return dm.status(name)
    except errors.ProcessError:
        return ""
