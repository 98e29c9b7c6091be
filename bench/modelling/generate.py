"""Random steps from a seed."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence

from bench.modelling.contents import Image
from bench.modelling.steps import LUN_FAULTS, Step, World

#: How often each kind is chosen; it is left out if nothing allows it at that moment.
WEIGHTS: Mapping[str, float] = {
    "write": 480, "zero": 25, "trim": 20, "flush": 80, "read": 240, "peek": 40,
    "create": 2, "clone": 3, "restore": 2, "delete": 5, "snapshot": 4, "forget": 4,
    "revert": 1.5, "extend": 1, "attach": 20, "detach": 6, "migrate": 5,
    "hand over": 10, "leave": 6,
    "fail path": 6, "fail lun": 5, "fill pool": 2, "evict": 4,
    "kill agent": 3, "kill watcher": 2, "kill node": 1, "restart volume": 0.7,
}  # fmt: skip
#: Numbers of steps begin here: smaller ones are tokens of images.
FIRST = 100
#: Sectors of a block of the local pool, and lengths of writes and reads.
_BLOCK = 128
_LENGTHS = (1, 3, 8, 8, 8, 16, 64, 128, 200, 256, 512, 1024)
_MARGIN = 4096  # beyond the image
#: Proposals of a chosen kind.
_TRIES = 10


class Generator:
    """Proposes steps until one is allowed.

    :param images: in the order of their numbers
    """

    def __init__(self, seed: int, world: World, images: Sequence[Image]) -> None:
        self._dice = random.Random(seed)  # noqa: S311 - reproducible, not a secret
        self._world = world
        self._images = images
        self._next = FIRST
        self._hot = [self._dice.randrange(1 << 30) for _ in range(3)]

    def steps(self, count: int) -> list[Step]:
        """The next steps; the first ones create and attach a volume of each image."""
        found: list[Step] = []
        if not self._world.volumes:
            for image in range(len(self._images)):
                found.append(self._take(Step(self._next, "create", self._next, other=image)))
                node = self._world.compute[image % len(self._world.compute)]
                found.append(self._take(Step(self._next, "attach", found[-1].volume, node)))
        while len(found) < count:
            (kind,) = self._dice.choices(tuple(WEIGHTS), tuple(WEIGHTS.values()))
            for step in (self._propose(kind) for _ in range(_TRIES)):
                if self._world.allows(step):
                    found.append(self._take(step))
                    break
        return found[:count]

    def _take(self, step: Step) -> Step:
        self._world.apply(step)
        self._next += 1
        return step

    def _propose(self, kind: str) -> Step:
        number, choice = self._next, self._dice.choice
        volume = choice(tuple(self._world.volumes) or (-1,))
        snapshot = choice(tuple(self._world.snapshots) or (-1,))
        node, image = choice(self._world.compute), self._dice.randrange(len(self._images))
        match kind:
            case "create":
                return Step(number, kind, number, other=image)
            case "clone":
                return Step(number, kind, number, other=volume)
            case "restore":
                return Step(number, kind, number, other=snapshot)
            case "snapshot":
                return Step(number, kind, volume, other=number)
            case "forget":
                return Step(number, kind, other=snapshot)
            case "revert":
                latest = self._world.of(volume)[-1:] or [-1]
                return Step(number, kind, volume, other=latest[0])
            case "attach" | "migrate":
                return Step(number, kind, volume, node)
            case "evict":
                return Step(number, kind, node=node, other=image)
            case "kill agent":
                return Step(number, kind, node=node, how=choice(("", "", "and watcher")))
            case "kill watcher" | "kill node" | "fill pool":
                return Step(number, kind, node=node)
            case "restart volume":
                return Step(number, kind, node=choice(self._world.storage))
            case "write" | "zero" | "trim" | "read" | "peek":
                first, count = self._range(volume, kind)
                return Step(number, kind, volume, first=first, count=count)
            case "fail lun":
                first, count = self._range(volume, kind)
                how = choice(LUN_FAULTS)
                return Step(number, kind, volume, first=first, count=count, how=how)
        return Step(number, kind, volume)

    def _range(self, volume: int, kind: str) -> tuple[int, int]:
        """Somewhere in the image, around its end, at the volume's end, or where it was before."""
        found = self._world.volumes.get(volume)
        if found is None:
            return 0, 0
        image, dice = self._images[found.image], self._dice
        count = dice.choice(_LENGTHS)
        if kind in ("zero", "trim", "read", "peek"):
            count = min(count * dice.choice((1, 4, 16)), _MARGIN)
        place = dice.random()
        if place < 0.5:
            first = dice.randrange(image.size + _MARGIN)
        elif place < 0.85:  # overwritten and read again and again
            first = dice.choice(self._hot) % image.size + dice.randrange(-_BLOCK, _BLOCK)
        elif place < 0.95:
            first = image.size - dice.randrange(2 * _BLOCK)
        else:
            first = found.sectors - dice.randrange(1, 2 * _BLOCK)
        if dice.random() < 0.6:  # as file systems do
            first, count = first // 8 * 8, -(-count // 8) * 8
        first = max(first, 0)
        return first, max(min(count, found.sectors - first), 1)
