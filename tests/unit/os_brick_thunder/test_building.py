"""Bases that are built before they have a source: who opens them, who waits, and for how long."""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from os_brick_thunder.agent.base import watch as watching
from os_brick_thunder.agent.base.watch import SourceWatch
from os_brick_thunder.common import errors, wire
from os_brick_thunder.common.policy import timelimits
from os_brick_thunder.common.state import READY
from tests.unit.os_brick_thunder.test_agent import IMAGE, PLAN, SOURCES, Host

PATHS, CHILD = f"thunder-paths-{IMAGE}", "iqn.x:cmp9"


@pytest.fixture
def host(tmp_path: Path) -> Host:
    return Host(tmp_path)


def while_it_is_opened(host: Host, do: Callable[[], object]) -> None:
    """Do something while the base's first source is asked for its export."""
    real = host.tracker.open_export

    def open_export(*args: object) -> wire.Export:
        host.tracker.open_export = real  # type: ignore[method-assign]
        do()
        return real(*args)  # type: ignore[arg-type]

    host.tracker.open_export = open_export  # type: ignore[method-assign, assignment]


def test_other_hosts_open_a_base_before_it_has_a_source(host: Host) -> None:
    """So the levels of a tree do not wait for each other. The volumes of its host do not use it."""
    _, _, bases, store = host.agent()
    found = []

    def open_it() -> None:
        found.append(host.app.base.exports.open(IMAGE, CHILD, 0.0))
        assert host.dm.queueing == {PATHS}  # what it reads waits
        assert not bases.is_ready(IMAGE)

    while_it_is_opened(host, open_it)
    bases.ensure(PLAN)
    assert found[0].iqn in host.targets.exported
    assert found[0].location_id == PLAN.location_id  # which is not deeper than planned
    assert host.dm.queueing == set()
    assert host.app.base.exports.open(IMAGE, CHILD, 0.0) == found[0]
    assert bases.is_ready(IMAGE)
    assert host.leftovers(store) == []


def test_reads_do_not_wait_for_a_source_that_does_not_come(host: Host) -> None:
    _, _, bases, store = host.agent(parent_wait=0.05)

    def come_late() -> None:
        until = time.monotonic() + 10
        while host.dm.queueing:
            assert time.monotonic() < until
            time.sleep(0.01)
        with pytest.raises(errors.NoReplica):  # nobody else begins to wait
            host.app.base.exports.open(IMAGE, CHILD, 0.0)

    while_it_is_opened(host, come_late)
    bases.ensure(PLAN)
    assert store.bases[IMAGE].phase == READY
    assert host.app.base.exports.open(IMAGE, CHILD, 0.0)


def test_a_source_whose_disk_is_too_short_is_passed_over(host: Host) -> None:
    """A table over it is refused; no base was built while the tracker named it first."""
    _, _, bases, store = host.agent()
    assert PLAN.image is not None
    host.blocks.sizes["/dev/sdm0"] = PLAN.image.size - 512
    bases.ensure(PLAN)
    found = host.dm.table(PATHS)
    assert found is not None
    assert found.devices == ("/dev/sdm1",)
    assert [iqn for iqn, _ in host.initiator.logged_in] == [store.bases[IMAGE].paths[0].iqn]
    assert store.bases[IMAGE].paths[0].host == SOURCES[1].host
    assert host.leftovers(store) == []


def test_of_a_base_that_gets_no_source_nothing_is_left(host: Host) -> None:
    _, _, bases, store = host.agent()
    before = dict(host.dm.tables)
    host.initiator.unreachable |= {"cmp2:3260", "stor1:3260"}
    with pytest.raises(errors.NoReplica, match="none of 2 replicas"):
        bases.ensure(PLAN)
    assert (host.dm.tables, host.dm.queueing, store.bases) == (before, set(), {})
    assert host.leftovers(store) == []
    with pytest.raises(errors.NoReplica):
        host.app.base.exports.open(IMAGE, CHILD, 0.0)


def test_the_next_source_is_asked_when_the_first_does_not_answer(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not only when the call to a dead host has timed out."""
    monkeypatch.setattr(timelimits, "EXPORTER", 0.1)
    _, _, bases, store = host.agent(parent_wait=0.0)
    answer = threading.Event()
    while_it_is_opened(host, lambda: answer.wait(20))
    began = time.monotonic()
    bases.ensure(PLAN)
    assert time.monotonic() - began < 10
    assert [path.host for path in store.bases[IMAGE].paths if path.is_open] == ["stor1"]
    answer.set()
    reported = len(host.tracker.reports)
    host.app.base.sources.add_spares(IMAGE)  # it has become able to answer
    assert [path.host for path in store.bases[IMAGE].paths] == ["cmp2", "stor1"]
    assert [report.source for report in host.tracker.reports[reported:]] == ["cmp2"]
    assert host.leftovers(store) == []


def test_a_source_that_cannot_be_read_is_none(host: Host) -> None:
    """Such as a base that has no source itself."""
    host.blocks.silent.add("/dev/sdm0")
    _, _, bases, store = host.agent()
    bases.ensure(PLAN)
    assert [path.host for path in store.bases[IMAGE].paths if path.is_open] == ["stor1"]
    assert [portal for _, portal in host.initiator.logged_in] == ["stor1:3260"]


def test_the_watch_adds_the_other_sources(host: Host) -> None:
    _, _, bases, store = host.agent()
    bases.ensure(PLAN)
    host.tracker.down = True
    for _ in range(2):  # a second attempt would come too early
        host.app.watch.check()
        host.app.watch._jobs.join(10)
    assert [path.host for path in store.bases[IMAGE].paths if path.is_open] == ["cmp2"]
    host.tracker.down = False
    bases.remove(IMAGE)
    bases.ensure(PLAN)
    host.app.watch.check()
    host.app.watch._jobs.join(10)
    assert [path.host for path in store.bases[IMAGE].paths] == ["cmp2", "stor1"]
    assert host.app.base.sources.without_spares(IMAGE) is None
    host.app.watch.stop()


def test_the_other_sources_are_added_at_once(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    """Until then the death of the first one costs the volumes their caches."""
    monkeypatch.setattr(watching, "INTERVAL", 60.0)
    _, _, bases, store = host.agent()
    host.app.watch.start()
    try:
        bases.ensure(PLAN)
        until = time.monotonic() + 10
        while len(store.bases[IMAGE].paths) < 2:
            assert time.monotonic() < until
            time.sleep(0.01)
    finally:
        host.app.watch.stop()


def test_a_source_that_does_not_answer_is_asked_again_and_again(host: Host) -> None:
    _, _, bases, store = host.agent()
    bases.ensure(PLAN)
    now = [0.0]
    app = host.app.base
    watch = SourceWatch(store, app.sources, app.health, bases.evict, lambda: now[0])
    host.initiator.unreachable.add("stor1:3260")
    for expected, reachable in ((["cmp2"], False), (["cmp2", "stor1"], True)):
        if reachable:
            host.initiator.unreachable.clear()
        watch.check()
        watch._jobs.join(10)
        assert [path.host for path in store.bases[IMAGE].paths] == expected
        now[0] += 5.0
    reloads = host.dm.log.count(f"reload {PATHS}")
    assert reloads == 2  # for the first source, and for the second
    assert app.sources.without_spares(IMAGE) is None
    bases.remove(IMAGE)
    bases.ensure(PLAN)
    host.initiator.unreachable.add("stor1:3260")
    closed = len(host.tracker.closed)
    for _ in range(60):
        now[0] += 10.0
        watch.check()
        watch._jobs.join(10)
    assert 10 <= len(host.tracker.closed) - closed <= 14  # at last once a minute
    watch.stop()


def test_sources_of_an_older_plan_do_not_come_back(host: Host) -> None:
    _, _, bases, store = host.agent()
    bases.ensure(PLAN)
    other = wire.Source("l4", "cmp4", "base", "cmp4")
    host.tracker.plan = dataclasses.replace(PLAN, volume_id="", sources=(other, SOURCES[-1]))
    host.initiator.unreachable.add("stor1:3260")
    host.app.base.sources.reparent(IMAGE, ("cmp2",))
    host.app.watch.check()
    host.app.watch._jobs.join(10)
    host.app.watch.stop()
    assert [path.host for path in store.bases[IMAGE].paths] == ["cmp4"]


def test_a_base_that_is_removed_while_sources_are_added_leaves_no_session(host: Host) -> None:
    """No lock is held while other hosts are waited for."""
    _, _, bases, store = host.agent()
    bases.ensure(PLAN)
    login = host.initiator.login

    def meanwhile(export: wire.Export) -> str:
        remover = threading.Thread(target=bases.remove, args=(IMAGE,))
        remover.start()
        remover.join(10)
        assert not remover.is_alive()
        return login(export)

    host.initiator.login = meanwhile  # type: ignore[method-assign]
    host.app.base.sources.add_spares(IMAGE)
    assert store.bases == {}
    assert host.initiator.logged_in == {}
    assert host.tracker.admitted == set()
