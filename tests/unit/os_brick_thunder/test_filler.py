"""Filling a base, on files: every byte is checked, and what is wrong is never written."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from os_brick_thunder.agent.base import filler as filler_module
from os_brick_thunder.agent.base.filler import Filler
from os_brick_thunder.agent.ports import Host
from os_brick_thunder.common import errors, wire
from os_brick_thunder.common.policy import manifest as manifests
from os_brick_thunder.common.policy.extents import Extents
from os_brick_thunder.common.policy.manifest import Manifest
from os_brick_thunder.common.state import READY, REMOVING, Base

MIB = 1 << 20
BLOCK = 64 << 10
SIZE = 3 * MIB + 512
ALLOCATED = Extents.of([(0, MIB + 3 * BLOCK), (2 * MIB, SIZE)])


@dataclass
class World:
    """What a filler sees of its agent; devices are files."""

    folder: Path
    image: bytes
    bases: dict[str, Base]
    manifest_: wire.ImageDigests | Exception
    mapped_: Extents = field(default_factory=Extents)
    completed: list[int] = field(default_factory=list)
    bad: list[int] = field(default_factory=list)
    asked: int = 0
    dropped: list[tuple[int, int]] = field(default_factory=list)
    heal: Callable[[], None] = lambda: None

    def manifest(self, image_id: str) -> wire.ImageDigests:
        self.asked += 1
        if isinstance(self.manifest_, Exception):
            raise self.manifest_
        return self.manifest_

    def mapped(self, thin_id: int) -> Extents:
        return self.mapped_

    def complete(self, base: Base) -> None:
        self.completed.append(base.thin_id)
        base = self.bases[base.image_id]
        self.bases[base.image_id] = dataclasses.replace(base, complete=True)

    def on_wrong_bytes(self, base: Base) -> None:
        self.bad.append(base.thin_id)
        self.heal()

    def source(self) -> Path:
        return self.folder / "thunder-source-i"

    def base(self) -> bytes:
        return (self.folder / "thunder-base-i").read_bytes()

    def expected(self) -> bytes:
        """Allocated bytes are the image's, others as they were."""
        data = bytearray(b"\xee" * SIZE)
        for start, end in ALLOCATED:
            data[start:end] = self.image[start:end]
        return bytes(data)

    def filler(self, may_fill: Callable[[], bool] = lambda: True) -> Filler:
        """It sees this world as its host: state file, tracker and pool."""
        world: Any = self
        kit: Any = SimpleNamespace(metadata=world, pool=SimpleNamespace(block=BLOCK))
        host = Host(kit, world, world, wire.Topology("h", "10.0.0.1", "r", "z", "iqn.x:h"))
        return Filler(host, self.complete, self.on_wrong_bytes, may_fill, workers=1)


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    monkeypatch.setattr(
        "os_brick_thunder.common.policy.devnames.path", lambda name: str(tmp_path / name)
    )
    monkeypatch.setattr("os_brick_thunder.common.backoff.PAUSES", (0.05,))
    data = bytearray(SIZE)
    for start, end in ALLOCATED:
        data[start:end] = os.urandom(end - start)
    image = bytes(data)
    digests = b"".join(manifests.digest(image[at : at + MIB]) for at in range(0, SIZE, MIB))
    manifest = Manifest(SIZE, MIB, digests)
    base = Base("i", SIZE, tuple((s, e - s) for s, e in ALLOCATED), "l", thin_id=1, phase=READY)
    made = World(tmp_path, image, {"i": base}, wire.ImageDigests("i", MIB, manifest.text))
    made.source().write_bytes(image)
    (tmp_path / "thunder-base-i").write_bytes(b"\xee" * SIZE)
    monkeypatch.setattr(
        filler_module, "drop_cache", lambda _, start, length: made.dropped.append((start, length))
    )
    return made


def wait_until(condition: Callable[[], object]) -> None:
    until = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.01)


def test_a_base_is_filled_but_for_holes(world: World) -> None:
    filler = world.filler()
    filler.start()
    wait_until(lambda: world.completed)
    filler.stop()
    assert world.base() == world.expected()
    assert Extents.of((s, s + n) for s, n in world.dropped) == Extents.of([(0, SIZE)])
    assert world.bad == []


def test_what_is_mapped_is_not_written_again(world: World) -> None:
    world.mapped_ = Extents.of([(BLOCK, 4 * BLOCK), (2 * MIB, SIZE)])
    filler = world.filler()
    filler.start()
    wait_until(lambda: world.completed)
    filler.stop()
    left = world.expected()
    for start, end in world.mapped_:
        left = left[:start] + b"\xee" * (end - start) + left[end:]
    assert world.base() == left


def test_wrong_bytes_are_evidence_and_never_written(world: World) -> None:
    lie = bytearray(world.image)
    lie[MIB + 5] ^= 1
    world.source().write_bytes(lie)
    seen: list[bytes] = []

    def heal() -> None:
        seen.append(world.base())
        if len(world.bad) == 2:
            world.source().write_bytes(world.image)

    world.heal = heal
    filler = world.filler()
    filler.start()
    wait_until(lambda: world.completed)
    filler.stop()
    assert world.bad == [1, 1]
    for base in seen:
        assert base[:MIB] == world.image[:MIB]
        assert set(base[MIB:]) == {0xEE}
    assert world.base() == world.expected()
    assert (MIB, MIB) in world.dropped  # a retry must not find them in the page cache


def test_without_a_tracker_it_waits(world: World, caplog: pytest.LogCaptureFixture) -> None:
    answer = world.manifest_
    world.manifest_ = errors.TrackerUnavailable("no answer")
    filler = world.filler()
    filler.start()
    wait_until(lambda: world.asked >= 3)
    assert set(world.base()) == {0xEE}
    world.manifest_ = answer
    wait_until(lambda: world.completed)
    filler.stop()
    assert world.base() == world.expected()


def test_an_image_without_a_manifest_is_filled_unchecked(world: World) -> None:
    world.manifest_ = errors.NoReplica("there is none")
    filler = world.filler()
    filler.start()
    wait_until(lambda: world.completed)
    filler.stop()
    assert world.base() == world.expected()


def test_a_manifest_of_another_size_fills_nothing(world: World) -> None:
    world.manifest_ = wire.ImageDigests("i", MIB, "")
    filler = world.filler()
    filler.start()
    wait_until(lambda: world.asked >= 2)
    filler.stop()
    assert set(world.base()) == {0xEE}
    assert world.completed == []


@pytest.mark.parametrize("how", ["removed", "stopped"])
def test_it_ends_when_its_base_goes_or_the_agent_stops(world: World, how: str) -> None:
    """Also while it waits for space in the pool."""
    asked: list[None] = []

    def full() -> bool:
        asked.append(None)
        return len(asked) <= 1

    filler = world.filler(may_fill=full)
    filler.start()
    wait_until(lambda: len(asked) >= 2)
    if how == "removed":
        base = world.bases["i"]
        world.bases["i"] = Base("i", SIZE, base.allocated, "l", 1, phase=REMOVING)
        wait_until(lambda: not filler._busy)
    filler.stop()
    assert world.completed == []
    assert world.base() == world.image[:MIB] + b"\xee" * (SIZE - MIB)


def test_a_base_whose_source_fails_gives_its_turn_to_the_others(world: World) -> None:
    """There is one worker here."""
    for image in ("broken", "broken-too"):
        base = dataclasses.replace(world.bases["i"], image_id=image, thin_id=len(image))
        world.bases = {image: base, **world.bases}  # without devices
    filler = world.filler()
    filler.start()
    wait_until(lambda: world.completed)
    filler.stop()
    assert world.completed == [1]
    assert world.base() == world.expected()


def test_another_base_of_the_image_is_filled_although_the_old_ones_worker_is_busy(
    world: World,
) -> None:
    """The old one waits for space; meanwhile it is evicted, and the image gets another base."""
    asked: list[None] = []

    def full() -> bool:
        asked.append(None)
        if len(asked) == 1:
            world.bases["i"] = dataclasses.replace(world.bases["i"], thin_id=2)
        return True

    filler = world.filler(may_fill=full)
    filler.start()
    wait_until(lambda: world.completed)
    filler.stop()
    assert world.completed == [2]
