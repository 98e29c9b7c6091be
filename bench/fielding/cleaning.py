"""Deletes whatever a run has created: as the cloud lists it, not as the run remembers it.

So what was requested when the run was interrupted, and what was created although the answer got
lost, is found, too.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from bench.fielding.cloud import Cloud, CloudError, Seen
from bench.fielding.turns import Clock, at_once

#: Statuses that end a deletion.
_REFUSED = {"error_deleting"}


@dataclass(frozen=True)
class Left:
    """Something that could not be deleted; ``id`` is empty if not even a list was answered."""

    kind: str
    id: str
    reason: str

    def __str__(self) -> str:
        return f"{self.kind} {self.id or '(all)'}: {self.reason}"


@dataclass
class _Deletion:
    """Of all servers or of all volumes."""

    kind: str
    listing: Callable[[str], dict[str, Seen]]
    delete: Callable[[str], None]
    accepted: set[str] = field(default_factory=set)
    reasons: dict[str, str] = field(default_factory=dict)

    def request(self, one: str) -> None:
        try:
            self.delete(one)
        except CloudError as error:  # a volume that is being created or detached, for instance
            self.reasons[one] = str(error)
        else:
            self.accepted.add(one)

    def left(self, one: str, seen: Seen) -> Left:
        asked = f"is still there, in status {seen.status}"
        return Left(self.kind, one, asked if one in self.accepted else self.reasons[one])


class Cleaner:
    """Deletes everything of one run, as often as it is called."""

    def __init__(
        self, cloud: Cloud, run: str, *, patience: float, poll: float, clock: Clock
    ) -> None:
        """:param patience: seconds without anything having gone, after which it gives up
        :param poll: seconds between two looks
        """
        self._cloud = cloud
        self._run = run
        self._patience = patience
        self._poll = poll
        self._clock = clock

    def clean(self) -> list[Left]:
        """Delete servers, then volumes; returns those that are still there."""
        cloud = self._cloud
        servers = _Deletion("server", cloud.servers, cloud.delete_server)
        volumes = _Deletion("volume", cloud.volumes, cloud.delete_volume)
        return [*self._delete(servers), *self._delete(volumes)]

    def _delete(self, deletion: _Deletion) -> list[Left]:
        progress, fewest = self._clock.now(), -1
        while True:
            try:
                found = deletion.listing(self._run)
            except CloudError as error:
                left = [Left(deletion.kind, "", str(error))]
            else:
                at_once(deletion.request, [one for one in found if one not in deletion.accepted])
                left = [deletion.left(one, seen) for one, seen in found.items()]
                if all(seen.status in _REFUSED for seen in found.values()):
                    return left
                if fewest < 0 or len(found) < fewest:
                    progress, fewest = self._clock.now(), len(found)
            if self._clock.now() - progress > self._patience:
                return left
            self._clock.sleep(self._poll)
