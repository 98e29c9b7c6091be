"""``thunder image precache``: the choice of hosts, their progress, and reasons for failures."""

from __future__ import annotations

import io
import json
import threading
from collections.abc import Callable
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from cinder_thunder.cli import progress, thunder
from cinder_thunder.cli.commands import precache
from cinder_thunder.cli.commands.precache import Outcome, choose
from cinder_thunder.db import migration
from cinder_thunder.db.api import Database
from cinder_thunder.db.values import Image, KnownHost
from cinder_thunder.policy.ranking import Limits
from os_brick_thunder.common import errors, wire
from os_brick_thunder.common.policy.extents import Extents
from os_brick_thunder.common.policy.profile import Profile, chunk_size

STORAGE = "stor1@thunder"
MIB = 1 << 20
IMAGE = Image("i", 8 * MIB, Extents.of([(0, 4 * MIB)]))


class World:
    """A cloud in a database, with agents and a clock that tests control."""

    def __init__(self, url: str) -> None:
        self.now = datetime(2026, 1, 1)
        self.database = Database(url, clock=lambda: self.now)
        migration.upgrade(self.database.engine)
        self.heartbeat(STORAGE, "r0", kind="storage")
        self.database.images.add_master(IMAGE, STORAGE)
        for host, rack, zone in (("c1", "r1", "z1"), ("c2", "r1", "z2"), ("c3", "r2", "z2")):
            self.heartbeat(host, rack, zone)
        #: What an agent does when it is asked; makes a base and fills nothing unless told.
        self.agents: dict[str, Callable[[], None]] = {}
        self.asked: list[str] = []
        self.profiled_only = False
        self._lock = threading.Lock()

    def heartbeat(self, host: str, rack: str, zone: str = "z1", kind: str = "compute") -> None:
        self.database.hosts.heartbeat(
            wire.Topology(host, "10.0.0.1", rack, zone, f"iqn.x:{host}", kind)
        )

    def beat(self) -> None:
        for host in self.database.hosts.all():
            if not host.alive:
                continue
            self.heartbeat(host.host, host.rack, host.zone, host.kind)

    def precache(self, host: str, image_id: str, wait: float, profiled_only: bool = False) -> None:
        assert profiled_only == self.profiled_only
        with self._lock:  # sqlite has one writer
            try:
                self.agents.get(host, lambda: self.make(host))()
            finally:
                self.asked.append(host)

    def status(self, host: str) -> Any:
        return {}

    def make(self, host: str, state: str = "filling", filled: int = 0) -> None:
        known = {each.host: each for each in self.database.hosts.all()}[host]
        topology = wire.Topology(host, "10.0.0.1", known.rack, known.zone, f"iqn.x:{host}")
        planned = self.database.locations.plan("i", topology, Limits())
        assert planned is not None
        self.report(host, state, filled)

    def report(self, host: str, state: str, filled: int = 0) -> None:
        (location,) = [each for each in self.database.locations.of("i") if each.host == host]
        self.database.locations.report(
            wire.LocationReport(location.id, "i", host, state, filled, "", "", 0, STORAGE)
        )

    def run(self, steps: list[Callable[[], None]], timeout: float | None) -> list[Outcome]:
        """Pre-cache everywhere, with one step for each sleep of the command, of 10 s.

        The threads that ask hosts run in real time: the first step waits for them.
        """
        left, began = iter(steps), self.now
        fit = {
            host.host for host in self.database.hosts.all() if host.alive and host.kind == "compute"
        }

        def sleep(seconds: float) -> None:
            for _ in range(1000):
                if set(self.asked) == fit:
                    break
                threading.Event().wait(0.01)
            self.now += timedelta(seconds=10)
            self.beat()
            next(left)()

        return precache.precache(
            self.database,
            self,
            "i",
            choose(self.database.hosts.all(), (), None, None, True),
            timeout,
            self.profiled_only,
            sleep,
            lambda: (self.now - began).total_seconds(),
        )


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(f"sqlite:///{tmp_path}/cinder.sqlite")


def hosts(found: list[KnownHost]) -> list[str]:
    return [host.host for host in found]


def test_which_hosts(world: World) -> None:
    known = world.database.hosts.all()
    assert hosts(choose(known, (), None, None, True)) == ["c1", "c2", "c3"]
    assert hosts(choose(known, ("c3", "c1", "c3"), None, None, False)) == ["c1", "c3"]
    assert hosts(choose(known, (), "r2", None, False)) == ["c3"]
    assert hosts(choose(known, (), None, "z2", False)) == ["c2", "c3"]
    assert hosts(choose(known, (), "r1", "z2", False)) == ["c2"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ((), "select hosts: either --host (once or more), or --rack and --zone, or --all"),
        (("--all", "--rack", "r1"), "select hosts: either "),
        (("--host", "x"), "there is no compute host x: known are c1, c2, c3"),
        (("--host", STORAGE), f"there is no compute host {STORAGE}: known are c1, c2, c3"),
        (("--rack", "r9"), "there is no compute host in rack r9: known are c1, c2, c3"),
        (("--rack", "r2", "--zone", "z1"), "there is no compute host in rack r2 and zone z1: "),
        (
            ("--rack", "r1"),
            "rack r1 is ambiguous: there is one in each of the zones z1, z2; give --zone, too",
        ),
        (("--all", "--profile"), "no boot of image i was recorded yet: boot a server from it"),
    ],
)
def test_bad_options(
    world: World,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    options: tuple[str, ...],
    said: str,
) -> None:
    """One line, exit code 2, and no host was asked."""
    monkeypatch.setattr(precache, "database", lambda file: world.database)
    monkeypatch.setattr(precache, "hosts_rpc", lambda file: world)
    assert thunder.main(["image", "precache", "i", *options]) == 2
    (line,) = [r.message for r in caplog.records if r.levelname == "ERROR"]
    assert line.startswith(said)
    assert world.asked == []


def test_an_image_without_a_master(
    world: World, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(precache, "database", lambda file: world.database)
    assert thunder.main(["image", "precache", "other", "--all"]) == 2
    assert "there is no replica of an image other" in caplog.text


def test_the_command(
    world: World, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(precache, "database", lambda file: world.database)
    monkeypatch.setattr(precache, "hosts_rpc", lambda file: world)
    for host in ("c1", "c2"):
        world.agents[host] = lambda host=host: world.make(host, "complete", 4 * MIB)  # type: ignore[misc]
    command = ["image", "precache", "i", "--host", "c1", "--host", "c2", "--wait", "-f", "json"]
    assert thunder.main(command) == 0
    rows = json.loads(capsys.readouterr().out)
    assert rows == [
        {"Host": host, "Result": "complete", "Filled": "100%", "Reason": ""}
        for host in ("c1", "c2")
    ]


def test_without_waiting(world: World) -> None:
    found = world.run([lambda: None] * 100, None)
    assert [outcome.result for outcome in found] == ["filling"] * 3


def test_waiting_until_all_are_complete(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    def all_have(filled: int, state: str = "filling") -> Callable[[], None]:
        def step() -> None:
            for host in ("c1", "c2", "c3"):
                world.report(host, state, filled)

        return step

    steps = [all_have(MIB), all_have(3 * MIB), all_have(4 * MIB, "complete")]
    found = world.run([*steps, *[lambda: None] * 100], 1000)
    assert found == [Outcome(host, "complete", 100) for host in ("c1", "c2", "c3")]
    lines = [line.split() for line in capsys.readouterr().err.splitlines()]
    shares = [line[3] for line in lines if line[2] == "c1" and line[8] == "filling,"]
    assert shares[-2:] == ["25%", "75%"]
    assert [line[8] for line in lines if line[2] == "c1"][-1] == "complete"


def test_waiting_until_all_have_what_boots_read(
    world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    world.profiled_only = True
    chunk = chunk_size(IMAGE.size)
    read = Profile.of(chunk, (2, 3, IMAGE.allocated.length // chunk + 1))  # the last is a hole
    image = wire.ImageInfo("i", IMAGE.size, ((0, 4 * MIB),))
    assert world.database.profiles.start("r", image, "c9", 60)
    boot = wire.Recording("i", "", "r", "c9", read.encode(), True, 0, 0)
    assert world.database.profiles.report(boot, read, IMAGE.size, 60)

    def have(filled: dict[str, int]) -> Callable[[], None]:
        def step() -> None:
            for host, size in filled.items():
                world.report(host, "filling", size)

        return step

    steps = [
        have(dict.fromkeys(("c1", "c2", "c3"), chunk)),
        have({"c1": 2 * chunk, "c2": 3 * chunk, "c3": 2 * chunk - 1}),
    ]
    found = world.run([*steps, *[lambda: None] * 100], 100)
    assert found[:2] == [Outcome(host, "complete", 100) for host in ("c1", "c2")]
    assert (found[2].result, found[2].percent) == ("failed", 99)
    shares = [line.split()[3] for line in capsys.readouterr().err.splitlines() if " c1 " in line]
    assert "50%" in shares


def test_one_that_is_dead_is_left_out(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    world.now += timedelta(hours=1)
    for host in (STORAGE, "c1", "c2"):
        world.heartbeat(host, "r1", kind="storage" if host == STORAGE else "compute")
    found = world.run([lambda: None] * 100, None)
    assert [outcome.result for outcome in found] == ["filling", "filling", "skipped"]
    reason = "it is dead, silent for 3600 s: start thunder-agent there"
    assert found[2].reason == reason
    assert f"warning: c3 is left out: {reason}\n" in capsys.readouterr().err
    assert "c3" not in world.asked


def test_one_that_is_drained_is_left_out(world: World) -> None:
    world.database.hosts.set_drained("c2", True)
    found = choose(world.database.hosts.all(), ("c2",), None, None, False)
    (outcome,) = precache.precache(world.database, world, "i", found, 10)
    assert outcome == Outcome("c2", "skipped", 0, "it is drained: thunder host undrain c2")
    assert world.asked == []


def test_reasons(world: World) -> None:
    """A host that refuses, one that loses its replica, one that is late: each with a reason."""

    def refuse() -> None:
        raise errors.PoolError("the local pool has 1 MiB free,\nimage i takes 4")

    world.agents["c1"] = refuse

    def gone() -> None:
        world.report("c2", "gone")
        world.report("c3", "filling", MIB)

    found = world.run([gone, *[lambda: None] * 100], 100)
    assert found == [
        Outcome("c1", "failed", 0, "the local pool has 1 MiB free, image i takes 4"),
        Outcome("c2", "failed", 0, "its replica was given up: see thunder-agent's log"),
        Outcome("c3", "failed", 25, "not complete after 100 s; the host continues to fill it"),
    ]


def test_one_that_dies_meanwhile(world: World) -> None:
    def all_but_c3() -> None:
        world.report("c1", "complete", 4 * MIB)
        world.report("c2", "complete", 4 * MIB)
        world.now += timedelta(hours=1)
        for host in ("c1", "c2"):
            world.heartbeat(host, "r1")

    found = world.run([all_but_c3, *[lambda: None] * 100], 10_000)
    assert [(outcome.result, outcome.reason) for outcome in found] == [
        ("complete", ""),
        ("complete", ""),
        ("failed", "its heartbeats stopped: is its agent running?"),
    ]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_bars_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    stream = Terminal()
    with progress.Bars(["c1", "c2"], 4 * MIB, stream) as bars:
        bars.show("c1", 4 * MIB, "complete")
        bars.show("c2", MIB, "filling, from c1")
    drawn = stream.getvalue()
    for part in ("c1", "100%", "complete", "c2", "25%", "filling, from c1", "━"):
        assert part in drawn


def test_lines_elsewhere() -> None:
    """A line for a new state or another 20 per cent, not for every poll."""
    stream, now = io.StringIO(), iter([0.0, 1.0, 2.0, 3.0])
    with progress.Bars(["c1"], 4 * MIB, stream, lambda: next(now)) as bars:
        for filled in (0, 4096, 8192, 2 * MIB, 2 * MIB + 1):
            bars.show("c1", filled, "filling")
        bars.show("c1", 4 * MIB, "complete")
    assert stream.getvalue().splitlines() == [
        "   1.0 s  c1    0%  0 of 4 MiB  filling",
        "   2.0 s  c1   50%  2 of 4 MiB  filling",
        "   3.0 s  c1  100%  4 of 4 MiB  complete",
    ]
