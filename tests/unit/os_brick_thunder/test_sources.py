"""Sources of a base that fail, come back, drain or deliver wrong bytes: reads go on."""

from __future__ import annotations

import contextlib
import dataclasses
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from os_brick_thunder.agent.base import watch as watching
from os_brick_thunder.agent.base.bases import Bases
from os_brick_thunder.agent.base.watch import SourceWatch
from os_brick_thunder.agent.policy import layout
from os_brick_thunder.common import errors, wire
from os_brick_thunder.common.policy import devnames, hashtree
from os_brick_thunder.common.policy.extents import Extents
from os_brick_thunder.common.policy.iscsinames import iqn_of
from os_brick_thunder.common.state import READY, StateFile
from os_brick_thunder.common.transport.base import Endpoint
from tests import fakes
from tests.unit.os_brick_thunder.test_agent import (
    IMAGE,
    LUN,
    MIB,
    PAYLOAD,
    PLAN,
    SOURCES,
    VOLUME,
    Crash,
    Host,
    Tripwire,
    _reboot,
    soon,
)

VERIFIED = f"{fakes.MAPPER}thunder-verified-{IMAGE}-"
PATHS, STORAGE = f"thunder-paths-{IMAGE}", f"thunder-storage-{IMAGE}"
OTHER = wire.Source("l4", "cmp4", "base", "cmp4")
MASTER = SOURCES[-1]
AGAIN = dataclasses.replace(PLAN, volume_id="", sources=(OTHER, MASTER))
CHILD = "iqn.x:cmp9"
ROOT = "5a" * 32


@pytest.fixture
def host(tmp_path: Path) -> Host:
    return Host(tmp_path)


def reading(host: Host, **options: Any) -> StateFile:
    """A host whose base reads from cmp2, then from stor1."""
    _, stacks, _, store = host.agent(**options)
    host.tracker.plan = of_image(PLAN, options)
    stacks.attach(PAYLOAD, LUN, soon())
    host.app.base.sources.add_spares(IMAGE)
    host.tracker.plan = of_image(AGAIN, options)
    return store


def watched(host: Host) -> tuple[SourceWatch, list[float]]:
    """A watch, and the time that it goes by."""
    now, base = [1000.0], host.app.base
    return SourceWatch(host.store, base.sources, base.health, base.bases.evict, lambda: now[0]), now


def of_image(plan: wire.Plan, options: Mapping[str, Any]) -> wire.Plan:
    """A plan; of an image with a hash tree, if bases are to be verified."""
    assert plan.image is not None
    image = dataclasses.replace(plan.image, root=ROOT if "verified" in options else "")
    return dataclasses.replace(plan, image=image)


def hosts(store: StateFile) -> list[str]:
    return [path.host for path in store.bases[IMAGE].paths]


def table(host: Host, name: str = PATHS) -> list[str]:
    """Portals of the paths that the kernel has, in their order."""
    found = host.dm.table(name)
    assert found is not None
    portals = {device: portal for (_, portal), device in host.initiator.logged_in.items()}
    disks = [device.replace(VERIFIED, "/dev/") for device in found.devices]
    return [portals.get(disk, f"{disk} is gone") for disk in disks]


def checked(host: Host) -> list[bool]:
    """Whether the kernel checks what is read over each path."""
    found = host.dm.table(PATHS)
    assert found is not None
    return [device.startswith(VERIFIED) for device in found.devices]


def test_if_the_last_one_cannot_be_opened_the_one_before_it_is_the_last(host: Host) -> None:
    host.initiator.unreachable.add("stor1:3260")
    reading(host)
    assert table(host) == ["cmp2:3260"]


def test_a_base_gets_another_parent_while_it_is_read(host: Host) -> None:
    store = reading(host)
    host.app.base.sources.reparent(IMAGE, ("cmp2",))
    assert host.tracker.excluded == [("cmp2",)]
    assert table(host) == ["cmp4:3260", "stor1:3260"]
    assert hosts(store) == ["cmp4", "stor1"]
    assert store.bases[IMAGE].paths == StateFile(host.file).bases[IMAGE].paths
    assert host.tracker.closed == ["cmp2"]
    assert len(host.initiator.logged_in) == 2
    assert host.tracker.reports[-1].source == "cmp4"
    assert host.dm.suspended == set()
    assert host.leftovers(store) == []


def test_sources_that_work_are_not_opened_again(host: Host) -> None:
    store = reading(host)
    before = dict(host.initiator.logged_in)
    host.tracker.plan = dataclasses.replace(AGAIN, sources=SOURCES)
    host.app.base.sources.reparent(IMAGE)
    assert host.initiator.logged_in == before
    assert hosts(store) == ["cmp2", "stor1"]
    assert host.tracker.closed == []


@pytest.mark.parametrize(
    ("plan", "unreachable"),
    [
        (wire.Plan("", "direct", "no storage host with it is alive"), ()),
        (dataclasses.replace(AGAIN, sources=(OTHER,)), ("cmp4:3260",)),
    ],
)
def test_no_better_source_leaves_what_is_there(
    host: Host, plan: wire.Plan, unreachable: tuple[str, ...]
) -> None:
    store = reading(host)
    before, sessions = store.bases[IMAGE], dict(host.initiator.logged_in)
    host.tracker.plan = plan
    host.initiator.unreachable.update(unreachable)
    with pytest.raises(errors.NoReplica):
        host.app.base.sources.reparent(
            IMAGE, ("cmp2",) if plan.mode == "direct" else ("cmp2", "stor1")
        )
    assert store.bases[IMAGE] == before
    assert host.initiator.logged_in == sessions
    assert table(host) == ["cmp2:3260", "stor1:3260"]
    assert host.tracker.reports[-1].source == "cmp2"  # the tracker may have planned another


def test_a_planned_source_that_fails_costs_no_path_that_works(host: Host) -> None:
    store = reading(host)
    host.initiator.unreachable.add("cmp4:3260")
    host.app.base.sources.reparent(IMAGE)
    assert hosts(store) == ["stor1", "cmp2"]
    assert host.leftovers(store) == []


def test_a_complete_base_needs_no_parent(host: Host) -> None:
    store = reading(host)
    host.complete()
    reports = len(host.tracker.reports)
    host.app.base.sources.reparent(IMAGE)
    assert host.tracker.excluded == []
    assert host.tracker.reports[reports:][0].source is None
    assert host.initiator.logged_in == {}
    assert store.bases[IMAGE].complete


def test_a_parent_that_came_back_with_other_secrets_is_logged_in_anew(host: Host) -> None:
    store = reading(host)
    old = dict(host.initiator.logged_in)
    host.initiator.unreachable.add("cmp2:3260")
    host.dm.failed[PATHS] = {"/dev/sdm0"}
    assert host.app.base.health.repair(IMAGE) == ("cmp2",)
    host.tracker.plan = dataclasses.replace(AGAIN, sources=SOURCES)

    real = host.tracker.open_export

    def back(*args: object) -> wire.Export:
        host.initiator.unreachable.clear()
        return real(*args)  # type: ignore[arg-type]

    host.tracker.open_export = back  # type: ignore[assignment, method-assign]
    host.app.base.sources.reparent(IMAGE)
    assert table(host) == ["cmp2:3260", "stor1:3260"]
    (key,) = [key for key in old if key[1] == "cmp2:3260"]
    assert host.initiator.logged_in[key] != old[key]  # another session, another disk
    assert host.app.base.health.repair(IMAGE) == ()
    assert host.leftovers(store) == []


def test_a_path_that_answers_again_is_reinstated_once(host: Host) -> None:
    reading(host)
    host.dm.failed[PATHS] = {"/dev/sdm0", "/dev/sdm1"}
    host.blocks.silent.add("/dev/sdm0")
    assert host.app.base.health.repair(IMAGE) == ("cmp2",)
    assert host.dm.failed[PATHS] == {"/dev/sdm0"}
    host.blocks.silent.clear()
    assert host.app.base.health.repair(IMAGE) == ()
    assert host.dm.failed[PATHS] == set()
    assert host.dm.log[-1] == f"switch_group 1 {PATHS}"
    host.dm.failed[PATHS] = {"/dev/sdm0", "/dev/sdm1"}
    assert host.app.base.health.repair(IMAGE) == (
        "cmp2",
    )  # it flaps; the last path is always taken back
    assert host.dm.failed[PATHS] == {"/dev/sdm0"}


def test_wrong_bytes_are_not_read_twice_from_one_host(host: Host) -> None:
    reading(host)
    host.app.base.health.distrust(host.store.bases[IMAGE])
    assert host.dm.failed[PATHS] == {"/dev/sdm0"}
    everything = (devnames.path(PATHS), 0, host.store.bases[IMAGE].size)
    assert host.blocks.dropped == [everything]  # guests would read more of it
    assert host.app.base.health.repair(IMAGE) == ("cmp2",)  # it answers, and is distrusted
    host.app.base.health.distrust(host.store.bases[IMAGE])
    # The storage host alone is left: it stays.
    assert host.dm.failed[PATHS] == {"/dev/sdm0"}
    assert host.blocks.dropped == [everything] * 2  # it may be what was read before


def test_the_host_is_named_that_the_kernel_reads_from(host: Host) -> None:
    """While sources change, those before are recorded first, and the kernel's table is new."""
    store = reading(host)
    base = store.bases[IMAGE]
    store.put(dataclasses.replace(base, paths=base.paths[::-1]))
    host.app.base.health.distrust(base)
    assert host.app.base.health.wrong == {"cmp2": 1}
    assert host.dm.failed[PATHS] == {"/dev/sdm0"}


def test_wrong_bytes_have_the_base_read_from_another_host(host: Host) -> None:
    store = reading(host)
    watch = host.app.watch
    watch.on_wrong_bytes(store.bases[IMAGE])
    _settled(watch)
    assert host.tracker.excluded == [("cmp2",)]
    assert hosts(store) == ["cmp4", "stor1"]
    watch.stop()


@pytest.mark.parametrize("verified", [False, True])
def test_a_host_that_lies_is_left_also_if_it_is_the_only_source(host: Host, verified: bool) -> None:
    """No other host had the image when the base was built."""
    options: dict[str, Any] = {"verified": True} if verified else {}
    _, stacks, _, store = host.agent(**options)
    host.tracker.plan = of_image(dataclasses.replace(PLAN, sources=SOURCES[:1]), options)
    stacks.attach(PAYLOAD, LUN, soon())
    host.tracker.plan = of_image(AGAIN, options)
    watch, now = watched(host)
    if verified:
        host.dm.corrupted.add(f"thunder-verity-{IMAGE}-sdm0")
    for _ in range(20):
        if "cmp2" in hosts(store):
            if verified:
                host.dm.failed[PATHS] = {f"{VERIFIED}sdm0"}  # by each read of the wrong block
            else:
                watch.on_wrong_bytes(store.bases[IMAGE])  # each time the filler tries again
                _settled(watch)
        _check(watch)
        now[0] += 2
    assert hosts(store) == ["cmp4", "stor1"]
    assert host.app.base.health.wrong["cmp2"] >= 1
    assert ("cmp2",) in host.tracker.excluded
    watch.stop()


def test_a_source_that_was_away_for_minutes_is_added_all_the_same(host: Host) -> None:
    host.initiator.unreachable.add("stor1:3260")
    _, stacks, _, store = host.agent()
    stacks.attach(PAYLOAD, LUN, soon())
    watch, now = watched(host)
    for _ in range(60):
        _check(watch)
        now[0] += 2
    assert hosts(store) == ["cmp2"]
    host.initiator.unreachable.clear()
    now[0] += 60
    _check(watch)
    assert hosts(store) == ["cmp2", "stor1"]
    watch.stop()


def test_other_sources_are_added_also_after_a_restart(host: Host) -> None:
    _, stacks, _, _ = host.agent()
    stacks.attach(PAYLOAD, LUN, soon())
    agent, _, _, store = host.agent()  # before the others were added
    agent.reconcile()
    host.app.watch.check()
    _settled(host.app.watch)
    assert hosts(store) == ["cmp2", "stor1"]
    plans = len(host.tracker.excluded)
    host.app.watch.check()
    _settled(host.app.watch)
    assert len(host.tracker.excluded) == plans  # it has them: no tracker is asked again


def test_a_parent_with_another_base_is_read_from_at_once(host: Host) -> None:
    """Its new base has the endpoint of the one before it."""
    store = reading(host)
    del host.initiator.logged_in[next(k for k in host.initiator.logged_in if "cmp2" in k[0])]
    anew = dataclasses.replace(SOURCES[0], location_id="l22")
    host.tracker.plan = dataclasses.replace(AGAIN, sources=(anew, MASTER))
    host.app.base.sources.reparent(IMAGE)
    assert hosts(store) == ["cmp2", "stor1"]
    assert table(host) == ["cmp2:3260", "stor1:3260"]
    assert host.app.base.health.repair(IMAGE) == ()


def test_a_storage_host_in_a_state_file_of_an_older_agent(host: Host) -> None:
    store = reading(host)
    base = store.bases[IMAGE]
    paths = tuple(dataclasses.replace(path, master=False) for path in base.paths)
    store.put(dataclasses.replace(base, paths=paths))  # it did not record which is one
    del host.initiator.logged_in[next(k for k in host.initiator.logged_in if "stor1" in k[0])]
    host.tracker.plan = dataclasses.replace(AGAIN, sources=SOURCES)
    host.app.base.sources.reparent(IMAGE)
    assert table(host) == ["cmp2:3260", "stor1:3260"]


def test_a_session_that_cannot_be_ended_keeps_no_other(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    reading(host)
    logout = host.initiator.logout

    def stuck(endpoint: Endpoint) -> None:
        if "cmp2" in endpoint.target:
            raise errors.ProcessError(["iscsiadm"], 9, "internal error")
        logout(endpoint)

    monkeypatch.setattr(host.initiator, "logout", stuck)
    host.app.stack.stacks.detach(VOLUME)
    with pytest.raises(errors.ThunderError, match="internal error"):
        host.app.base.bases.remove(IMAGE)
    assert [portal for _, portal in host.initiator.logged_in] == ["cmp2:3260"]
    assert host.tracker.closed == [MASTER.exporter]  # cmp2 is still read from, as far as it knows
    monkeypatch.undo()
    host.catch_up()
    assert host.initiator.logged_in == {}
    assert host.leftovers(host.store) == []


def test_the_watch_finds_a_new_parent_for_one_that_is_silent(host: Host) -> None:
    store = reading(host)
    now = [1000.0]
    watch = SourceWatch(
        store,
        host.app.base.sources,
        host.app.base.health,
        host.app.base.bases.evict,
        clock=lambda: now[0],
    )
    _check(watch)
    host.initiator.unreachable.add("cmp2:3260")
    host.tracker.down = True
    _check(watch)
    assert watch._troubles[IMAGE].backoff.attempts == 0  # it may be back in a moment
    now[0] += watching.GRACE
    _check(watch)
    assert watch._troubles[IMAGE].backoff.attempts == 1
    assert hosts(store) == ["cmp2", "stor1"]
    host.tracker.down = False
    now[0] += 4.9
    _check(watch)  # too early for another attempt
    assert host.tracker.excluded == []
    now[0] += 0.1
    _check(watch)  # the second attempt excludes none: a host that was away may be back
    assert host.tracker.excluded == [()]
    assert hosts(store) == ["cmp4", "stor1"]
    _check(watch)
    assert watch._troubles == {}
    watch.stop()


def test_orders_of_the_tracker_are_obeyed(host: Host) -> None:
    store = reading(host)
    watch = host.app.watch
    watch.obey(wire.Orders(reparent=(IMAGE,)))
    _settled(watch)
    assert hosts(store) == ["cmp4", "stor1"]
    watch.obey(wire.Orders(remove=(IMAGE,)))
    _settled(watch)
    assert IMAGE in store.bases  # a volume uses it
    host.app.stack.stacks.detach(VOLUME)
    watch.obey(wire.Orders(remove=(IMAGE, "img-unknown")))
    _settled(watch)
    assert StateFile(host.file).bases == {}
    assert host.tracker.locations == set()
    watch.stop()


def _check(watch: SourceWatch) -> None:
    watch.check()
    _settled(watch)


def _settled(watch: SourceWatch) -> None:
    watch._jobs.join(10)


def drained(host: Host, timeout: float) -> tuple[Bases, StateFile]:
    """A base that no volume uses, and a host that reads from it."""
    _, stacks, bases, store = host.agent(drain_timeout=timeout)
    stacks.attach(PAYLOAD, LUN, soon())
    stacks.detach(VOLUME)
    host.app.base.exports.open(IMAGE, CHILD, 0.0)
    host.targets.readers[iqn_of("cmp1", IMAGE)] = {CHILD}
    return bases, store


def test_a_base_goes_when_its_readers_have_left(host: Host) -> None:
    bases, store = drained(host, 30.0)

    def leave() -> None:
        while not host.tracker.reports or host.tracker.reports[-1].state != "draining":
            time.sleep(0.01)
        with pytest.raises(errors.NoReplica):  # no other reader is admitted
            host.app.base.exports.open(IMAGE, "iqn.x:cmp8", 0.0)
        host.targets.readers.clear()

    child = threading.Thread(target=leave)
    child.start()
    bases.evict(IMAGE)
    child.join()
    assert store.bases == {}
    assert host.tracker.reports[-1].state == "gone"
    assert host.leftovers(store) == []
    before = len(host.tracker.reports)
    bases.evict(IMAGE)  # absent is success, and the tracker is told
    assert [report.state for report in host.tracker.reports[before:]] == ["gone"]


def test_no_report_of_a_base_follows_its_removal(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A report that arrived after that would leave the tracker with a location for ever."""
    bases, store = drained(host, 30.0)
    host.targets.readers.clear()
    report, began = host.tracker.report, threading.Event()

    def slow(said: wire.LocationReport) -> None:
        if not began.is_set():
            began.set()
            time.sleep(0.3)
        report(said)

    monkeypatch.setattr(host.tracker, "report", slow)
    telling = threading.Thread(target=host.app.base.reporter.report_all)
    telling.start()
    assert began.wait(10)
    bases.evict(IMAGE)
    telling.join()
    host.app.base.reporter.report_all()
    assert store.bases == {}
    assert host.tracker.reports[-1].state == "gone"


def test_a_base_whose_readers_stay_stays_too_unless_it_must_go(host: Host) -> None:
    bases, store = drained(host, 0.1)
    with pytest.raises(errors.DeviceBusy, match=CHILD):
        bases.evict(IMAGE)
    assert store.bases[IMAGE].phase == READY
    assert [report.state for report in host.tracker.reports[-2:]] == ["draining", "filling"]
    host.app.base.exports.open(IMAGE, "iqn.x:cmp8", 0.0)  # as before
    bases.evict(IMAGE, force=True)
    assert store.bases == {}
    assert host.leftovers(store) == []


def test_a_volume_that_needs_a_draining_base_keeps_it(host: Host) -> None:
    bases, store = drained(host, 30.0)
    failures: list[Exception] = []

    def evict() -> None:
        try:
            bases.evict(IMAGE)
        except errors.DeviceBusy as error:
            failures.append(error)

    thread = threading.Thread(target=evict)
    thread.start()
    while not host.tracker.reports or host.tracker.reports[-1].state != "draining":
        time.sleep(0.01)
    bases.ensure(PLAN)
    thread.join(10)
    assert [str(error) for error in failures] == [
        f"thunder-base-{IMAGE} is in use by a volume of this host: it was not touched"
    ]
    assert store.bases[IMAGE].phase == READY
    assert host.tracker.reports[-1].state == "filling"


def test_a_base_that_could_not_go_is_built_anew(host: Host) -> None:
    bases, store = drained(host, 0.1)
    host.targets.readers.clear()
    host.dm.held.add(f"thunder-export-{IMAGE}")
    with pytest.raises(errors.UndoFailed):
        bases.evict(IMAGE)
    host.dm.held.discard(f"thunder-export-{IMAGE}")
    assert bases.ensure(PLAN).phase == READY
    assert host.leftovers(store) == []


def test_a_reader_that_waits_for_a_base_is_admitted_after_a_reboot(host: Host) -> None:
    reading(host)
    _reboot(host)
    host.agent()[0].reconcile()
    found: list[wire.Export] = []
    child = threading.Thread(
        target=lambda: found.append(host.app.base.exports.open(IMAGE, CHILD, 10.0))
    )
    child.start()
    host.catch_up()
    child.join(5)
    assert found[0].iqn == iqn_of("cmp1", IMAGE)


def test_a_base_that_went_while_it_waited_for_its_replicas_does_not_come_back(host: Host) -> None:
    drained(host, 0.1)
    _reboot(host)
    agent, _, bases, store = host.agent()
    agent.reconcile()
    bases.evict(IMAGE)
    host.catch_up()
    assert store.bases == {}
    assert host.tracker.locations == set()
    assert host.leftovers(store) == []


def _reparent_and_evict(host: Host, tripwire: Tripwire | None) -> None:
    _, stacks, bases, _ = host.agent(tripwire)
    host.initiator.unreachable.add("cmp2:3260")
    host.app.base.sources.reparent(IMAGE, ("cmp2",))
    stacks.detach(VOLUME)
    bases.evict(IMAGE)


@pytest.mark.parametrize("options", [{}, {"checked_only": True}, {"verified": True}])
def test_wherever_an_agent_dies_that_changes_its_sources_a_restart_converges(
    tmp_path: Path, options: dict[str, bool]
) -> None:
    (tmp_path / "count").mkdir()
    host, tripwire = Host(tmp_path / "count"), Tripwire()
    reading(host, **options)
    _reparent_and_evict(host, tripwire)
    steps = tripwire.steps
    assert f"dm.reload_noflush {PATHS}" in steps
    for at, step in enumerate(steps):
        folder = tmp_path / str(at)
        folder.mkdir()
        host, tripwire = Host(folder), Tripwire()
        reading(host, **options)
        tripwire.at = at
        with pytest.raises(Crash):
            _reparent_and_evict(host, tripwire)
        agent, _, _, store = host.agent()
        agent.reconcile()
        host.catch_up()
        assert host.leftovers(store) == [], (at, step)
        assert host.disagreements(store) == set(), (at, step)
        if base := store.bases.get(IMAGE):
            assert len(table(host)) == 2, (at, step)
            assert not [line for line in table(host) if "gone" in line], (at, step)
            assert [p.portal for p in base.paths] == table(host), (at, step)
            assert len(host.initiator.logged_in) == 2, (at, step)
            if "checked_only" in options:
                assert table(host, STORAGE) == ["stor1:3260"], (at, step)
            if "verified" in options:
                assert checked(host) == [True, False], (at, step)
        _reparent_and_evict(host, None)
        assert StateFile(host.file).bases == {}, (at, step)
        assert host.dm.thin_ids == {devnames.ZERO_ID}, (at, step)
        assert host.initiator.logged_in == {}, (at, step)


@pytest.mark.parametrize("options", [{}, {"verified": True}])
def test_whatever_fails_while_sources_change_the_base_can_be_read(
    tmp_path: Path, options: dict[str, bool]
) -> None:
    (tmp_path / "count").mkdir()
    host, tripwire = Host(tmp_path / "count"), Tripwire()
    reading(host, **options)
    host.agent(tripwire)
    host.app.base.sources.reparent(IMAGE, ("cmp2",))
    for at, step in enumerate(tripwire.steps):
        folder = tmp_path / str(at)
        folder.mkdir()
        host, tripwire = Host(folder), Tripwire()
        reading(host, **options)
        tripwire.at, tripwire.error = at, lambda: errors.ThunderError("injected")
        store = host.agent(tripwire)[3]
        with contextlib.suppress(errors.ThunderError):
            host.app.base.sources.reparent(IMAGE, ("cmp2",))
        assert not [line for line in table(host) if "gone" in line], (at, step)
        assert "stor1:3260" in table(host), (at, step)
        host.app.base.sources.reparent(IMAGE, ("cmp2",))
        assert table(host) == ["cmp4:3260", "stor1:3260"], (at, step)
        assert hosts(store) == ["cmp4", "stor1"], (at, step)
        agent, _, _, store = host.agent()
        agent.reconcile()
        if step == "tracker.close_export":  # not told again: it may never be back
            host.tracker.admitted.clear()
        assert host.leftovers(store) == [], (at, step)


def test_a_base_whose_replica_hangs_does_not_keep_the_others_from_failing_over(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    reading(host)
    assert PLAN.image is not None
    for number in range(10):
        image = dataclasses.replace(PLAN.image, id=f"more-{number}")
        host.app.base.bases.ensure(dataclasses.replace(PLAN, image=image))
        host.app.base.sources.add_spares(image.id)
        host.dm.failed[f"thunder-paths-more-{number}"] = {f"/dev/sdm{2 * number + 3}"}
    host.dm.failed[PATHS] = {"/dev/sdm1"}
    goes_on, hanging = threading.Event(), {"/dev/sdm1", *(f"/dev/sdm{n}" for n in range(5, 23, 2))}

    def answers(device: str) -> bool:
        return device not in hanging or goes_on.wait(30)

    monkeypatch.setattr(host.blocks, "answers", answers)
    check = threading.Thread(target=host.app.watch.check, daemon=True)
    check.start()
    until = time.monotonic() + 5
    while host.dm.failed["thunder-paths-more-0"]:
        assert time.monotonic() < until
        time.sleep(0.01)
    assert host.dm.failed[PATHS] == {"/dev/sdm1"}
    goes_on.set()
    check.join(10)  # it may not have begun all of its jobs yet
    _settled(host.app.watch)
    assert host.dm.failed[PATHS] == set()


# Bases of which only what was checked is read


def test_what_is_not_filled_yet_is_read_from_a_storage_host_alone(host: Host) -> None:
    _, stacks, _, store = host.agent(checked_only=True)
    stacks.attach(PAYLOAD, LUN, soon())
    assert hosts(store) == ["stor1"]  # a peer is not waited for, and not read from
    assert table(host, STORAGE) == table(host) == ["stor1:3260"]
    host.app.base.sources.add_spares(IMAGE)
    assert hosts(store) == ["cmp2", "stor1"]
    assert table(host) == ["cmp2:3260", "stor1:3260"]
    assert table(host, STORAGE) == ["stor1:3260"]
    assert list(host.loops.loops.values()) == [devnames.path(STORAGE)] * layout.LOOPS
    host.tracker.plan = AGAIN
    host.app.base.sources.reparent(IMAGE, ("cmp2",))
    assert table(host) == ["cmp4:3260", "stor1:3260"]
    assert table(host, STORAGE) == ["stor1:3260"]
    agent, stacks, bases, store = host.agent()  # without the option: bases stay what they are
    agent.reconcile()
    assert hosts(store) == ["cmp4", "stor1"]
    assert host.leftovers(store) == []
    host.complete()
    assert host.initiator.logged_in == {}
    stacks.detach(VOLUME)
    bases.evict(IMAGE)
    assert host.leftovers(store) == []


def test_without_a_storage_host_there_is_no_such_base(host: Host) -> None:
    _, stacks, _, store = host.agent(checked_only=True)
    host.initiator.unreachable.add("stor1:3260")
    stacks.attach(PAYLOAD, LUN, soon())
    assert store.stacks[VOLUME].mode == "direct"
    assert store.bases == {}
    assert host.leftovers(store) == []


def test_such_a_base_keeps_its_storage_host(host: Host) -> None:
    store = reading(host, checked_only=True)
    host.tracker.plan = dataclasses.replace(AGAIN, sources=(OTHER,))
    host.dm.failed[STORAGE] = {"/dev/sdm0"}
    with pytest.raises(errors.NoReplica, match="no new source could be opened"):
        host.app.base.sources.reparent(IMAGE, ("stor1",))
    assert hosts(store) == ["cmp2", "stor1"]
    assert host.leftovers(store) == []


def test_a_storage_path_that_answers_again_is_reinstated_in_both_devices(host: Host) -> None:
    reading(host, checked_only=True)
    (disk,) = _devices(host, STORAGE)
    host.dm.failed[STORAGE], host.dm.failed[PATHS] = {disk}, set()
    host.blocks.silent.add(disk)
    assert host.app.base.health.repair(IMAGE) == ("stor1",)
    assert host.dm.failed[STORAGE] == {disk}
    host.blocks.silent.clear()
    assert host.app.base.health.repair(IMAGE) == ()
    assert host.dm.failed[STORAGE] == set()


def test_a_host_that_lies_is_named_and_counted_and_left(host: Host) -> None:
    agent, stacks, _, store = host.agent(checked_only=True)
    stacks.attach(PAYLOAD, LUN, soon())
    host.app.base.sources.add_spares(IMAGE)
    host.tracker.plan = AGAIN
    watch = host.app.watch
    watch.on_wrong_bytes(store.bases[IMAGE])
    _settled(watch)
    assert hosts(store) == ["cmp4", "stor1"]
    assert table(host, STORAGE) == ["stor1:3260"]
    assert agent.status()["wrong_bytes"] == {"cmp2": 1}


def _devices(host: Host, name: str) -> tuple[str, ...]:
    found = host.dm.table(name)
    assert found is not None
    return found.devices


# Bases of which the kernel checks each block


def test_a_block_of_a_peer_is_checked_before_anybody_reads_it(host: Host) -> None:
    agent, stacks, _, store = host.agent(verified=True)
    host.tracker.plan = of_image(PLAN, {"verified": True})
    stacks.attach(PAYLOAD, LUN, soon())
    assert (table(host), checked(host)) == (["cmp2:3260"], [True])  # from the first read on
    host.app.base.sources.add_spares(IMAGE)
    assert (table(host), checked(host)) == (["cmp2:3260", "stor1:3260"], [True, False])
    base, sectors = store.bases[IMAGE], 512 * MIB // 512
    assert base.length == 512 * MIB + hashtree.length(512 * MIB)
    assert str(host.dm.table(f"thunder-verity-{IMAGE}-sdm0")) == (
        f"0 {sectors} verity 1 /dev/sdm0 /dev/sdm0 4096 4096 131072 131072 sha256 {ROOT} -"
    )
    verified = host.dm.table(f"thunder-verified-{IMAGE}-sdm0")
    assert verified is not None
    assert verified.mapped_to("/dev/sdm0") == Extents.of([(base.size, base.length)])
    for device in (PATHS, f"thunder-source-{IMAGE}", f"thunder-export-{IMAGE}"):
        found = host.dm.table(device)
        assert found is not None
        assert found.length == base.length // 512, device  # the tree is relayed, too
    assert host.app.base.exports.open(IMAGE, CHILD, 0).size == base.length
    assert list(base.needed.within(base.size, 1 << 40)) == [(base.size, base.length)]
    assert agent.status()["bases"][0]["verified"]
    assert host.leftovers(store) == []
    host.complete()
    assert agent.status()["bases"][0]["filled"] == 100 * MIB + (64 << 10)  # of the image
    assert not [name for name in host.dm.tables if "veri" in name]
    assert host.leftovers(store) == []


def test_a_peer_that_sent_a_wrong_block_is_named_and_counted_and_left(host: Host) -> None:
    store = reading(host, verified=True)
    host.dm.failed[PATHS] = {f"{VERIFIED}sdm0"}
    host.blocks.silent.add(f"{VERIFIED}sdm0")
    assert host.app.base.health.repair(IMAGE) == ("cmp2",)
    assert host.app.agent.status()["wrong_bytes"] == {}  # it may only have gone
    host.blocks.silent.clear()
    host.dm.corrupted.add(f"thunder-verity-{IMAGE}-sdm0")
    for _ in range(2):
        assert host.app.base.health.repair(IMAGE) == ("cmp2",)  # it answers, but is not taken back
        assert host.app.agent.status()["wrong_bytes"] == {"cmp2": 1}
    host.app.base.sources.reparent(IMAGE, ("cmp2",))
    assert (table(host), checked(host)) == (["cmp4:3260", "stor1:3260"], [True, False])
    assert host.leftovers(store) == []


def test_a_source_without_the_tree_is_not_read_from(host: Host) -> None:
    host.tracker.sizes["cmp2"] = 512 * MIB
    store = reading(host, verified=True)
    assert (table(host), checked(host)) == (["stor1:3260"], [False])
    assert host.leftovers(store) == []


def test_a_kernel_that_cannot_check_passes_the_tree_on_nevertheless(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host.dm, "has_target", lambda kind: False)
    store = reading(host, verified=True)
    assert (table(host), checked(host)) == (["cmp2:3260", "stor1:3260"], [False, False])
    assert store.bases[IMAGE].length > store.bases[IMAGE].size
    assert not store.bases[IMAGE].verified


def test_what_was_made_for_a_path_that_cannot_be_checked_is_removed(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    create = host.dm.create

    def refuse(name: str, *args: Any, **options: Any) -> None:
        if name.startswith("thunder-verified-"):
            raise errors.ProcessError(["dm", "load", name], 22, "Invalid argument")
        create(name, *args, **options)

    monkeypatch.setattr(host.dm, "create", refuse)
    store = reading(host, verified=True)
    assert (table(host), checked(host)) == (["stor1:3260"], [False])
    assert host.leftovers(store) == []
