"""The lab itself: it leaves nothing behind, labs are isolated, and link limits are effective."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

from lab.cluster import Cluster, Options
from lab.errors import ConditionError, LabError
from lab.nodes.node import TREE, Node
from lab.nodes.services import Service
from lab.nodes.topology import Link, Topology
from lab.shell import run, wait_for

_BARE = Options(control_plane=False, services=False)


def _lab(name: str, compute: int = 1) -> Cluster:
    return Cluster(name, Topology.standard(storage=0, compute=compute, memory=512, disk=1), _BARE)


def _command(name: str, *arguments: str) -> list[str]:
    return [sys.executable, "-m", "lab", "--name", name, *arguments]


_UP = ("up", "--no-control-plane", "--storage", "0", "--compute", "2", "--memory", "512")


@dataclasses.dataclass(frozen=True)
class _Machine:
    """What a lab could leave behind on the machine."""

    processes: frozenset[str]
    links: frozenset[str]
    namespaces: frozenset[str]
    mounts: frozenset[str]
    loops: frozenset[str]

    @classmethod
    def now(cls, lab: Cluster) -> _Machine:
        """What names the lab on the machine, where other labs and builds of images go on."""

        def ours(line: str) -> bool:
            return lab.network.name in line or str(lab.folder) in line

        loops = json.loads(run(["losetup", "--json", "--list"]).stdout or '{"loopdevices": []}')
        return cls(
            processes=frozenset(_processes(lab)),
            links=frozenset(x["ifname"] for x in json.loads(run(["ip", "-j", "link"]).stdout)),
            namespaces=frozenset(filter(ours, run(["ip", "netns"]).stdout.splitlines())),
            mounts=frozenset(filter(ours, Path("/proc/self/mounts").read_text().splitlines())),
            loops=frozenset(
                loop["name"] for loop in loops["loopdevices"] if ours(str(loop["back-file"]))
            ),
        )


def _processes(lab: Cluster) -> Iterator[str]:
    inside = set(lab.network.pids())
    for process in psutil.process_iter(["pid", "cmdline", "status"]):
        line = " ".join(process.info["cmdline"] or [])
        if process.info["status"] != psutil.STATUS_ZOMBIE and (
            process.info["pid"] in inside or str(lab.folder) in line
        ):
            yield f"{process.info['pid']} {line}"


def _network(lab: Cluster) -> bool:
    return lab.network.exists()


def _kernels(lab: Cluster) -> bool:
    return len(lab.network.pids()) > 8


def _first_node(lab: Cluster) -> bool:
    return (lab.folder / "nodes/cmp1/control/ready").exists()


@pytest.mark.parametrize("moment", [_network, _kernels, _first_node, Cluster.is_up])
def test_down_after_kill_leaves_nothing(moment: Callable[[Cluster], bool]) -> None:
    lab = _lab("test-kill", compute=2)
    lab.down()
    # The folder of network namespaces remains mounted after its first use.
    run(["ip", "netns", "add", "thunder-test-kill"])
    run(["ip", "netns", "delete", "thunder-test-kill"])
    before = _Machine.now(lab)
    up = subprocess.Popen(_command(lab.name, *_UP), cwd=TREE, stderr=subprocess.DEVNULL)
    try:
        wait_for("that moment of up", lambda: moment(lab), timeout=600)
        during = _Machine.now(lab)
    finally:
        up.send_signal(signal.SIGKILL)
        up.wait()

    run(_command(lab.name, "down"), cwd=TREE)

    assert during.namespaces > before.namespaces
    wait_for("the processes to be gone", lambda: not list(_processes(lab)), timeout=10)
    assert _Machine.now(lab) == before
    assert [path.name for path in lab.folder.iterdir()] in (["logs"], [])


def test_down_stops_an_up_under_way() -> None:
    lab = _lab("test-stop", compute=2)
    up = subprocess.Popen(
        _command(lab.name, *_UP), cwd=TREE, stderr=subprocess.PIPE, stdout=subprocess.PIPE
    )
    wait_for("kernels", lambda: _kernels(lab), timeout=60)

    run(_command(lab.name, "down"), cwd=TREE)

    _, output = up.communicate(timeout=60)
    assert up.returncode == 130
    assert b"interrupted" in output
    assert not lab.network.exists()
    assert not list(_processes(lab))


def test_two_ups_of_one_name_do_not_mix() -> None:
    lab = _lab("test-twice", compute=1)
    up = subprocess.Popen(_command(lab.name, *_UP), cwd=TREE, stderr=subprocess.DEVNULL)
    try:
        wait_for("the first", lambda: _network(lab), timeout=60)
        with pytest.raises(LabError, match=f"process {up.pid} is bringing lab 'test-twice' up"):
            lab.up()
    finally:
        lab.down()
        assert up.wait(timeout=60) == 130


def test_a_part_that_fails_takes_all_down(monkeypatch: pytest.MonkeyPatch) -> None:
    lab = _lab("test-fail")

    def broken(_node: Node, _topology: Topology) -> None:
        raise LabError("no such luck")

    monkeypatch.setattr(Node, "prepare", broken)

    with pytest.raises(LabError, match="no such luck"):
        lab.up()

    assert not lab.network.exists()
    assert not lab.is_up()


_BOUND = """
import time
from tests.lab.test_lab import _lab
_lab("test-left").up(bound=True)
time.sleep(600)
"""


@pytest.mark.parametrize("moment", [_kernels, Cluster.is_up])
def test_a_lab_that_was_left_behind_is_taken_down(
    moment: Callable[[Cluster], bool], capsys: pytest.CaptureFixture[str]
) -> None:
    """By the next lab of that name, after a SIGKILL to every process that held it."""
    lab = _lab("test-left")
    owner = subprocess.Popen(
        [sys.executable, "-c", _BOUND], cwd=TREE, stderr=subprocess.DEVNULL, start_new_session=True
    )
    try:
        wait_for("that moment of up", lambda: moment(lab), timeout=600)
        os.killpg(owner.pid, signal.SIGKILL)
        wait_for("the kill", lambda: owner.poll() is not None, timeout=10)
        old = lab.network.pids()
        assert old

        lab.up()

        output = f"left behind by an earlier run (process {owner.pid}): taken down\n"
        assert output in capsys.readouterr().err
        assert not [pid for pid in old if psutil.pid_exists(pid)]
        assert lab.node("cmp1").run("hostname").stdout == "cmp1\n"
    finally:
        owner.kill()
        owner.wait()
        lab.down()


def test_labs_do_not_meet() -> None:
    labs = [_lab("test-a"), _lab("test-b")]
    try:
        with ThreadPoolExecutor() as pool:
            list(pool.map(Cluster.up, labs))
        one, other = (lab.node("cmp1") for lab in labs)
        assert one.address == other.address
        for node, text in ((one, "one"), (other, "other")):
            node.write("/root/which", text)
        assert [node.run("cat /root/which").stdout for node in (one, other)] == ["one", "other"]
        quiet = other.counters().received
        one.run(["ping", "-q", "-c", "20", "-i", "0.01", "10.77.0.1"])
        assert other.counters().received - quiet < 20 * 64

        labs[0].down()

        assert other.run("hostname").stdout == "cmp1\n"
    finally:
        for lab in labs:
            lab.down()


@pytest.fixture(scope="module")
def pair() -> Iterator[Cluster]:
    with _lab("test-pair", compute=2) as lab:
        yield lab


_RECEIVE = """
import socket
with socket.create_server(("0.0.0.0", 7000)) as server:
    print("listening", flush=True)
    connection, _ = server.accept()
    while connection.recv(1 << 20):
        pass
    connection.sendall(b"all of it")
"""
_SEND = """
import socket, sys, time
began = time.monotonic()
with socket.create_connection((sys.argv[1], 7000)) as connection:
    for _ in range(int(sys.argv[2])):
        connection.sendall(bytes(1 << 20))
    connection.shutdown(socket.SHUT_WR)
    assert connection.recv(100) == b"all of it"
print(int(sys.argv[2]) / (time.monotonic() - began))
"""


def _throughput(sender: Node, receiver: Node, mib: int) -> float:
    """MiB per second of one TCP connection."""
    argv = receiver.ssh("python3 -c '" + _RECEIVE + "'")
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as listener:
        assert listener.stdout is not None
        assert listener.stdout.readline() == "listening\n"
        done = sender.run(["python3", "-c", _SEND, receiver.name, str(mib)])
    return float(done.stdout)


@pytest.mark.parametrize("capped", ["sender", "receiver"])
def test_a_link_is_capped_in_both_directions(pair: Cluster, capped: str) -> None:
    sender, receiver = pair.node("cmp1"), pair.node("cmp2")
    for node in (sender, receiver):
        pair.set_link(node.name, Link("0bit"))
    free = _throughput(sender, receiver, 200)
    name = {"sender": "cmp1", "receiver": "cmp2"}[capped]
    pair.set_link(name, Link("100mbit"))
    before = sender.counters(), receiver.counters()

    limited = _throughput(sender, receiver, 20)

    rate = 100e6 / 8 / 2**20
    assert free > 3 * rate
    assert 0.7 * rate < limited < 1.05 * rate
    sent = sender.counters().sent - before[0].sent
    received = receiver.counters().received - before[1].received
    # Headers are counted once for a large segment, so the two may differ.
    assert 20 * 2**20 <= sent < 22 * 2**20
    assert 20 * 2**20 <= received < 22 * 2**20


def test_delay_is_on_what_a_node_sends(pair: Cluster) -> None:
    node = pair.node("cmp1")
    # The fastest of some: a machine with other work to do is late with the rest.
    ping = "ping -q -c 10 -i 0.2 cmp2 | sed -n 's,.*= \\([^/]*\\)/.*,\\1,p'"
    pair.set_link("cmp1", Link("0bit", "0ms"))
    node.run("ping -c 1 cmp2")
    near = float(node.run(ping).stdout)
    pair.set_link("cmp1", Link("0bit", "40ms"))

    far = float(node.run(ping).stdout)

    pair.set_link("cmp1", Link("0bit", "0ms"))
    assert 38 < far - near < 60


def test_power_cut_keeps_the_disks(pair: Cluster) -> None:
    node = pair.node("cmp1")
    node.run("echo root > /root/file; sync; echo data | dd of=/dev/ubdb oflag=direct conv=sync")
    booted = node.run("cat /proc/sys/kernel/random/boot_id").stdout

    node.kill()

    assert not node.running()
    assert node.run("true", check=False).returncode == 255
    node.start()
    assert node.run("cat /proc/sys/kernel/random/boot_id").stdout != booted
    assert node.run("cat /root/file; head -c 5 /dev/ubdb").stdout == "root\ndata\n"
    assert node.run("ping -q -c 1 cmp2", check=False).returncode == 0
    with pytest.raises(LabError, match="cmp1 is running; kill it first"):
        node.start()


def test_a_node_cannot_change_the_tree(pair: Cluster) -> None:
    done = pair.node("cmp2").run(f"test -e {TREE}/setup.cfg && touch {TREE}/setup.cfg", check=False)
    assert done.returncode == 1
    assert "Read-only file system" in done.stderr


def test_daemons_of_a_node(pair: Cluster) -> None:
    node = pair.node("cmp2")
    node.catalog["ticker"] = Service(
        "ticker",
        ("sh", "-c", "sleep 1; echo started $WORD; while :; do sleep 0.1; date +%N; done"),
        ready="grep -q started $log",
        env={"WORD": "two words"},
    )
    node.catalog["broken"] = Service("broken", ("sh", "-c", "echo my mistake; exit 3"), "false")

    node.service_start("ticker")

    log = node.logs / "ticker.log"
    assert "started two words" in log.read_text()
    node.service_signal("ticker", signal.SIGSTOP)
    time.sleep(0.5)  # a child that was just being forked may still write a line
    size = log.stat().st_size
    time.sleep(0.5)  # time for five more lines
    assert log.stat().st_size == size
    assert node.service_running("ticker")
    node.service_signal("ticker", signal.SIGCONT)
    node.service_stop("ticker")
    assert not node.service_running("ticker")
    with pytest.raises(ConditionError, match=r"broken: it ended; the end of .*\nmy mistake"):
        node.service_start("broken")


def test_a_lab_in_use_is_not_taken_down(pair: Cluster) -> None:
    with pytest.raises(LabError, match=f"'test-pair' is up, and process {os.getpid()} uses it"):
        pair.up()
    assert pair.node("cmp1").running()


def test_the_state_is_readable_from_another_process(pair: Cluster) -> None:
    done = run(_command(pair.name, "exec", "cmp2", "cat /etc/iscsi/initiatorname.iscsi"), cwd=TREE)
    assert done.stdout == "InitiatorName=iqn.2026-11.org.thunder:cmp2\n"
    status = run(_command(pair.name, "status"), cwd=TREE).stdout
    assert "10.77.0.12" in status
    assert f"all time limits are multiplied by {pair.pace:.1f}" in status
    assert os.environ.get("HOME", "/") not in status
