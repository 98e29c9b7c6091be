"""Runs of steps in a lab, each with images of its own and nothing left behind."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from bench.modelling.api import Cinder
from bench.modelling.contents import Image
from bench.modelling.hosts import Hosts
from bench.modelling.outcome import Outcome
from bench.modelling.parallel import each_of
from bench.modelling.player import Player, drive
from bench.modelling.steps import Step, World, valid
from lab.inside.sectors import SECTOR, encode
from lab.nodes.node import Node
from lab.pace import deadline
from lab.play import audit
from lab.play.journey import Journey

_KIB, _MIB = (1 << 10) // SECTOR, (1 << 20) // SECTOR
#: With holes, with ends inside a block, with data smaller than a block; sizes in sectors.
IMAGES = (
    Image(1, 8 * _MIB + 3, ((0, 3 * _MIB), (5 * _MIB, 3 * _MIB + 3))),
    Image(2, 5 * _MIB, tuple((at * 192 * _KIB, 64 * _KIB) for at in range(26))),
    Image(3, 16 * _MIB - 5, ((8, 100), (4 * _MIB + 3, 12 * _MIB - 8))),
)
_LEFTOVERS = 90.0
#: Tables whose rows stay as long as an image's replicas.
_OF_IMAGES = "thunder_images", "thunder_locations", "thunder_profiles"


def world(journey: Journey) -> World:
    """An empty one with a lab's hosts."""
    names = {
        kind: [node.name for node in journey.cluster.of_kind(kind)]
        for kind in ("compute", "storage")
    }
    return World(len(IMAGES), names["compute"], names["storage"])


class Scene:
    """A lab whose hosts have workers, with images for any number of runs.

    :param progress: called with the number of steps that are done, of how many, and the outcome
    """

    def __init__(
        self, journey: Journey, hosts: Hosts, progress: Callable[[int, int, Outcome], None]
    ) -> None:
        self._journey = journey
        self._hosts = hosts
        self._progress = progress
        self._before = set(journey.all_leftovers())
        with ThreadPoolExecutor(len(IMAGES)) as threads:
            self._images = list(threads.map(self._upload, IMAGES))

    def _upload(self, image: Image) -> str:
        data = bytearray(image.size * SECTOR)
        for first, count in image.data:
            data[first * SECTOR : (first + count) * SECTOR] = encode(image.token, first, count)
        name, content = f"model-{image.token}", bytes(data)
        formats = {"disk_format": "raw", "container_format": "bare"}

        def create(cloud: Any) -> str:
            made = cloud.image.create_image(name, data=content, allow_duplicates=True, **formats)
            return str(made.id)

        return self._journey.cluster.ask(create)

    def close(self) -> list[str]:
        """Delete the images; returns what is left of anything, anywhere."""
        images = self._images
        self._journey.cluster.ask(lambda cloud: [cloud.image.delete_image(each) for each in images])
        return self._await_nothing(lambda line: True)

    def run(self, steps: Sequence[Step], until: float = math.inf) -> Outcome:
        """Do the steps that are allowed, compare everything, and remove all volumes.

        Replicas of the images stay for the next run.

        :param until: the (monotonic) time after which no step is begun
        """
        steps = list(valid(steps, world(self._journey)))
        pairs = list(zip(IMAGES, self._images, strict=True))
        cinder = Cinder(self._journey.cluster)
        player = Player(self._journey, cinder, self._hosts, pairs, world(self._journey))
        drive(player, steps, self._progress, until)
        if not player.outcome.failed:
            player.compare_all()
        player.clear()
        left = self._await_nothing(self._is_of_a_volume)
        self._before.update(left)  # of this run, and not of the next one
        player.outcome.leftovers = sorted({*left, *self._disagreements()})
        return player.outcome

    def _is_of_a_volume(self, line: str) -> bool:
        of_image = any(each in line or each.replace("-", "--") in line for each in self._images)
        return not of_image and not line.endswith(_OF_IMAGES)

    def _await_nothing(self, counts: Callable[[str], bool]) -> list[str]:
        """What was not there before the first run, and does not go away."""
        until = deadline(_LEFTOVERS)
        while True:
            left = set(self._journey.all_leftovers()) - self._before
            left = {line for line in left if counts(line)}
            if not left or time.monotonic() > until:
                return sorted(left)
            time.sleep(1)

    def _disagreements(self) -> list[str]:
        """What the audit finds on the compute hosts."""
        found: list[str] = []

        def look(node: Node) -> None:
            found.extend(f"{node.name}: {x}" for x in audit.settle(self._journey.cluster, node))

        each_of(self._journey.cluster.of_kind("compute"), look)
        return found
