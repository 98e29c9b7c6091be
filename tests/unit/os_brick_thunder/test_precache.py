"""Pre-caching on fakes: the base that an attach would have built, or nothing at all."""

from __future__ import annotations

import dataclasses
import queue
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from os_brick_thunder.agent import ports
from os_brick_thunder.agent.app import build
from os_brick_thunder.agent.base.filler import Filler
from os_brick_thunder.agent.base.precache import Precacher
from os_brick_thunder.agent.policy import layout
from os_brick_thunder.common import errors, files, wire
from os_brick_thunder.common import stats as figures
from os_brick_thunder.common.policy import devnames
from os_brick_thunder.common.policy.extents import Extents
from os_brick_thunder.common.policy.profile import Profile
from os_brick_thunder.common.state import READY, Stack, StateFile
from tests import fakes
from tests.unit.os_brick_thunder import test_agent
from tests.unit.os_brick_thunder.test_agent import IMAGE, MIB, PLAN, TOPOLOGY, VOLUME


class Host:
    def __init__(self, folder: Path, plan: wire.Plan) -> None:
        self.kit = fakes.fake_kit()
        self.file = folder / "state.json"
        self.store = StateFile(self.file)
        self.tracker = fakes.FakeTracker(plan)
        here = ports.Host(self.kit, self.store, self.tracker, TOPOLOGY)
        app = build(here, fakes.SETTINGS)
        self.heartbeat = app.heartbeat
        self.bases, self.reporter = app.base.bases, app.base.reporter
        self.refusal = ""
        self.precacher = Precacher(
            here, app.base.bases, app.base.reporter, lambda image, profile, keep: self.refusal
        )


def _wait_for(condition: Callable[[], bool]) -> None:
    until = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.01)


@pytest.fixture
def host(tmp_path: Path) -> Host:
    return Host(tmp_path, PLAN)


def test_it_builds_a_base_and_has_it_filled(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    woken: list[Filler] = []
    monkeypatch.setattr(Filler, "wake", lambda self: woken.append(self))
    host.precacher.precache(IMAGE)
    assert host.store.bases[IMAGE].phase == READY
    assert len(woken) == 1
    host.precacher.precache(IMAGE)  # again: nothing more
    assert len(woken) == 1


def test_a_base_follows_the_newest_profile_until_it_is_complete(host: Host) -> None:
    older, newer, newest = (Profile.of(1 << 18, [n]).encode() for n in range(3))
    for profile, expected in (
        (older, older),
        (newer, newer),
        ("", newer),  # of a tracker that does not know any more, or an older one
    ):
        host.tracker.plan = dataclasses.replace(PLAN, profile=profile)
        host.precacher.precache(IMAGE)
        assert host.store.bases[IMAGE].profile == expected
        assert StateFile(host.file).bases[IMAGE].profile == expected
    host.store.put(dataclasses.replace(host.store.bases[IMAGE], complete=True))
    host.tracker.plan = dataclasses.replace(PLAN, profile=newest)
    host.precacher.precache(IMAGE)
    assert host.store.bases[IMAGE].profile == newer


def test_a_base_of_what_boots_read_alone(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    """Until the whole is asked for; never the other way round."""
    woken: list[Filler] = []
    monkeypatch.setattr(Filler, "wake", lambda self: woken.append(self))
    host.tracker.plan = dataclasses.replace(PLAN, profile=Profile.of(1 << 18, [1]).encode())
    host.precacher.precache(IMAGE, profiled_only=True)
    host.precacher.announced(IMAGE)
    host.bases.ensure(host.tracker.plan)  # of an attach: the volume that uses it says enough
    assert host.store.bases[IMAGE].profiled_only
    assert StateFile(host.file).bases[IMAGE].profiled_only
    del woken[:]
    host.precacher.precache(IMAGE)
    assert len(woken) == 1
    for _ in range(2):
        assert not StateFile(host.file).bases[IMAGE].profiled_only
        host.precacher.precache(IMAGE, profiled_only=True)


@pytest.mark.parametrize("profile", ["", Profile.of(1 << 18, [1 << 40]).encode(), "none"])
def test_without_a_recorded_boot_there_is_no_base_of_what_boots_read(
    host: Host, profile: str
) -> None:
    host.tracker.plan = dataclasses.replace(PLAN, profile=profile)
    with pytest.raises(errors.NoReplica, match=f"no boot of image {IMAGE} has been recorded"):
        host.precacher.precache(IMAGE, profiled_only=True)
    assert host.store.bases == {}
    assert [report.state for report in host.tracker.reports] == ["gone"]


def test_a_base_that_is_being_filled_is_told_what_boots_read(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the answer to a heartbeat: in the first storm of an image it was planned before."""
    followed: list[str] = []
    follow = host.bases.follow

    def noted(image_id: str, profile: str) -> None:
        followed.append(profile)
        follow(image_id, profile)

    monkeypatch.setattr(host.bases, "follow", noted)

    def told(profile: str, content: str = "") -> bool:
        """Orders are repeated until they are carried out."""
        known = wire.BootProfile(IMAGE, content, profile)
        other = wire.BootProfile("elsewhere", "", profile)
        host.tracker.orders = wire.Orders(profiles=(other, known))
        host.heartbeat.beat()
        return host.store.bases[IMAGE].profile == profile

    host.tracker.plan = dataclasses.replace(
        PLAN, image=dataclasses.replace(PLAN.image, content="sha512:0f") if PLAN.image else None
    )
    host.precacher.precache(IMAGE)
    first, second, third = (Profile.of(1 << 18, [n]).encode() for n in range(3))
    told(third, "sha512:1e")  # of what the image was before
    _wait_for(lambda: told(first))
    told(third, "sha512:1e")
    _wait_for(lambda: told(second, "sha512:0f"))
    host.store.put(dataclasses.replace(host.store.bases[IMAGE], complete=True))
    told(third)
    assert set(host.store.bases) == {IMAGE}
    assert followed == [first, second]


def test_a_profile_that_cannot_be_recorded_fails_nothing(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    host.precacher.precache(IMAGE)
    host.tracker.plan = dataclasses.replace(PLAN, profile=Profile.of(1 << 18, [1]).encode())

    def full(path: Path, text: str) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files, "replace", full)
    host.bases.ensure(host.tracker.plan)
    assert host.store.bases[IMAGE].profile == ""


def test_an_announced_image_has_a_base_when_it_is_attached(host: Host) -> None:
    host.precacher.announced(IMAGE)
    _wait_for(lambda: IMAGE in host.store.bases and host.store.bases[IMAGE].phase == READY)
    planned = len(host.tracker.excluded)
    host.precacher.announced(IMAGE)  # again: no tracker is asked
    assert len(host.tracker.excluded) == planned == 1


def test_announcements_do_not_pile_up(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of one image there is one at a time, of all a few; the others are left to their attaches."""
    begun: queue.SimpleQueue[str] = queue.SimpleQueue()
    answer = threading.Event()

    def slow(image_id: str, *_: object) -> wire.Plan:
        begun.put(image_id)
        answer.wait(10)
        raise errors.TrackerUnavailable("thunder-tracker did not answer")

    monkeypatch.setattr(host.tracker, "plan_sources", slow)
    for number in range(20):
        for _ in range(3):
            host.precacher.announced(f"img-{number}")
    found = [begun.get(timeout=10) for _ in range(8)]
    assert sorted(found) == sorted(f"img-{number}" for number in range(8))
    assert begun.empty()
    answer.set()


def test_an_image_that_no_storage_host_has(host: Host) -> None:
    host.tracker.plan = wire.Plan("", "direct", "no storage host with image img-1 is alive")
    with pytest.raises(errors.NoReplica, match="no storage host with image img-1 is alive"):
        host.precacher.precache(IMAGE)
    assert host.store.bases == {}


def test_a_pool_without_space(host: Host) -> None:
    """It is refused, and the tracker, which counts on the location, is told."""
    before = dict(host.kit.dm.tables)  # type: ignore[attr-defined]
    host.refusal = "image img-1 takes 101 MiB of the local pool, which has 40 MiB to give"
    with pytest.raises(errors.PoolError, match="takes 101 MiB of the local pool"):
        host.precacher.precache(IMAGE)
    assert host.store.bases == {}
    assert host.kit.dm.tables == before  # type: ignore[attr-defined]
    assert [report.state for report in host.tracker.reports] == ["gone"]
    assert host.tracker.locations == set()


def test_what_was_planned_when_the_agent_died_is_withdrawn(
    host: Host, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the tracker's plan and the first line about the base in the state file."""

    def die(plan: wire.Plan, profiled_only: bool) -> None:
        host.reporter.withdraw_all()  # a heartbeat in between withdraws nothing
        raise SystemExit

    monkeypatch.setattr(host.bases, "ensure", die)
    with pytest.raises(SystemExit):
        host.precacher.precache(IMAGE)
    assert host.tracker.locations == {IMAGE}
    store = StateFile(tmp_path / "state.json")
    build(
        ports.Host(host.kit, store, host.tracker, TOPOLOGY), fakes.SETTINGS
    ).base.reporter.withdraw_all()
    assert host.tracker.locations == set()
    assert StateFile(tmp_path / "state.json").withdrawals == {}


def test_a_base_that_is_here_needs_no_room(host: Host) -> None:
    host.precacher.precache(IMAGE)
    host.refusal = "the local pool is 100 % full"
    host.precacher.precache(IMAGE)
    host.reporter.withdraw_all()
    assert "gone" not in [report.state for report in host.tracker.reports]


def test_figures_of_a_stack(host: Host) -> None:
    stack = Stack(VOLUME, "stor1@thunder", "/dev/sdb", "cached", IMAGE, 1, 2, 512 * MIB)
    assert figures.of_stack(host.kit.dm, stack)["present"] is False
    names = devnames.VolumeNames(VOLUME)
    dm: fakes.FakeDeviceMapper = host.kit.dm  # type: ignore[assignment]
    for name, thin_id, length in ((names.meta, 1, MIB), (names.local, 2, 512 * MIB)):
        dm.thin_ids.add(thin_id)
        dm.create(name, layout.thin_table(length, thin_id))
    table = layout.cached_table(names, "/dev/sdb", 512 * MIB, 64 << 10, "writethrough")
    dm.create(names.cached, table)
    dm.create(names.failover, layout.failover_table(names, "/dev/sdb", 512 * MIB))
    shared = Extents.of([(0, 128 * MIB), (256 * MIB, 512 * MIB)])
    dm.create(names.vol, layout.vol_table(names, "/dev/sdb", shared, 1 << 30))
    entry = figures.of_stack(dm, stack)
    assert (entry["present"], entry["failed"], entry["volume_id"]) == (True, 0, VOLUME)
    cache = entry["cache"]
    assert (cache["mapped"], cache["total"]) == (600 * 64 << 10, 1000 * 64 << 10)
    assert (cache["read_hits"], cache["read_misses"]) == (75, 25)
    dm.bare.add(names.cached)  # it has just been created
    entry = figures.of_stack(dm, stack)
    assert (entry["present"], entry["cache"]) == (False, None)
    direct = dataclasses.replace(stack, mode="direct", base_image_id=None)
    assert figures.of_stack(dm, direct)["cache"] is None


def test_hoarding_comes_to_rest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What boots read of three images is more than the pool has room for."""
    host = test_agent.Host(tmp_path)
    _, _, _, store = host.agent(hoard_images=3)  # a pool of 1 GiB, 80 % is its low mark
    profile = Profile(64 << 10, ((0, 300 * 16),)).encode()  # 300 MiB of each
    brought: list[str] = []

    def plan_sources(image_id: str, *args: Any) -> wire.Plan:
        assert PLAN.image is not None
        image = dataclasses.replace(PLAN.image, id=image_id, allocated=((0, 512 << 20),))
        host.tracker.locations.add(image_id)
        return dataclasses.replace(PLAN, image=image, profile=profile, volume_id="")

    monkeypatch.setattr(host.tracker, "plan_sources", plan_sources)
    host.tracker.orders = wire.Orders(popular=("img-a", "img-b", "img-c"))
    for _ in range(10):
        before = set(store.bases)
        host.app.heartbeat.beat()
        _wait_for(lambda: not any(thread.name == "hoard" for thread in threading.enumerate()))
        for image_id in set(store.bases) - before:
            brought.append(image_id)
            host.dm.mapped[store.bases[image_id].thin_id] = 300 << 20  # it is filled soon
        while host.app.guard.make_space():
            pass
    assert brought == ["img-a", "img-b"]
    assert set(store.bases) == {"img-a", "img-b"}
