"""The player against a cloud in memory: it finds what is planted there, and nothing else."""

from __future__ import annotations

import errno
import itertools
import random
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any

import pytest

from bench.modelling.generate import Generator
from bench.modelling.outcome import Outcome
from bench.modelling.player import Player, drive
from bench.modelling.scene import IMAGES
from bench.modelling.shrink import shrink
from bench.modelling.steps import Step, World, valid
from lab.errors import LabError
from lab.inside.sectors import ZERO, Run, join

HOSTS = (["cmp1", "cmp2", "cmp3"], ["stor1", "stor2"])


class Disk:
    """A volume: its image, what is stored of it, and what a crash may lose."""

    def __init__(self, image: int) -> None:
        self.image = IMAGES[image]
        self.stored: dict[int, int] = {}
        self.pending: dict[int, list[int]] = {}
        self.fails = False
        self.old: dict[int, int] | None = None  # what a stale cache returns

    def copy(self) -> Disk:
        found = Disk(IMAGES.index(self.image))
        found.stored = {**self.stored, **{at: all_[-1] for at, all_ in self.pending.items()}}
        return found

    def at(self, sector: int) -> int:
        now = self.pending.get(sector, [self.stored.get(sector, self.image.at(sector))])[-1]
        return now if self.old is None else self.old.get(sector, now)

    def flush(self) -> None:
        self.stored |= {at: values[-1] for at, values in self.pending.items()}
        self.pending.clear()

    def crash(self) -> None:
        dice = random.Random(1)
        for at, values in self.pending.items():
            self.stored[at] = dice.choice([self.stored.get(at, self.image.at(at)), *values])
        self.pending.clear()

    def read(self, first: int, count: int) -> list[Run]:
        runs: list[Run] = []
        end = first + count
        written = {at for at in (*self.stored, *self.pending) if first <= at < end}
        for at in sorted({*range(first, min(end, self.image.size)), *written}):
            gap = sum(runs[-1][:2]) if runs else first
            if at > gap:
                join(runs, (gap, at - gap, ZERO))
            join(runs, (at, 1, self.at(at)))
        gap = sum(runs[-1][:2]) if runs else first
        return [*runs, (gap, end - gap, ZERO)] if end > gap else runs


class Cloud:
    """Cinder, hosts and journey in one.

    :param bug: "stale": after a failed path the old cache answers; "flush": a flush does nothing;
        "detach": the third one fails
    """

    def __init__(self, bug: str = "") -> None:
        self.bug = bug
        self.disks: dict[str, Disk] = {}
        self.attached: dict[str, set[str]] = {}  # host → volumes
        self.cut: set[str] = set()
        self.cluster = self
        self.address = "10.0.0.1"
        self._ids = itertools.count()
        self._detached = itertools.count(1)

    # -- Cinder

    def create(self, gib: int, source: str, value: str) -> str:
        found = f"id-{next(self._ids)}"
        image = source == "imageRef"
        self.disks[found] = Disk(int(value)) if image else self.disks[value].copy()
        return found

    def snapshot(self, volume: str) -> str:
        return self.create(1, "volume", volume)

    def revert(self, volume: str, snapshot: str) -> None:
        self.disks[volume] = self.disks[snapshot].copy()

    def extend(self, volume: str, gib: int, status: str) -> None:
        pass

    def delete(self, kind: str, found: str) -> None:
        del self.disks[found]

    def place(self, volume: str) -> tuple[str, str]:
        return "stor1", volume

    # -- hosts and journey

    def node(self, name: str) -> Any:
        return self

    def evict(self, node: Any, image: str, timeout: float) -> None:
        pass

    def worker(self, name: str) -> Any:
        return Worker(self, name)

    def kill_agent(self, name: str) -> None:
        pass

    restart_volume = power_on = kill_agent

    def power_cut(self, name: str) -> None:
        for volume in self.attached.get(name, ()):
            self.disks[volume].crash()


class Worker:
    def __init__(self, cloud: Cloud, host: str) -> None:
        self._cloud = cloud
        self._host = host

    def begin(self, verb: str, **arguments: Any) -> Future[Any]:
        found: Future[Any] = Future()
        if verb in ("break_lun", "cut"):
            disk = self._cloud.disks.get(arguments.get("device", ""))
            if disk:
                disk.fails = True

            def mend() -> None:
                if disk:
                    disk.fails = False
                found.set_result(None)

            threading.Timer(0.01, mend).start()
        else:
            try:
                found.set_result(getattr(self, verb)(**arguments))
            except LabError as error:
                found.set_exception(error)
        return found

    def ask(self, verb: str, **arguments: Any) -> Any:
        return self.begin(verb, **arguments).result()

    def io(self, device: str, ops: Sequence[Any], patience: float) -> Any:
        results = [self._op(self._cloud.disks[device], *op) for op in ops]
        return {"results": results, "failed": 0, "longest_s": 0.0}

    def _op(self, disk: Disk, kind: str, first: int, count: int, token: int) -> Any:
        if kind == "trim":
            return {"error": "not supported", "errno": errno.EOPNOTSUPP}
        if disk.fails:
            return {"error": "EIO", "errno": errno.EIO}
        if kind == "read":
            return disk.read(first, count)
        if kind == "flush" and self._cloud.bug != "flush":
            disk.flush()
        if kind in ("write", "zero"):
            for at in range(first, first + count):
                disk.pending.setdefault(at, []).append(token if kind == "write" else ZERO)
        return None

    def connect(self, what: str, volume: str) -> Any:
        here = self._cloud.attached.setdefault(self._host, set())
        if what == "detach":
            if self._cloud.bug == "detach" and next(self._cloud._detached) == 3:
                raise LabError("busy")
            here.remove(volume)
        else:
            here.add(volume)
        return {"path": volume, "cached": True}

    def fail_path(self, volume: str) -> bool:
        disk = self._cloud.disks[volume]
        if self._cloud.bug == "stale" and disk.stored:
            at = max(disk.stored)
            disk.old = {at: disk.image.at(at)}
        return True

    def kill_watcher(self) -> bool:
        return True

    def fill(self, percent: float, seconds: float) -> int:
        return 1

    def whole(self, device: str, count: int) -> list[Run]:
        return self._cloud.disks[device].read(0, count)


def play(steps: Sequence[Step], bug: str = "") -> Outcome:
    cloud: Any = Cloud(bug)
    images = [(image, str(number)) for number, image in enumerate(IMAGES)]
    player = Player(cloud, cloud, cloud, images, World(len(IMAGES), *HOSTS))
    steps = list(valid(steps, World(len(IMAGES), *HOSTS)))
    drive(player, steps, lambda done, of, outcome: None)
    if not player.outcome.failed:
        player.compare_all()
    player.clear()
    assert not cloud.disks or bug
    return player.outcome


def generate(seed: int, count: int) -> list[Step]:
    return Generator(seed, World(len(IMAGES), *HOSTS), IMAGES).steps(count)


@pytest.mark.parametrize("seed", [226, 440])
def test_nothing_is_found_in_a_cloud_that_works(seed: int) -> None:
    outcome = play(generate(seed, 200))
    assert outcome.problems == []
    assert sum(outcome.done.values()) == 200
    assert outcome.faults.total() > 0


def test_a_stale_cache_is_found_and_the_steps_are_shrunk() -> None:
    steps = generate(3, 150)
    outcome = play(steps, "stale")
    assert outcome.wrong > 0
    left = shrink(steps, lambda some: play(some, "stale").wrong > 0, lambda: False)
    assert [step.kind for step in left[:2]] == ["create", "attach"]
    assert left[-1].kind == "fail path"
    assert len(left) <= 5


def test_a_flush_that_does_nothing_loses_a_flushed_write() -> None:
    steps = [
        Step(100, "create", 1, other=0),
        Step(101, "attach", 1, "cmp1"),
        *(Step(110 + at, "write", 1, first=at * 100, count=8) for at in range(20)),
        Step(200, "flush", 1),
        Step(201, "kill node", node="cmp1"),
    ]
    assert play(steps).is_good
    outcome = play(steps, "flush")
    assert outcome.lost > 0
    assert outcome.wrong >= outcome.lost
    assert "a flushed write is lost" in outcome.problems[0]


def test_a_step_that_fails_ends_the_run() -> None:
    steps = generate(1, 600)
    outcome = play(steps, "detach")
    (number,) = outcome.failed
    assert "busy" in outcome.problems[0]
    assert sum(outcome.done.values()) < len(steps)
    assert next(step for step in steps if step.number == number).kind in ("detach", "leave")


def test_a_limit_of_time_ends_with_everything_compared_and_removed() -> None:
    cloud: Any = Cloud()
    images = [(image, str(number)) for number, image in enumerate(IMAGES)]
    player = Player(cloud, cloud, cloud, images, World(len(IMAGES), *HOSTS))
    steps = generate(226, 200)

    def progress(done: int, of: int, outcome: Outcome) -> None:
        assert done <= of == 200

    drive(player, steps, progress, until=time.monotonic() + 0.2)
    player.compare_all()
    player.clear()
    assert player.outcome.is_good
    assert 0 < sum(player.outcome.done.values()) < 200
    assert not cloud.disks
