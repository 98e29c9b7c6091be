"""What ``thunder`` shows of hosts, images and replicas."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cinder_thunder.cli import thunder
from cinder_thunder.cli.commands import show
from cinder_thunder.db import migration
from cinder_thunder.db.api import Database
from cinder_thunder.db.values import ClonedVolume, Image
from cinder_thunder.policy.ranking import Limits
from os_brick_thunder.common import errors, wire
from os_brick_thunder.common.policy.extents import Extents

STORAGE = "stor1@thunder"
ROOT = "5a" * 32
MIB = 1 << 20
VOLUME = "11111111-2222-3333-4444-555555555555"
ENTRY = {
    "volume_id": VOLUME,
    "mode": "cached",
    "device": "/dev/sdb",
    "source": STORAGE,
    "reason": "",
    "failed": 0,
    "cache": {"total": 1000, "mapped": 600, "read_hits": 75, "read_misses": 25},
}


@pytest.fixture
def option(tmp_path: Path) -> list[str]:
    """Two compute hosts in a row below a master, and the option that names their database."""
    url = f"sqlite:///{tmp_path}/cinder.sqlite"
    (tmp_path / "cinder.conf").write_text(f"[database]\nconnection = {url}\n")
    database = Database(url)
    migration.upgrade(database.engine)
    database.hosts.heartbeat(wire.Topology(STORAGE, "10.0.0.1", "r0", "z1", "", "storage"))
    digests = wire.ImageDigests("i", 256 << 10, "")
    image = Image("i", 8 * MIB, Extents.of([(0, 4 * MIB)]), manifest=digests, root=ROOT)
    database.images.add_master(image, STORAGE)
    for host in ("c1", "c2"):
        topology = wire.Topology(host, "10.0.0.2", "r1", "z1", f"iqn.2026-11.org.example:{host}")
        database.hosts.heartbeat(topology)
        assert (
            database.locations.plan("i", topology, Limits(fanout=1, storage_fanout=1)) is not None
        )
    (location,) = [found.id for found in database.locations.of("i") if found.host == "c2"]
    database.volumes.put(ClonedVolume(VOLUME, "i", STORAGE))
    database.volumes.put_stack(VOLUME, "c1", "cached")
    database.locations.report(
        wire.LocationReport(location, "i", "c2", "filling", MIB, "10.0.0.2:3260", "iqn", 0, "c1")
    )
    return ["--config-file", str(tmp_path / "cinder.conf")]


def shown(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> list[dict[str, object]]:
    assert thunder.main([*arguments, "-f", "json"]) == 0
    answer: list[dict[str, object]] = json.loads(capsys.readouterr().out)
    return answer


def one(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> dict[str, object]:
    assert thunder.main([*arguments, "-f", "json"]) == 0
    answer: dict[str, object] = json.loads(capsys.readouterr().out)
    return answer


def test_hosts(option: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    rows = shown(["host", "list", *option], capsys)
    assert [(r["Host"], r["Kind"], r["Rack"], r["State"], r["Drained"]) for r in rows] == [
        ("c1", "compute", "r1", "alive", False),
        ("c2", "compute", "r1", "alive", False),
        (STORAGE, "storage", "r0", "alive", False),
    ]


def test_drain_and_undrain(
    option: list[str], agents: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert thunder.main(["host", "drain", "c1", *option]) == 0
    assert capsys.readouterr().out.startswith("c1 is drained: hosts that read from it move to ")
    assert one(["host", "show", "c1", *option], capsys)["drained"] is True
    assert thunder.main(["host", "undrain", "c1", *option]) == 0
    assert capsys.readouterr().out == "c1 serves replicas again\n"
    assert one(["host", "show", "c1", *option], capsys)["drained"] is False


def test_images(option: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert shown(["image", "list", *option], capsys) == [
        {
            "Image": "i",
            "Kind": "image",
            "Size": 8 * MIB,
            "Allocated": 4 * MIB,
            "Masters": 1,
            "Bases": 2,
            "Deleted": False,
        }
    ]


def test_locations(option: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    rows = shown(["location", "list", "--image", "i", *option], capsys)
    assert rows == shown(["location", "list", *option], capsys)
    assert [(r["Host"], r["State"], r["Filled"], r["Reads from"]) for r in rows] == [
        (STORAGE, "complete", 4 * MIB, ""),
        ("c1", "creating", 0, STORAGE),
        ("c2", "filling", MIB, "c1"),
    ]


def test_the_tree(option: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert thunder.main(["image", "tree", "i", *option]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "stor1@thunder  master complete 100%",
        "└── c1  base creating 0%",
        "    └── c2  base filling 25%",
    ]


def test_an_image(option: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert one(["image", "show", "i", *option], capsys) == {
        "id": "i",
        "size": 8 * MIB,
        "allocated": 4 * MIB,
        "signature": "not asked for",
        "hash_tree": ROOT,
        "masters": STORAGE,
        "volumes": 1,
        "bases": 2,
        "complete": 0,
        "depth": 2,
    }


def test_a_location(option: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    rows = shown(["location", "list", *option], capsys)
    (location,) = [str(row["Location"]) for row in rows if row["Host"] == "c1"]
    for word in (location, location[:8]):
        found = one(["location", "show", word, *option], capsys)
        assert found | {"heard_of_s": 0} == {
            "id": location,
            "image": "i",
            "host": "c1",
            "address": "10.0.0.2",
            "iqn": "iqn.2026-11.org.thunder:c1:i",
            "kind": "base",
            "state": "creating",
            "filled": 0,
            "percent": 0,
            "depth": 1,
            "reads_from": STORAGE,
            "read_by": "c2",
            "heard_of_s": 0,
        }


@pytest.fixture
def agents(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The status of each agent; other agents do not answer."""
    answers: dict[str, Any] = {}

    class Rpc:
        def status(self, host: str) -> Any:
            if host not in answers:
                raise errors.TrackerUnavailable(f"{host} did not answer")
            return answers[host]

    monkeypatch.setattr(show, "hosts_rpc", lambda file, timeout: Rpc())
    return answers


def test_a_host(
    option: list[str], agents: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    silent = one(["host", "show", "c1", *option], capsys)
    assert (silent["agent"], silent["pool_used"], silent["stacks"]) == ("c1 did not answer", "", "")
    agents["c1"] = {"pool": {"used": MIB, "total": 8 * MIB, "healthy": True}, "stacks": [{}]}
    found = one(["host", "show", "c1", *option], capsys)
    assert (found["kind"], found["rack"], found["replicas"], found["complete"]) == (
        *("compute", "r1"),
        *(1, 0),
    )
    assert (found["agent"], found["pool_used"], found["stacks"]) == ("answers", MIB, 1)
    storage = one(["host", "show", STORAGE, *option], capsys)
    assert (storage["kind"], storage["agent"]) == ("storage", "")


def test_a_volume(
    option: list[str], agents: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    agents["c1"] = {"stacks": [ENTRY]}
    found = one(["volume", "show", VOLUME[:6], *option], capsys)
    assert found == {
        "id": VOLUME,
        "image": "i",
        "backend": STORAGE,
        "hosts": "c1",
        "mode": "cached",
        "agent": "answers",
        "device": "/dev/sdb",
        "source": STORAGE,
        "reason": "",
        "failed_paths": 0,
        "coverage": "60.0%",
        "hits": "75.0%",
        "read_hits": 75,
        "read_misses": 25,
    }
    del agents["c1"]
    found = one(["volume", "show", VOLUME, *option], capsys)
    assert (found["mode"], found["agent"]) == ("cached", "c1 did not answer")
    assert (found["coverage"], found["hits"]) == ("", "")


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (["image", "tree", "x"], "there is no replica of an image x: thunder image list shows"),
        (["image", "show", "x"], "there is no replica of an image x: thunder image list shows"),
        (["image", "evict", "x"], "there is no replica of an image x: thunder image list shows"),
        (["location", "list", "--image", "x"], "there is no replica of an image x: "),
        (["location", "show", "x"], "there is no location x: thunder location list shows"),
        (["host", "show", "x"], f"there is no host x: known are c1, c2, {STORAGE}"),
        (["host", "drain", "x"], f"there is no host x: known are c1, c2, {STORAGE}"),
        (["host", "undrain", "x"], f"there is no host x: known are c1, c2, {STORAGE}"),
        (["volume", "show", "x"], "there is no volume x: openstack volume list --all-projects"),
    ],
)
def test_what_is_not_there(
    option: list[str], command: list[str], said: str, caplog: pytest.LogCaptureFixture
) -> None:
    assert thunder.main([*command, *option]) == 2
    (line,) = [r.message for r in caplog.records if r.levelname == "ERROR"]
    assert line.startswith(said)
    assert "\n" not in line
