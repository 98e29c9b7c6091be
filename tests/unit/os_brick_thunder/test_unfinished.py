"""What fails is remembered and finished later; it stops nothing else meanwhile."""

from __future__ import annotations

import contextlib
import dataclasses
import threading
import time
from pathlib import Path

import pytest

from os_brick_thunder.agent.heartbeat import Heartbeat
from os_brick_thunder.agent.reaper import Reaper
from os_brick_thunder.agent.reporter import AGAIN
from os_brick_thunder.agent.stack import stacks as stacks_module
from os_brick_thunder.common import errors, wire
from os_brick_thunder.common.policy import devnames
from os_brick_thunder.common.policy.dmtable import Table
from os_brick_thunder.common.policy.extents import Extents
from os_brick_thunder.common.state import READY, REMOVING
from tests.unit.os_brick_thunder.test_agent import (
    GIB,
    IMAGE,
    LUN,
    MIB,
    PAYLOAD,
    PLAN,
    SOURCES,
    VOLUME,
    Host,
    _reboot,
    soon,
)

VOL, BASE = f"thunder-vol-{VOLUME}", f"thunder-base-{IMAGE}"
OTHER = "img-2"


@pytest.fixture
def host(tmp_path: Path) -> Host:
    return Host(tmp_path)


def second_image(host: Host) -> None:
    """A volume of another image, which is complete."""
    assert PLAN.image is not None
    image = dataclasses.replace(PLAN.image, id=OTHER)
    host.tracker.plan = dataclasses.replace(PLAN, volume_id="vol-2", image=image)
    host.blocks.sizes["/dev/sdc"] = GIB
    payload = wire.Payload("vol-2", OTHER, "stor1@thunder")
    host.app.stack.stacks.attach(payload, "/dev/sdc", soon())
    base = host.store.bases[OTHER]
    host.fill(base)
    host.app.base.completion.complete(base)


# -- one base of an image is not the next ----------------------------------------------------


def test_the_next_base_of_an_image_is_not_taken_for_the_one_that_was_filled(host: Host) -> None:
    _, stacks, bases, store = host.agent()
    stacks.attach(PAYLOAD, LUN, soon())
    old = store.bases[IMAGE]
    host.fill(old)  # its last piece is written; before complete() it is evicted, and built anew
    stacks.detach(VOLUME)
    bases.evict(IMAGE)
    stacks.attach(PAYLOAD, LUN, soon())
    before = len(host.tracker.reports)
    host.app.base.completion.complete(old)
    assert store.bases[IMAGE].thin_id != old.thin_id
    assert not store.bases[IMAGE].complete
    assert len(host.initiator.logged_in) == 1
    assert "complete" not in [report.state for report in host.tracker.reports[before:]]


def test_a_base_is_complete_only_if_the_pool_says_so(host: Host) -> None:
    _, stacks, _, store = host.agent()
    stacks.attach(PAYLOAD, LUN, soon())
    base = store.bases[IMAGE]
    metadata = host.kit.metadata
    metadata.filled[base.thin_id] = Extents.of([(0, 50 * MIB)])  # type: ignore[attr-defined]
    with pytest.raises(errors.PoolError, match="lacks blocks"):
        host.app.base.completion.complete(base)
    assert not store.bases[IMAGE].complete
    assert len(host.initiator.logged_in) == 1
    host.complete()
    assert store.bases[IMAGE].complete


def test_a_complete_base_whose_blocks_were_lost_is_filled_again(host: Host) -> None:
    _, stacks, _, _ = host.agent()
    stacks.attach(PAYLOAD, LUN, soon())
    host.complete()
    _reboot(host)
    host.kit.metadata.filled.clear()  # type: ignore[attr-defined]
    agent, _, _, store = host.agent()
    agent.reconcile()
    assert not store.bases[IMAGE].complete
    assert BASE not in host.dm.tables
    host.catch_up()
    assert len(host.initiator.logged_in) == 2
    assert BASE in host.dm.tables


def test_a_base_that_the_power_failure_took_is_forgotten(host: Host) -> None:
    """Its thin id was not committed to the pool's metadata: it could never be restored."""
    _, stacks, _, _ = host.agent()
    stacks.attach(PAYLOAD, LUN, soon())
    _reboot(host)
    host.dm.thin_ids = {devnames.ZERO_ID}
    agent, stacks, _, store = host.agent()
    agent.reconcile()
    host.catch_up()
    assert store.bases == {}
    assert host.tracker.locations == set()
    assert stacks.attach(PAYLOAD, LUN, soon()).mode == "cached"
    assert host.leftovers(store) == []


def test_an_eviction_that_waits_leaves_the_next_base_alone(host: Host) -> None:
    _, stacks, bases, store = host.agent()
    stacks.attach(PAYLOAD, LUN, soon())
    stacks.detach(VOLUME)
    drain = host.app.base.exports.drain

    def meanwhile(base: object) -> None:
        host.app.base.exports.drain = drain  # type: ignore[method-assign]
        bases.evict(IMAGE)
        bases.ensure(PLAN)
        assert bases.is_ready(IMAGE)

    host.app.base.exports.drain = meanwhile  # type: ignore[method-assign]
    bases.evict(IMAGE)
    assert bases.is_ready(IMAGE)
    assert store.bases[IMAGE].phase == READY


# -- detaching from sources ------------------------------------------------------------------


def test_a_volume_that_hangs_does_not_keep_a_base_from_being_complete(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, stacks, _, store = host.agent()
    stacks.attach(PAYLOAD, LUN, soon())

    def hangs(name: str) -> None:
        raise errors.ProcessTimeout(["dmsetup", "suspend", name], -9, "killed after 60 s")

    monkeypatch.setattr(host.dm, "suspend", hangs)
    host.complete()
    assert store.bases[IMAGE].complete
    assert (host.initiator.logged_in, store.bases[IMAGE].paths) == ({}, ())


def test_sources_that_are_still_read_are_detached_later(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os_brick_thunder.agent.base.devices._LAST_READS", 0.1)
    _, stacks, bases, store = host.agent()
    stacks.attach(PAYLOAD, LUN, soon())
    host.app.base.sources.add_spares(IMAGE)
    loop = list(host.loops.loops)[-1]
    host.blocks.reading[loop] = 1
    host.complete()
    assert (host.tracker.reports[-1].state, host.tracker.reports[-1].source) == ("complete", None)
    assert len(host.initiator.logged_in) == 2
    assert [base.image_id for base in bases.unfinished()] == [IMAGE]
    host.blocks.reading.clear()
    host.catch_up()
    assert host.initiator.logged_in == {}
    assert store.bases[IMAGE].paths == ()
    assert bases.unfinished() == []
    assert host.tracker.admitted == set()


# -- the start -------------------------------------------------------------------------------


def test_a_base_that_cannot_be_restored_stops_neither_the_agent_nor_other_bases(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, stacks, _, _ = host.agent()
    stacks.attach(PAYLOAD, LUN, soon())
    host.complete()
    second_image(host)
    _reboot(host)
    create = host.dm.create

    def fails(name: str, table: Table, readonly: bool = False) -> None:
        if name == BASE:
            raise errors.ProcessError(["dmsetup", "create", name], 1, "busy")
        create(name, table, readonly)

    with monkeypatch.context() as patched:
        patched.setattr(host.dm, "create", fails)
        agent, _, bases, store = host.agent()
        agent.reconcile()
    assert (bases.is_ready(OTHER), bases.is_ready(IMAGE)) == (True, False)
    host.catch_up()
    assert bases.is_ready(IMAGE)
    assert host.leftovers(store) == []
    assert bases.unfinished() == []


@pytest.mark.parametrize("what", ["targets.unexport", "dm.resume", "initiator.logout"])
def test_what_cannot_be_swept_does_not_stop_the_agent(
    host: Host, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    host.agent()[1].attach(PAYLOAD, LUN, soon())
    host.file.unlink()  # all of it belongs to nothing
    host.dm.suspended.add(VOL)

    def fails(*args: object) -> None:
        raise errors.ProcessTimeout([what], -9, "killed after 60 s")

    port, method = what.split(".")
    monkeypatch.setattr(getattr(host.kit, port), method, fails)
    agent, *_ = host.agent()
    agent.reconcile()
    assert VOL not in host.dm.tables
    assert f"thunder-cached-{VOLUME}" not in host.dm.tables


def test_a_base_that_cannot_be_reported_does_not_keep_the_others_from_it(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    host.agent()[1].attach(PAYLOAD, LUN, soon())
    second_image(host)
    report = host.tracker.report

    def refuse(said: wire.LocationReport) -> None:
        if said.image_id == IMAGE:
            raise errors.ThunderError("DBError")
        report(said)

    monkeypatch.setattr(host.tracker, "report", refuse)
    monkeypatch.setattr("os_brick_thunder.agent.reporter.AGAIN", 0.0)
    before = len(host.tracker.reports)
    host.app.heartbeat.catch_up()
    found = [(report.image_id, report.state) for report in host.tracker.reports[before:]]
    assert found == [(OTHER, "complete")]


def test_a_heartbeat_does_not_read_the_pools_metadata(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that hangs would have this host taken for dead."""
    _, stacks, _, store = host.agent()
    stacks.attach(PAYLOAD, LUN, soon())
    host.dm.mapped[store.bases[IMAGE].thin_id] = 50 * MIB

    def hangs(thin_id: int) -> Extents:
        raise AssertionError("thin_dump was started")

    monkeypatch.setattr(host.kit.metadata, "mapped", hangs)
    host.app.heartbeat.catch_up()
    assert host.tracker.reports[-1].filled == 50 * MIB


def test_heartbeats_wait_for_nothing_else_that_trackers_are_told(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tracker that is busy takes its time for each of many releases."""
    _, stacks, _, _ = host.agent()
    stacks.attach(PAYLOAD, LUN, soon())
    beats, go_on = [], threading.Event()
    beat, release = host.tracker.heartbeat, host.tracker.release

    def heartbeat(topology: wire.Topology) -> wire.Orders:
        beats.append(time.monotonic())
        return beat(topology)

    def slow(*args: str) -> None:
        go_on.wait(10)
        release(*args)

    monkeypatch.setattr(host.tracker, "heartbeat", heartbeat)
    monkeypatch.setattr(host.tracker, "release", slow)
    stacks.detach(VOLUME)
    beating = Heartbeat(host.app.heartbeat._host, 0.02, lambda orders: None, stacks.release_all, ())
    beating.start()
    until = time.monotonic() + 10
    while len(beats) < 5:
        assert time.monotonic() < until
        time.sleep(0.01)
    assert host.tracker.stacks == {VOLUME}  # none was released yet
    go_on.set()
    while host.tracker.stacks:
        assert time.monotonic() < until
        time.sleep(0.01)
    beating.stop()


def test_a_base_that_is_being_built_keeps_no_other_from_being_withdrawn(host: Host) -> None:
    """It may wait for other hosts, and is withdrawn the next time."""
    _, _, bases, _ = host.agent()
    assert PLAN.image is not None
    for image_id in (IMAGE, OTHER):
        bases.ensure(dataclasses.replace(PLAN, image=dataclasses.replace(PLAN.image, id=image_id)))
    host.tracker.down = True
    for image_id in (IMAGE, OTHER):
        bases.remove(image_id)
    host.tracker.down = False
    before, building, go_on = len(host.tracker.reports), threading.Event(), threading.Event()

    def build() -> None:
        with host.app.base.bases._availability.lock(IMAGE):
            building.set()
            go_on.wait(10)

    thread = threading.Thread(target=build)
    thread.start()
    building.wait(10)
    host.app.heartbeat.catch_up()
    found = [(report.image_id, report.state) for report in host.tracker.reports[before:]]
    assert found == [(OTHER, "gone")]
    go_on.set()
    thread.join()
    host.app.heartbeat.catch_up()
    assert (host.tracker.reports[-1].image_id, host.tracker.reports[-1].state) == (IMAGE, "gone")


# -- removals --------------------------------------------------------------------------------


def test_a_failed_attach_keeps_its_entry_while_something_of_it_is_left(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, stacks, _, store = host.agent()
    create = host.dm.create

    def killed(name: str, table: Table, readonly: bool = False) -> None:
        create(name, table, readonly)
        if name == VOL:
            raise errors.ProcessTimeout(["dmsetup", "create", name], -9, "killed after 60 s")

    host.dm.held.add(VOL)  # by a probe
    with monkeypatch.context() as patched:
        patched.setattr(host.dm, "create", killed)
        with pytest.raises(errors.ProcessTimeout):
            stacks.attach(PAYLOAD, LUN, soon())
    assert store.stacks[VOLUME].phase == REMOVING
    assert host.leftovers(store) == []
    with pytest.raises(errors.UndoFailed):  # it is not handed out: it is to be removed
        stacks.attach(PAYLOAD, LUN, soon())
    host.dm.held.discard(VOL)
    host.catch_up()
    assert store.stacks == {}
    assert host.volumes() == set()
    assert stacks.attach(PAYLOAD, LUN, soon()).mode == "cached"


def test_a_failed_base_keeps_its_entry_while_something_of_it_is_left(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, _, bases, store = host.agent()

    def killed(device: str, iqn: str, portal: str) -> None:
        raise errors.ExportError("no memory")

    host.dm.held.add(BASE)
    with monkeypatch.context() as patched:
        patched.setattr(host.targets, "export", killed)
        with pytest.raises(errors.ExportError):
            bases.ensure(PLAN)
    assert store.bases[IMAGE].phase == REMOVING
    assert host.leftovers(store) == []
    host.dm.held.discard(BASE)
    host.catch_up()
    assert store.bases == {}
    assert host.dm.thin_ids == {devnames.ZERO_ID}
    assert host.leftovers(store) == []
    assert host.tracker.locations == set()


def test_a_removal_that_failed_is_tried_again_with_pauses(host: Host) -> None:
    _, stacks, _, store = host.agent()
    now = [1000.0]
    reaper = Reaper(host.app.base.bases, stacks, clock=lambda: now[0])
    stacks.attach(PAYLOAD, LUN, soon())
    host.dm.held.add(f"thunder-local-{VOLUME}")
    with pytest.raises(errors.UndoFailed):
        stacks.detach(VOLUME)
    assert store.stacks[VOLUME].phase == REMOVING
    reaper.check()
    reaper._jobs.join(10)
    host.dm.held.clear()
    reaper.check()  # too early
    reaper._jobs.join(10)
    assert store.stacks[VOLUME].phase == REMOVING
    now[0] += 5
    reaper.check()
    reaper._jobs.join(10)
    assert store.stacks == {}
    assert host.leftovers(store) == []


def test_one_removal_that_hangs_does_not_hold_up_the_others(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, stacks, _, store = host.agent()
    reaper = Reaper(host.app.base.bases, stacks)
    hangs, remove = threading.Event(), host.dm.remove

    def slow(name: str) -> None:
        if name == VOL:
            assert hangs.wait(30)
        remove(name)

    for number in (1, 2, 3):
        host.blocks.sizes[f"/dev/sd{number}"] = GIB
        payload = wire.Payload(f"vol-{number}", IMAGE, "stor1@thunder")
        stacks.attach(payload, f"/dev/sd{number}", soon())
        store.put(dataclasses.replace(store.stacks[f"vol-{number}"], phase=REMOVING))
    monkeypatch.setattr(host.dm, "remove", slow)
    reaper.check()
    for thread in list(reaper._jobs._busy.values()):
        thread.join(1)
    assert set(store.stacks) == {VOLUME}
    hangs.set()
    reaper._jobs.join(10)
    assert store.stacks == {}


def test_a_device_that_is_open_for_a_moment_can_be_detached(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os_brick_thunder.agent.stack.devices.PROBE", 10.0)
    _, stacks, _, store = host.agent()
    stacks.attach(PAYLOAD, LUN, soon())
    host.dm.held.add(VOL)
    scan = threading.Timer(0.3, host.dm.held.clear)
    scan.start()
    stacks.detach(VOLUME)
    scan.join()
    assert store.stacks == {}


# -- orders ----------------------------------------------------------------------------------


def test_a_volume_that_cinder_no_longer_has_here_is_dropped(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, stacks, _, store = host.agent()
    stacks.attach(PAYLOAD, LUN, soon())
    stacks.drop(VOLUME)  # the order is older than this attach
    assert set(store.stacks) == {VOLUME}
    monkeypatch.setattr(stacks_module, "_JUST_NOW", -1.0)
    host.dm.held.add(VOL)
    with pytest.raises(errors.DeviceBusy):
        stacks.drop(VOLUME)
    assert store.stacks[VOLUME].phase == READY
    host.dm.held.clear()
    host.tracker.stacks.add("vol-unknown")
    host.tracker.orders = wire.Orders(drop=(VOLUME, "vol-unknown"))
    host.app.heartbeat.beat()
    host.app.reaper._jobs.join(10)
    assert store.stacks == {}
    assert host.volumes() == set()
    assert "vol-unknown" not in host.tracker.stacks


def test_a_volume_that_is_attached_while_it_is_to_be_dropped_stays(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its device has been handed out, and nobody has opened it yet."""
    _, stacks, _, store = host.agent()
    stacks.attach(PAYLOAD, LUN, soon())
    store.put(dataclasses.replace(store.stacks[VOLUME], attached_at=1.0))
    detach, attached = stacks.detach, threading.Event()

    def attach() -> None:
        stacks.attach(PAYLOAD, LUN, soon())
        attached.set()

    def at_the_same_time(volume_id: str) -> None:
        threading.Thread(target=attach).start()
        attached.wait(0.5)
        detach(volume_id)

    monkeypatch.setattr(stacks, "detach", at_the_same_time)
    stacks.drop(VOLUME)
    assert attached.wait(10)
    assert store.stacks[VOLUME].phase == READY
    assert VOL in host.dm.tables
    assert host.leftovers(store) == []


def test_the_second_base_of_an_image_keeps_the_sources_that_it_shares(host: Host) -> None:
    """A base is evicted while other sources are asked for it; the next one reads from these."""
    _, stacks, bases, store = host.agent()
    stacks.attach(PAYLOAD, LUN, soon())
    stacks.detach(VOLUME)
    host.initiator.unreachable.add("cmp2:3260")
    open_export = host.tracker.open_export

    def meanwhile(*args: object) -> wire.Export:
        host.tracker.open_export = open_export  # type: ignore[method-assign]
        bases.evict(IMAGE)
        host.initiator.unreachable.clear()
        bases.ensure(PLAN)
        return open_export(*args)  # type: ignore[arg-type]

    host.tracker.open_export = meanwhile  # type: ignore[method-assign, assignment]
    closed = len(host.tracker.closed)
    host.app.base.sources.reparent(IMAGE)
    host.app.base.sources.add_spares(IMAGE)
    assert [path.host for path in store.bases[IMAGE].paths] == [s.host for s in SOURCES]
    assert host.tracker.closed[closed:].count("cmp2") == 1  # by the eviction
    assert host.tracker.admitted == {s.exporter for s in SOURCES}


def test_a_complete_base_is_not_reported_with_every_heartbeat(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that is filling is, and all are after some minutes: a tracker may have lost a row."""
    host.agent()[1].attach(PAYLOAD, LUN, soon())
    second_image(host)

    def reported() -> list[str]:
        before = len(host.tracker.reports)
        with contextlib.suppress(errors.TrackerUnavailable):
            host.app.heartbeat.catch_up()
        return [report.image_id for report in host.tracker.reports[before:]]

    assert reported() == [IMAGE]  # the other one was reported when it became complete
    host.tracker.down = True
    reported()
    host.tracker.down = False
    now = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now + AGAIN)
    assert sorted(reported()) == sorted([IMAGE, OTHER])
    assert reported() == [IMAGE]


def test_the_trackers_set_the_pace_of_heartbeats(host: Host) -> None:
    host.agent()
    heartbeat = host.app.heartbeat
    configured = heartbeat.beat()
    host.tracker.orders = wire.Orders(interval=3 * configured)
    assert heartbeat.beat() == pytest.approx(3 * configured, rel=0.1)
    host.tracker.orders = wire.Orders()  # an older tracker
    assert heartbeat.beat() == pytest.approx(configured, rel=0.1)


@pytest.mark.parametrize("how", ["complete", "absent", "filling"])
def test_a_base_is_known_by_the_location_that_it_has_by_now(host: Host, how: str) -> None:
    """The trackers had lost its row. They send readers to its new location, which open no other.

    One that still reads as its old location was told stays that: it may be below such a reader.
    """
    _, stacks, bases, store = host.agent()
    stacks.attach(PAYLOAD, LUN, soon())
    before = store.bases[IMAGE].location_id
    if how == "complete":
        host.complete()
    elif how == "absent":
        stacks.detach(VOLUME)
        _reboot(host)
        agent, _, bases, store = host.agent()
        agent.reconcile()
    bases.ensure(dataclasses.replace(PLAN, location_id="again"))
    known = before if how == "filling" else "again"
    assert store.bases[IMAGE].location_id == known
    assert host.app.base.exports.open(IMAGE, "iqn.x:cmp3", 0.0).location_id == known
