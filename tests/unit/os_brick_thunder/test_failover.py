"""The failover watcher: what it decides, and what it does to a kernel that fails over."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from os_brick_thunder.agent.mechanism.failover import FailoverProcess
from os_brick_thunder.common import errors, files
from os_brick_thunder.common.mechanism import failoverlocks
from os_brick_thunder.common.policy import devnames, failover
from os_brick_thunder.common.policy.devnames import VolumeNames
from os_brick_thunder.common.policy.dmtable import Error, Linear, Multipath, Table, Thin
from os_brick_thunder.common.policy.failover import Action, Paths, Release
from os_brick_thunder.common.policy.timelimits import FULL_POOL
from os_brick_thunder.failover import main
from os_brick_thunder.failover.watcher import Watcher

LUN, LENGTH, IMAGE_LENGTH = "8:16", 4096, 2048
POOL = "thin-pool 0 43/1024 10/8000 - rw discard_passdown queue_if_no_space - 1024"
GOOD, BAD = "striped 1 252:0 1 A", "striped 1 252:0 1 D"


# -- decisions ----------------------------------------------------------------------------------


def test_paths_are_told_in_order_and_only_of_two() -> None:
    status = "multipath 2 0 0 0 2 1 A 0 1 0 254:7 F 1 E 0 1 0 8:16 A 0"
    found = Paths.of(status)
    assert found == Paths(failover.Path("254:7", False), failover.Path("8:16", True))
    assert Paths.of("multipath 2 0 0 0 1 1 A 0 1 0 8:16 A 0") is None
    assert Paths.of("linear") is None


@pytest.mark.parametrize(
    ("pool", "metadata", "data", "found"),
    [
        (POOL, GOOD, GOOD, ""),
        (POOL, "linear", "linear", ""),  # of an older agent
        ("", "", "", ""),
        (POOL.replace(" rw ", " out_of_data_space "), GOOD, GOOD, ""),
        (POOL.replace(" rw ", " ro "), GOOD, GOOD, "the local pool has failed (ro)"),
        (POOL.replace(" - 1024", " needs_check 1024"), GOOD, GOOD, "has failed (needs_check)"),
        ("thin-pool Fail", GOOD, GOOD, "the local pool has failed (Fail)"),
        (POOL, BAD, GOOD, "metadata had an I/O error"),
        (POOL, GOOD, BAD, "device had an I/O error"),
    ],
)
def test_trouble_of_the_pool(pool: str, metadata: str, data: str, found: str) -> None:
    assert found in failover.trouble(pool, metadata, data)
    assert bool(failover.trouble(pool, metadata, data)) == bool(found)


def test_a_lun_that_has_io_in_flight_is_waited_for() -> None:
    assert Release().step(lun_active=True, in_flight=9) == (Release(), Action.WAIT)


def test_while_requests_end_the_rest_is_sent_again() -> None:
    release = Release()
    for in_flight in (9, 5, 3, 1):
        release, action = release.step(False, in_flight)
        assert action is Action.REINSTATE


def test_what_the_lun_refuses_again_and_again_is_refused() -> None:
    actions, release = [], Release()
    for _ in range(4):
        release, action = release.step(False, 1)
        actions.append(action)
    assert actions == [Action.REINSTATE] * 3 + [Action.REFUSE]


# -- the watcher on a kernel ----------------------------------------------------------------------


class FakeKernel:
    """Volumes whose LUNs refuse some of the requests that are in flight."""

    def __init__(self) -> None:
        self.tables: dict[str, Table] = {}
        self.loaded: dict[str, Table] = {}
        self.failed: dict[str, set[str]] = {}  # numbers of paths
        self.queueing: set[str] = set()
        self.good: dict[str, int] = {}  # requests in flight that succeed when sent again
        self.bad: dict[str, int] = {}  # those that fail each time
        self.refused: dict[str, int] = {}
        self.pool, self.metadata, self.data = POOL, GOOD, GOOD
        self.hanging: set[str] = set()  # volumes whose LUNs do not answer
        self.no_load = False
        self.messages: list[tuple[str, str]] = []

    def volume(self, volume: str) -> VolumeNames:
        names = VolumeNames(volume)
        pool = self.number(devnames.POOL)
        for name, thin in ((names.meta, 1), (names.local, 2)):
            self.tables[name] = Table.of((IMAGE_LENGTH, Thin(pool, thin)))
        paths = Multipath((self.number(names.cached), LUN), queue=True)
        self.tables[names.failover] = Table.of((IMAGE_LENGTH, paths))
        self.queueing.add(names.failover)
        self.tables[names.vol] = Table.of(
            (IMAGE_LENGTH, Linear(self.number(names.failover))),
            (LENGTH - IMAGE_LENGTH, Linear(LUN, IMAGE_LENGTH)),
        )
        return names

    def numbers(self) -> dict[str, str]:
        pool = (devnames.POOL, devnames.POOL_METADATA, devnames.POOL_DATA)
        return {name: self.number(name) for name in (*pool, *self.tables)}

    @staticmethod
    def number(name: str) -> str:
        return f"254:{name}"

    def status(self, name: str) -> str:
        special = {
            devnames.POOL: self.pool,
            devnames.POOL_METADATA: self.metadata,
            devnames.POOL_DATA: self.data,
        }
        if name in special:
            return special[name]
        target = self.table(name).segments[0].target
        if not isinstance(target, Multipath):
            return str(target).split()[0]
        failed = self.failed.get(name, set())
        words = [f"{path} {'F' if path in failed else 'A'} 0" for path in target.paths]
        return f"multipath 2 0 0 0 2 1 {' '.join(words)}"

    def table(self, name: str) -> Table:
        if name not in self.tables:
            raise errors.ProcessError(["dm", name], 6, "No such device or address")
        return self.tables[name]

    def message(self, name: str, text: str) -> None:
        self.table(name)
        self.messages.append((name, text))
        verb, *rest = text.split()
        if verb == "fail_path":
            self.failed.setdefault(name, set()).add(rest[0])
        elif verb == "reinstate_path":
            self.failed.get(name, set()).discard(rest[0])
        elif verb == "queue_if_no_path":
            self.queueing.add(name)
        elif verb == "fail_if_no_path":
            self.queueing.discard(name)

    def load(self, name: str, table: Table) -> None:
        if self.no_load:
            raise errors.ProcessError(["dm", name, "load"], 6, "No such device or address")
        self.loaded[name] = table

    def resume(self, name: str, flush: bool = True) -> None:
        """Waits until no request is in flight."""
        failover_name = name.replace("-vol-", "-failover-")
        while self.hanging & {name} or (flush and self._serve(name, failover_name)):
            time.sleep(0.001)
        self.tables[name] = self.loaded.pop(name)

    def _serve(self, vol: str, name: str) -> int:
        """One round of the kernel's: what is in flight is sent to the LUN, and ends or fails."""
        if name in self.tables and LUN not in self.failed.get(name, set()):
            self.good[vol] = 0
            if self.bad.get(vol):
                self.failed.setdefault(name, set()).add(LUN)
        if self.bad.get(vol) and name not in self.queueing:
            self.refused[vol] = self.bad.pop(vol)
        return self.in_flight(vol)

    def in_flight(self, name: str) -> int:
        return self.good.get(name, 0) + self.bad.get(name, 0)


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


@contextlib.contextmanager
def free(volume_id: str) -> Iterator[None]:
    yield


@pytest.fixture
def kernel() -> FakeKernel:
    return FakeKernel()


def check(found: Watcher) -> None:
    found.check()
    assert found.wait_idle(10)


def fail_cached(kernel: FakeKernel, names: VolumeNames) -> None:
    kernel.failed.setdefault(names.failover, set()).add(kernel.number(names.cached))


def direct(kernel: FakeKernel, names: VolumeNames) -> bool:
    return kernel.tables[names.vol] == Table.of((LENGTH, Linear(LUN)))


def test_a_volume_whose_cached_path_has_failed_maps_its_lun(kernel: FakeKernel) -> None:
    one, two = kernel.volume("one"), kernel.volume("two")
    found = Watcher(kernel, free)
    check(found)
    assert not direct(kernel, one)
    fail_cached(kernel, one)
    check(found)
    assert direct(kernel, one)
    assert not direct(kernel, two)
    done = len(kernel.messages)
    check(found)
    assert len(kernel.messages) == done


def test_io_in_flight_succeeds_and_only_what_the_lun_refuses_fails(kernel: FakeKernel) -> None:
    names = kernel.volume("one")
    kernel.good[names.vol], kernel.bad[names.vol] = 7, 1
    kernel.failed[names.failover] = {kernel.number(names.cached), LUN}
    check(Watcher(kernel, free))
    assert direct(kernel, names)
    assert kernel.refused == {names.vol: 1}
    assert kernel.in_flight(names.vol) == 0


def test_a_lun_that_hangs_stops_no_other_volume(kernel: FakeKernel) -> None:
    hung, other = kernel.volume("hung"), kernel.volume("other")
    kernel.hanging.add(hung.vol)
    found = Watcher(kernel, free)
    fail_cached(kernel, hung)
    found.check()
    fail_cached(kernel, other)
    until = time.monotonic() + 10
    while not direct(kernel, other) and time.monotonic() < until:
        found.check()
        time.sleep(0.01)
    assert direct(kernel, other)
    assert not direct(kernel, hung)
    assert sum(thread.name == "swap-hung" for thread in threading.enumerate()) == 1
    kernel.hanging.clear()
    assert found.wait_idle(10)
    assert direct(kernel, hung)


def test_a_volume_that_cannot_be_swapped_keeps_its_path_and_waits_for_nothing(
    kernel: FakeKernel,
) -> None:
    names, other = kernel.volume("one"), kernel.volume("two")
    kernel.failed[names.failover] = {kernel.number(names.cached), LUN}
    kernel.no_load = True
    check(Watcher(kernel, free))
    assert kernel.failed[names.failover] == {kernel.number(names.cached)}
    assert names.failover not in kernel.queueing
    assert other.failover in kernel.queueing


@pytest.mark.parametrize("what", ["pool", "metadata", "data"])
def test_when_the_pool_fails_every_volume_leaves_it(kernel: FakeKernel, what: str) -> None:
    volumes = [kernel.volume(each) for each in ("one", "two")]
    found = Watcher(kernel, free)
    check(found)
    setattr(kernel, what, POOL.replace(" rw ", " ro ") if what == "pool" else BAD)
    found.check()
    for names in volumes:
        assert kernel.number(names.cached) in kernel.failed[names.failover]
    assert found.wait_idle(10)
    assert all(direct(kernel, names) for names in volumes)


def test_a_pool_that_stays_full_loses_its_caches(kernel: FakeKernel) -> None:
    """An agent frees space long before; but it may hang, and after a minute guests get errors."""
    names, clock = kernel.volume("one"), Clock()
    found = Watcher(kernel, free, clock)
    kernel.pool = POOL.replace(" rw ", " out_of_data_space ")
    check(found)
    clock.now += FULL_POOL - 1
    check(found)
    assert not direct(kernel, names)
    clock.now += 1
    check(found)
    assert direct(kernel, names)
    for name in (names.local, names.meta):
        assert kernel.tables[name] == Table.of((IMAGE_LENGTH, Error()))


def test_a_pool_that_was_full_for_a_moment_is_forgiven(kernel: FakeKernel) -> None:
    names, clock = kernel.volume("one"), Clock()
    found = Watcher(kernel, free, clock)
    for pool in (POOL.replace(" rw ", " out_of_data_space "), POOL) * 2:
        kernel.pool = pool
        check(found)
        clock.now += FULL_POOL - 1
    assert not direct(kernel, names)


def test_the_agent_can_exclude_the_watcher_from_a_volume(
    kernel: FakeKernel, tmp_path: Path
) -> None:
    names, other = kernel.volume("one"), kernel.volume("two")
    fail_cached(kernel, names)
    fail_cached(kernel, other)
    found = Watcher(kernel, lambda volume: failoverlocks.volume(volume, tmp_path))
    with FailoverProcess(folder=tmp_path).excluded("one"):
        found.check()
        until = time.monotonic() + 10
        while not direct(kernel, other) and time.monotonic() < until:
            time.sleep(0.01)
        assert direct(kernel, other)
        assert not direct(kernel, names)
        assert kernel.loaded == {}
    assert found.wait_idle(10)
    assert direct(kernel, names)


def test_a_volume_that_is_removed_meanwhile_stops_nothing(kernel: FakeKernel) -> None:
    gone, names = kernel.volume("gone"), kernel.volume("one")
    fail_cached(kernel, gone)
    fail_cached(kernel, names)
    del kernel.tables[gone.vol]
    check(Watcher(kernel, free))
    assert direct(kernel, names)


def test_the_only_path_of_a_volume_of_an_older_agent_comes_back(kernel: FakeKernel) -> None:
    names = VolumeNames("old")
    cached = kernel.number(names.cached)
    kernel.tables[names.vol] = Table.of((LENGTH, Multipath((cached, LUN))))
    kernel.failed[names.vol] = {cached, LUN}
    check(Watcher(kernel, free))
    assert kernel.failed[names.vol] == {cached}


def test_io_waits_for_a_watcher_only_while_there_is_one(kernel: FakeKernel) -> None:
    names = kernel.volume("one")
    found = Watcher(kernel, free)
    found.stop()
    assert names.failover not in kernel.queueing
    found.start()
    assert names.failover in kernel.queueing


# -- its process ----------------------------------------------------------------------------------

#: A watcher that watches nothing: it claims its place, and stays.
PROCESS = """
import os, sys, time
from pathlib import Path
from os_brick_thunder.common.mechanism import failoverlocks
if failoverlocks.claim(failoverlocks.Watcher(os.getpid(), {version}), Path({folder!r})) is None:
    sys.exit(1)
time.sleep(60)
"""


@pytest.fixture
def process(tmp_path: Path) -> Iterator[Callable[[int], FailoverProcess]]:
    """Makes agents' starters of a watcher of some version."""

    def make(version: int) -> FailoverProcess:
        code = PROCESS.format(version=version, folder=str(tmp_path))
        return FailoverProcess((sys.executable, "-c", code), tmp_path)

    yield make
    if found := failoverlocks.running(tmp_path):
        os.kill(found.pid, signal.SIGKILL)


def running(folder: Path) -> failoverlocks.Watcher:
    found = failoverlocks.running(folder)
    assert found is not None
    return found


def test_one_watcher_runs_whoever_starts_it(
    process: Callable[[int], FailoverProcess], tmp_path: Path
) -> None:
    assert failoverlocks.running(tmp_path) is None
    first = process(failover.VERSION)
    first.ensure()
    pid = running(tmp_path).pid
    first.ensure()
    process(failover.VERSION).ensure()  # of the next agent
    assert (running(tmp_path).pid, running(tmp_path).version) == (pid, failover.VERSION)
    assert os.getsid(pid) == pid  # what ends the agent's processes does not end it


def test_a_watcher_that_died_is_replaced(
    process: Callable[[int], FailoverProcess], tmp_path: Path
) -> None:
    starter = process(failover.VERSION)
    starter.ensure()
    pid = running(tmp_path).pid
    os.kill(pid, signal.SIGKILL)
    until = time.monotonic() + 10
    while failoverlocks.running(tmp_path) and time.monotonic() < until:
        time.sleep(0.01)
    starter.ensure()
    assert running(tmp_path).pid != pid


def test_a_watcher_that_hangs_is_replaced(
    process: Callable[[int], FailoverProcess], tmp_path: Path
) -> None:
    starter = process(failover.VERSION)
    starter.ensure()
    pid = running(tmp_path).pid
    long_ago = time.time() - 60
    os.utime(failoverlocks.watcher_file(tmp_path), (long_ago, long_ago))
    starter.ensure()
    assert running(tmp_path).pid != pid


def test_a_watcher_of_another_version_is_replaced(
    process: Callable[[int], FailoverProcess], tmp_path: Path
) -> None:
    code = PROCESS.format(version=failover.VERSION + 1, folder=str(tmp_path))
    other = subprocess.Popen([sys.executable, "-c", code])
    until = time.monotonic() + 10
    while not failoverlocks.running(tmp_path) and time.monotonic() < until:
        time.sleep(0.01)
    process(failover.VERSION).ensure()
    assert running(tmp_path).version == failover.VERSION
    assert other.wait(10) == -signal.SIGKILL


def test_a_watcher_can_be_ended(process: Callable[[int], FailoverProcess], tmp_path: Path) -> None:
    failoverlocks.end(tmp_path)  # absent is success
    process(failover.VERSION).ensure()
    failoverlocks.end(tmp_path)
    until = time.monotonic() + 10
    while failoverlocks.running(tmp_path) and time.monotonic() < until:
        time.sleep(0.01)
    assert failoverlocks.running(tmp_path) is None


def test_those_who_ask_at_once_are_not_taken_for_a_watcher(tmp_path: Path) -> None:
    file = failoverlocks.watcher_file(tmp_path)
    asks = f"{main._UNLESS_ANOTHER_RUNS}; echo none"  # as the last will of a killed watcher does
    with open(file, "w") as asking:
        assert files.lock(asking.fileno(), shared=True)
        assert failoverlocks.running(tmp_path) is None
        done = subprocess.run(["sh", "-c", asks, "sh", file], capture_output=True, check=True)
        assert done.stdout == b"none\n"
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: failoverlocks.running(tmp_path), range(4000)))
    assert set(found) == {None}


def test_a_watcher_that_comes_during_a_last_will_waits_for_its_end(tmp_path: Path) -> None:
    """Or what the last will says after the new watcher's first words holds: I/O does not wait."""
    began, told = tmp_path / "began", tmp_path / "told"
    dmsetup = tmp_path / "dmsetup"
    dmsetup.write_text(f"#!/bin/sh\ntouch {began}\nsleep 1\ntouch {told}\n")
    dmsetup.chmod(0o755)
    paths = (failoverlocks.watcher_file(tmp_path), failoverlocks.last_will_file(tmp_path))
    paths[0].touch()
    os.utime(paths[0], (0, 0))
    script = main._NO_HEIR.removeprefix("sleep 10;")
    command = ["sh", "-c", script, "sh", *map(str, paths)]
    path = f"{tmp_path}:{os.environ['PATH']}"
    with subprocess.Popen(command, env={"PATH": path}) as will:
        while not began.exists():
            assert will.poll() is None
            time.sleep(0.01)
        claim = failoverlocks.claim(failoverlocks.Watcher(1, 1), tmp_path)
        assert claim is not None
        assert told.exists()
        os.close(claim)


@pytest.mark.parametrize("command", [("/nowhere/thunder-failover",), ("false",)])
def test_a_watcher_that_cannot_run_is_an_error(tmp_path: Path, command: tuple[str, ...]) -> None:
    with pytest.raises(errors.WatcherError, match="the failover watcher"):
        FailoverProcess(command, tmp_path).ensure()


#: The program, told to stop the moment it has become the watcher.
TOLD_AT_ONCE = """
import os, pathlib, signal, types
from os_brick_thunder.common.mechanism import failoverlocks
from os_brick_thunder.failover import main

folder = pathlib.Path({folder!r})
claim, file = failoverlocks.claim, failoverlocks.watcher_file

def claim_and_stop(watcher):
    found = claim(watcher, folder)
    os.kill(os.getpid(), signal.SIGTERM)
    return found

failoverlocks.claim, failoverlocks.watcher_file = claim_and_stop, lambda _=None: file(folder)
os.geteuid = lambda: 0
main.RealKernel = lambda: types.SimpleNamespace(
    numbers=lambda: {{"thunder-failover-v": "254:1"}}, message=print
)
main.main([])
"""


def test_a_watcher_that_is_told_to_stop_at_once_leaves_nothing_waiting(tmp_path: Path) -> None:
    code = TOLD_AT_ONCE.format(folder=str(tmp_path))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "thunder-failover-v fail_if_no_path\n"
