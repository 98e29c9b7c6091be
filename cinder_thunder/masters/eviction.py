"""Removes all replicas of an image: the deepest first, so that no replica loses its source."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from cinder_thunder.db.api import Database
from cinder_thunder.policy.ranking import MASTER
from os_brick_thunder.common import errors


@dataclass(frozen=True)
class Eviction:
    """The result for one replica; ``kept``: the reason why it was not removed, or empty."""

    host: str
    kind: str
    kept: str = ""


def evict(database: Database, image_id: str, remove: Callable[[str, str], None]) -> list[Eviction]:
    """Remove every replica of an image that is not in use.

    :param remove: asks the exporter on a host to remove its replica of an image
    :raises errors.InvalidRequest: there is no replica of such an image
    """
    locations = database.locations.of(image_id)
    if not locations:
        raise errors.InvalidRequest(
            f"there is no replica of an image {image_id}: give its id in Glance"
        )
    outcomes: list[Eviction] = []
    for location in sorted(locations, key=lambda found: (found.kind == MASTER, -found.depth)):
        kept = ""
        if location.kind == MASTER and any(o.kept and o.kind != MASTER for o in outcomes):
            kept = "compute hosts still have a replica that may read from it"
        else:
            try:
                remove(location.host, image_id)
                database.locations.drop(image_id, location.host)
            except errors.ThunderError as error:
                kept = str(error)
        outcomes.append(Eviction(location.host, location.kind, kept))
    return outcomes
