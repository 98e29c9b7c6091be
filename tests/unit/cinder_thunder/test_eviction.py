"""All replicas of an image are removed, the deepest first; those in use stay, with the reason."""

from __future__ import annotations

from typing import Any

import pytest

from cinder_thunder.cli import thunder
from cinder_thunder.cli.commands import change
from cinder_thunder.db.api import Database
from cinder_thunder.db.values import ClonedVolume, Image
from cinder_thunder.masters.eviction import Eviction, evict
from cinder_thunder.policy.ranking import Limits
from os_brick_thunder.common import errors, wire
from os_brick_thunder.common.policy.extents import Extents

STORAGE = "stor1@thunder"


def topology(host: str, kind: str = "compute") -> wire.Topology:
    initiator = f"iqn.2026-11.org.example:{host}" if kind == "compute" else ""
    return wire.Topology(host, "10.0.0.1", "r1", "z1", initiator, kind)


@pytest.fixture
def chain(database: Database) -> Database:
    """stor1 → c1 → c2."""
    database.hosts.heartbeat(topology(STORAGE, "storage"))
    database.images.add_master(Image("i", 1 << 20, Extents.of([(0, 4096)])), STORAGE)
    for host in ("c1", "c2"):
        database.hosts.heartbeat(topology(host))
        assert (
            database.locations.plan("i", topology(host), Limits(fanout=1, storage_fanout=1))
            is not None
        )
    return database


def test_the_deepest_is_removed_first_and_the_image_last(chain: Database) -> None:
    asked: list[str] = []
    outcomes = evict(chain, "i", lambda host, image: asked.append(host))
    assert asked == ["c2", "c1", STORAGE]
    assert outcomes == [Eviction("c2", "base"), Eviction("c1", "base"), Eviction(STORAGE, "master")]
    assert chain.locations.of("i") == []
    with pytest.raises(errors.InvalidRequest, match="no replica of an image i"):
        evict(chain, "i", lambda host, image: None)


def test_masters_are_removed_after_complete_bases_of_the_same_depth(chain: Database) -> None:
    for host in ("c1", "c2"):
        chain.locations.report(wire.LocationReport("", "i", host, "complete", 4096, "p", "iqn", 0))
    asked: list[str] = []
    evict(chain, "i", lambda host, image: asked.append(host))
    assert sorted(asked[:2]) == ["c1", "c2"]
    assert asked[2:] == [STORAGE]


def test_a_replica_in_use_stays_and_so_does_its_master(chain: Database) -> None:
    def remove(host: str, image: str) -> None:
        if host == "c1":
            raise errors.DeviceBusy("thunder-base-i", "a volume of this host")

    outcomes = evict(chain, "i", remove)
    assert [(o.host, bool(o.kept)) for o in outcomes] == [
        ("c2", False),
        ("c1", True),
        (STORAGE, True),
    ]
    assert "a volume of this host" in outcomes[1].kept
    assert {location.host for location in chain.locations.of("i")} == {"c1", STORAGE}


class Rpc:
    """Agents that answer; c2 is one of before status was added to the RPC."""

    def __init__(self) -> None:
        self.drains: dict[str, float] = {}

    def status(self, host: str) -> dict[str, Any]:
        if host == "c2":
            raise errors.ThunderError("NoSuchMethod: status")
        return {"drain_timeout": 90}

    def evict(self, host: str, image: str, drain: float = 0) -> None:
        self.drains[host] = drain


def test_a_host_is_waited_for_as_long_as_its_own_option_says(
    chain: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    rpc = Rpc()
    monkeypatch.setattr(change, "database", lambda file: chain)
    monkeypatch.setattr(change, "hosts_rpc", lambda file: rpc)
    assert thunder.main(["image", "evict", "i"]) == 0
    assert rpc.drains == {"c1": 90, "c2": 30, STORAGE: 30}


@pytest.mark.parametrize(
    ("status", "seconds"),
    [
        ({"drain_timeout": 0}, 0),
        ({}, 30),
        ({"drain_timeout": None}, 30),
        ({"drain_timeout": "90"}, 30),
        ({"drain_timeout": -1}, 30),
        ({"drain_timeout": float("nan")}, 30),
        ({"drain_timeout": 1e300}, 30),
    ],
)
def test_a_drain_timeout_from_the_bus(status: dict[str, Any], seconds: float) -> None:
    rpc: Any = Rpc()
    rpc.status = lambda host: status
    assert change.drain_timeout(rpc, "c1") == seconds


def test_a_master_with_volumes_stays(database: Database) -> None:
    database.images.add_master(Image("i", 1 << 20, Extents()), STORAGE)
    database.volumes.put(ClonedVolume("v", "i", STORAGE))
    assert database.volumes.count("i", STORAGE) == 1
    assert database.volumes.count("other", STORAGE) == 0
