"""bench.field: its figures, and whole runs in a cloud that is simulated."""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from openstack.exceptions import SDKException

from bench import field as bench
from bench.field import Measured, measure
from bench.fielding import turns as turning
from bench.fielding.cloud import TAG, CloudError, Invalid, OpenStack, Seen, Wanted, connect
from bench.fielding.figures import (
    Facts,
    Failure,
    Outcome,
    Setting,
    Turn,
    hosts,
    order,
    percentile,
    report,
    summarize,
    table,
)
from bench.fielding.turns import Prompt, Ssh

RUN = "thunder-field-0000"
FACTS = Facts(1000, "qcow2", 1, 512, {"python": "3.11"})
SETTING = Setting(2, 1, 10, "console", 60.0, FACTS)
GOOD = Outcome(1.0, 2.0, 4.0, None, "host-secret-1")
BAD = Outcome(1.0, failure=Failure.SERVER)


# -- figures -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("seconds", "percent", "expected"),
    [
        ([3.0], 50, 3.0),
        ([1.0, 2.0], 50, 1.0),
        ([2.0, 1.0, 3.0], 50, 2.0),
        ([float(n) for n in range(1, 100)], 99, 99.0),  # of fewer than 100: the longest
        ([float(n) for n in range(1, 101)], 99, 99.0),
        ([float(n) for n in range(1, 301)], 99, 297.0),
        ([], 50, None),
    ],
)
def test_percentiles_are_values_that_were_measured(
    seconds: list[float], percent: int, expected: float | None
) -> None:
    assert percentile(seconds, percent) == expected


def test_what_failed_is_slower_than_all_others() -> None:
    assert percentile([None, 1.0, 2.0], 50) == 2.0
    assert percentile([None, 1.0, 2.0], 99) is None
    assert percentile([None, None, 2.0], 50) is None


def test_rounds_go_to_and_fro() -> None:
    assert [order("abc", number) for number in (1, 2, 3)] == [
        tuple("abc"),
        tuple("cba"),
        tuple("abc"),
    ]


def test_the_first_round_is_apart_from_the_others() -> None:
    fast, slow = Outcome(1.0, 2.0, 4.0), Outcome(3.0, 3.0, 12.0)
    turns = [
        Turn(number, kind, (outcome, outcome))
        for number in (1, 2, 3)
        for kind, outcome in (("a", fast), ("b", slow))
    ]
    lines = summarize(turns, ["a", "b"])
    assert [(line.rounds, line.servers) for line in lines[::8]] == [("1", 2), ("2 to 3", 4)]
    answers = [line for line in lines if line.measure == "answers"]
    assert [line.ratio for line in answers] == [1.0, 3.0, 1.0, 3.0]
    both = [line.p50 for line in lines if line.measure == "volume + answers"]
    assert both == [5.0, 15.0, 5.0, 15.0]


def test_no_ratio_to_what_failed() -> None:
    lines = summarize([Turn(1, "a", (BAD,)), Turn(1, "b", (GOOD,))], ["a", "b"])
    by = {(line.measure, line.type): line for line in lines}
    assert by["answers", "b"].ratio is None
    assert (by["answers", "a"].failed, by["answers", "a"].longest) == (1, None)
    assert by["volume", "b"].ratio == 1.0  # its server failed later
    assert "-" in table(lines)


def test_nothing_measured() -> None:
    assert [line.servers for line in summarize([], ["a"])] == [0] * 4
    assert table(summarize([], ["a"])).startswith("rounds")


def test_a_report_has_no_names_and_no_ids() -> None:
    turns = [Turn(1, "type-secret", (GOOD, BAD)), Turn(1, "other-secret", (GOOD, GOOD))]
    labels = {"type-secret": "type 1", "other-secret": "type 2"}
    found = report(
        SETTING, turns, labels, date="2026-01-01", resolution=1.04, interrupted=False, left=3
    )
    text = json.dumps(found)
    assert "secret" not in text
    assert found["hosts"] == 1
    assert found["not_deleted"] == 3
    assert found["failures"] == [{"type": "type 1", "failure": "server failed", "servers": 1}]
    assert found["turns"][0]["servers"][0]["host"] == 1
    assert found["turns"][0]["servers"][1] == {
        "volume_s": 1.0, "active_s": None, "answer_s": None, "failure": "server failed",
        "host": None,
    }  # fmt: skip


# -- runs --------------------------------------------------------------------------------------


class FakeClock:
    """Time passes only while somebody sleeps."""

    def __init__(self) -> None:
        self.time = 0.0

    def now(self) -> float:
        return self.time

    def sleep(self, seconds: float) -> None:
        self.time += seconds


@dataclass
class _Thing:
    at: float  # when it was requested
    kind: str
    deleted: bool = False


@dataclass
class FakeCloud:
    """Volumes take 2 seconds, servers 3 to be ACTIVE and 5 to answer; what is in the sets differs.

    Servers and volumes are numbered in the order of their requests, from 1.

    :ivar failing: servers that get into error
    :ivar refused: servers whose requests are refused
    :ivar silent: servers that never answer
    :ivar bad: volumes that get into error
    :ivar stuck: volumes whose deletion is refused, as while there are servers
    :ivar on_list: called at each list of servers
    """

    clock: FakeClock = field(default_factory=FakeClock)
    failing: set[int] = field(default_factory=set)
    refused: set[int] = field(default_factory=set)
    silent: set[int] = field(default_factory=set)
    bad: set[int] = field(default_factory=set)
    stuck: set[int] = field(default_factory=set)
    on_list: Callable[[], None] = lambda: None
    made: dict[str, _Thing] = field(default_factory=dict)
    turns: list[str] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def check(self, wanted: Wanted) -> Facts:
        return FACTS

    def create_volume(self, run: str, kind: str) -> str:
        if not self.turns or self.turns[-1] != kind or not self._there("volume"):
            self.turns.append(kind)
        return self._make("volume")

    def create_server(self, run: str, number: int, volume: str) -> str:
        assert self.volumes(run)[volume].status == "available"
        server = self._make("server")
        if _number(server) in self.refused:
            del self.made[server]
            raise CloudError("quota exceeded for project-secret")
        return server

    def _make(self, kind: str) -> str:
        with self.lock:
            every = [name for name in self.made if name.startswith(kind)]
            name = f"{kind}-{len(every) + 1}"
            self.made[name] = _Thing(self.clock.now(), kind)
            return name

    def _there(self, kind: str) -> dict[str, _Thing]:
        return {n: t for n, t in list(self.made.items()) if t.kind == kind and not t.deleted}

    def volumes(self, run: str) -> dict[str, Seen]:
        found = {}
        for name, thing in self._there("volume").items():
            done = self.clock.now() - thing.at >= 2
            wrong = "error" if _number(name) in self.bad else "available"
            found[name] = Seen(wrong if done else "creating")
        return found

    def servers(self, run: str) -> dict[str, Seen]:
        self.on_list()
        return {name: self._seen(name, thing) for name, thing in self._there("server").items()}

    def _seen(self, name: str, thing: _Thing) -> Seen:
        if self.clock.now() - thing.at < 3:
            return Seen("BUILD")
        if _number(name) in self.failing:
            return Seen("ERROR", "no valid host: host-secret")
        return Seen("ACTIVE", "", f"host-secret-{_number(name) % 2}")

    def delete_volume(self, volume: str) -> None:
        if _number(volume) in self.stuck or self._there("server"):
            raise CloudError("it is attached")
        self.made[volume].deleted = True

    def delete_server(self, server: str) -> None:
        self.made[server].deleted = True

    def console(self, server: str) -> str:
        if _number(server) in self.silent or self.clock.now() - self.made[server].at < 5:
            return "Booting"
        return "Debian\nguest login: "

    def left(self) -> set[str]:
        return {name for name, thing in self.made.items() if not thing.deleted}


def _number(name: str) -> int:
    return int(name.partition("-")[2])


def run(
    cloud: FakeCloud, notes: list[str] | None = None, *, servers: int = 3, rounds: int = 1
) -> Measured:
    return measure(
        cloud,
        RUN,
        ["thunder", "lvm"],
        Prompt(cloud, re.compile("login:")),
        (list[str]() if notes is None else notes).append,
        servers=servers,
        rounds=rounds,
        timeout=60.0,
        clock=cloud.clock,
    )


def outcomes(measured: Measured) -> list[Outcome]:
    return [replace(each, host="") for turn in measured.turns for each in turn.outcomes]


OK = Outcome(2.0, 3.0, 5.0)


def test_a_run() -> None:
    cloud = FakeCloud()
    measured = run(cloud, rounds=3)
    assert outcomes(measured) == [OK] * 18
    assert (measured.left, measured.interrupted, measured.resolution) == ((), False, 1.0)
    assert cloud.left() == set()
    assert len(hosts(measured.turns)) == 2


def test_the_types_alternate() -> None:
    cloud = FakeCloud()
    measured = run(cloud, rounds=3)
    expected = ["thunder", "lvm", "lvm", "thunder", "thunder", "lvm"]
    assert [turn.type for turn in measured.turns] == expected
    assert cloud.turns == expected


def test_servers_that_fail_are_counted_and_end_nothing() -> None:
    cloud, notes = FakeCloud(failing={1}, refused={5}, bad={3}), list[str]()
    measured = run(cloud, notes)
    failures = [each.failure for each in outcomes(measured)]
    # The servers are requested by threads: which of them fails is not known.
    assert sorted(map(str, failures[:3])) == ["None", "server failed", "volume failed"]
    assert sum(failure is None for failure in failures) == 3
    assert any("no valid host" in note for note in notes)
    assert any("quota exceeded" in note for note in notes)
    assert cloud.left() == set()


def test_a_server_that_never_answers() -> None:
    cloud = FakeCloud(silent={2})
    measured = run(cloud)
    late = [each for each in outcomes(measured) if each.failure]
    assert late == [Outcome(2.0, 3.0, None, Failure.SILENT)]
    assert cloud.left() == set()


def test_servers_and_volumes_that_are_never_there() -> None:
    cloud = FakeCloud()
    cloud._seen = lambda name, thing: Seen("BUILD")  # type: ignore[method-assign]
    measured = run(cloud)
    assert {each.failure for each in outcomes(measured)} == {Failure.SERVER_LATE}
    cloud = FakeCloud()
    real = cloud.volumes
    cloud.volumes = lambda run: {n: Seen("creating") for n in real(run)}  # type: ignore[method-assign]
    assert {each.failure for each in outcomes(run(cloud))} == {Failure.VOLUME_LATE}


def test_an_api_that_does_not_always_answer() -> None:
    calls = itertools.count()

    def refuse() -> None:
        if next(calls) % 2:
            raise CloudError("503")

    cloud, notes = FakeCloud(on_list=refuse), list[str]()
    measured = run(cloud, notes)
    assert [each.failure for each in outcomes(measured)] == [None] * 6
    assert sum("503" in note for note in notes) == 1
    assert cloud.left() == set()


def test_ctrl_c_deletes_everything() -> None:
    cloud, calls = FakeCloud(), itertools.count(1)

    def interrupt() -> None:
        if next(calls) == 14:  # in the second turn
            raise KeyboardInterrupt

    cloud.on_list = interrupt
    measured = run(cloud)
    assert measured.interrupted
    assert [turn.type for turn in measured.turns] == ["thunder"]  # what is complete is shown
    assert len(cloud.made) == 12
    assert cloud.left() == set()
    assert "lvm" in bench.show(measured, ["thunder", "lvm"])


def test_a_second_ctrl_c_says_that_all_is_left() -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    cloud, notes = FakeCloud(on_list=interrupt), list[str]()
    measured = run(cloud, notes)
    assert measured.interrupted
    assert [str(each) for each in measured.left] == [
        "server (all): interrupted",
        "volume (all): interrupted",
    ]
    assert any(note.startswith("NOT DELETED") for note in notes)


def test_an_error_of_this_bench_deletes_everything() -> None:
    cloud = FakeCloud()
    cloud.console = lambda server: 1 / 0  # type: ignore[assignment,return-value,method-assign]
    with pytest.raises(ZeroDivisionError):
        run(cloud)
    assert len(cloud.made) == 6
    assert cloud.left() == set()


def test_what_cannot_be_deleted_is_reported() -> None:
    cloud, notes = FakeCloud(stuck={2}), list[str]()
    measured = run(cloud, notes)
    assert [str(each) for each in measured.left] == ["volume volume-2: it is attached"]
    assert "NOT DELETED: volume volume-2: it is attached" in notes
    assert cloud.left() == {"volume-2"}
    assert len(outcomes(measured)) == 6  # the second type was measured nevertheless


def test_a_list_that_is_refused_is_reported() -> None:
    def refuse() -> None:
        raise CloudError("503")

    measured = run(FakeCloud(on_list=refuse))
    assert str(measured.left[0]) == "server (all): 503"
    assert {each.failure for each in outcomes(measured)} == {Failure.SERVER_LATE}


# -- openstacksdk ------------------------------------------------------------------------------


WANTED = Wanted(("thunder", "lvm"), "debian", "small", "private", 10)
KEPT = {"status": "active", "disk_format": "qcow2", "size": 1000, "min_disk": 0}


def connection(**image: object) -> Any:
    """As much of openstacksdk's as a check asks, with everything that is wanted."""

    def find(**attributes: object) -> Callable[[str], object]:
        return lambda name: SimpleNamespace(id=f"id-of-{name}", **attributes)

    kinds = [SimpleNamespace(name=name, id=f"id-of-{name}") for name in WANTED.types]
    point = SimpleNamespace(max_microversion=(2, 96))
    return SimpleNamespace(
        image=SimpleNamespace(find_image=find(**{**KEPT, "virtual_size": None, **image})),
        compute=SimpleNamespace(
            find_flavor=find(vcpus=1, ram=512), get_endpoint_data=lambda: point
        ),
        network=SimpleNamespace(find_network=find()),
        block_storage=SimpleNamespace(types=lambda: kinds, get_endpoint_data=lambda: None),
    )


def test_a_check_returns_what_a_report_says() -> None:
    facts = OpenStack(connection()).check(WANTED)
    assert replace(facts, versions={}) == Facts(1000, "qcow2", 1, 512, {})
    assert set(facts.versions) == {"python", "openstacksdk", "compute API"}
    assert facts.versions["compute API"] == "2.96"


def test_a_check_tells_all_problems_at_once() -> None:
    cloud = connection(status="queued", virtual_size=(20 << 30) + 1)

    def refuse(name: str) -> None:
        raise SDKException("forbidden")

    cloud.compute.find_flavor = refuse
    cloud.network.find_network = lambda name: None
    with pytest.raises(Invalid) as raised:
        OpenStack(cloud).check(replace(WANTED, types=("lvm", "fast")))
    assert str(raised.value).splitlines() == [
        "flavor 'small': forbidden",
        "there is no network 'private'",
        "there is no volume type 'fast'",
        "the image is queued, not active",
        "the image needs a volume of 21 GiB: --size 21",
    ]


def test_only_what_has_the_tag_is_of_a_run() -> None:
    cloud = connection()
    mine = SimpleNamespace(id="1", status="available", metadata={TAG: RUN})
    other = SimpleNamespace(id="2", status="available", metadata={})
    cloud.block_storage.volumes = lambda **_: [mine, other]
    assert set(OpenStack(cloud).volumes(RUN)) == {"1"}


def test_no_client(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openstack", None)
    with pytest.raises(Invalid, match="openstacksdk is missing"):
        connect()


def test_no_credentials(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in [each for each in os.environ if each.startswith("OS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("OS_CLIENT_CONFIG_FILE", str(tmp_path / "none.yaml"))
    with pytest.raises(Invalid, match="Set OS_CLOUD"):
        connect()


# -- readiness, command line -------------------------------------------------------------------


@pytest.mark.parametrize(("banner", "ready"), [(b"SSH-2.0-x\r\n", True), (b"220 smtp\r\n", False)])
def test_ssh_is_ready_when_it_says_what_it_is(
    banner: bytes, ready: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]

        def serve() -> None:
            with server.accept()[0] as connection:
                connection.sendall(banner)

        thread = threading.Thread(target=serve)
        thread.start()
        real = turning._has_ssh
        monkeypatch.setattr(turning, "_has_ssh", lambda address: real(address, port))
        assert Ssh().is_ready("id", Seen("ACTIVE", addresses=("127.0.0.1",))) is ready
        thread.join()
    assert not Ssh().is_ready("id", Seen("ACTIVE", addresses=("127.0.0.1",)))
    assert not Ssh().is_ready("id", Seen("ACTIVE"))


ARGUMENTS = ["--types", "a", "b", "--image", "i", "--flavor", "f", "--network", "n"]


@pytest.mark.parametrize(
    "more",
    [
        ["--network", "none"],
        ["--types", "a", "a"],
        ["--labels", "one"],
        ["--servers", "0"],
        ["--prompt", "("],
        ["--report", "/nowhere/at/all.json"],
    ],
)
def test_invalid_options(more: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as raised:
        bench.main([*ARGUMENTS, *more])
    assert raised.value.code == 2
    assert more[0] in capsys.readouterr().err


def test_a_cloud_that_lacks_something(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def connect() -> FakeCloud:
        raise Invalid("there is no image 'i'")

    monkeypatch.setattr(bench, "connect", connect)
    assert bench.main(ARGUMENTS) == 2
    assert "there is no image 'i'\nNothing was created." in capsys.readouterr().err


def test_nohup_is_respected() -> None:
    program = (
        "import signal\n"
        "from bench import field\n"
        "signal.signal(signal.SIGHUP, signal.SIG_IGN)\n"
        "field._stop_on_signals()\n"
        "signal.raise_signal(signal.SIGHUP)\n"
        "try:\n"
        "    signal.raise_signal(signal.SIGTERM)\n"
        "except KeyboardInterrupt as error:\n"
        "    print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=Path(bench.__file__).parents[1],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "SIGTERM\n"


def test_the_folder_alone_is_enough(tmp_path: Path) -> None:
    shutil.copytree(Path(bench.__file__).parent, tmp_path / "bench")
    program = (
        "import sys, bench.field\n"
        "known = {'bench', *sys.stdlib_module_names}\n"
        "print({name.split('.')[0] for name in set(sys.modules) - before} - known)"
    )
    done = subprocess.run(
        [sys.executable, "-c", f"import sys\nbefore = set(sys.modules)\n{program}"],
        cwd=tmp_path,
        env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "set()\n"
