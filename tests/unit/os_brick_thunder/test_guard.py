"""Low space on fakes: what is given up, in which order, and nothing half done after a crash."""

from __future__ import annotations

import dataclasses
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from os_brick_thunder.agent.pool import guard as guarding
from os_brick_thunder.agent.pool.guard import PoolGuard
from os_brick_thunder.agent.stack import direct
from os_brick_thunder.common import errors, wire
from os_brick_thunder.common.policy import devnames
from os_brick_thunder.common.policy.devnames import VolumeNames
from os_brick_thunder.common.policy.profile import Profile
from os_brick_thunder.common.state import READY
from tests.unit.os_brick_thunder.test_agent import (
    GIB,
    IMAGE,
    LUN,
    MIB,
    PLAN,
    VOLUME,
    Crash,
    Host,
    Tripwire,
    soon,
)

CACHED = devnames.path(VolumeNames(VOLUME).cached)
FAILOVER = VolumeNames(VOLUME).failover


class World:
    """A host with a pool of 1 GiB, a guard at 80 and 90 percent, and volumes by number."""

    def __init__(self, folder: Path) -> None:
        self.host = Host(folder)
        _, self.stacks, self.bases, self.store = self.host.agent()
        self.usage = self.host.app.usage
        self.evicted: list[str] = []
        self.guard = PoolGuard(self.usage, self.host.app.stack.remover, self._evict)

    def _evict(self, image_id: str) -> None:
        self.bases.remove(image_id)
        self.evicted.append(image_id)

    def attach(self, number: int, image: str = IMAGE) -> str:
        assert PLAN.image is not None
        plan = dataclasses.replace(PLAN, image=dataclasses.replace(PLAN.image, id=image))
        self.host.tracker.plan = plan
        lun, volume = f"/dev/sd{'bcdefgh'[number]}", f"vol-{number}"
        self.host.blocks.sizes[lun] = GIB
        self.stacks.attach(wire.Payload(volume, image, "stor1@thunder"), lun, soon())
        return volume

    def write(self, volume: str, mib: int) -> None:
        thin_id = self.store.stacks[volume].local_id
        assert thin_id is not None
        self.host.dm.mapped[thin_id] = self.host.dm.mapped.get(thin_id, 0) + mib * MIB

    def fill(self, image: str, mib: int) -> None:
        self.host.dm.mapped[self.store.bases[image].thin_id] = mib * MIB

    def modes(self) -> dict[str, str]:
        return {stack.volume_id: stack.mode for stack in self.store.stacks.values()}

    def given_up(self) -> list[tuple[str, str]]:
        return [(each["what"], each["id"]) for each in self.guard.status()["given_up"]]

    def leftovers(self) -> list[str]:
        return self.host.leftovers(self.store)


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def test_a_volume_goes_direct_under_its_guest(world: World) -> None:
    volume = world.attach(1)
    world.host.dm.held.add(VolumeNames(volume).vol)
    assert world.host.app.stack.remover.to_direct(volume, "said so")
    stack = world.store.stacks[volume]
    assert (stack.mode, stack.reason, stack.base_image_id, stack.local_id, stack.meta_id) == (
        "direct",
        "said so",
        None,
        None,
        None,
    )
    assert {name for name in world.host.dm.tables if volume in name} == {VolumeNames(volume).vol}
    table = world.host.dm.table(VolumeNames(volume).vol)
    assert table is not None
    assert table.devices == ("/dev/sdc",)
    assert world.leftovers() == []
    assert not world.host.app.stack.remover.to_direct(volume, "again")
    world.bases.remove(IMAGE)  # no volume uses it any longer


def test_a_volume_whose_lun_is_away_keeps_its_cache(world: World) -> None:
    volume = world.attach(1)
    world.host.dm.failed[VolumeNames(volume).failover] = {"/dev/sdc"}
    with pytest.raises(errors.DeviceNotFound, match="LUN does not answer"):
        world.host.app.stack.remover.to_direct(volume, "low")
    assert not world.host.app.stack.remover.cut(volume, "low")
    assert world.modes() == {volume: "cached"}
    assert VolumeNames(volume).local in world.host.dm.tables


def test_a_cache_that_failed_is_taken_down(world: World) -> None:
    volume, other = world.attach(1), world.attach(2)
    world.write(volume, 7)
    assert world.host.app.stack.remover.remove_failed() == []
    names = VolumeNames(volume)
    world.host.dm.failed[names.failover] = {devnames.path(names.cached)}
    assert world.host.app.stack.remover.remove_failed() == [(volume, 7 * MIB)]
    assert world.modes() == {volume: "direct", other: "cached"}
    assert world.store.stacks[volume].reason == direct.FAILED
    assert world.store.stacks[volume].recache_pending
    assert world.leftovers() == []


def test_a_cache_that_could_not_be_left_is_not_given_up_for_space_when_it_fails(
    world: World,
) -> None:
    """Its volume would stay direct until it is attached again, and for another reason."""
    volume = world.attach(1)
    names = VolumeNames(volume)
    world.host.dm.failed[names.failover] = {"/dev/sdc"}
    assert not world.host.app.stack.remover.leave_cache(volume, "the local pool ran low")
    world.host.dm.failed[names.failover] = {devnames.path(names.cached)}  # much later
    assert [each for each, _ in world.host.app.stack.remover.remove_failed()] == [volume]
    stack = world.store.stacks[volume]
    assert (stack.reason, stack.recache_pending) == (direct.FAILED, True)


def test_unused_bases_go_first_then_the_largest_volume(world: World) -> None:
    for number, image in enumerate(("old", "new")):
        world.stacks.detach(world.attach(number, image))
        world.fill(image, 100)
        time.sleep(0.001)
    world.store.touch("old")  # now it is the newer one
    small, large = world.attach(2), world.attach(3)
    world.fill(IMAGE, 200)
    world.write(small, 100)
    assert not world.guard.make_space()  # 500 of 1024 MiB
    world.write(large, 510)
    while world.guard.make_space():
        pass
    assert world.evicted == ["new", "old"]
    assert world.modes() == {small: "cached", large: "cached"}  # 810 of 1024
    world.write(small, 90)
    while world.guard.make_space():
        pass
    assert world.given_up() == [("base", "new"), ("base", "old"), ("volume", large)]
    assert world.modes() == {small: "cached", large: "direct"}
    assert world.leftovers() == []


def test_what_cannot_be_given_up_is_left_alone_for_a_while(world: World) -> None:
    large, small = world.attach(1), world.attach(2)
    world.write(large, 600)
    world.write(small, 300)
    world.host.dm.failed[VolumeNames(large).failover] = {"/dev/sdc"}  # its storage host is away
    assert world.guard.make_space()
    assert world.given_up() == []
    assert world.guard.make_space()
    assert world.given_up() == [("volume", small)]


def test_bases_whose_readers_stay_do_not_keep_others_from_going(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each attempt takes longer than what failed is left alone."""
    monkeypatch.setattr(guarding, "RETRY_AFTER", 0.0)
    assert PLAN.image is not None
    for number, image in enumerate(("img-a", "img-b", "img-c")):
        world.stacks.detach(world.attach(number, image))
        world.fill(image, 300)
    evict = world.guard._evict

    def drain(image_id: str) -> None:
        if image_id != "img-c":
            raise errors.DeviceBusy(image_id, "it is in use by iqn.x:cmp9")
        evict(image_id)

    monkeypatch.setattr(world.guard, "_evict", drain)
    for _ in range(3):
        world.guard.make_space()
    assert world.evicted == ["img-c"]


@pytest.mark.parametrize("left", [True, False])
def test_a_lun_that_hangs_does_not_keep_others_from_going(
    world: World, monkeypatch: pytest.MonkeyPatch, left: bool
) -> None:
    """Tables of volumes are loaded once their LUNs have answered what is in flight."""
    monkeypatch.setattr(direct, "PATIENCE", 0.1)
    monkeypatch.setattr(guarding, "PATIENCE", 0.1)
    stuck, other = world.attach(1), world.attach(2)
    world.write(stuck, 500)
    world.write(other, 400)
    if left:
        assert world.host.app.stack.remover.leave_cache(stuck, "it failed")
    reload, go_on = world.host.dm.reload, threading.Event()

    def hanging(name: str, *args: Any, **options: Any) -> None:
        if name == VolumeNames(stuck).vol:
            go_on.wait(10)
        reload(name, *args, **options)

    monkeypatch.setattr(world.host.dm, "reload", hanging)
    for _ in range(3):
        world.guard.make_space()
    assert world.given_up() == [("volume", other)]
    go_on.set()
    until = time.monotonic() + 10
    while world.modes()[stuck] == "cached" or world.store.stacks[stuck].local_id is not None:
        assert time.monotonic() < until
        time.sleep(0.01)
    assert world.leftovers() == []


def test_a_volume_that_writes_too_fast_leaves_its_cache_at_once(world: World) -> None:
    calm, fast = world.attach(1), world.attach(2)
    world.write(calm, 500)
    world.write(fast, 330)
    world.guard.poll()
    assert world.host.dm.failed == {}
    world.write(fast, 80)  # of 1024, within no time
    world.guard.poll()
    assert world.host.dm.failed == {
        VolumeNames(fast).failover: {devnames.path(VolumeNames(fast).cached)},
    }
    assert world.guard.make_space()
    assert world.modes() == {calm: "cached", fast: "direct"}
    assert world.store.stacks[fast].reason == "the local pool ran low"
    assert world.guard.status()["peak"] == 910 * MIB


def test_slow_writers_are_not_stopped_early(world: World) -> None:
    volume = world.attach(1)
    world.write(volume, 830)
    world.guard.poll()
    time.sleep(0.05)
    world.write(volume, 1)
    world.guard.poll()
    assert world.host.dm.failed == {}


def test_a_full_pool_is_freed_below_the_writes_that_wait(world: World) -> None:
    large, small = world.attach(1), world.attach(2)
    world.write(large, 700)
    world.write(small, 324)
    world.guard.poll()
    assert world.host.dm.log[-2:] == [
        f"wipe {VolumeNames(large).local}",
        f"wipe {VolumeNames(large).meta}",
    ]
    assert world.usage.status().used == 324 * MIB
    assert world.given_up() == [("cut", large)]
    world.guard.make_space()
    assert world.modes() == {large: "direct", small: "cached"}
    assert world.leftovers() == []


def test_a_volume_that_is_just_going_direct_is_cut_too(world: World) -> None:
    """Its table is swapped when its writes are done, and they wait for room."""
    volume = world.attach(1)
    world.write(volume, 1024)
    stack = dataclasses.replace(world.store.stacks[volume], mode="direct")
    world.store.put(stack)
    world.guard.poll()
    assert world.given_up() == [("cut", volume)]
    assert world.usage.status().healthy
    world.guard.make_space()
    assert world.store.stacks[volume].local_id is None
    assert world.leftovers() == []


def test_a_base_that_does_not_fit_is_not_begun(world: World) -> None:
    """What unused bases hold counts as free, what filling ones still need does not."""
    first = world.attach(1)  # its base still needs 100 MiB
    world.write(first, 700)
    second = world.attach(2, "other")
    stack = world.store.stacks[second]
    assert stack.mode == "direct"
    assert stack.reason == (
        "image other takes 101 MiB of the local pool, which has 19 MiB to give below "
        "pool_low_percent (80)"
    )
    assert "other" not in world.store.bases
    assert "other" in world.store.withdrawals
    other = wire.ImageInfo("other", 100 * MIB, ((0, 100 * MIB),))
    assert "image other takes 100 MiB" in world.usage.refusal(other)
    with_tree = dataclasses.replace(other, root="5a" * 32)
    assert "image other takes 101 MiB" in world.usage.refusal(with_tree)
    profile = Profile.of(MIB, range(18)).encode()
    assert world.usage.refusal(other, profile) == ""  # what boots read of it does fit
    assert "the profile of image other takes 20 MiB" in world.usage.refusal(
        other, Profile.of(MIB, range(20)).encode()
    )
    base = world.store.bases[IMAGE]
    world.store.put(dataclasses.replace(base, profile=profile, profiled_only=True))
    assert world.usage.refusal(other) != ""  # a volume uses it: it is to have all of its image
    stacks = world.store.stacks
    world.store.put(dataclasses.replace(stacks[first], base_image_id=None))
    assert world.usage.refusal(other) == ""
    world.store.put(stacks[first])
    world.store.put(base)
    third = world.attach(3)  # its base is here
    assert world.modes()[third] == "cached"
    world.host.complete()
    world.attach(2, "other")
    assert world.modes()[second] == "cached"


def test_above_the_high_mark_nothing_is_begun(world: World) -> None:
    world.write(world.attach(1), 922)
    assert not world.usage.may_fill()
    volume = world.attach(2)
    second = world.store.stacks[volume]
    assert second.mode == "direct"
    assert "is 90 % full: above pool_high_percent (90)" in second.reason
    assert world.leftovers() == []


def test_filling_stops_between_the_marks(world: World) -> None:
    volume = world.attach(1)
    world.write(volume, 820)
    assert world.usage.may_fill()
    world.write(volume, 60)
    assert not world.usage.may_fill()


def test_marks_must_leave_room(world: World) -> None:
    with pytest.raises(errors.InvalidRequest, match="pool_low_percent 90 is not below"):
        world.host.agent(pool_low_percent=90, pool_high_percent=90)


def test_a_pool_that_failed_is_left_alone(world: World) -> None:
    world.host.kit.pool.total = 0  # type: ignore[attr-defined]
    assert world.guard.poll() > 0
    assert world.given_up() == []


def _swap(host: Host) -> None:
    host.app.stack.remover.to_direct(VOLUME, "low")


def _attached(folder: Path, at: int = -1) -> tuple[Host, Tripwire]:
    folder.mkdir()
    host, tripwire = Host(folder), Tripwire()
    _, stacks, _, _ = host.agent(tripwire)
    stacks.attach(wire.Payload(VOLUME, IMAGE, "stor1@thunder"), LUN, soon())
    host.dm.held.add(VolumeNames(VOLUME).vol)
    tripwire.steps.clear()
    tripwire.at = at
    return host, tripwire


@pytest.mark.parametrize("crash", [True, False])
def test_wherever_a_swap_ends_it_is_finished_later(tmp_path: Path, crash: bool) -> None:
    host, counting = _attached(tmp_path / "count")
    _swap(host)
    assert len(counting.steps) >= 9, counting.steps
    for at in range(len(counting.steps)):
        host, tripwire = _attached(tmp_path / f"{crash}{at}", at)
        if not crash:
            tripwire.error = lambda: errors.ThunderError("injected")
        where = (at, counting.steps[at])
        try:
            _swap(host)
            # When the base was last used: less than that does not stop a swap.
            assert (crash, counting.steps[at]) == (False, "state.save"), where
        except (Crash, errors.ThunderError):
            pass
        if crash:
            agent, *_ = host.agent()
            agent.reconcile()
        vol = VolumeNames(VOLUME).vol
        assert vol in host.dm.tables, where
        if at:  # the guest was off its cache from the first step on
            table = host.dm.table(vol)
            assert table is not None
            assert table.devices == (LUN,) or CACHED in host.dm.failed[FAILOVER], where
        host.app.stack.remover.remove_failed()
        _swap(host)
        store = (
            host.app.stack.stacks._store
        )  # the file follows with the next save, if it was that which failed
        assert store.stacks[VOLUME].mode == "direct", where
        assert store.stacks[VOLUME].phase == READY, where
        assert store.stacks[VOLUME].local_id is None, where
        assert host.volumes() == {vol}, where
        assert host.leftovers(store) == [], where


def test_a_direct_volume_gets_a_cache_under_its_guest(world: World) -> None:
    volume = world.attach(1)
    world.host.dm.held.add(VolumeNames(volume).vol)
    world.host.app.stack.remover.to_direct(volume, "low")
    asked: list[bool] = []
    plan = world.host.tracker.plan_attach

    def plan_attach(
        server: str, volume_id: str, topology: wire.Topology, stack_id: str = ""
    ) -> wire.Plan:
        asked.append(VolumeNames(volume).vol in world.host.dm.suspended)
        return plan(server, volume_id, topology, stack_id)

    world.host.tracker.plan_attach = plan_attach  # type: ignore[method-assign]
    assert world.host.app.stack.builder.to_cached(volume).mode == "cached"
    assert asked == [False], "one plan, for which the guest does not wait"
    assert world.host.dm.suspended == set()
    table = world.host.dm.table(VolumeNames(volume).vol)
    assert table is not None
    assert table.devices == (devnames.path(VolumeNames(volume).failover), "/dev/sdc")
    stack = world.store.stacks[volume]
    assert (stack.mode, stack.reason, stack.base_image_id) == ("cached", "", IMAGE)
    assert world.host.app.stack.remover.remove_failed() == []
    assert world.leftovers() == []
    assert world.host.app.stack.builder.to_cached(volume).mode == "cached"
    assert len(asked) == 1


def test_what_speaks_against_a_cache_leaves_the_volume_direct(world: World) -> None:
    with pytest.raises(errors.InvalidRequest, match="no stack"):
        world.host.app.stack.builder.to_cached("vol-9")
    volume = world.attach(1)
    world.host.app.stack.remover.to_direct(volume, "low")
    world.host.tracker.plan = wire.Plan(volume, "direct", "the volume is attached to cmp9 too")
    found = world.host.app.stack.builder.to_cached(volume)
    assert (found.mode, found.reason) == ("direct", "the volume is attached to cmp9 too")
    assert world.leftovers() == []


@pytest.mark.parametrize("crash", [True, False])
def test_wherever_taking_a_cache_up_ends_the_volume_is_whole(tmp_path: Path, crash: bool) -> None:
    def prepared(folder: Path, at: int = -1) -> tuple[Host, Tripwire]:
        host, tripwire = _attached(folder)
        _swap(host)
        tripwire.steps.clear()
        tripwire.at = at
        return host, tripwire

    host, counting = prepared(tmp_path / "count")
    host.app.stack.builder.to_cached(VOLUME)
    assert len(counting.steps) > 12, counting.steps
    vol = VolumeNames(VOLUME).vol
    for at in range(len(counting.steps)):
        host, tripwire = prepared(tmp_path / f"{crash}{at}", at)
        where = (at, counting.steps[at])
        if not crash:
            tripwire.error = lambda: errors.ThunderError("injected")
        try:
            host.app.stack.builder.to_cached(VOLUME)
            harmless = ("tracker.report", "state.save", "dm.message")  # the region is left
            assert counting.steps[at].startswith(harmless), where
        except (Crash, errors.ThunderError):
            pass
        if crash:
            agent, *_ = host.agent()
            agent.reconcile()
        assert host.dm.suspended == set(), where
        host.app.stack.remover.remove_failed()
        store = host.app.stack.stacks._store
        stack = store.stacks[VOLUME]
        table = host.dm.table(vol)
        assert table is not None
        if stack.mode == "direct":
            assert (stack.local_id, stack.base_image_id, table.devices) == (None, None, (LUN,)), (
                where
            )
            assert host.volumes() == {vol}, where
        else:
            assert table.devices == (devnames.path(FAILOVER), LUN), where
        assert host.leftovers(store) == [], where
        tripwire.at = -1
        assert host.app.stack.builder.to_cached(VOLUME).mode == "cached", where
