"""The agent's services on fakes: the right devices, and nothing left behind by a failure or crash.

Two sweeps: every call that changes the kernel, the state file or the tracker is made to fail once,
and the agent is made to die at each of them once.
"""

from __future__ import annotations

import contextlib
import dataclasses
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

from bench import faults
from os_brick_thunder.agent import app, devices, ports
from os_brick_thunder.agent.agent import Agent
from os_brick_thunder.agent.base.bases import Bases
from os_brick_thunder.agent.policy import layout
from os_brick_thunder.agent.stack import stacks as stacks_module
from os_brick_thunder.agent.stack.stacks import Stacks
from os_brick_thunder.common import errors, files, wire
from os_brick_thunder.common.policy import devnames, dmtable
from os_brick_thunder.common.policy.devnames import VolumeNames
from os_brick_thunder.common.policy.dmtable import Table
from os_brick_thunder.common.policy.extents import Extents
from os_brick_thunder.common.state import READY, Base, Stack, StateFile
from tests import fakes

GIB = 1 << 30
MIB = 1 << 20
VOLUME, IMAGE, LUN = "vol-1", "img-1", "/dev/sdb"
TOPOLOGY = wire.Topology("cmp1", "10.0.0.1", "r1", "z1", "iqn.x:cmp1")
PAYLOAD = wire.Payload(VOLUME, IMAGE, "stor1@thunder")
SOURCES = (
    wire.Source("l2", "cmp2", "base", "cmp2"),
    wire.Source("l0", "stor1", "master", "stor1@thunder"),
)
PLAN = wire.Plan(
    volume_id=VOLUME,
    mode="cached",
    reason="",
    image=wire.ImageInfo(IMAGE, 512 * MIB, ((0, 100 * MIB), (200 * MIB, 4096))),
    location_id="l3",
    sources=SOURCES,
    unmodified=((0, 512 * MIB),),
)


class Crash(BaseException):
    """The process is dead: from now on nothing that it does reaches the world."""


class Tripwire:
    """Counts the steps of an agent; raises before one of them, and, dead, before all after."""

    def __init__(self) -> None:
        self.steps: list[str] = []
        self.at = -1
        self.error: Callable[[], BaseException] = Crash
        self.dead = False

    @contextlib.contextmanager
    def __call__(self, step: str) -> Iterator[None]:
        if self.dead:
            raise Crash
        self.steps.append(step)
        if len(self.steps) - 1 == self.at:
            error = self.error()
            self.dead = isinstance(error, Crash)
            raise error
        yield


class Host:
    """A host with a fake kernel, which may be met by one agent after the other."""

    def __init__(self, folder: Path) -> None:
        self.file = folder / "state.json"
        self.kit = fakes.fake_kit()
        self.tracker = fakes.FakeTracker(PLAN)
        self.dm: fakes.FakeDeviceMapper = self.kit.dm  # type: ignore[assignment]
        self.blocks: fakes.FakeBlocks = self.kit.blocks  # type: ignore[assignment]
        self.initiator: fakes.FakeInitiator = self.kit.initiator  # type: ignore[assignment]
        self.targets: fakes.FakeTargets = self.kit.targets  # type: ignore[assignment]
        self.loops: fakes.FakeLoops = self.kit.loops  # type: ignore[assignment]
        self.blocks.sizes[LUN] = GIB

    def agent(
        self, tripwire: Tripwire | None = None, **options: Any
    ) -> tuple[Agent, Stacks, Bases, StateFile]:
        """Another agent of this host; ``app`` has its other parts."""
        host = ports.Host(self.kit, StateFile(self.file), self.tracker, TOPOLOGY)
        if tripwire:
            host = faults.hooked_host(host, self.file, tripwire)
        self.app = app.build(host, dataclasses.replace(fakes.SETTINGS, **options))
        self.store = host.store
        return self.app.agent, self.app.stack.stacks, self.app.base.bases, host.store

    def catch_up(self) -> None:
        """What a running agent does by itself, all of it once."""
        self.app.heartbeat.catch_up()
        for finish in self.app.reaper.unfinished().values():
            with contextlib.suppress(errors.ThunderError):
                finish()
        for image_id in self.store.bases:
            with contextlib.suppress(errors.ThunderError):
                self.app.base.sources.add_spares(image_id)

    def fill(self, base: Base) -> None:
        """The pool holds all of a base's image, as after its filling."""
        metadata: fakes.FakeMetadata = self.kit.metadata  # type: ignore[assignment]
        metadata.filled[base.thin_id] = Extents.of([(0, base.length)])

    def complete(self) -> None:
        """The base of the image is filled."""
        base = self.store.bases[IMAGE]
        self.fill(base)
        self.app.base.completion.complete(base)

    def volumes(self) -> set[str]:
        return {name for name in self.dm.tables if VOLUME in name}

    def leftovers(self, store: StateFile) -> list[str]:
        """What is in the kernel and belongs to nothing in the state file."""
        bases, stacks = store.bases, store.stacks
        expected = devices.expected(TOPOLOGY.host, bases.values(), stacks.values())
        known = expected.names | self._checking(bases.values())
        left = [f"device {name}" for name in self.dm.tables if name not in known]
        left += [f"thin {i}" for i in self.dm.thin_ids - expected.thin_ids]
        iqns = {path.iqn for base in bases.values() for path in base.paths}
        exporters = {path.exporter for base in bases.values() for path in base.paths}
        left += [f"admission at {name}" for name in self.tracker.admitted - exporters]
        left += [f"session {iqn}" for iqn, _ in self.initiator.logged_in if iqn not in iqns]
        left += [f"export {iqn}" for iqn in self.targets.exported if iqn not in expected.exports]
        left += [f"loop over {d}" for d in self.loops.loops.values() if d not in expected.loops]
        return left

    def _checking(self, bases: Iterable[Base]) -> set[str]:
        """Devices that check what these bases read of other hosts: as many as are read from."""
        devices = {d for b in bases for n in layout.multipaths(b) for d in self._below(n)}
        verified = {device.removeprefix(fakes.MAPPER) for device in devices if "verified" in device}
        return verified | {name.replace("verified", "verity") for name in verified}

    def _below(self, name: str) -> tuple[str, ...]:
        table = self.dm.table(name)
        return table.devices if table else ()

    def disagreements(self, store: StateFile) -> set[str]:
        """Images and volumes of which the tracker has rows and the host nothing, or vice versa."""
        tracker = self.tracker
        return (tracker.locations ^ set(store.bases)) | (tracker.stacks ^ set(store.stacks))


@pytest.fixture
def host(tmp_path: Path) -> Host:
    return Host(tmp_path)


def soon() -> float:
    return time.monotonic() + 60


def test_attach_builds_the_stack_of_the_architecture(host: Host) -> None:
    _, stacks, _, store = host.agent()
    answer = stacks.attach(PAYLOAD, LUN, soon())
    assert dataclasses.asdict(answer) == {
        "path": f"/dev/mapper/thunder-vol-{VOLUME}",
        "mode": "cached",
        "reason": "",
        "source": "cmp2",
    }
    assert host.dm.log == [
        f"create thunder-{what}"
        for what in (
            "pool-metadata",
            "pool-data",
            "pool",
            "zero",
            f"paths-{IMAGE}",
            f"source-{IMAGE}",
            f"base-{IMAGE}",
            f"export-{IMAGE}",
        )
    ] + [
        f"reload thunder-paths-{IMAGE}",  # now it has a source
        f"create thunder-vol-{VOLUME}",  # over its LUN
        *(f"create thunder-{w}-{VOLUME}" for w in ("meta", "local", "cached", "failover")),
        f"reload thunder-vol-{VOLUME}",
    ]
    assert _sources(host) == 1  # the nearest: nobody waits for the others
    assert store.stacks[VOLUME].phase == READY
    host.catch_up()
    assert _sources(host) == 2  # and a storage host
    assert host.tracker.reports[-1].state == "filling"
    assert host.tracker.reports[-1].source == "cmp2"


def _sources(host: Host) -> int:
    """How many replicas the base reads from, nearest first."""
    table = host.dm.table(f"thunder-paths-{IMAGE}")
    assert table is not None
    return len(table.devices)


def test_detach_removes_the_stack_and_keeps_the_base(host: Host) -> None:
    _, stacks, _, store = host.agent()
    stacks.attach(PAYLOAD, LUN, soon())
    stacks.detach(VOLUME)
    assert host.volumes() == set()
    assert store.stacks == {}
    assert f"thunder-base-{IMAGE}" in host.dm.tables
    assert store.releases == {VOLUME: "stor1@thunder"}
    assert host.leftovers(store) == []
    stacks.detach(VOLUME)  # absent is success


def test_two_volumes_share_one_base(host: Host) -> None:
    _, stacks, _, store = host.agent()
    host.blocks.sizes["/dev/sdc"] = GIB
    stacks.attach(PAYLOAD, LUN, soon())
    stacks.attach(wire.Payload("vol-2", IMAGE, "stor1@thunder"), "/dev/sdc", soon())
    assert len(store.bases) == 1
    assert len(host.initiator.logged_in) == 1


def test_volumes_of_one_image_do_not_wait_for_each_others_devices(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, stacks, bases, _ = host.agent()
    bases.ensure(PLAN)
    host.blocks.sizes["/dev/sdc"] = GIB
    begun, other_is_built, create = threading.Event(), threading.Event(), host.dm.create

    def slow(name: str, *args: Any, **options: Any) -> None:
        if name == f"thunder-meta-{VOLUME}":
            begun.set()
            assert other_is_built.wait(20)
        create(name, *args, **options)

    monkeypatch.setattr(host.dm, "create", slow)
    answers = []
    first = threading.Thread(target=lambda: answers.append(stacks.attach(PAYLOAD, LUN, soon())))
    first.start()
    assert begun.wait(20)
    second = wire.Payload("vol-2", IMAGE, "stor1@thunder")
    assert stacks.attach(second, "/dev/sdc", soon()).mode == "cached"
    other_is_built.set()
    first.join(20)
    assert [answer.mode for answer in answers] == ["cached"]


def test_volumes_are_detached_although_the_state_file_cannot_be_written(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, text: str) -> None:
        raise OSError(28, "No space left on device")

    _, stacks, bases, store = host.agent()
    stacks.attach(PAYLOAD, LUN, soon())
    with monkeypatch.context() as patched:
        patched.setattr(files, "replace", full)
        with pytest.raises(errors.StateError, match="No space left"):
            stacks.attach(wire.Payload("vol-2", IMAGE, "stor1@thunder"), "/dev/sdc", soon())
        stacks.detach(VOLUME)
        bases.remove(IMAGE)
    assert (store.stacks, store.bases, host.leftovers(store)) == ({}, {}, [])
    agent, _, _, store = host.agent()  # the file still has the entries
    assert set(store.bases) == {IMAGE}
    agent.reconcile()
    host.catch_up()
    assert store.stacks == {}
    assert store.withdrawals == {}
    assert host.leftovers(store) == []


def test_a_volume_that_somebody_has_open_is_not_taken_down(host: Host) -> None:
    _, stacks, _, _ = host.agent()
    stacks.attach(PAYLOAD, LUN, soon())
    host.dm.held.add(f"thunder-vol-{VOLUME}")
    before = dict(host.dm.tables)
    with pytest.raises(errors.DeviceBusy):
        stacks.detach(VOLUME)
    assert host.dm.tables == before


def test_the_cache_of_a_stack_that_was_here_already_is_never_used(host: Host) -> None:
    """As when a guest comes back by live migration: an idle stack is built anew, one in use is
    handed out without its cache, until there is a new one."""
    _, stacks, _, store = host.agent()
    first = stacks.attach(PAYLOAD, LUN, soon())
    ids = store.stacks[VOLUME].local_id
    stacks.attach(PAYLOAD, LUN, soon())
    assert store.stacks[VOLUME].local_id != ids
    host.dm.held.add(f"thunder-vol-{VOLUME}")
    ids = store.stacks[VOLUME].local_id
    again = stacks.attach(PAYLOAD, LUN, soon())
    assert (again.path, again.mode) == (first.path, "direct")
    assert again.reason == "it was attached again while in use"
    table = host.dm.table(f"thunder-vol-{VOLUME}")
    assert table is not None
    assert table.devices == (LUN,)
    assert stacks.attach(PAYLOAD, LUN, soon()) == again
    assert host.app.stack.builder.candidates(()) == {VOLUME}
    assert host.app.stack.builder.to_cached(VOLUME).mode == "cached"
    assert store.stacks[VOLUME].local_id not in (None, ids)
    assert host.leftovers(store) == []


def test_a_direct_volume_has_its_lun_alone(host: Host) -> None:
    host.tracker.plan = wire.Plan(VOLUME, "direct", "attached on cmp9 too")
    _, stacks, _, store = host.agent()
    answer = stacks.attach(PAYLOAD, LUN, soon())
    assert (answer.mode, answer.reason) == ("direct", "attached on cmp9 too")
    assert host.volumes() == {f"thunder-vol-{VOLUME}"}
    table = host.dm.table(f"thunder-vol-{VOLUME}")
    assert table is not None
    assert table.devices == (LUN,)
    stacks.detach(VOLUME)
    assert host.leftovers(store) == []


def test_an_image_smaller_than_a_block_is_direct(host: Host) -> None:
    host.tracker.plan = dataclasses.replace(
        PLAN, image=wire.ImageInfo(IMAGE, 4096, ((0, 4096),)), unmodified=((0, 4096),)
    )
    _, stacks, _, _ = host.agent()
    stacks.attach(PAYLOAD, LUN, soon())
    assert host.volumes() == {f"thunder-vol-{VOLUME}"}


def test_a_dead_parent_costs_a_path_not_the_attach(host: Host) -> None:
    host.initiator.unreachable.add("cmp2:3260")
    _, stacks, _, store = host.agent()
    assert stacks.attach(PAYLOAD, LUN, soon()).source == "stor1"
    host.app.base.sources.add_spares(IMAGE)
    assert [path.host for path in store.bases[IMAGE].paths] == ["stor1"]
    assert host.tracker.closed == ["cmp2"]


def test_an_admission_that_was_taken_back_is_asked_for_again(host: Host) -> None:
    host.tracker.passwords["cmp2"] = "old"
    host.initiator.revoked.add("old")
    _, stacks, _, store = host.agent()
    assert stacks.attach(PAYLOAD, LUN, soon()).source == "cmp2"
    host.app.base.sources.add_spares(IMAGE)
    assert [path.host for path in store.bases[IMAGE].paths] == ["cmp2", "stor1"]


def test_a_cache_that_an_attach_waited_for_was_there_when_it_was_answered(host: Host) -> None:
    _, stacks, _, store = host.agent()
    assert stacks.attach(PAYLOAD, LUN, soon()).mode == "cached"
    stack = store.stacks[VOLUME]
    assert 0 < stack.cached_at <= stack.attached_at


def direct_for_now(host: Host, stacks: Stacks, store: StateFile) -> str:
    """Attach a volume that gets a direct stack for now, and a cache later.

    :returns: the reason
    """
    answer = stacks.attach(PAYLOAD, LUN, soon())
    assert answer.mode == "direct"
    assert answer.path == f"/dev/mapper/thunder-vol-{VOLUME}"
    assert host.volumes() == {f"thunder-vol-{VOLUME}"}
    table = host.dm.table(f"thunder-vol-{VOLUME}")
    assert table is not None
    assert table.devices == (LUN,)
    stack = store.stacks[VOLUME]
    assert (stack.phase, stack.recache_pending, stack.base_image_id, stack.cached_at) == (
        READY,
        True,
        None,
        0,
    )
    assert host.app.stack.builder.candidates(()) == {VOLUME}
    return answer.reason


def gets_its_cache(host: Host, stacks: Stacks, store: StateFile) -> None:
    host.dm.held.add(f"thunder-vol-{VOLUME}")  # under its guest
    assert host.app.stack.builder.to_cached(VOLUME).mode == "cached"
    stack = store.stacks[VOLUME]
    assert (stack.recache_pending, stack.reason) == (False, "")
    assert stack.cached_at >= stack.attached_at > 0
    assert host.leftovers(store) == []
    assert host.disagreements(store) == set()


def test_without_any_replica_a_volume_is_direct_until_there_is_one(host: Host) -> None:
    host.initiator.unreachable |= {"cmp2:3260", "stor1:3260"}
    _, stacks, _, store = host.agent()
    reason = direct_for_now(host, stacks, store)
    assert reason.startswith(f"none of 2 replicas of image {IMAGE}")
    assert host.leftovers(store) == []
    assert store.bases == {}
    assert host.tracker.reports[-1].state == "gone"
    host.initiator.unreachable.clear()
    gets_its_cache(host, stacks, store)


def test_a_tracker_that_does_not_answer_costs_the_cache_for_a_while(host: Host) -> None:
    host.tracker.down = True
    _, stacks, _, store = host.agent()
    assert direct_for_now(host, stacks, store) == "thunder-tracker did not answer"
    host.tracker.down = False
    gets_its_cache(host, stacks, store)


def test_a_late_plan_is_dropped_and_its_base_is_kept(host: Host) -> None:
    """The volume may be written from the answer on: the map of that plan is old when it comes."""
    _, stacks, bases, store = host.agent()
    host.tracker.delay = 2.0
    began = time.monotonic()
    answer = stacks.attach(PAYLOAD, LUN, began + 0.8)
    assert time.monotonic() - began < 2.0  # it did not wait for the plan
    assert (answer.mode, answer.reason) == (
        "direct",
        "its plan and base were not there within 0.4 s",
    )
    host.tracker.delay = 0.0
    until = time.monotonic() + 10
    while not bases.is_ready(IMAGE):
        assert time.monotonic() < until
        time.sleep(0.01)
    assert host.volumes() == {f"thunder-vol-{VOLUME}"}
    assert store.stacks[VOLUME].mode == "direct"
    gets_its_cache(host, stacks, store)


def test_a_cache_that_cannot_be_built_is_left_out_for_now(host: Host) -> None:
    def fail(device: str, xml: str) -> None:
        raise errors.ProcessError(["cache_restore"], 1, "no memory")

    host.kit = dataclasses.replace(host.kit, restore_cache=fail)
    _, stacks, _, store = host.agent()
    assert "no memory" in direct_for_now(host, stacks, store)
    assert host.leftovers(store) == []
    host.kit = dataclasses.replace(host.kit, restore_cache=lambda device, xml: None)
    agent, stacks, _, store = host.agent()
    agent.reconcile()
    assert host.app.stack.builder.candidates(()) == {VOLUME}  # also after a restart
    gets_its_cache(host, stacks, store)


def test_a_detach_drops_what_is_still_being_prepared(host: Host) -> None:
    _, stacks, bases, store = host.agent()
    host.tracker.delay = 0.3
    stacks.attach(PAYLOAD, LUN, time.monotonic() + 0.2)
    stacks.detach(VOLUME)
    until = time.monotonic() + 10
    while not bases.is_ready(IMAGE):
        assert time.monotonic() < until
        time.sleep(0.01)
    assert store.stacks == {}
    assert host.volumes() == set()
    assert host.leftovers(store) == []


def test_while_a_volume_is_attached_nobody_else_gives_it_a_cache(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also before its own begins to be built: each would watch writes in the other's place."""
    _, stacks, _, store = host.agent()
    builder, others = host.app.stack.builder, []
    add = builder.add

    def added(user: Stack, plan: wire.Plan, seconds: float) -> None:
        others.append(builder.candidates({VOLUME}))
        add(user, plan, seconds)

    monkeypatch.setattr(builder, "add", added)
    assert stacks.attach(PAYLOAD, LUN, soon()).mode == "cached"
    assert others == [set()]
    assert store.stacks[VOLUME].mode == "cached"


def test_an_attach_that_comes_too_late_is_undone(host: Host) -> None:
    _, stacks, _, store = host.agent()
    with pytest.raises(errors.AgentUnavailable, match="too late"):
        stacks.attach(PAYLOAD, LUN, time.monotonic() - 1)
    assert host.tracker.reports == []  # nothing was begun
    host.dm.delay = 0.2
    with pytest.raises(errors.AgentUnavailable, match="too late"):
        stacks.attach(PAYLOAD, LUN, time.monotonic() + 0.1)
    assert host.volumes() == set()
    assert store.stacks == {}
    assert host.leftovers(store) == []


def _held_back(
    host: Host, monkeypatch: pytest.MonkeyPatch, error: Exception | None = None
) -> threading.Event:
    """Have the failover device of the volume created only after an event, or fail then."""
    create, goes_on = host.dm.create, threading.Event()

    def held_back(name: str, table: Any, readonly: bool = False) -> None:
        if name == f"thunder-failover-{VOLUME}":
            assert goes_on.wait(30)
            if error:
                raise error
        create(name, table, readonly)

    monkeypatch.setattr(host.dm, "create", held_back)
    return goes_on


def test_a_cache_that_takes_long_to_build_comes_later(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Answered in time, with a device of ours; what is written meanwhile is not read from it."""
    agent, stacks, bases, store = host.agent()
    bases.ensure(PLAN)
    goes_on = _held_back(host, monkeypatch)
    found = stacks.attach(PAYLOAD, LUN, time.monotonic() + 2)
    assert (found.mode, found.reason) == ("direct", stacks_module.NOT_BUILT)
    assert found.path == f"/dev/mapper/thunder-vol-{VOLUME}"
    assert store.stacks[VOLUME].recache_pending
    assert host.app.stack.builder.candidates(()) == set()  # nobody else builds it
    host.dm.write(f"thunder-vol-{VOLUME}", 0, 4096)
    goes_on.set()
    agent.stop()  # after what is being built
    assert store.stacks[VOLUME].mode == "cached"
    assert not store.stacks[VOLUME].recache_pending
    table = host.dm.table(f"thunder-vol-{VOLUME}")
    assert table is not None
    assert "failover" not in str(table.segments[0].target)  # it reads there what was written
    assert "failover" in str(table.segments[1].target)
    assert host.leftovers(store) == []


def test_a_cache_that_cannot_be_built_after_the_answer_comes_later(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    agent, stacks, bases, store = host.agent()
    bases.ensure(PLAN)
    create = host.dm.create
    goes_on = _held_back(host, monkeypatch, OSError("of an unknown kind"))
    assert stacks.attach(PAYLOAD, LUN, time.monotonic() + 1).mode == "direct"
    goes_on.set()
    agent.stop()
    stack = store.stacks[VOLUME]
    assert (stack.mode, stack.reason, stack.base_image_id) == ("direct", "of an unknown kind", None)
    assert host.app.stack.builder.candidates(()) == {VOLUME}
    assert host.volumes() == {f"thunder-vol-{VOLUME}"}
    assert host.leftovers(store) == []
    host.dm.create = create  # type: ignore[method-assign]
    assert host.app.stack.builder.to_cached(VOLUME).mode == "cached"


def test_a_volume_that_is_detached_while_its_cache_is_built_has_nothing_left(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    agent, stacks, bases, store = host.agent()
    bases.ensure(PLAN)
    ensure, goes_on = host.kit.failover.ensure, threading.Event()

    def slow() -> None:
        assert goes_on.wait(30)
        ensure()

    monkeypatch.setattr(host.kit.failover, "ensure", slow)
    assert stacks.attach(PAYLOAD, LUN, time.monotonic() + 1).mode == "direct"
    stacks.detach(VOLUME)
    goes_on.set()
    agent.stop()
    assert store.stacks == {}
    assert host.volumes() == set()
    assert host.leftovers(store) == []
    assert VOLUME not in host.tracker.stacks


def test_a_payload_of_another_version_is_refused(host: Host) -> None:
    _, stacks, _, store = host.agent()
    with pytest.raises(errors.UnknownVersion, match="has version 9, this host supports 1"):
        stacks.attach(dataclasses.replace(PAYLOAD, version=9), LUN, soon())
    assert store.stacks == {}


def test_releases_wait_for_the_tracker(host: Host) -> None:
    _, stacks, _, store = host.agent()
    stacks.attach(PAYLOAD, LUN, soon())
    host.tracker.down = True
    stacks.detach(VOLUME)
    assert store.releases == {VOLUME: "stor1@thunder"}
    with pytest.raises(errors.TrackerUnavailable):
        stacks.release_all()
    assert store.releases == {VOLUME: "stor1@thunder"}
    host.tracker.down = False
    stacks.release_all()
    assert host.tracker.released == [VOLUME]
    assert store.releases == {}


def test_a_late_release_leaves_the_next_stack_alone(host: Host) -> None:
    """Its row is the only guard where Cinder does not list the host."""
    _, stacks, _, store = host.agent()
    for _ in range(2):
        stacks.attach(PAYLOAD, LUN, soon())
        stacks.detach(VOLUME)
    stacks.attach(PAYLOAD, LUN, soon())
    _, stacks, _, store = host.agent()  # also after a restart
    assert host.tracker.stack_ids == {VOLUME: store.stacks[VOLUME].stack_id}
    stacks.release_all()
    assert host.tracker.released == [VOLUME] * 2  # one for each stack: any may be in the row
    assert host.tracker.stacks == {VOLUME}
    assert store.releases == {}
    stacks.detach(VOLUME)
    stacks.release_all()
    assert host.tracker.stacks == set()


@contextlib.contextmanager
def occupied(lock: Any) -> Iterator[None]:
    """Somebody else holds a lock while the body runs."""
    taken, done = threading.Event(), threading.Event()

    def hold() -> None:
        with lock:
            taken.set()
            done.wait(60)

    thread = threading.Thread(target=hold)
    thread.start()
    assert taken.wait(10)
    try:
        yield
    finally:
        done.set()
        thread.join(10)


def test_an_attach_does_not_wait_for_its_base_for_ever(host: Host) -> None:
    """Else the attaches of one image, behind a parent that hangs, would take all of the API."""
    _, stacks, bases, store = host.agent()
    stacks.attach(PAYLOAD, LUN, soon())
    stacks.detach(VOLUME)
    ensure = bases.ensure
    with contextlib.ExitStack() as busy:

        def ensure_and_lose(plan: wire.Plan, profiled_only: bool = False) -> Any:
            base = ensure(plan, profiled_only)
            # From here on another one changes the base: its sources hang.
            busy.enter_context(occupied(bases._availability.lock(IMAGE)))
            return base

        bases.ensure = ensure_and_lose  # type: ignore[method-assign]
        answer = stacks.attach(PAYLOAD, LUN, time.monotonic() + 6)
    assert answer.mode == "direct"
    assert "another operation on it has not ended in time" in answer.reason
    assert store.stacks[VOLUME].recache_pending
    assert host.app.stack.builder.to_cached(VOLUME).mode == "cached"


@pytest.mark.parametrize("verb", ["attach", "detach"])
def test_no_request_waits_for_its_volume_longer_than_its_caller(host: Host, verb: str) -> None:
    _, stacks, _, store = host.agent()
    stacks.attach(PAYLOAD, LUN, soon())
    before = set(host.dm.tables), dict(store.stacks)
    calls: dict[str, Callable[[float], Any]] = {
        "attach": lambda deadline: stacks.attach(PAYLOAD, LUN, deadline),
        "detach": lambda deadline: stacks.detach(VOLUME, deadline),
    }
    with (
        occupied(host.app.stack.stacks._registry.lock(VOLUME)),
        pytest.raises(errors.AgentUnavailable, match="volume vol-1: another operation"),
    ):
        calls[verb](time.monotonic() + 0.2)
    assert (set(host.dm.tables), dict(store.stacks)) == before


def test_a_detach_waits_for_no_tracker(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    """The release is told by a thread of its own, at once, not with the next heartbeat."""
    agent, stacks, _, store = host.agent(heartbeat_interval=600.0)
    stacks.attach(PAYLOAD, LUN, soon())
    told, answers = threading.Event(), threading.Event()
    release = host.tracker.release
    callers: list[str] = []

    def slow(volume_id: str, host_name: str, stack_id: str) -> None:
        callers.append(threading.current_thread().name)
        told.set()
        assert answers.wait(30)
        release(volume_id, host_name)

    monkeypatch.setattr(host.tracker, "release", slow)
    agent.start()
    try:
        detach = threading.Thread(target=agent.detach, args=(VOLUME, soon()))
        detach.start()
        detach.join(10)
        assert not detach.is_alive()
        assert told.wait(10)
        assert callers == ["reports"]
    finally:
        answers.set()
        agent.stop()
    assert host.tracker.released == [VOLUME]
    assert store.releases == {}


def test_a_tracker_that_is_down_costs_one_timeout_for_all_releases(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, stacks, _, store = host.agent()
    for number in range(3):
        store.put(Stack(f"vol-{number}", "stor1@thunder", LUN, mode="direct"))
        store.drop_stack(f"vol-{number}")
    tries: list[str] = []

    def down(volume_id: str, host_name: str, stack_id: str) -> None:
        tries.append(volume_id)
        raise errors.TrackerUnavailable("thunder-tracker did not answer")

    monkeypatch.setattr(host.tracker, "release", down)
    with pytest.raises(errors.TrackerUnavailable):
        stacks.release_all()
    assert len(tries) == 1


def test_a_detach_that_comes_too_late_spares_a_later_stack(host: Host) -> None:
    """The connector no longer waited, and took the devices down itself."""
    _, stacks, _, store = host.agent()
    stacks.attach(PAYLOAD, LUN, soon())
    devices_now = set(host.dm.tables)
    with pytest.raises(errors.AgentUnavailable, match="too late"):
        stacks.detach(VOLUME, time.monotonic() - 1)
    assert set(host.dm.tables) == devices_now
    assert store.stacks[VOLUME].phase == READY


def test_a_detach_that_comes_too_late_removes_what_the_connector_left(host: Host) -> None:
    _, stacks, _, store = host.agent()
    stacks.attach(PAYLOAD, LUN, soon())
    for name in devnames.VolumeNames(VOLUME).all:
        host.dm.remove(name)
    stacks.detach(VOLUME, time.monotonic() - 1)
    assert store.stacks == {}
    assert host.leftovers(store) == []


def test_a_complete_base_lets_go_of_its_replicas(host: Host) -> None:
    """What is above the loop device stays as it is: no read waits, and no readahead fails."""
    _, stacks, _, store = host.agent()
    stacks.attach(PAYLOAD, LUN, soon())
    before, begun = dict(host.dm.tables), len(host.dm.log)
    host.complete()
    assert host.initiator.logged_in == {}
    assert host.dm.log[begun:] == [f"wipe thunder-paths-{IMAGE}"]
    changed = {name for name in before if host.dm.tables[name] != before[name]}
    assert changed == {f"thunder-paths-{IMAGE}"}
    assert host.dm.suspended == set()
    assert host.leftovers(store) == []
    assert store.bases[IMAGE].paths == ()
    assert host.tracker.reports[-1].state == "complete"
    assert host.tracker.reports[-1].source is None


def test_a_base_in_use_is_not_removed_an_idle_one_is(host: Host) -> None:
    _, stacks, bases, store = host.agent()
    stacks.attach(PAYLOAD, LUN, soon())
    with pytest.raises(errors.DeviceBusy):
        bases.remove(IMAGE)
    stacks.detach(VOLUME)
    bases.remove(IMAGE)
    assert store.bases == {}
    assert host.leftovers(store) == []
    assert host.dm.thin_ids == {devnames.ZERO_ID}
    assert host.tracker.reports[-1].state == "gone"


@pytest.mark.parametrize("error", [errors.DeviceNotFound(LUN), OSError(5, "Input/output error")])
def test_a_lun_whose_disk_has_gone_keeps_none_from_the_others(
    host: Host, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    _, stacks, _, store = host.agent()
    host.blocks.sizes["/dev/sdc"] = GIB
    stacks.attach(PAYLOAD, LUN, soon())
    stacks.attach(wire.Payload("vol-2", IMAGE, "stor1@thunder"), "/dev/sdc", soon())
    size = host.blocks.size

    def gone(device: str) -> int:
        if device == LUN:
            raise error
        return size(device)

    monkeypatch.setattr(host.blocks, "size", gone)
    for volume in (VOLUME, "vol-2"):
        names = VolumeNames(volume)
        host.dm.failed[names.failover] = {devnames.path(names.cached)}
    host.app.failover.check(10)
    assert store.stacks["vol-2"].local_id is None
    assert store.stacks[VOLUME].local_id is not None
    monkeypatch.undo()
    host.app.failover.check(10)
    assert store.stacks[VOLUME].local_id is not None  # a while later
    host.app.stack.remover._clock = lambda: time.monotonic() + 5
    host.app.failover.check(10)
    assert store.stacks[VOLUME].local_id is None
    assert host.leftovers(store) == []


def test_a_cache_whose_removal_hangs_keeps_none_from_the_others(host: Host) -> None:
    _, stacks, _, store = host.agent()
    host.blocks.sizes["/dev/sdc"] = GIB
    stacks.attach(PAYLOAD, LUN, soon())
    stacks.attach(wire.Payload("vol-2", IMAGE, "stor1@thunder"), "/dev/sdc", soon())
    for volume in (VOLUME, "vol-2"):
        names = VolumeNames(volume)
        host.dm.failed[names.failover] = {devnames.path(names.cached)}
    reload, goes_on = host.dm.reload, threading.Event()

    def hang(name: str, table: Table, readonly: bool = False) -> None:
        if name == VolumeNames(VOLUME).vol:
            assert goes_on.wait(30)
        reload(name, table, readonly)

    host.dm.reload = hang  # type: ignore[method-assign]
    host.app.failover.check(0.5)
    assert store.stacks["vol-2"].local_id is None
    assert store.stacks[VOLUME].local_id is not None
    goes_on.set()
    host.app.failover.check(10)
    assert store.stacks[VOLUME].local_id is None
    assert host.leftovers(store) == []


def test_what_the_watcher_has_made_direct_is_direct_in_the_state(host: Host) -> None:
    """It swaps the table of the volume's own device, and nothing else."""
    _, stacks, _, store = host.agent()
    stacks.attach(PAYLOAD, LUN, soon())
    host.app.failover.check(10)
    assert store.stacks[VOLUME].mode == "cached"
    names = VolumeNames(VOLUME)
    host.dm.reload(names.vol, layout.vol_table(names, LUN, Extents(), GIB))
    host.app.failover.check(10)
    assert (store.stacks[VOLUME].mode, store.stacks[VOLUME].local_id) == ("direct", None)
    assert host.volumes() == {names.vol}
    assert host.leftovers(store) == []


def test_a_volume_that_is_attached_again_has_the_lun_that_was_passed(host: Host) -> None:
    """As when its session was lost and made anew while something had it open."""
    _, stacks, _, store = host.agent()
    for plan in (PLAN, wire.Plan(VOLUME, "direct", "attached on cmp9 too")):
        host.dm.held.discard(f"thunder-vol-{VOLUME}")
        host.tracker.plan = plan
        stacks.attach(PAYLOAD, LUN, soon())
        host.dm.held.add(f"thunder-vol-{VOLUME}")
        host.blocks.sizes["/dev/sdz"] = GIB
        assert stacks.attach(PAYLOAD, "/dev/sdz", soon()).mode == "direct"
        assert store.stacks[VOLUME].device == "/dev/sdz"
        table = host.dm.table(f"thunder-vol-{VOLUME}")
        assert table is not None
        assert table.devices == ("/dev/sdz",)
    del host.blocks.sizes["/dev/sdz"]
    with pytest.raises((errors.ThunderError, KeyError)):
        stacks.attach(PAYLOAD, "/dev/sdz", soon())


def test_without_a_watcher_a_volume_is_direct(host: Host) -> None:
    host.kit.failover.absent = True  # type: ignore[attr-defined]
    _, stacks, _, store = host.agent()
    assert "watcher has ended" in direct_for_now(host, stacks, store)
    assert host.leftovers(store) == []
    host.kit.failover.absent = False  # type: ignore[attr-defined]
    gets_its_cache(host, stacks, store)


def older(host: Host, paths: tuple[str, ...]) -> None:
    """Have the volume's own device be what an older agent built."""
    names = VolumeNames(VOLUME)
    table, readonly = host.dm.tables[names.vol]
    old = Table.of((table.length, dmtable.Multipath(paths)))
    host.dm.tables[names.vol] = (old, readonly)
    host.dm.remove(names.failover)
    host.dm.held.add(names.vol)


def test_a_volume_of_an_older_agent_leaves_its_cache_and_is_detached(host: Host) -> None:
    agent, stacks, _, store = host.agent()
    stacks.attach(PAYLOAD, LUN, soon())
    names = VolumeNames(VOLUME)
    older(host, (devnames.path(names.cached), LUN))
    agent.reconcile()
    host.app.failover.check(10)
    assert store.stacks[VOLUME].mode == "cached"
    assert host.app.stack.remover.leave_cache(VOLUME, "low")
    assert host.dm.failed[names.vol] == {devnames.path(names.cached)}
    host.app.failover.check(10)
    assert store.stacks[VOLUME].mode == "direct"
    table = host.dm.table(names.vol)
    assert table == Table.of((GIB // 512, dmtable.Multipath((LUN,))))
    host.dm.held.discard(names.vol)
    stacks.detach(VOLUME)
    assert host.volumes() == set()
    assert host.leftovers(store) == []


def test_a_volume_of_an_older_agent_is_extended_without_its_cache(host: Host) -> None:
    """Its cached path may have failed, and a new table would not know."""
    _, stacks, _, store = host.agent()
    stacks.attach(PAYLOAD, LUN, soon())
    older(host, (devnames.path(VolumeNames(VOLUME).cached), LUN))
    host.blocks.sizes[LUN] = 2 * GIB
    assert stacks.extend(VOLUME).mode == "direct"
    table = host.dm.table(VolumeNames(VOLUME).vol)
    assert table == Table.of((2 * GIB // 512, dmtable.Multipath((LUN,))))
    assert host.leftovers(store) == []


def test_extend_follows_the_lun(host: Host) -> None:
    _, stacks, _, _ = host.agent()
    stacks.attach(PAYLOAD, LUN, soon())
    host.blocks.sizes[LUN] = 2 * GIB
    host.dm.log.clear()
    assert stacks.extend(VOLUME).mode == "cached"
    table = host.dm.table(f"thunder-vol-{VOLUME}")
    assert table is not None
    assert table.length * 512 == 2 * GIB
    assert host.dm.log == [f"reload thunder-vol-{VOLUME}"]
    with pytest.raises(errors.InvalidRequest, match="no stack"):
        stacks.extend("other")


@pytest.mark.parametrize("meanwhile", [False, True])
def test_extend_does_not_bring_back_a_cache_that_was_left(host: Host, meanwhile: bool) -> None:
    """A new table has no failed paths, and the cache lacks what was written past it."""
    _, stacks, _, store = host.agent()
    stacks.attach(PAYLOAD, LUN, soon())
    names = VolumeNames(VOLUME)
    host.dm.held.add(names.vol)
    host.blocks.sizes[LUN] = 2 * GIB
    reload = host.dm.reload

    def leave_meanwhile(name: str, table: Table, readonly: bool = False) -> None:
        assert host.app.stack.remover.leave_cache(VOLUME, "low")
        reload(name, table, readonly)

    if meanwhile:
        host.dm.reload = leave_meanwhile  # type: ignore[method-assign]
    else:
        assert host.app.stack.remover.leave_cache(VOLUME, "low")
    mode = stacks.extend(VOLUME).mode
    assert f"reload {names.failover}" not in host.dm.log
    if meanwhile:
        assert host.dm.failed[names.failover] == {devnames.path(names.cached)}
        host.dm.reload = reload  # type: ignore[method-assign]
        host.app.failover.check(10)
    else:
        assert mode == "direct"
    assert (store.stacks[VOLUME].mode, store.stacks[VOLUME].reason) == ("direct", "low")
    table = host.dm.table(names.vol)
    assert table is not None
    assert (table.devices, table.length * 512) == ((LUN,), 2 * GIB)
    assert host.dm.suspended == set()
    assert host.volumes() == {names.vol}


def swapped_meanwhile(host: Host) -> list[str]:
    """Have the watcher swap a volume's table right after the next reload, for one of the length
    that the volume had.

    :returns: gets the device's name when that has happened
    """
    reload = host.dm.reload
    swapped: list[str] = []

    def swap(name: str, table: Table, readonly: bool = False) -> None:
        reload(name, table, readonly)
        if not swapped:
            swapped.append(name)
            reload(name, layout.vol_table(VolumeNames(VOLUME), LUN, Extents(), GIB))

    host.dm.reload = swap  # type: ignore[method-assign]
    return swapped


def test_extend_tries_again_if_the_watcher_swaps_the_table_meanwhile(host: Host) -> None:
    _, stacks, _, _ = host.agent()
    stacks.attach(PAYLOAD, LUN, soon())
    names, swapped = VolumeNames(VOLUME), swapped_meanwhile(host)
    host.blocks.sizes[LUN] = 2 * GIB
    stacks.extend(VOLUME)
    table = host.dm.table(names.vol)
    assert table is not None
    assert table.length * 512 == 2 * GIB
    assert swapped == [names.vol]


def test_a_volume_leaves_its_cache_even_while_it_is_suspended(host: Host) -> None:
    _, stacks, _, _ = host.agent()
    stacks.attach(PAYLOAD, LUN, soon())
    host.dm.suspend(f"thunder-vol-{VOLUME}")
    assert host.app.stack.remover.leave_cache(VOLUME, "low")


def test_a_second_host_opens_a_base_here(host: Host) -> None:
    _, stacks, _, _ = host.agent()
    with pytest.raises(errors.NoReplica):
        host.app.base.exports.open(IMAGE, "iqn.x:cmp3", 0.0)
    stacks.attach(PAYLOAD, LUN, soon())
    export = host.app.base.exports.open(IMAGE, "iqn.x:cmp3", 0.0)
    assert export.iqn in host.targets.exported
    assert host.app.base.exports.open(IMAGE, "iqn.x:cmp3", 0.0) == export
    assert host.app.base.exports.open(IMAGE, "iqn.x:cmp4", 0.0).password != export.password
    host.app.base.exports.close(IMAGE, "iqn.x:cmp3")
    assert [i for _, i in host.targets.admitted] == ["iqn.x:cmp4"]


def _attach_and_detach(host: Host) -> None:
    stacks, bases = host.app.stack.stacks, host.app.base.bases
    stacks.attach(PAYLOAD, LUN, soon())
    host.complete()
    stacks.detach(VOLUME)
    stacks.release_all()  # as the heartbeat does
    bases.remove(IMAGE)


def _count(folder: Path) -> int:
    host, tripwire = Host(folder), Tripwire()
    host.agent(tripwire)
    _attach_and_detach(host)
    return len(tripwire.steps)


def test_whatever_fails_while_attaching_nothing_is_left(tmp_path: Path) -> None:
    (tmp_path / "count").mkdir()
    host, tripwire = Host(tmp_path / "count"), Tripwire()
    host.agent(tripwire)[1].attach(PAYLOAD, LUN, soon())
    steps = len(tripwire.steps)
    assert steps > 20
    served = 0
    for at in range(steps):
        folder = tmp_path / str(at)
        folder.mkdir()
        host, tripwire = Host(folder), Tripwire()
        tripwire.at, tripwire.error = at, lambda: errors.ThunderError("injected")
        _, stacks, _, _ = host.agent(tripwire)
        try:
            stacks.attach(PAYLOAD, LUN, soon())
        except errors.ThunderError:
            after = StateFile(host.file)
            assert host.volumes() == set(), tripwire.steps[at]
            assert after.stacks == {} or tripwire.steps[at] == "state.save"
        else:
            served += 1
        agent, stacks, _, store = host.agent()
        agent.reconcile()
        host.catch_up()
        if tripwire.steps[at] == "tracker.close_export":  # not told again: it may never be back
            host.tracker.admitted.clear()
        for volume_id in host.app.stack.builder.candidates(()):
            host.app.stack.builder.to_cached(volume_id)
        assert host.leftovers(store) == [], (at, tripwire.steps[at])
        assert host.disagreements(store) == set(), (at, tripwire.steps[at])
        assert stacks.attach(PAYLOAD, LUN, soon()).mode == "cached"  # and it works the next time
    assert served > steps / 2, served  # most of what fails costs the cache alone


def test_wherever_the_agent_dies_a_restart_converges(tmp_path: Path) -> None:
    (tmp_path / "count").mkdir()
    steps = _count(tmp_path / "count")
    assert steps > 40
    for at in range(steps):
        folder = tmp_path / str(at)
        folder.mkdir()
        host, tripwire = Host(folder), Tripwire()
        tripwire.at = at
        host.agent(tripwire)
        with pytest.raises(Crash):
            _attach_and_detach(host)
        agent, stacks, _, store = host.agent()
        agent.reconcile()
        host.catch_up()
        where = (at, tripwire.steps[at])
        assert host.leftovers(store) == [], where
        assert host.disagreements(store) == set(), where
        assert all(stack.phase == READY for stack in store.stacks.values()), where
        assert all(base.phase == READY for base in store.bases.values()), where
        stacks.attach(PAYLOAD, LUN, soon())
        _attach_and_detach(host)
        assert store.bases == {}, where
        assert host.leftovers(store) == [], where
        assert host.disagreements(store) == set(), where
        assert host.dm.thin_ids == {devnames.ZERO_ID}, where
        assert host.dm.suspended == set(), where


@pytest.mark.parametrize("reboots", [False, True])
def test_wherever_a_restart_dies_the_next_one_converges(tmp_path: Path, reboots: bool) -> None:
    """Twice in a row: dead while attaching or detaching, then dead while it sets that right."""
    (tmp_path / "count").mkdir()
    died = set()
    for at in range(0, _count(tmp_path / "count"), 4):
        for again in range(at // 4 % 3, 30, 3):
            folder = tmp_path / f"{at}-{again}"
            folder.mkdir()
            host, tripwire = Host(folder), Tripwire()
            tripwire.at = at
            host.agent(tripwire)
            with pytest.raises(Crash):
                _attach_and_detach(host)
            if reboots:
                _reboot(host)
            second = Tripwire()
            second.at = again
            try:
                agent, *_ = host.agent(second)
                agent.reconcile()
                host.catch_up()
                break  # it has fewer steps than that
            except Crash:
                died.add(second.steps[-1])
            agent, _, _, store = host.agent()
            agent.reconcile()
            host.catch_up()
            where = (tripwire.steps[-1], second.steps[-1])
            assert host.leftovers(store) == [], where
            assert host.disagreements(store) == set(), where
            assert all(e.phase == READY for e in store.stacks.values()), where
            assert all(e.phase == READY for e in store.bases.values()), where
            _attach_and_detach(host)
            assert host.leftovers(store) == [], where
            assert host.disagreements(store) == set(), where
            assert host.dm.thin_ids == {devnames.ZERO_ID}, where
    assert len(died) > 10, died


def test_after_a_reboot_a_complete_base_is_back_without_any_replica(host: Host) -> None:
    _, stacks, _, _ = host.agent()
    stacks.attach(PAYLOAD, LUN, soon())
    host.complete()
    _reboot(host)
    host.tracker.down = True
    agent, _, _, store = host.agent()
    agent.reconcile()
    assert store.stacks == {}  # the guest went too; its volume is attached anew
    assert f"thunder-export-{IMAGE}" in host.dm.tables
    assert host.initiator.logged_in == {}
    assert host.leftovers(store) == []


def test_after_a_reboot_a_filling_base_asks_for_its_replicas_again(host: Host) -> None:
    _, stacks, _, _ = host.agent()
    stacks.attach(PAYLOAD, LUN, soon())
    _reboot(host)
    agent, _, _, store = host.agent()
    agent.reconcile()
    assert f"thunder-base-{IMAGE}" not in host.dm.tables
    host.catch_up()
    assert f"thunder-base-{IMAGE}" in host.dm.tables
    assert len(host.initiator.logged_in) == 2
    assert host.leftovers(store) == []


def test_after_a_reboot_nothing_is_made_up_while_no_replica_is_found(host: Host) -> None:
    """An incomplete base over nothing would read as zeroes: wrong bytes."""
    _, stacks, _, _ = host.agent()
    stacks.attach(PAYLOAD, LUN, soon())
    _reboot(host)
    host.tracker.plan = wire.Plan("", "direct", "no storage host is alive")
    agent, stacks, bases, store = host.agent()
    agent.reconcile()
    with pytest.raises(errors.NoReplica):
        bases.finish(store.bases[IMAGE])
    with pytest.raises(errors.NoReplica):  # nor is it given to others
        host.app.base.exports.open(IMAGE, "iqn.x:cmp3", 0.0)
    assert f"thunder-base-{IMAGE}" not in host.dm.tables
    assert host.leftovers(store) == []
    host.tracker.plan = PLAN
    stacks.attach(PAYLOAD, LUN, soon())  # the next attach brings its sources along
    assert f"thunder-base-{IMAGE}" in host.dm.tables
    assert len(store.bases) == 1
    assert bases.unfinished() == []
    assert len(host.initiator.logged_in) == 1
    assert host.app.base.exports.open(IMAGE, "iqn.x:cmp3", 0.0).iqn in host.targets.exported


def _reboot(host: Host) -> None:
    """The kernel keeps only what is on disk: the pool and its thin devices."""
    pool = {devnames.POOL, devnames.POOL_DATA, devnames.POOL_METADATA, devnames.ZERO}
    host.dm.tables = {n: t for n, t in host.dm.tables.items() if n in pool}
    host.dm.held.clear()
    host.loops.loops.clear()
    host.initiator.logged_in.clear()
    host.targets.exported.clear()
    host.targets.admitted.clear()


def test_a_state_file_that_cannot_be_read_stops_the_agent(tmp_path: Path) -> None:
    file = tmp_path / "state.json"
    file.write_text('{"version": 7}')
    with pytest.raises(errors.StateError, match="version 7, this agent supports 1"):
        StateFile(file)
    assert file.read_text() == '{"version": 7}'


def test_the_status_says_how_long_readers_have_to_leave(host: Host) -> None:
    """Whoever evicts a base waits for as long."""
    agent, *_ = host.agent(drain_timeout=75.0)
    assert agent.status()["drain_timeout"] == 75.0
