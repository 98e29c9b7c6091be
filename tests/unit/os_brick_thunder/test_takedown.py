"""A volume is given back without its agent, and never below somebody who has it open."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from os_brick import exception as brick_exception
from os_brick.initiator.connectors import iscsi

from os_brick_thunder import connector, takedown
from os_brick_thunder.common import errors, wire
from os_brick_thunder.common.policy import devnames
from os_brick_thunder.common.policy.devnames import VolumeNames
from tests import fakes
from tests.unit.os_brick_thunder import test_agent
from tests.unit.os_brick_thunder.test_agent import IMAGE, LUN, PAYLOAD, VOLUME, Host, soon

NAMES = VolumeNames(VOLUME)
DATA = {"thunder": PAYLOAD.to_wire(), "device_path": devnames.path(NAMES.vol)}


@pytest.fixture
def host(tmp_path: Path) -> Host:
    found = Host(tmp_path)
    found.blocks.sizes["/dev/sdc"] = test_agent.GIB
    return found


def test_the_devices_of_one_volume_are_removed_and_no_others(host: Host) -> None:
    _, stacks, _, _ = host.agent()
    stacks.attach(PAYLOAD, LUN, soon())
    before = set(host.dm.tables)
    stacks.attach(wire.Payload("vol-2", IMAGE, "stor1@thunder"), "/dev/sdc", soon())
    host.dm.log.clear()
    takedown.dismantle(host.dm, "vol-2")
    assert set(host.dm.tables) == before
    assert host.dm.log[0] == "remove thunder-vol-vol-2"
    takedown.dismantle(host.dm, "vol-2")  # absent is success


def test_nothing_is_removed_below_a_guest(host: Host) -> None:
    _, stacks, _, _ = host.agent()
    stacks.attach(PAYLOAD, LUN, soon())
    host.dm.held.add(NAMES.vol)
    before = set(host.dm.tables)
    with pytest.raises(errors.DeviceBusy, match=r"thunder-vol-vol-1 is in use by 1 opener\(s\)"):
        takedown.dismantle(host.dm, VOLUME, patience=0)
    assert set(host.dm.tables) == before


def test_a_probe_is_waited_for(host: Host) -> None:
    _, stacks, _, _ = host.agent()
    stacks.attach(PAYLOAD, LUN, soon())
    host.dm.held.add(NAMES.vol)
    threading.Timer(0.3, host.dm.held.discard, [NAMES.vol]).start()
    takedown.dismantle(host.dm, VOLUME, patience=30)
    assert host.volumes() == set()


def test_what_an_attach_that_hangs_has_built_so_far_is_removed_too(host: Host) -> None:
    _, stacks, _, _ = host.agent()
    stacks.attach(PAYLOAD, LUN, soon())
    host.dm.remove(NAMES.vol)
    takedown.dismantle(host.dm, VOLUME)
    assert host.volumes() == set()


def test_a_device_of_somebody_else_under_our_name_is_left_alone(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, stacks, _, _ = host.agent()
    stacks.attach(PAYLOAD, LUN, soon())
    before = set(host.dm.tables)
    monkeypatch.setattr(devnames, "UUID_PREFIX", "LVM-")
    takedown.dismantle(host.dm, VOLUME)
    assert set(host.dm.tables) == before


def test_names_are_of_all_devices_of_a_stack_from_the_top(host: Host) -> None:
    """What the agent builds, bottom up, is what is taken down, top down."""
    _, stacks, _, _ = host.agent()
    host.dm.log.clear()
    stacks.attach(PAYLOAD, LUN, soon())
    built = [line.split()[1] for line in host.dm.log if VOLUME in line and "create" in line]
    assert set(built) == set(NAMES.all)
    host.dm.log.clear()
    takedown.dismantle(host.dm, VOLUME)
    assert [line.split()[1] for line in host.dm.log] == list(NAMES.all)


def test_an_agent_that_was_down_during_a_detach_cleans_up_when_it_is_back(host: Host) -> None:
    _, stacks, _, _ = host.agent()
    stacks.attach(PAYLOAD, LUN, soon())
    takedown.dismantle(host.dm, VOLUME)
    agent, _, _, store = host.agent()
    agent.reconcile()
    assert store.stacks == {}
    assert host.leftovers(store) == []
    host.app.heartbeat.catch_up()
    assert host.tracker.released == [VOLUME]
    assert host.disagreements(store) == set()


def test_an_agent_that_was_only_late_removes_the_rest_by_itself(host: Host) -> None:
    """The request that it was late for may have been lost with its connection."""
    _, stacks, _, store = host.agent()
    stacks.attach(PAYLOAD, LUN, soon())
    assert host.app.reaper.unfinished() == {}
    takedown.dismantle(host.dm, VOLUME)
    (finish,) = host.app.reaper.unfinished().values()
    finish()
    assert store.stacks == {}
    assert host.leftovers(store) == []
    host.app.heartbeat.catch_up()
    assert host.disagreements(store) == set()


# The connector


class World:
    """The connector over fakes: os-brick logs out, the agent does what it is told to."""

    def __init__(self, dm: fakes.FakeDeviceMapper, monkeypatch: pytest.MonkeyPatch) -> None:
        self.dm = dm
        self.agent: Callable[[str], None] = dm_remover(dm)
        self.logged_out: list[dict[str, Any]] = []
        world = self

        class Agent:
            def detach(self, volume_id: str) -> None:
                world.agent(volume_id)

        monkeypatch.setattr(
            iscsi.ISCSIConnector,
            "disconnect_volume",
            lambda self, data, info, **options: world.logged_out.append(options),
        )
        monkeypatch.setattr(
            takedown, "has_devices", lambda v: any(n in dm.tables for n in VolumeNames(v).all)
        )
        monkeypatch.setattr(takedown, "take_down", lambda v: takedown.dismantle(dm, v, 0))
        self.connector = connector.ThunderISCSIConnector(None)
        monkeypatch.setattr(self.connector, "_agent", Agent)

    def disconnect(self, force: bool = False) -> None:
        self.connector.disconnect_volume(DATA, None, force=force)


def dm_remover(dm: fakes.FakeDeviceMapper) -> Callable[[str], None]:
    return lambda volume_id: takedown.dismantle(dm, volume_id, 0)


def unavailable(volume_id: str) -> None:
    raise errors.AgentUnavailable("thunder-agent is not running")


def failing(volume_id: str) -> None:
    raise errors.AgentError("the local pool has failed")


def ignorant(volume_id: str) -> None:
    """Absent is success: the agent has devices of which it has no entry."""


@pytest.fixture
def world(host: Host, monkeypatch: pytest.MonkeyPatch) -> World:
    _, stacks, _, _ = host.agent()
    stacks.attach(PAYLOAD, LUN, soon())
    return World(host.dm, monkeypatch)


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("agent", [unavailable, failing, ignorant])
def test_a_volume_is_given_back_whatever_its_agent_does(
    world: World, host: Host, agent: Callable[[str], None], force: bool
) -> None:
    world.agent = agent
    world.disconnect(force)
    assert host.volumes() == set()
    assert world.logged_out == [{"force": force, "ignore_errors": False}]


def test_an_open_volume_stays_connected(world: World, host: Host) -> None:
    host.dm.held.add(NAMES.vol)
    world.agent = unavailable
    before = set(host.dm.tables)
    with pytest.raises(brick_exception.BrickException, match=r"stays connected.*in use by"):
        world.disconnect()
    assert set(host.dm.tables) == before
    assert world.logged_out == []


def test_a_forced_disconnect_leaves_the_devices_of_an_open_volume_alone(
    world: World, host: Host
) -> None:
    """os-brick logs out below it, as it does without us; the agent removes them later."""
    host.dm.held.add(NAMES.vol)
    world.agent = unavailable
    before = set(host.dm.tables)
    world.disconnect(force=True)
    assert set(host.dm.tables) == before
    assert len(world.logged_out) == 1


def test_a_volume_without_a_stack_is_none_of_the_agents_business(world: World) -> None:
    takedown.dismantle(world.dm, VOLUME)
    world.agent = failing
    world.disconnect()
    assert len(world.logged_out) == 1


@pytest.mark.parametrize("raw", ["nonsense", 7, {}, {"volume_id": None}])
def test_connection_data_that_is_not_ours_is_os_bricks_business(world: World, raw: object) -> None:
    world.connector.disconnect_volume({"thunder": raw}, None)
    assert len(world.logged_out) == 1


def test_our_devices_are_no_multipaths_to_flush(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connector, "SYSFS", tmp_path)
    for dm, uuid in (("dm-3", "THUNDER-thunder-vol-v"), ("dm-4", "mpath-360014"), ("dm-5", "")):
        (tmp_path / dm / "dm").mkdir(parents=True)
        (tmp_path / dm / "dm" / "uuid").write_text(uuid + "\n")
    for disk, holders in (("sda", ["dm-3"]), ("sdb", ["dm-3", "dm-4"]), ("sdc", [])):
        for holder in holders:
            (tmp_path / disk / "holders" / holder).mkdir(parents=True)
    disks = connector.ThunderISCSIConnector(None)._linuxscsi
    assert disks.find_sysfs_multipath_dm(["sda", "sdc", "sdd"]) is None
    assert disks.find_sysfs_multipath_dm(["sda", "sdb"]) == "dm-4"
