"""Whether a state file and a pool belong together.

The state file says what is under which thin id. Of another pool that would be another image, or
what a volume of another tenant has written.
"""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass


@dataclass(frozen=True)
class Claims:
    """What a state file says of its pool.

    :ivar pool: its identity; empty if an older agent wrote the file, or there was none
    :ivar thin_ids: those under which it knows something to be
    :ivar next_id: no id from this one on was ever used
    """

    pool: str
    thin_ids: Set[int]
    next_id: int


def belong_together(claims: Claims, pool: str, present: Set[int]) -> bool:
    """
    :param pool: the pool's identity; empty if an older agent made it
    :param present: the thin ids in it
    """
    if not claims.thin_ids or not present:
        return True  # no id can be taken for another one
    if claims.pool and pool:
        return claims.pool == pool
    # After an upgrade neither has an identity; after a downgrade, or a crash, one lacks it.
    if max(present) >= claims.next_id:
        return False
    return claims.thin_ids <= present or not (claims.pool or pool)
