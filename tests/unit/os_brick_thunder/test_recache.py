"""Direct volumes get a cache while they are in use, as soon as they may, whatever fails."""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from os_brick_thunder.agent.app import App
from os_brick_thunder.agent.stack.recache import Recacher
from os_brick_thunder.common import errors, wire
from os_brick_thunder.common.policy import devnames, dmtable
from os_brick_thunder.common.policy.devnames import VolumeNames
from os_brick_thunder.common.policy.dmtable import Table
from os_brick_thunder.common.policy.extents import Extents
from os_brick_thunder.common.policy.profile import Profile
from os_brick_thunder.common.state import Stack, StateFile
from tests.unit.os_brick_thunder.test_agent import (
    GIB,
    IMAGE,
    LUN,
    MIB,
    PAYLOAD,
    PLAN,
    VOLUME,
    Crash,
    Host,
    Tripwire,
    soon,
)
from tests.unit.os_brick_thunder.test_guard import World

VOL = VolumeNames(VOLUME).vol
CACHED = devnames.path(VolumeNames(VOLUME).cached)
FAILOVER = devnames.path(VolumeNames(VOLUME).failover)
ELSEWHERE = wire.Plan(VOLUME, "direct", "the volume is attached to cmp9 too")
ANOTHER = dataclasses.replace(PAYLOAD, volume_id="vol-2")


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def migrated(host: Host, *, base: bool = False, tripwire: Tripwire | None = None) -> App:
    """A volume in use on the destination of a finished live migration: it is direct.

    :param base: whether there is a base of its image here, for another volume
    """
    host.agent(tripwire)
    if base:
        host.blocks.sizes["/dev/sdc"] = GIB
        host.app.stack.stacks.attach(ANOTHER, "/dev/sdc", soon())
    host.tracker.plan = ELSEWHERE
    host.app.stack.stacks.attach(PAYLOAD, LUN, soon())
    host.dm.held.add(VOL)
    host.tracker.plan = PLAN
    return host.app


@pytest.fixture
def host(tmp_path: Path) -> Host:
    return Host(tmp_path)


def stack_of(host: Host) -> Stack:
    return StateFile(host.file).stacks[VOLUME]


def devices(host: Host) -> tuple[str, ...]:
    table = host.dm.table(VOL)
    assert table is not None
    return table.devices


def answers(host: Host, *results: wire.Plan | Exception) -> list[bool]:
    """Have the tracker answer requests for plans with these results, one after the other.

    :returns: for each request, as it comes, whether the volume was suspended
    """
    waited: list[bool] = []
    plan_attach, left = host.tracker.plan_attach, list(results)

    def answer(
        server: str, volume_id: str, topology: wire.Topology, stack_id: str = ""
    ) -> wire.Plan:
        waited.append(VOL in host.dm.suspended)
        result = left.pop(0)
        if isinstance(result, Exception):
            raise result
        host.tracker.plan = result
        return plan_attach(server, volume_id, topology, stack_id)

    host.tracker.plan_attach = answer  # type: ignore[method-assign]
    return waited


def test_an_order_is_carried_out(host: Host) -> None:
    app = migrated(host)
    recacher = Recacher(app.stack.builder)
    assert not recacher.attempt()
    recacher.obey([VOLUME, "vol-that-is-not-here"])
    assert recacher.attempt()
    assert devices(host) == (FAILOVER, LUN)
    assert (stack_of(host).mode, stack_of(host).reason) == ("cached", "")
    assert host.tracker.modes == {VOLUME: "cached"}
    assert not recacher.attempt()
    # The order was for one cache, and that is removed now.
    app.stack.remover.to_direct(VOLUME, "the local pool ran low")
    assert not recacher.attempt()


def test_a_newer_profile_is_followed_and_a_recording_begun(host: Host) -> None:
    app = migrated(host)
    host.dm.requests[VOL] = 1 << 20
    profile = Profile.of(1 << 18, [7, 8]).encode()
    answers(host, dataclasses.replace(PLAN, profile=profile, record="r1"))
    recacher = Recacher(app.stack.builder)
    recacher.obey([VOLUME])
    assert recacher.attempt()
    assert StateFile(host.file).bases[IMAGE].profile == profile
    app.stack.recorder._jobs.join(30)
    # Its boot went on already: nobody is to wait for it.
    assert [(each.record, each.last) for each in host.tracker.recordings] == [("r1", True)]
    assert not list(Profile.decode(host.tracker.recordings[0].part, 512 * MIB).chunks())


def test_orders_are_carried_out_in_another_thread_than_the_heartbeat(host: Host) -> None:
    migrated(host)
    agent, _, _, store = host.agent()
    app = host.app
    began, cached = threading.Event(), app.stack.builder.to_cached

    def to_cached(volume_id: str) -> Any:
        assert threading.current_thread().name == "recache"
        began.set()
        return cached(volume_id)

    app.stack.builder.to_cached = to_cached  # type: ignore[method-assign]
    host.tracker.orders = wire.Orders(recache=(VOLUME,))
    agent.start()
    try:
        assert began.wait(10)
    finally:
        agent.stop()
    assert store.stacks[VOLUME].mode == "cached"
    assert host.dm.suspended == set()


def test_an_agent_that_stops_leaves_no_volume_suspended(host: Host) -> None:
    app = migrated(host, base=True)
    swap = host.dm.swap

    def slow(name: str, table: Table) -> float:
        time.sleep(0.3)
        return swap(name, table)

    host.dm.swap = slow  # type: ignore[method-assign]
    recacher = Recacher(app.stack.builder)
    recacher.start()
    recacher.obey([VOLUME])
    until = time.monotonic() + 10
    while not host.dm.suspended and time.monotonic() < until:
        time.sleep(0.01)
    assert host.dm.suspended == {VOL}
    recacher.stop()
    assert host.dm.suspended == set()
    assert devices(host) == (FAILOVER, LUN)


def test_a_volume_stays_direct_if_a_migration_has_begun(host: Host) -> None:
    app = migrated(host)
    waited = answers(host, ELSEWHERE, PLAN)
    recacher = Recacher(app.stack.builder)
    recacher.obey([VOLUME])
    assert recacher.attempt()
    assert "attached to cmp9 too" in stack_of(host).reason
    assert devices(host) == (LUN,)
    assert not stack_of(host).recache_pending
    assert host.tracker.modes == {VOLUME: "direct"}
    recacher = Recacher(app.stack.builder)
    recacher.obey([VOLUME])  # when the migration is over
    assert recacher.attempt()
    assert stack_of(host).mode == "cached"
    assert waited == [False, False]


def shared(host: Host) -> Extents:
    """What the volume reads from its cache."""
    table = host.dm.table(VOL)
    assert table is not None
    return table.mapped_to(FAILOVER)


def test_what_is_written_after_the_plan_is_not_read_from_the_cache(host: Host) -> None:
    """Between the plan and the volume's suspension, at any step."""
    app = migrated(host)
    plan_attach, create, suspend = host.tracker.plan_attach, host.dm.create, host.dm.suspend
    step = 128 << 10  # 512 MiB have 4096 areas of this size

    def plan(server: str, volume_id: str, topology: wire.Topology, stack_id: str = "") -> wire.Plan:
        found = plan_attach(server, volume_id, topology, stack_id)
        host.dm.write(VOL, 0, 4096)
        return found

    def build(name: str, table: Table, readonly: bool = False) -> None:
        create(name, table, readonly)
        host.dm.write(VOL, 10 * step - 512, 1024)  # crosses a border

    def last(name: str) -> float:
        host.dm.write(VOL, 100 * step, 3 * step)
        return suspend(name)

    host.tracker.plan_attach = plan  # type: ignore[method-assign]
    host.dm.create = build  # type: ignore[method-assign]
    host.dm.suspend = last  # type: ignore[method-assign]
    assert app.stack.builder.to_cached(VOLUME).mode == "cached"
    assert shared(host) == Extents.of(
        [(step, 9 * step), (11 * step, 100 * step), (103 * step, 512 << 20)]
    )
    assert host.dm.regions[VOL] == {}
    host.blocks.sizes[LUN] = 2 * GIB
    before = shared(host)
    app.stack.stacks.extend(VOLUME)
    assert shared(host) == before  # what was written is not brought back
    table = host.dm.table(VOL)
    assert table is not None
    assert table.length == 2 * GIB // 512


def test_a_volume_that_was_overwritten_meanwhile_stays_direct_for_now(host: Host) -> None:
    app = migrated(host)
    suspend = host.dm.suspend

    def overwritten(name: str) -> float:
        host.dm.write(VOL, 0, GIB)
        return suspend(name)

    host.dm.suspend = overwritten  # type: ignore[method-assign]
    with pytest.raises(errors.NoReplica, match="was overwritten meanwhile"):
        app.stack.builder.to_cached(VOLUME)
    assert (devices(host), host.dm.suspended, host.dm.regions[VOL]) == ((LUN,), set(), {})
    assert stack_of(host).recache_pending


def test_a_volume_that_shares_nothing_with_its_image_gets_no_cache(host: Host) -> None:
    """Whether it is attached or in use: it would leave that cache at once, again and again."""
    _, stacks, _, store = host.agent()
    host.tracker.plan = dataclasses.replace(PLAN, unmodified=((100, 4096),))  # no whole block
    answer = stacks.attach(PAYLOAD, LUN, soon())
    assert (answer.mode, answer.reason) == ("direct", "nothing of it is as in its image any more")
    assert not store.stacks[VOLUME].recache_pending
    found = host.app.stack.builder.to_cached(VOLUME)
    assert (found.mode, found.reason) == (answer.mode, answer.reason)
    assert host.volumes() == {VOL}


def test_what_a_killed_agent_has_watched_is_forgotten(host: Host) -> None:
    """Its region says nothing of the time before the new one."""
    app = migrated(host)
    host.dm.message(VOL, "@stats_create 0+1048576 256 thunder")
    host.dm.write(VOL, 0, 4096)
    assert app.stack.builder.to_cached(VOLUME).mode == "cached"
    assert shared(host) == Extents.of([(0, 512 << 20)])
    assert host.dm.regions[VOL] == {}


def test_an_error_of_the_lun_costs_the_cache_for_a_while_only(host: Host) -> None:
    """And for longer each time: a bad sector that is read again and again."""
    app, clock = migrated(host), Clock()
    recacher = Recacher(app.stack.builder, clock=clock)
    recacher.obey([VOLUME])
    assert recacher.attempt()
    for pause in (5, 60, 300):
        assert stack_of(host).mode == "cached"
        host.dm.failed[VolumeNames(VOLUME).failover] = {CACHED}
        app.failover.check(10)
        assert (stack_of(host).mode, stack_of(host).recache_pending) == ("direct", True)
        assert "its cache failed" in stack_of(host).reason
        assert devices(host) == (LUN,)
        assert host.volumes() == {VOL}
        clock.now += pause - 1
        assert not recacher.attempt()
        clock.now += 1
        assert recacher.attempt()


def test_no_volume_gets_a_cache_without_a_watcher(host: Host) -> None:
    app = migrated(host)
    host.kit.failover.absent = True  # type: ignore[attr-defined]
    with pytest.raises(errors.WatcherError):
        app.stack.builder.to_cached(VOLUME)
    assert host.dm.suspended == set()
    assert devices(host) == (LUN,)


def test_the_watcher_resumes_no_volume_whose_table_is_being_swapped(host: Host) -> None:
    """Something could be written after the counters were read, and the cache would hide it."""
    app, excluded = migrated(host), []
    swap = host.dm.swap

    def watched(name: str, table: Table) -> float:
        excluded.append(VOLUME in host.kit.failover.excluded_now)  # type: ignore[attr-defined]
        return swap(name, table)

    host.dm.swap = watched  # type: ignore[method-assign]
    app.stack.builder.to_cached(VOLUME)
    assert excluded == [True]
    assert host.kit.failover.excluded_now == set()  # type: ignore[attr-defined]


def test_a_volume_of_an_older_agent_gets_no_cache(host: Host) -> None:
    """Its own device is a multipath, which can be given no table of another kind."""
    app = migrated(host)
    table, readonly = host.dm.tables[VOL]
    old = Table.of((table.length, dmtable.Multipath((LUN,))))
    host.dm.tables[VOL] = (old, readonly)
    found = app.stack.builder.to_cached(VOLUME)
    assert (found.mode, found.recache_pending) == ("direct", False)
    assert "older agent" in found.reason
    assert host.dm.tables[VOL] == (old, readonly)


def test_a_volume_stays_direct_while_the_tracker_does_not_answer(host: Host) -> None:
    app, clock = migrated(host, base=True), Clock()
    silent = errors.TrackerUnavailable("did not answer in 8 s")
    waited = answers(host, silent, PLAN)
    recacher = Recacher(app.stack.builder, clock=clock)
    recacher.obey([VOLUME])
    assert recacher.attempt()
    assert devices(host) == (LUN,)
    assert host.dm.regions[VOL] == {}
    # The tracker may have planned a cache, so it is tried again without an order.
    recacher.obey([])
    assert not recacher.attempt()
    clock.now += 5
    assert recacher.attempt()
    assert stack_of(host).mode == "cached"
    assert waited == [False, False]


def test_a_guest_waits_for_no_tracker_and_no_device(host: Host) -> None:
    app = migrated(host)
    host.tracker.delay = host.dm.delay = 0.05
    suspend, swap = host.dm.suspend, host.dm.swap
    at: list[float] = []

    def first(name: str) -> float:
        at.append(suspend(name))
        return at[0]

    def last(name: str, table: Table) -> float:
        at.append(swap(name, table))
        return at[1]

    host.dm.suspend, host.dm.swap = first, last  # type: ignore[method-assign]
    assert app.stack.builder.to_cached(VOLUME).mode == "cached"
    began, ended = at
    assert ended - began < 0.05


def test_a_volume_whose_lun_does_not_answer_is_not_suspended(host: Host) -> None:
    """The suspend would wait for its I/O in flight."""
    app = migrated(host)
    host.blocks.silent.add(LUN)
    waited = answers(host)
    with pytest.raises(errors.DeviceNotFound, match="LUN does not answer"):
        app.stack.builder.to_cached(VOLUME)
    assert waited == []


def test_a_pool_with_larger_blocks_is_for_volumes_that_are_attached_anew(host: Host) -> None:
    """A guest that has aligned its I/O to 512 bytes would get errors."""
    app = migrated(host)
    host.blocks.sectors[devnames.path(devnames.POOL)] = 4096
    waited = answers(host, PLAN, PLAN)
    stack = app.stack.builder.to_cached(VOLUME)
    assert (stack.mode, stack.recache_pending) == ("direct", False)
    assert "blocks of 4096 bytes, the volume of 512" in stack.reason
    assert waited == []  # no tracker was asked in vain
    host.blocks.sectors[LUN] = 4096
    assert app.stack.builder.to_cached(VOLUME).mode == "cached"


def test_a_lun_that_has_answered_can_be_asked_again_at_once(host: Host) -> None:
    builder = migrated(host).stack.builder
    assert all(builder._answers(LUN) for _ in range(300))


def test_a_refusal_is_not_recorded_for_the_next_attachment(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its entry would name a LUN that may be another volume's by then."""
    app = migrated(host)
    host.blocks.sizes["/dev/sdz"] = GIB
    sector = host.blocks.sector

    def meanwhile(device: str) -> int:
        monkeypatch.setattr(host.blocks, "sector", sector)
        host.dm.held.clear()
        app.stack.stacks.detach(VOLUME)
        host.tracker.plan = ELSEWHERE
        app.stack.stacks.attach(PAYLOAD, "/dev/sdz", soon())
        return 4096 if "pool" in device else 512

    monkeypatch.setattr(host.blocks, "sector", meanwhile)
    with pytest.raises(errors.NoReplica, match="attached anew meanwhile"):
        app.stack.builder.to_cached(VOLUME)
    assert stack_of(host).device == "/dev/sdz"


def test_attempts_back_off_and_other_volumes_go_first(host: Host) -> None:
    app, clock = migrated(host), Clock()
    tried: list[str] = []

    def to_cached(volume_id: str) -> Any:
        tried.append(volume_id)
        raise errors.NoReplica("not now")

    app.stack.builder.to_cached = to_cached  # type: ignore[method-assign]
    app.stack.builder.candidates = lambda ordered: set(ordered)  # type: ignore[method-assign]
    recacher = Recacher(app.stack.builder, clock=clock)
    recacher.obey(["a", "b"])
    while recacher.attempt():
        pass
    assert tried == ["a", "b"]
    for pause in (5, 10, 20, 40, 60, 60):
        clock.now += pause - 1
        assert not recacher.attempt()
        clock.now += 1
        assert recacher.attempt()
        assert recacher.attempt()
    assert tried == ["a", "b"] * 7
    recacher.obey([])
    recacher.attempt()
    recacher.obey(["a"])  # a new order starts without a back-off
    assert recacher.attempt()


def test_a_volume_that_takes_long_holds_up_no_other(host: Host) -> None:
    app = migrated(host)
    go_on, done = threading.Event(), set[str]()
    at_work: list[str] = []

    def to_cached(volume_id: str) -> Any:
        assert volume_id not in at_work, "it is given two caches at once"
        at_work.append(volume_id)
        if volume_id == "vol-0":
            go_on.wait(10)
        at_work.remove(volume_id)
        done.add(volume_id)
        return dataclasses.replace(stack_of(host), volume_id=volume_id, mode="cached")

    ordered = {f"vol-{i}" for i in range(20)}
    app.stack.builder.to_cached = to_cached  # type: ignore[method-assign]
    app.stack.builder.candidates = lambda ordered: set(ordered)  # type: ignore[method-assign]
    recacher = Recacher(app.stack.builder)
    recacher.start()
    recacher.obey(ordered)
    until = time.monotonic() + 10
    while len(done) < 19 and time.monotonic() < until:
        time.sleep(0.01)
    assert (done, at_work) == (ordered - {"vol-0"}, ["vol-0"])
    go_on.set()
    recacher.stop()
    assert done == ordered


def pending(host: Host, volume_id: str, image_id: str, lun: str = LUN) -> None:
    """Record a volume in use without its cache."""
    stack = dataclasses.replace(stack_of(host), volume_id=volume_id, origin_image_id=image_id)
    host.store.put(dataclasses.replace(stack, device=lun, recache_pending=True))


def test_luns_that_hang_hold_up_no_other_volume(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A storage host is away, and the kernel waits for it, for minutes."""
    monkeypatch.setattr("os_brick_thunder.agent.stack.cache._ANSWER", 0.1, raising=False)
    app, go_on = migrated(host, base=True), threading.Event()
    for number in range(9):
        pending(host, f"hung-{number}", IMAGE, f"/dev/hung{number}")
    asked: list[str] = []

    def answers(device: str) -> bool:
        asked.append(device)
        return not device.startswith("/dev/hung") or go_on.wait(20)

    monkeypatch.setattr(host.blocks, "answers", answers)
    clock = Clock()
    recacher = Recacher(app.stack.builder, clock=clock)
    recacher.start()
    recacher.obey([VOLUME])
    until = time.monotonic() + 10
    while host.store.stacks[VOLUME].mode == "direct" and time.monotonic() < until:
        time.sleep(0.01)
    mode = host.store.stacks[VOLUME].mode
    clock.now += 5  # the next attempts
    time.sleep(0.5)
    recacher.stop()
    go_on.set()
    assert mode == "cached"
    assert asked.count("/dev/hung0") == 1  # at most one thread is blocked by each LUN


def test_an_image_whose_sources_are_silent_holds_up_no_other(host: Host) -> None:
    """Its volumes wait for one attempt at its base, rather than each for its own."""
    app, clock = migrated(host, base=True), Clock()
    for number in range(9):
        pending(host, f"silent-{number}", "img-silent")
    pending(host, "vol-9", IMAGE)
    go_on, done = threading.Event(), set[str]()
    tried: list[str] = []

    def to_cached(volume_id: str) -> Any:
        tried.append(volume_id)
        if volume_id.startswith("silent"):
            go_on.wait(10)
            raise errors.NoReplica("none of 2 replicas could be opened")
        done.add(volume_id)
        stack = dataclasses.replace(host.store.stacks[volume_id], mode="cached")
        host.store.put(stack)
        return stack

    app.stack.builder.to_cached = to_cached  # type: ignore[method-assign]
    recacher = Recacher(app.stack.builder, clock=clock)
    recacher.start()
    recacher.obey(["vol-9"])
    until = time.monotonic() + 5
    while not done and time.monotonic() < until:
        time.sleep(0.01)
    go_on.set()
    recacher.stop()
    assert done == {"vol-9"}
    assert tried.count("vol-9") == 1
    assert len(tried) == 2
    recacher = Recacher(app.stack.builder, clock=clock)
    assert recacher.attempt()
    assert not recacher.attempt()  # the next of them is not to take this thread at once
    clock.now += 5
    assert recacher.attempt()
    assert len(set(tried)) == 3


def test_no_cache_is_built_without_space_for_it(tmp_path: Path) -> None:
    """Neither above the low mark nor while the base does not fit below it; later it is, unasked."""
    world = World(tmp_path)
    other = world.attach(2)
    world.host.complete()
    world.host.tracker.plan = dataclasses.replace(ELSEWHERE, volume_id="vol-1")
    world.host.blocks.sizes["/dev/sdc"] = GIB
    world.stacks.attach(wire.Payload("vol-1", "img-9", "stor1@thunder"), "/dev/sdc", soon())
    assert PLAN.image is not None
    world.host.tracker.plan = dataclasses.replace(
        PLAN, image=dataclasses.replace(PLAN.image, id="img-9")
    )
    clock = Clock()
    recacher = Recacher(world.host.app.stack.builder, world.guard.may_build_unasked, clock)
    recacher.obey(["vol-1"])
    world.write(other, 820)  # of 1024: above the low mark
    assert not recacher.attempt()
    world.host.dm.mapped.clear()
    world.write(other, 780)  # below it, but the base takes 101
    assert recacher.attempt()
    assert "of the local pool, which has 39 MiB to give" in world.store.stacks["vol-1"].reason
    assert world.modes()["vol-1"] == "direct"
    world.host.dm.mapped.clear()
    assert not recacher.attempt()
    clock.now += 5
    assert recacher.attempt()
    assert world.modes()["vol-1"] == "cached"
    assert world.leftovers() == []


def test_a_volume_that_was_switched_to_direct_for_space_stays_direct(tmp_path: Path) -> None:
    """Until it is attached again: the tracker counts it as cached, so it gives no order."""
    world = World(tmp_path)
    volume = world.attach(1)
    world.write(volume, 900)
    assert world.guard.make_space()
    assert world.modes() == {volume: "direct"}
    assert world.host.tracker.modes == {volume: "cached"}
    assert not Recacher(world.host.app.stack.builder, world.guard.may_build_unasked).attempt()


def test_a_detach_does_not_wait_for_replicas(host: Host) -> None:
    app = migrated(host)
    asked, go_on = threading.Event(), threading.Event()
    results: list[object] = []
    plan_sources = host.tracker.plan_sources

    def slow(image_id: str, topology: wire.Topology, exclude: tuple[str, ...] = ()) -> wire.Plan:
        asked.set()
        go_on.wait(10)
        return plan_sources(image_id, topology, exclude)

    def work() -> None:
        try:
            results.append(app.stack.builder.to_cached(VOLUME))
        except errors.InvalidRequest as error:
            results.append(error)

    host.tracker.plan_sources = slow  # type: ignore[method-assign]
    thread = threading.Thread(target=work)
    thread.start()
    assert asked.wait(10)
    host.dm.held.discard(VOL)
    app.stack.stacks.detach(VOLUME)
    go_on.set()
    thread.join(10)
    assert "has no stack" in str(results[0])
    app.stack.stacks.release_all()
    store = StateFile(host.file)
    assert host.leftovers(store) == []
    assert host.disagreements(store) == set()


def while_planned(host: Host, app: App, call: Callable[[], object]) -> list[object]:
    """Have a volume given a cache, and something done while its tracker makes the plan.

    :returns: what came of the cache
    """
    plan_attach, results = host.tracker.plan_attach, list[object]()

    def plan(server: str, volume_id: str, topology: wire.Topology, stack_id: str = "") -> wire.Plan:
        thread = threading.Thread(target=call)
        thread.start()
        thread.join(10)
        assert not thread.is_alive(), "it waits for the tracker"
        return plan_attach(server, volume_id, topology, stack_id)

    host.tracker.plan_attach = plan  # type: ignore[method-assign]
    try:
        results.append(app.stack.builder.to_cached(VOLUME))
    except errors.ThunderError as error:
        results.append(error)
    host.tracker.plan_attach = plan_attach  # type: ignore[method-assign]
    return results


def test_a_detach_does_not_wait_for_a_plan(host: Host) -> None:
    app = migrated(host)

    def detach() -> None:
        host.dm.held.discard(VOL)
        app.stack.stacks.detach(VOLUME)
        app.stack.stacks.release_all()  # before the plan is recorded

    (result,) = while_planned(host, app, detach)
    assert "attached anew meanwhile" in str(result)
    assert host.volumes() == set()
    store = StateFile(host.file)
    assert host.leftovers(store) == []
    assert host.disagreements(store) == set()


def test_a_plan_is_not_used_for_a_later_attachment(host: Host) -> None:
    """Its guest has migrated away and come back: another host has written to the volume."""
    app = migrated(host)
    again = (PAYLOAD, LUN, soon())
    (result,) = while_planned(host, app, lambda: app.stack.stacks.attach(*again))
    assert "attached anew meanwhile" in str(result)
    assert devices(host) == (LUN,)
    assert host.tracker.stacks == {VOLUME}
    assert app.stack.builder.candidates({VOLUME}) == {VOLUME}
    assert app.stack.builder.to_cached(VOLUME).mode == "cached"


def test_a_volume_that_is_attached_anew_meanwhile_does_not_keep_the_base(host: Host) -> None:
    """The pool may be low: then no cache is built, and the base is to make room."""
    app = migrated(host)
    again = (PAYLOAD, LUN, soon())
    while_planned(host, app, lambda: app.stack.stacks.attach(*again))
    assert (stack_of(host).mode, stack_of(host).base_image_id) == ("direct", None)
    app.base.bases.evict(IMAGE)
    assert host.store.bases == {}
    assert app.stack.builder.candidates({VOLUME}) == {VOLUME}
    assert app.stack.builder.to_cached(VOLUME).mode == "cached"
    assert host.leftovers(host.store) == []


def test_a_base_is_not_removed_while_a_plan_depends_on_it(host: Host) -> None:
    """The pool may run low between any two steps, and bases are then removed."""
    _, stacks, bases, store = host.agent()
    host.tracker.plan = ELSEWHERE
    stacks.attach(PAYLOAD, LUN, soon())
    host.tracker.plan = PLAN
    app = host.app
    plan_attach, ensure_base = host.tracker.plan_attach, app.stack.admission.ensure_base

    def while_planned(
        server: str, volume_id: str, topology: wire.Topology, stack_id: str = ""
    ) -> wire.Plan:
        with pytest.raises(errors.DeviceBusy):
            bases.remove(IMAGE)
        return plan_attach(server, volume_id, topology, stack_id)

    def after_it_was_built(image_id: str) -> str:
        reason = ensure_base(image_id)
        bases.remove(image_id)
        return reason

    host.tracker.plan_attach = while_planned  # type: ignore[method-assign]
    app.stack.admission.ensure_base = after_it_was_built  # type: ignore[method-assign]
    with pytest.raises(errors.NoReplica, match="has just been removed"):
        app.stack.builder.to_cached(VOLUME)
    assert store.stacks[VOLUME].base_image_id is None
    assert (host.volumes(), devices(host), host.dm.suspended) == ({VOL}, (LUN,), set())
    assert host.leftovers(store) == []
    assert host.disagreements(store) == set()
    app.stack.admission.ensure_base = ensure_base  # type: ignore[method-assign]
    assert app.stack.builder.to_cached(VOLUME).mode == "cached"
    assert host.leftovers(store) == []
    assert host.disagreements(store) == set()


def _sweep(folder: Path, base: bool, at: int = -1) -> tuple[Host, Tripwire, App]:
    folder.mkdir()
    host, tripwire = Host(folder), Tripwire()
    app = migrated(host, base=base, tripwire=tripwire)
    tripwire.steps.clear()
    tripwire.at = at
    return host, tripwire, app


def _crash() -> BaseException:
    return Crash()


def _fail() -> BaseException:
    return errors.ThunderError("injected")


def _full() -> BaseException:
    return OSError(28, "No space left on device")


@pytest.mark.parametrize("base", [True, False])
@pytest.mark.parametrize("error", [_crash, _fail, _full])
def test_whichever_step_fails_the_volume_is_whole_and_gets_its_cache_later(
    tmp_path: Path, base: bool, error: Callable[[], BaseException]
) -> None:
    """After a crash, the next agent gets only the orders that follow from the tracker's rows."""
    _, counting, app = _sweep(tmp_path / "count", base)
    assert app.stack.builder.to_cached(VOLUME).mode == "cached"
    assert len(counting.steps) > (15 if base else 30), counting.steps
    for at in range(len(counting.steps)):
        host, tripwire, app = _sweep(tmp_path / str(at), base, at)
        tripwire.error = error
        where = (at, counting.steps[at])
        try:
            app.stack.builder.to_cached(VOLUME)
            survived = True
        except (Crash, errors.ThunderError, OSError):
            survived = False
        if error is _crash:
            assert not survived, where
        if error is _crash or not survived:
            if error is not _crash:  # the agent lives on: no volume may stay suspended
                assert host.dm.suspended == set(), where
                assert devices(host) in ((LUN,), (FAILOVER, LUN)), where
            agent, *_ = host.agent()
            app = host.app
            agent.reconcile()
            host.catch_up()
        assert host.dm.suspended == set(), where
        store = app.stack.stacks._store
        if not survived:
            mode = store.stacks[VOLUME].mode
            assert devices(host) == ((FAILOVER, LUN) if mode == "cached" else (LUN,)), where
        if counting.steps[at] == "tracker.close_export":
            host.tracker.admitted.clear()
        assert host.leftovers(store) == [], where
        assert host.disagreements(store) == set(), where
        clock = Clock()
        recacher = Recacher(app.stack.builder, clock=clock)
        if host.tracker.modes[VOLUME] == "direct":
            recacher.obey([VOLUME])
        recacher.attempt()
        assert store.stacks[VOLUME].mode == "cached", where
        assert not store.stacks[VOLUME].recache_pending, where
        assert devices(host) == (FAILOVER, LUN), where
        assert host.tracker.modes[VOLUME] == "cached", where
        assert host.leftovers(store) == [], where


def test_no_cache_is_built_over_a_base_whose_sources_are_all_dead(host: Host) -> None:
    """It would fail with its first block, and its guest would have waited for it."""
    app = migrated(host, base=True)
    suspended = host.dm.suspend
    host.dm.suspend = lambda name: pytest.fail("the guest waits")  # type: ignore[method-assign]
    host.initiator.unreachable |= {"cmp2:3260", "stor1:3260"}
    with pytest.raises(errors.NoReplica, match="no source of the base of image img-1 works"):
        app.stack.builder.to_cached(VOLUME)
    assert app.stack.builder.candidates({VOLUME}) == {VOLUME}
    host.dm.suspend = suspended  # type: ignore[method-assign]
    host.initiator.unreachable.clear()
    assert app.stack.builder.to_cached(VOLUME).mode == "cached"
