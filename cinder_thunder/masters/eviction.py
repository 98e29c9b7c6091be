"""Taking all replicas of an image away: the deepest first, so that nobody loses its source."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from cinder_thunder.db.api import Database
from cinder_thunder.policy.ranking import MASTER
from os_brick_thunder.common import errors


@dataclass(frozen=True)
class Outcome:
    """What became of one replica; ``kept`` says why it is still there, if it is."""

    host: str
    kind: str
    kept: str = ""


def evict(database: Database, image_id: str, remove: Callable[[str, str], None]) -> list[Outcome]:
    """Remove every replica of an image that nothing uses.

    :param remove: asks the exporter on a host to remove its replica of an image
    :raises errors.InvalidRequest: there is no replica of such an image
    """
    locations = database.locations.of(image_id)
    if not locations:
        raise errors.InvalidRequest(
            f"there is no replica of an image {image_id}: give the id that Glance has for it"
        )
    outcomes: list[Outcome] = []
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
        outcomes.append(Outcome(location.host, location.kind, kept))
    return outcomes
