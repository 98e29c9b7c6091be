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

from os_brick_thunder.agent.base import demand, pieces
from os_brick_thunder.agent.base import filler as filler_module
from os_brick_thunder.agent.base.filler import Filler
from os_brick_thunder.agent.base.pieces import Pieces
from os_brick_thunder.agent.base.readahead import FAR, LITTLE, Readahead
from os_brick_thunder.agent.ports import Host
from os_brick_thunder.common import errors, wire
from os_brick_thunder.common.backoff import Backoff
from os_brick_thunder.common.policy import manifest as manifests
from os_brick_thunder.common.policy.extents import Extents
from os_brick_thunder.common.policy.manifest import Manifest
from os_brick_thunder.common.policy.profile import Profile
from os_brick_thunder.common.state import READY, REMOVING, STALE, Base, ReplicaPath, Stack
from tests.unit.os_brick_thunder.test_hashtree import tree_of

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
    ahead: list[tuple[int, int]] = field(default_factory=list)  # and how many were read then
    heal: Callable[[], None] = lambda: None
    stacks: dict[str, Stack] = field(default_factory=dict)
    read: Callable[[], int] = lambda: 0  # bytes that the guest has read
    waiting: int = 0  # requests that the guest waits for
    #: How far is read ahead of what is missed, and how many pieces had been read then.
    misses: list[tuple[int, int]] = field(default_factory=list)
    missed: dict[int, float] = field(default_factory=dict)  # shares of pieces, by their number
    #: The pieces that were read, in order, by their number.
    order: list[int] = field(default_factory=list)
    closed: int = 0  # page caches
    length: int = SIZE  # of the base

    def manifest(self, image_id: str) -> wire.ImageDigests:
        self.asked += 1
        if isinstance(self.manifest_, Exception):
            raise self.manifest_
        return self.manifest_

    def mapped(self, thin_id: int) -> Extents:
        return self.mapped_

    def bytes_read(self, device: str) -> int:
        assert device.endswith("thunder-vol-v")
        return self.read()

    def in_flight(self, device: str) -> int:
        assert device.endswith("thunder-vol-v")
        return self.waiting

    def reopen(self, device: str, read_ahead: int) -> None:
        assert "/thunder-paths-" in device
        self.misses.append((read_ahead, len(self.order)))

    def page_cache(self, device: str, size: int) -> World:
        assert "/thunder-paths-" in device
        assert size == self.length
        return self

    def share(self, start: int, end: int) -> float:
        return self.missed.get(start // MIB, 0.0)

    def close(self) -> None:
        self.closed += 1

    def complete(self, base: Base) -> None:
        self.completed.append(base.thin_id)
        base = self.bases[base.image_id]
        self.bases[base.image_id] = dataclasses.replace(base, complete=True)

    def on_wrong_bytes(self, base: Base) -> None:
        self.bad.append(base.thin_id)
        self.heal()

    def source(self) -> Path:
        return self.folder / "thunder-paths-i"

    def base(self) -> bytes:
        return (self.folder / "thunder-base-i").read_bytes()

    def expected(self) -> bytes:
        """Allocated bytes are the image's, others as they were."""
        data = bytearray(b"\xee" * SIZE)
        for start, end in ALLOCATED:
            data[start:end] = self.image[start:end]
        return bytes(data)

    def filler(
        self,
        may_fill: Callable[[], bool] = lambda: True,
        rate: int = 0,
        link_rate: int = 0,
        rest: bool = True,
    ) -> Filler:
        """It sees this world as its host: state file, tracker, pool and devices."""
        world: Any = self
        pool = SimpleNamespace(block=BLOCK)
        kit: Any = SimpleNamespace(metadata=world, pool=pool, blocks=world, loops=world)
        host = Host(kit, world, world, wire.Topology("h", "10.0.0.1", "r", "z", "iqn.x:h"))
        return Filler(
            host,
            Readahead(world),
            self.complete,
            self.on_wrong_bytes,
            may_fill,
            1,
            rate,
            link_rate,
            rest,
        )

    def fill(self, may_fill: Callable[[], bool] = lambda: True) -> None:
        """Until a base is complete."""
        filler = self.filler(may_fill)
        filler.start()
        wait_until(lambda: self.completed)
        filler.stop()

    def follow(self, *chunks: int) -> None:
        """A newer profile is recorded, of chunks of 64 KiB."""
        profile = Profile.of(BLOCK, chunks).encode()
        self.bases["i"] = dataclasses.replace(self.bases["i"], profile=profile)


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    monkeypatch.setattr(
        "os_brick_thunder.common.policy.devnames.path", lambda name: str(tmp_path / name)
    )
    monkeypatch.setattr(Backoff.after_attempt, "__defaults__", ((0.05,),))
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

    was_read = Pieces.was_read

    def read(self: Pieces, start: int, end: int) -> None:
        made.order.append(start // MIB)
        was_read(self, start, end)

    monkeypatch.setattr(Pieces, "was_read", read)

    def read_ahead(device: str, start: int, length: int) -> None:
        assert device.startswith(str(tmp_path / "thunder-paths-"))
        made.ahead.append((start // MIB, len(made.order)))

    monkeypatch.setattr(filler_module, "read_ahead", read_ahead)
    return made


def _paused(filler: Filler) -> float:
    return sum(each._paused for each in filler._demand.values())


def wait_until(condition: Callable[[], object]) -> None:
    until = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.01)


def test_a_base_is_filled_but_for_holes(world: World) -> None:
    world.fill()
    assert world.base() == world.expected()
    assert Extents.of((s, s + n) for s, n in world.dropped) == Extents.of([(0, SIZE)])
    assert world.bad == []


def test_what_is_mapped_is_not_written_again(world: World) -> None:
    world.mapped_ = Extents.of([(BLOCK, 4 * BLOCK), (2 * MIB, SIZE)])
    world.fill()
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
    world.fill()
    assert world.bad == [1, 1]
    for base in seen:
        assert base[:MIB] == world.image[:MIB]
        assert set(base[MIB:]) == {0xEE}
    assert world.base() == world.expected()
    assert (MIB, MIB) in world.dropped  # a retry must not find them in the page cache


@pytest.mark.parametrize("wrong", [5, 3 * MIB + 5], ids=["image", "tree"])
def test_an_image_with_a_tree_is_checked_without_a_tracker(world: World, wrong: int) -> None:
    """The tree, which is filled, too, is checked from its root."""
    image = world.image[: 3 * MIB]
    root, tree = tree_of(image)
    both = image + tree
    base = dataclasses.replace(world.bases["i"], size=3 * MIB, root=root)
    base = dataclasses.replace(base, allocated=((0, MIB), (2 * MIB, MIB)))
    world.bases["i"], world.length = base, base.length
    world.manifest_ = errors.TrackerUnavailable("not asked")
    lie = bytearray(both)
    lie[wrong] ^= 1
    world.source().write_bytes(lie)
    (world.folder / "thunder-base-i").write_bytes(b"\xee" * len(both))
    left: list[bytes] = []

    def heal() -> None:
        left.append(world.base())
        world.source().write_bytes(both)

    world.heal = heal
    world.fill()
    assert world.bad == [1]
    assert left == [b"\xee" * len(both)]
    assert world.base() == image[:MIB] + b"\xee" * MIB + image[2 * MIB :] + tree
    assert world.asked == 0


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
    world.fill()
    assert world.base() == world.expected()


def test_a_manifest_of_another_size_fills_nothing(world: World) -> None:
    world.manifest_ = wire.ImageDigests("i", MIB, "")
    filler = world.filler()
    filler.start()
    wait_until(lambda: world.asked >= 2)
    filler.stop()
    assert set(world.base()) == {0xEE}
    assert world.completed == []


def test_what_is_filled_from_one_host_keeps_a_rate_together(world: World) -> None:
    """Of a host that is left for another one nothing is copied any more."""
    filler, began = world.filler(rate=5 * MIB, link_rate=MIB), time.monotonic()

    def after(host: str, thin_id: int) -> float:
        paths = (ReplicaPath("gone", "l", "gone", state=STALE), ReplicaPath(host, "l", host, "iqn"))
        base = dataclasses.replace(world.bases["i"], thin_id=thin_id)
        world.bases["i"] = dataclasses.replace(base, paths=paths)
        return filler._after(base, 10 * MIB) - began

    assert after("a", 1) == pytest.approx(10, abs=1.5)
    assert after("a", 2) == pytest.approx(20, abs=1.5)
    assert after("b", 2) == pytest.approx(10, abs=1.5)
    assert after("c", 2) == pytest.approx(10, abs=1.5)
    # The host's own rate holds for all that came before, too.
    assert after("d", 2) == pytest.approx(10, abs=1.5)
    assert after("e", 2) == pytest.approx(12, abs=1.5)


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
    world.fill()
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

    world.fill(may_fill=full)
    assert world.completed == [2]


#: Chunks of 64 KiB in each of the four pieces of the image.
FIRST, SECOND, THIRD, LAST = 3, 16, 40, 48


def test_what_boots_read_comes_first_in_their_order(world: World) -> None:
    world.follow(THIRD, FIRST)
    world.fill()
    assert world.order == [2, 0, 1, 3]
    assert world.base() == world.expected()


def test_what_guests_or_other_hosts_are_at_comes_first_and_what_they_have_last(
    world: World,
) -> None:
    world.follow(SECOND, FIRST, LAST, THIRD)
    world.missed = {1: 1.0, 2: 0.5}
    world.fill()
    assert world.order == [2, 0, 3, 1]
    assert world.base() == world.expected()
    assert world.closed == 1


def test_nobody_has_missed_what_is_read_ahead(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pieces, "LOOK", 0.0)
    world.follow(SECOND, FIRST, THIRD)
    world.share = lambda start, end: 0.5 * (start // MIB in {at for at, _ in world.ahead})  # type: ignore[method-assign]
    world.fill()
    assert world.order == [1, 0, 2, 3]


def test_what_no_boot_reads_does_not_come_first_because_it_is_missed(world: World) -> None:
    world.follow(SECOND, FIRST)
    world.missed = {3: 0.5}
    world.fill()
    assert world.order == [1, 0, 2, 3]


def test_what_is_missed_comes_first_in_a_newer_profile_too(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pieces, "LOOK", 0.0)
    world.follow(SECOND, FIRST)
    world.missed = {0: 0.5, 2: 0.5}

    def may_fill() -> bool:
        if not world.order:
            world.follow(LAST, THIRD, SECOND)
        return True

    world.fill(may_fill)
    assert world.order == [0, 2, 3, 1]
    assert world.base() == world.expected()


def test_there_is_a_look_for_what_is_missed_now_and_then(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At each piece it would cost more than the filling, of a fast source."""
    looks: list[int] = []

    def share(start: int, end: int) -> float:
        looks.append(start // MIB)
        return 0.0

    monkeypatch.setattr(pieces, "LOOK", 60.0)
    world.share = share  # type: ignore[method-assign]
    world.follow(SECOND, FIRST, THIRD)
    world.fill()
    assert looks == [1, 0, 2]


def test_what_boots_read_stays_in_the_page_cache_until_all_of_it_is_filled(world: World) -> None:
    """Loop devices read ahead there, too, and would fetch it again."""
    dropped: list[int] = []

    def may_fill() -> bool:  # asked before each piece
        dropped.append(len(world.dropped))
        return True

    world.follow(THIRD, SECOND)
    world.fill(may_fill)
    assert world.order == [2, 1, 0, 3]
    assert dropped[:4] == [0, 0, 2, 3]
    assert [start // MIB for start, _ in world.dropped] == world.order


def test_a_page_cache_that_cannot_be_seen_stops_nothing(world: World) -> None:
    def page_cache(device: str, size: int) -> World:
        raise OSError

    world.page_cache = page_cache  # type: ignore[method-assign]
    world.follow(THIRD)
    world.fill()
    assert world.order == [2, 0, 1, 3]


def test_the_next_pieces_are_on_their_way_while_one_is_written(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But what no boot reads only once it is its turn."""
    monkeypatch.setattr(pieces, "AHEAD", 2 * MIB)
    world.follow(THIRD, SECOND)
    world.fill()
    assert world.order == [2, 1, 0, 3]
    assert world.ahead == [(1, 0), (3, 2)]  # the piece, and how many had been read before


@pytest.mark.parametrize(("mib_per_second", "pieces"), [(None, 2), (3, 2), (25, 5), (1000, 8)])
def test_what_is_read_ahead_takes_a_tenth_of_a_second(
    world: World, mib_per_second: int | None, pieces: int
) -> None:
    """Misses of guests wait behind it. As long as the rate is not known, it is little."""
    nothing: Any = None
    demand = world.filler()._demand_of(world.bases["i"])
    filling = Pieces(SIZE, nothing, nothing, demand, nothing, nothing, nothing, nothing)
    if mib_per_second:
        filling._bytes, filling._seconds = 8.0 * MIB, 8 / mib_per_second
    assert filling._most_ahead(MIB // 2) == pieces


def test_what_was_read_ahead_in_vain_is_dropped(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pieces, "AHEAD", 2 * MIB)
    world.source().write_bytes(b"\0" * MIB + world.image[MIB:])  # the first piece is wrong
    filler = world.filler()
    filler.start()
    wait_until(lambda: world.bad)
    filler.stop()
    assert {piece for piece, _ in world.ahead} <= {start // MIB for start, _ in world.dropped}
    assert (1, 0) in world.ahead


def test_a_newer_profile_takes_effect_for_what_is_left(world: World) -> None:
    world.follow(SECOND)

    def may_fill() -> bool:
        """Asked before each piece, which is chosen by then."""
        if not world.order:
            world.follow(SECOND, LAST)
        return True

    world.fill(may_fill)
    assert world.order == [1, 3, 0, 2]
    assert world.base() == world.expected()


def test_a_newer_profile_takes_effect_after_the_last_piece_too(world: World) -> None:
    """Which is shorter than others, as it ends with the image."""
    world.follow(LAST)

    def may_fill() -> bool:
        if not world.order:
            world.follow(LAST, THIRD)
        return True

    world.fill(may_fill)
    assert world.order == [3, 2, 0, 1]
    assert world.bad == []
    assert world.base() == world.expected()


@pytest.mark.parametrize("profile", ["AAAA", Profile.of(BLOCK, [1000]).encode()])
def test_a_profile_that_is_none_of_the_image_is_left_out(world: World, profile: str) -> None:
    world.bases["i"] = dataclasses.replace(world.bases["i"], profile=profile)
    world.fill()
    assert world.order == [0, 1, 2, 3]
    assert world.base() == world.expected()


def test_without_the_rest_a_base_has_what_boots_read_and_is_not_complete(world: World) -> None:
    filler = world.filler(rest=False)
    filler.start()
    time.sleep(0.2)
    assert world.asked == 0  # nothing is known of boots
    world.follow(SECOND)
    wait_until(lambda: world.dropped and not filler._busy)
    asked = world.asked
    filler._assign()
    assert world.asked == asked  # there is nothing to be done
    world.follow(LAST, SECOND)
    world.mapped_ = Extents.of([(MIB, 2 * MIB)])
    wait_until(lambda: len(world.dropped) == 2 and not filler._busy)
    filler.stop()
    assert world.order == [1, 3]
    assert world.completed == []
    written = ALLOCATED.intersection(Extents.of([(MIB, 2 * MIB), (3 * MIB, SIZE)]))
    for start, end in written:
        assert world.base()[start:end] == world.image[start:end]
    assert set(world.base()[:MIB]) == {0xEE}


def test_a_base_of_what_boots_read_is_filled_whole_while_a_volume_uses_it(world: World) -> None:
    world.follow(SECOND)
    world.bases["i"] = dataclasses.replace(world.bases["i"], profiled_only=True)
    filler = world.filler()
    filler.start()
    wait_until(lambda: world.dropped and not filler._busy)
    world.mapped_ = Extents.of([(MIB, 2 * MIB)])
    asked = world.asked
    filler._assign()
    assert (world.asked, world.order) == (asked, [1])  # there is nothing to be done
    world.follow(THIRD)
    wait_until(lambda: len(world.dropped) == 2 and not filler._busy)
    assert world.order == [1, 2]
    assert world.completed == []
    world.stacks["v"] = Stack("v", "t", "/dev/sdb", "cached", base_image_id="i")
    wait_until(lambda: world.completed)
    filler.stop()
    assert world.base() == world.expected()


def test_a_volume_that_goes_leaves_the_rest(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demand, "LOOK", 0.01)
    world.follow(SECOND)
    world.bases["i"] = dataclasses.replace(world.bases["i"], profiled_only=True)
    world.stacks["v"] = Stack("v", "t", "/dev/sdb", "cached", base_image_id="i")
    world.read = time.monotonic_ns  # the rest waits for the guest
    filler = world.filler()
    filler.start()
    wait_until(lambda: _paused(filler) > 0.05)
    del world.stacks["v"]
    wait_until(lambda: not filler._busy)
    filler.stop()
    assert (world.order, world.completed) == ([1], [])


@pytest.mark.parametrize(
    "stack",
    [
        Stack("v", "t", "/dev/sdb", "cached", base_image_id="i"),
        Stack("v", "t", "/dev/sdb", "direct", origin_image_id="i"),
    ],
    ids=["cached", "not cached yet"],
)
def test_the_rest_waits_while_guests_read_and_what_boots_read_does_not(
    world: World, monkeypatch: pytest.MonkeyPatch, stack: Stack
) -> None:
    monkeypatch.setattr(demand, "LOOK", 0.01)
    world.follow(THIRD, SECOND)
    world.stacks["v"] = stack
    reading = True
    world.read = lambda: time.monotonic_ns() if reading else 0
    filler = world.filler()
    filler.start()
    wait_until(lambda: _paused(filler) > 0.2)
    assert world.order == [2, 1]
    assert world.completed == []
    reading = False
    wait_until(lambda: world.completed)
    filler.stop()
    assert world.base() == world.expected()


def test_beside_a_guest_without_a_cache_what_boots_read_gets_a_share(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The guest gains nothing from it, and reads over the same link."""
    monkeypatch.setattr(demand, "LOOK", 0.0)
    world.follow(THIRD, SECOND, FIRST)
    world.bases["i"] = dataclasses.replace(world.bases["i"], profiled_only=True)
    world.stacks["v"] = Stack("v", "t", "/dev/sdb", "direct", origin_image_id="i")
    world.read = time.monotonic_ns
    slow = 0.02
    shares: list[float] = []

    def may_fill() -> bool:
        time.sleep(slow)  # as of a link that the guest uses, too
        return True

    filler = world.filler(may_fill)
    share = demand.Demand.share

    def shared(self: demand.Demand, seconds: float) -> float:
        shares.append(share(self, seconds) / seconds)
        return share(self, seconds)

    monkeypatch.setattr(demand.Demand, "share", shared)
    began = time.monotonic()
    filler.start()
    wait_until(lambda: len(shares) == 3 and not filler._busy)
    filler.stop()
    assert world.order == [2, 1, 0]
    assert world.ahead == []  # which the guest would wait behind
    assert shares == pytest.approx([3.0] * 3)
    assert time.monotonic() - began > 3 * slow * 4


def test_a_guest_that_waits_for_a_read_is_not_quiet(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may wait behind what is filled."""
    monkeypatch.setattr(demand, "LOOK", 0.01)
    monkeypatch.setattr(demand, "QUIET", 0.05)
    world.follow(THIRD)
    world.stacks["v"] = Stack("v", "t", "/dev/sdb", "cached", base_image_id="i")
    world.waiting = 1
    filler = world.filler()
    filler.start()
    wait_until(lambda: _paused(filler) > 0.2)
    assert world.order == [2]
    world.waiting = 0
    wait_until(lambda: world.completed)
    filler.stop()


def test_between_two_reads_a_guest_is_not_quiet(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demand, "LOOK", 0.0)
    monkeypatch.setattr(demand, "QUIET", 10.0)
    now, read = 0.0, 1
    world.stacks["v"] = Stack("v", "t", "/dev/sdb", "cached", base_image_id="i")
    world.read = lambda: read
    guests = world.filler()._demand_of(world.bases["i"])
    guests._all._clock = lambda: now
    guests.pause()
    now = 9.9
    guests.pause()
    assert not guests.quiet
    read = 2
    guests.pause()
    now = 19.8
    guests.pause()
    assert not guests.quiet
    now = 20.0
    guests.pause()
    assert guests.quiet


@pytest.mark.parametrize("used", [True, False])
def test_what_no_boot_reads_is_filled_slowly_while_volumes_use_a_base(
    world: World, monkeypatch: pytest.MonkeyPatch, used: bool
) -> None:
    """Hosts that are still booting need the source's link."""
    monkeypatch.setattr(demand, "LOOK", 0.0)
    world.follow(THIRD)
    if used:
        world.stacks["v"] = Stack("v", "t", "/dev/sdb", "cached", base_image_id="i")
    waits: list[float] = []
    share = demand.Demand.share_of_rest

    def shared(self: demand.Demand, seconds: float) -> float:
        waits.append(share(self, seconds) / seconds)
        return 0.0

    monkeypatch.setattr(demand.Demand, "share_of_rest", shared)
    world.fill()
    assert world.order == [2, 0, 1, 3]
    assert waits == pytest.approx([9.0 if used else 0.0] * 3)
    assert (world.ahead == []) is used


def test_what_no_boot_reads_is_slow_only_so_long(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demand, "MOST_OF_REST", 8.5)
    world.stacks["v"] = Stack("v", "t", "/dev/sdb", "cached", base_image_id="i")
    filling = world.filler()._demand_of(world.bases["i"])
    assert [filling.share_of_rest(0.1) for _ in range(11)] == pytest.approx([0.9] * 10 + [0.0])
    assert filling.share(0.1) == 0.0


def test_what_the_kernel_read_ahead_of_the_rest_counts_as_slow_as_what_boots_read(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It came over the same link."""
    monkeypatch.setattr(demand, "LOOK", 0.0)
    world.follow(THIRD)
    world.stacks["v"] = Stack("v", "t", "/dev/sdb", "cached", base_image_id="i")
    took: list[float] = []

    def may_fill() -> bool:
        time.sleep(0.0 if world.order else 0.2)  # of the first piece
        return True

    def shared(_self: demand.Demand, seconds: float) -> float:
        took.append(seconds)
        return 0.0

    monkeypatch.setattr(demand.Demand, "share_of_rest", shared)
    world.fill(may_fill)
    assert len(took) == 3
    assert min(took[:2]) >= 0.2  # the last one ends with the image, and is shorter


def test_while_what_boots_read_is_filled_little_else_is_read_ahead(world: World) -> None:
    """Of what guests and other hosts miss."""
    world.follow(THIRD, SECOND)
    world.fill()
    assert world.misses == [(LITTLE, 0), (FAR, 2)]


def test_what_is_missed_is_read_ahead_again_if_filling_stops(world: World) -> None:
    world.follow(FIRST)
    world.source().write_bytes(b"\0" * MIB + world.image[MIB:])  # the first piece is wrong
    filler = world.filler()
    filler.start()
    wait_until(lambda: world.bad)
    filler.stop()
    assert world.misses[:2] == [(LITTLE, 0), (FAR, 1)]


def test_it_waits_for_guests_only_so_long(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demand, "LOOK", 0.01)
    monkeypatch.setattr(demand, "MOST", 0.1)
    world.follow(THIRD)
    world.stacks["v"] = Stack("v", "t", "/dev/sdb", "cached", base_image_id="i")
    world.read = time.monotonic_ns
    world.fill()
    assert world.base() == world.expected()


@pytest.mark.parametrize("fast", [True, False])
def test_where_no_boot_was_recorded_guests_wait_for_no_slow_source(
    world: World, monkeypatch: pytest.MonkeyPatch, fast: bool
) -> None:
    """A base that is filled fast soon has what they read."""
    monkeypatch.setattr(demand, "LOOK", 1e-4)  # a look at each piece
    monkeypatch.setattr(demand, "FAST", 1.0 if fast else 1e15)
    world.stacks["v"] = Stack("v", "t", "/dev/sdb", "cached", base_image_id="i")
    reading = True
    world.read = lambda: time.monotonic_ns() if reading else 0
    filler = world.filler()
    filler.start()
    wait_until(lambda: world.completed if fast else _paused(filler) > 0.01)
    assert world.ahead == []  # which guests would wait behind
    assert (world.completed != []) is fast
    reading = False
    wait_until(lambda: world.completed)
    filler.stop()


def test_a_base_that_lacks_the_rest_makes_way_for_what_boots_read(world: World) -> None:
    """There is one worker here."""
    filler = world.filler(may_fill=lambda: may_fill())
    seen: list[str] = []

    def may_fill() -> bool:
        seen.append("asked")
        if len(seen) == 1:  # while the first piece of a base without a profile is filled
            other = dataclasses.replace(
                world.bases["i"], image_id="j", thin_id=2, profile=Profile.of(BLOCK, [5]).encode()
            )
            for name in ("paths", "base"):
                data = (world.folder / f"thunder-{name}-i").read_bytes()
                (world.folder / f"thunder-{name}-j").write_bytes(data)
            world.bases["j"] = other
            filler._assign()
        return True

    filler.start()
    wait_until(lambda: len(world.completed) == 2)
    filler.stop()
    assert world.completed == [2, 1]
    assert world.base() == world.expected()


def test_a_base_that_fails_takes_no_turn_from_others_for_what_boots_read(world: World) -> None:
    """There is one worker here; the rest of the healthy base is filled in one go."""
    profile = Profile.of(BLOCK, [5]).encode()
    broken = dataclasses.replace(world.bases["i"], image_id="broken", thin_id=2, profile=profile)
    world.bases["broken"] = broken  # without devices
    asked: list[bool] = []

    def may_fill() -> bool:
        time.sleep(0.1)  # longer than the pause after a failure
        filler._assign()
        asked.append(filler._urgent)
        return True

    filler = world.filler(may_fill)
    filler.start()
    wait_until(lambda: world.completed)
    filler.stop()
    assert world.order == [0, 1, 2, 3]
    assert len(asked) == 4
    assert not any(asked)
