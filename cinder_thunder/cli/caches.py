"""The counters of a stack's cache, for people. Needs neither Cinder nor a database."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from os_brick_thunder.common.policy.dmstatus import CacheStatus


def counters(entry: Mapping[str, Any]) -> CacheStatus | None:
    """The counters in an agent's entry of a stack; None for a stack without a cache.

    An agent of another version may have more of them, or fewer: those are 0.
    """
    counted = entry.get("cache")
    if not counted:
        return None
    fields = dataclasses.fields(CacheStatus)
    return CacheStatus(**{field.name: counted.get(field.name, 0) for field in fields})


def shares(counted: CacheStatus | None) -> tuple[str, str]:
    """Coverage and hits as percentages; empty where there is nothing to count."""
    if counted is None:
        return "", ""
    hits = counted.hit_ratio
    return f"{counted.coverage:.1%}", "" if hits is None else f"{hits:.1%}"
