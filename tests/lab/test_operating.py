"""What an operator does: pre-cache, inspect, drain, run the doctor; and invalid input."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import pytest

from lab.cloud import config
from lab.inside import blocks
from lab.nodes.node import Node
from lab.play.journey import Journey

MIB = 1 << 20
SIZE = 32 * MIB
NAME = "operating"
_COMMAND = "python -m cinder_thunder.cli.thunder"
_CINDER = "/var/lib/cinder/cinder.conf"


@dataclass(frozen=True)
class Image:
    id: str
    digest: str


@pytest.fixture(scope="module")
def image(journey: Journey, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Image]:
    raw = tmp_path_factory.mktemp("image") / "image.raw"
    with open(raw, "wb") as file:
        file.truncate(SIZE)
        file.write(random.Random(6).randbytes(24 * MIB))
    found = journey.upload(raw, NAME, "raw")
    yield Image(found, blocks.expected_digest(raw, ()))
    journey.cluster.openstack("image", "delete", found)


@pytest.fixture(scope="module")
def volume(journey: Journey, image: Image) -> Iterator[str]:
    made = journey.create_volume(NAME, 1, "--image", image.id)
    yield made
    journey.delete_volumes([made])


def thunder(journey: Journey, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The operator's command on a host with Cinder's configuration, with credentials for Glance."""
    controller = journey.cluster.controller
    conf = str(controller.folder / "cinder/cinder.conf")
    command = [sys.executable, "-m", "cinder_thunder.cli.thunder", *arguments]
    done = controller.run([*command, "--config-file", conf], check=False)
    print(
        f"$ thunder {' '.join(arguments)}\n{done.stdout}{done.stderr}[exit code {done.returncode}]"
    )
    return done


def shown(done: subprocess.CompletedProcess[str]) -> Any:
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_a_precached_host_boots_from_its_own_disk(
    journey: Journey, image: Image, volume: str
) -> None:
    nodes = journey.cluster.of_kind("compute")
    done = thunder(journey, "image", "precache", NAME, "--all", "--wait", "-f", "json")
    assert {(row["Host"], row["Result"]) for row in shown(done)} == {
        (node.name, "complete") for node in nodes
    }
    for node in nodes:  # progress, a line for each step of a host
        assert f"  {node.name}  100%  24 of 24 MiB  complete" in done.stderr
    tree = thunder(journey, "image", "tree", NAME).stdout
    assert all(f"{node.name}  base complete 100%" in tree for node in nodes), tree
    for node in (nodes[0], nodes[2]):
        before, came = journey.from_network(node), node.counters().received
        attached = journey.attach_cached(node, volume)
        assert journey.digest(node, attached.path, SIZE) == image.digest
        came = node.counters().received - came
        print(f"{node.name}: {came / MIB:.1f} MiB over its cable, image bytes: "
              f"{journey.from_network(node) - before}")  # fmt: skip
        assert journey.from_network(node) == before
        assert came < 8 * MIB  # the API, RPC and iSCSI; not the image's 24 MiB
        if node is nodes[0]:
            _look(journey, node, image, volume)
        journey.detach(node, volume)


def _look(journey: Journey, node: Node, image: Image, volume: str) -> None:
    """The output for an attached volume, with and without the agent."""
    found = shown(thunder(journey, "volume", "show", NAME, "-f", "json"))
    assert (found["id"], found["image"], found["hosts"]) == (volume, image.id, node.name)
    assert (found["mode"], found["agent"], found["coverage"]) == ("cached", "answers", "100.0%")
    assert found["hits"] == "100.0%"
    host = shown(thunder(journey, "host", "show", node.name, "-f", "json"))
    assert (host["state"], host["agent"], host["stacks"]) == ("alive", "answers", 1)
    node.service_stop("thunder-agent")
    listed = node.run(f"{_COMMAND} stack list").stdout
    print(f"{node.name}$ thunder stack list, its agent stopped\n{listed}")
    (row,) = [line.split("|") for line in listed.splitlines() if volume in line]
    assert [field.strip() for field in row[2:4]] == ["cached", "ready"]
    assert [field.strip() for field in row[6:8]] == ["100.0%", "100.0%"]
    node.service_start("thunder-agent")


def test_a_drained_host_is_left_out(journey: Journey, image: Image, volume: str) -> None:
    name = journey.cluster.of_kind("compute")[2].name
    assert thunder(journey, "host", "drain", name).returncode == 0
    try:
        command = ("image", "precache", image.id, "--host", name, "--wait", "-f", "json")
        done = thunder(journey, *command)
        assert done.returncode == 1
        (row,) = json.loads(done.stdout)
        assert (row["Result"], row["Reason"]) == (
            *("skipped",),
            f"it is drained: thunder host undrain {name}",
        )
        assert f"warning: {name} is left out: it is drained" in done.stderr
    finally:
        assert thunder(journey, "host", "undrain", name).returncode == 0


def test_bad_input(journey: Journey, image: Image, volume: str) -> None:
    """One line each, exit code 2, and nothing was changed."""
    twins = [
        journey.cluster.ask(
            lambda cloud: str(
                cloud.image.create_image(
                    "twin", container_format="bare", disk_format="raw", allow_duplicates=True
                ).id
            )
        )
        for _ in range(2)
    ]
    before = journey.rows()
    unknown = "there is no replica of an image nothing: thunder image list shows all of them"
    cases = {
        ("image", "precache", "nothing", "--all"): unknown,
        ("image", "evict", "nothing"): unknown,
        ("image", "precache", "twin", "--all"): f"may be {', '.join(sorted(twins))}",
        ("image", "precache", twins[0], "--all"): "its first volume creates one",
        ("image", "precache", NAME): "select hosts: either --host (once or more), or",
        ("image", "precache", NAME, "--host", "cmp9"): "there is no compute host cmp9: known are",
        ("host", "drain", "cmp9"): "there is no host cmp9: known are cmp1, cmp2, cmp3, stor1@",
        ("volume", "show", "nothing"): "there is no volume nothing: openstack volume list",
        ("location", "show", "nothing"): "there is no location nothing: thunder location list",
    }
    try:
        with ThreadPoolExecutor(2) as threads:
            done = list(threads.map(lambda words: thunder(journey, *words), cases))
        for answer, message in zip(done, cases.values(), strict=True):
            (line,) = answer.stderr.splitlines()
            assert message in line
            assert (answer.returncode, answer.stdout) == (2, "")
        assert journey.rows() == before
    finally:
        journey.cluster.ask(lambda cloud: [cloud.image.delete_image(twin) for twin in twins])


def test_no_right_to_look(journey: Journey) -> None:
    node = journey.cluster.of_kind("compute")[0]
    node.write("/tmp/thunder.conf", config.agent(node.spec))  # readable by anyone
    done = node.run(
        "setpriv --reuid=65534 --regid=65534 --clear-groups "
        f"{_COMMAND} stack list --agent-config-file /tmp/thunder.conf",
        check=False,
    )
    print(done.stderr, done.returncode)
    assert (done.returncode, done.stdout, done.stderr) == (
        *(2, ""),
        "no permission to read /var/lib/thunder/state.json and device-mapper: run it as root\n",
    )


# -- the doctor ---------------------------------------------------------------------------------


def doctor(node: Node, *options: str, prefix: str = "") -> tuple[int, dict[str, dict[str, str]]]:
    """The doctor's exit code, and its rows by name."""
    done = node.run(f"{prefix}{_COMMAND} doctor {' '.join(options)} -f json", check=False)
    assert "Traceback" not in done.stderr, done.stderr
    return done.returncode, {row["Check"]: row for row in json.loads(done.stdout)}


@dataclass(frozen=True)
class Fault:
    """How a fault is injected into a host and removed, and the check that must find it."""

    what: str
    inject: Callable[[Node], object]
    heal: Callable[[Node], object]
    check: str
    message: str
    options: tuple[str, ...] = ()
    prefix: str = ""
    #: Other checks that cannot pass then.
    also: frozenset[str] = frozenset()


def script(text: str) -> Callable[[Node], object]:
    return lambda node: node.run(text)


def nothing(node: Node) -> None:
    pass


_COPY = "/tmp/doctor.conf"


def copied(source: str, old: str, new: str, also: str = "") -> Callable[[Node], object]:
    """Copy a configuration file with another value of an option."""
    return script(
        f"sed 's|^{old} *=.*|{new}|' {source} > {_COPY}; chmod 644 {_COPY}; "
        f"cmp -s {source} {_COPY} && exit 1; {also or 'true'}"
    )


_THUNDER = "/etc/thunder/thunder.conf"
_AS_COPY = ("--agent-config-file", _COPY)
_AS_CINDER = ("--config-file", _COPY)

AGENT = [
    Fault(
        "agent stopped",
        lambda node: node.service_stop("thunder-agent"),
        lambda node: node.service_start("thunder-agent"),
        *("agent", "thunder-agent is not running (/run/thunder/agent.sock: "),
    ),
    Fault(
        "agent hung",
        lambda node: node.service_signal("thunder-agent", signal.SIGSTOP),
        lambda node: node.service_signal("thunder-agent", signal.SIGCONT),
        *("agent", "thunder-agent did not answer in 5 s (/run/thunder/agent.sock)"),
    ),
    Fault(
        "socket open to all",
        script("chmod 666 /run/thunder/agent.sock"),
        script("chmod 600 /run/thunder/agent.sock"),
        *("agent", "/run/thunder/agent.sock has mode 666"),
    ),
    Fault(
        "not root",
        copied(_THUNDER, "rack", "rack = elsewhere"),
        nothing,
        *("rights", "not root: devices and the agent's socket are out of reach"),
        options=_AS_COPY,
        prefix="setpriv --reuid=65534 --regid=65534 --clear-groups ",
    ),
]
HOST = [
    Fault(
        "a module missing",
        script("rmmod dm_cache_smq dm_cache && mount -t tmpfs none /lib/modules"),
        script("umount /lib/modules && modprobe -a dm_cache dm_cache_smq"),
        *("device-mapper", "the kernel has no dm_cache (target cache), dm_cache_smq"),
    ),
    Fault(
        "a tool missing",
        script("mount --bind /dev/null $(readlink -f /usr/sbin/thin_dump)"),
        script("umount $(readlink -f /usr/sbin/thin_dump)"),
        *("tools", "not installed: "),
    ),
    Fault(
        "no initiator name",
        script("mount --bind /dev/null /etc/iscsi/initiatorname.iscsi"),
        script("umount /etc/iscsi/initiatorname.iscsi"),
        *("iSCSI initiator", "/etc/iscsi/initiatorname.iscsi gives no InitiatorName"),
    ),
    Fault(
        "clock a minute ahead",
        script("date -s @$(($(date +%s) + 60))"),
        script("date -s @$(($(date +%s) - 60))"),
        *("clock", "this host's clock is "),
    ),
]
OPTIONS = [
    Fault(
        "pool device gone",
        copied(_THUNDER, "pool_device", "pool_device = /dev/nothing"),
        nothing,
        *("local pool", "there is no block device /dev/nothing: check the path"),
        options=_AS_COPY,
    ),
    Fault(
        "another host's address",
        copied(_THUNDER, "address", "address = 10.99.0.1"),
        nothing,
        *("address", "10.99.0.1 is not an address of this host"),
        options=_AS_COPY,
    ),
    Fault(
        "transport_url wrong",
        copied(_THUNDER, "transport_url", "transport_url = rabbit://a:b@10.77.0.1:1/"),
        nothing,
        *("RPC", "thunder-tracker did not answer clock in 5 s"),
        options=_AS_COPY,
    ),
]
#: Hosts with a fault may be late.
_ELSEWHERE = frozenset({"hosts"})
STORAGE = [
    Fault(
        "database URL wrong",
        copied(_CINDER, "connection", "connection = mysql+pymysql://a:b@10.77.0.1:1/cinder"),
        nothing,
        *("database", "does not answer: "),
        options=_AS_CINDER,
        also=_ELSEWHERE,
    ),
    Fault(
        "tables missing",
        copied(_CINDER, "connection", "connection = sqlite:////tmp/doctor.sqlite"),
        nothing,
        *("tables", "Thunder's tables are at revision None, this code needs "),
        options=_AS_CINDER,
        also=_ELSEWHERE,
    ),
    Fault(
        "volume group missing",
        copied(_CINDER, "volume_group", "volume_group = nothing"),
        nothing,
        *("thunder: thin pool", "there is no volume group nothing; there are: cinder-volumes"),
        options=_AS_CINDER,
        also=_ELSEWHERE,
    ),
    Fault(
        "target_helper wrong",
        copied(_CINDER, "target_helper", "target_helper = tgtadm"),
        nothing,
        *("thunder: options", "target_helper is tgtadm"),
        options=_AS_CINDER,
        also=_ELSEWHERE,
    ),
]


@pytest.mark.long
def test_the_doctor(journey: Journey) -> None:
    """All checks pass; then each fault is found, and nothing else is reported."""
    computes = journey.cluster.of_kind("compute")
    storage = journey.cluster.of_kind("storage")[0]
    cinder = ("--config-file", _CINDER)
    healthy: list[tuple[Node, tuple[str, ...]]] = [(node, ()) for node in computes]
    healthy.append((storage, cinder))

    def all_well(place: tuple[Node, tuple[str, ...]]) -> list[str]:
        node, options = place
        code, rows = doctor(node, *options)
        assert (code, _failed(rows)) == (0, {})
        return [f"{node.name}, all well:", *_printed(rows)]

    def faults(place: tuple[Node, list[Fault]]) -> None:
        for fault in place[1]:
            _injected(place[0], fault)

    with ThreadPoolExecutor() as threads:
        for report in list(threads.map(all_well, healthy)):
            print("\n".join(report))
        places = list(zip((*computes, storage), (AGENT, HOST, OPTIONS, STORAGE), strict=True))
        list(threads.map(faults, places))


def _injected(node: Node, fault: Fault) -> None:
    try:
        fault.inject(node)
        code, rows = doctor(node, *fault.options, prefix=fault.prefix)
    finally:
        fault.heal(node)
    failed = _failed(rows)
    print("\n".join([f"{node.name}, {fault.what}:", *_printed(rows, "FAIL")]), flush=True)
    assert code == 1, fault
    assert failed[fault.check].startswith(fault.message), (fault, failed)
    assert set(failed) - fault.also == {fault.check}, (fault, failed)
    assert rows[fault.check]["Remedy"]


def _failed(rows: dict[str, dict[str, str]]) -> dict[str, str]:
    return {name: row["Found"] for name, row in rows.items() if row["Result"] == "FAIL"}


def _printed(rows: dict[str, dict[str, str]], result: str = "") -> list[str]:
    return [
        f"  {row['Check']}: {row['Result']}: {row['Found']}"
        + (f" → {row['Remedy']}" if row["Remedy"] else "")
        for row in rows.values()
        if result in ("", row["Result"])
    ]
