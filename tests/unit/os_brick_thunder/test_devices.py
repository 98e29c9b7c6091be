"""The device graph as a value: what its functions build and remove, and that it is enough.

One more device in a layout is built, recognized, audited, swept and removed without any other
change; the crash sweep passes with it too.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from os_brick_thunder.agent import devices
from os_brick_thunder.agent.policy import layout
from os_brick_thunder.agent.policy.layout import BuildInputs, DeviceSpec, Graph
from os_brick_thunder.agent.undo import UndoStack
from os_brick_thunder.common import errors, state
from os_brick_thunder.common.policy import devnames
from os_brick_thunder.common.policy.dmtable import Table
from os_brick_thunder.common.state import Base, Stack
from tests import fakes
from tests.unit.os_brick_thunder import test_agent
from tests.unit.os_brick_thunder.test_agent import IMAGE, LUN, PAYLOAD, VOLUME, Host, soon

MIB = 1 << 20
IQN = "iqn.x:export"
BASE = Base(IMAGE, 64 * MIB, ((0, MIB),), "l3", thin_id=1)
CACHED = Stack(VOLUME, "t", LUN, "cached", IMAGE, local_id=2, meta_id=3, cached=64 * MIB)
CHECKED, CHECKED_CACHE = f"thunder-checked-{IMAGE}", f"thunder-checked-{VOLUME}"


def _names(graph: Graph) -> list[str]:
    return [spec.name.split("-")[1] for spec in graph if spec.expected]


def test_a_base_keeps_its_devices_when_it_is_complete() -> None:
    inputs = BuildInputs(64 << 10)
    filling = layout.base_devices(BASE, IQN)
    assert _names(filling) == ["paths", "source", "base", "export"]
    assert str(filling[0].table(inputs)) == "0 131072 multipath 2 queue_mode bio 0 0 0"
    loop = layout.loop_over(f"thunder-paths-{IMAGE}", 0)
    assert loop in filling[1].table(inputs).devices
    complete = layout.base_devices(dataclasses.replace(BASE, complete=True), IQN)
    assert [spec.name for spec in complete] == [spec.name for spec in filling]
    assert str(complete[0].table(inputs)) == "0 131072 error"
    assert complete[1].table(inputs) == filling[1].table(inputs)


def test_a_stack_has_a_cache_while_it_has_thin_ids_for_it() -> None:
    assert _names(layout.stack_devices(CACHED)) == ["meta", "local", "cached", "failover", "vol"]
    leaving = dataclasses.replace(CACHED, mode="direct")
    assert _names(layout.stack_devices(leaving)) == ["meta", "local", "cached", "failover", "vol"]
    direct = dataclasses.replace(leaving, base_image_id=None, local_id=None, meta_id=None)
    assert _names(layout.stack_devices(direct)) == ["vol"]


def test_what_is_expected_of_a_host() -> None:
    found = devices.expected("cmp1", [BASE], [CACHED])
    assert found.names == {
        *(f"thunder-{what}" for what in ("pool", "pool-metadata", "pool-data", "zero")),
        *(f"thunder-{what}-{IMAGE}" for what in ("paths", "source", "base", "export")),
        *(f"thunder-{what}-{VOLUME}" for what in ("meta", "local", "cached", "failover", "vol")),
    }
    assert found.thin_ids == {devnames.ZERO_ID, 1, 2, 3}
    assert found.loops == {f"/dev/mapper/thunder-paths-{IMAGE}": layout.LOOPS}
    assert found.exports == {f"iqn.2026-11.org.thunder:cmp1:{IMAGE}"}


def test_a_failure_removes_what_was_created_and_only_new_thin_ids() -> None:
    kit = fakes.fake_kit()
    dm, graph = kit.dm, layout.base_devices(BASE, IQN)
    before = {device.name for device in dm.devices()}
    inputs = BuildInputs(64 << 10, portal="10.0.0.1:3260")
    kit.pool.create_thin(1)
    for new_thin, left in ((False, {devnames.ZERO_ID, 1}), (True, {devnames.ZERO_ID})):
        if new_thin:
            kit.pool.delete_thin(1)
        undo = UndoStack("test")
        devices.assemble(kit, graph, inputs, undo, new_thin)
        assert devices.is_whole(graph, {device.name for device in dm.devices()})
        undo.run()
        assert {device.name for device in dm.devices()} == before
        assert kit.metadata.ids() == left
        assert kit.targets.targets("") == ()


def test_dismantling_goes_on_past_a_failure() -> None:
    kit = fakes.fake_kit()
    assert isinstance(kit.dm, fakes.FakeDeviceMapper)
    inputs = BuildInputs(64 << 10, portal="10.0.0.1:3260")
    graph = layout.base_devices(BASE, IQN)
    with UndoStack("test") as undo:
        devices.assemble(kit, graph, inputs, undo)
        undo.keep()
    kit.dm.held.add(f"thunder-export-{IMAGE}")
    with pytest.raises(errors.UndoFailed, match=r"removal of it: .*thunder-export"):
        devices.dismantle(kit, graph, "removal of it")
    assert kit.targets.targets("") == ()
    kit.dm.held.clear()
    devices.dismantle(kit, graph, "removal of it")
    devices.dismantle(kit, graph, "removal of it")  # absent is success
    assert kit.metadata.ids() == {devnames.ZERO_ID}


@pytest.fixture
def one_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """A base with one more device under its export, a cache with one more under its blocks."""
    base_devices, cache_devices = layout.base_devices, layout.cache_devices

    def longer_base(base: Base, iqn: str) -> Graph:
        *graph, export = base_devices(base, iqn)
        below = devnames.path(devnames.ImageNames(base.image_id).base)
        spec = DeviceSpec(CHECKED, lambda _: layout.linear_table(below, base.size), readonly=True)
        return (*graph, spec, _moved(export, below, CHECKED))

    def longer_cache(stack: Stack) -> Graph:
        *graph, cached = cache_devices(stack)
        below = devnames.path(devnames.VolumeNames(stack.volume_id).local)
        spec = DeviceSpec(
            CHECKED_CACHE,
            lambda _: layout.linear_table(below, stack.cached),
            expected=cached.expected,
        )
        return (*graph, spec, _moved(cached, below, CHECKED_CACHE))

    monkeypatch.setattr(layout, "base_devices", longer_base)
    monkeypatch.setattr(layout, "cache_devices", longer_cache)


def _moved(spec: DeviceSpec, below: str, name: str) -> DeviceSpec:
    """The same device on top of ``name`` in place of the path ``below``."""
    to = {below: devnames.path(name)}

    def table(inputs: BuildInputs) -> Table:
        return spec.table(inputs).resolved(lambda device: to.get(device, device))

    return dataclasses.replace(spec, table=table)


@pytest.mark.usefixtures("one_more")
def test_one_more_device_is_built_audited_and_removed(tmp_path: Path) -> None:
    host = Host(tmp_path)
    _, stacks, bases, store = host.agent()
    stacks.attach(PAYLOAD, LUN, soon())
    export = host.dm.table(f"thunder-export-{IMAGE}")
    assert export is not None
    assert export.devices == (devnames.path(CHECKED),)
    assert {CHECKED, CHECKED_CACHE} <= host.dm.tables.keys()
    audited = devices.expected("cmp1", store.bases.values(), store.stacks.values())
    assert audited.names == host.dm.tables.keys()
    assert host.app.stack.remover.to_direct(VOLUME, "a test")
    assert CHECKED_CACHE not in host.dm.tables
    assert host.app.stack.builder.to_cached(VOLUME).mode == "cached"
    assert CHECKED_CACHE in host.dm.tables
    stacks.detach(VOLUME)
    assert CHECKED_CACHE not in host.dm.tables
    bases.remove(IMAGE)
    assert host.leftovers(store) == []
    assert CHECKED not in host.dm.tables


@pytest.mark.usefixtures("one_more")
def test_one_more_device_is_restored_after_a_reboot(tmp_path: Path) -> None:
    host = Host(tmp_path)
    _, stacks, _, _ = host.agent()
    stacks.attach(PAYLOAD, LUN, soon())
    host.complete()
    test_agent._reboot(host)
    agent, _, _, store = host.agent()
    agent.reconcile()
    assert CHECKED in host.dm.tables
    assert host.leftovers(store) == []


@pytest.mark.usefixtures("one_more")
def test_one_more_device_is_swept_when_it_belongs_to_nothing(tmp_path: Path) -> None:
    host = Host(tmp_path)
    _, stacks, _, _ = host.agent()
    stacks.attach(PAYLOAD, LUN, soon())
    host.file.unlink()  # as if the state had never been written
    agent, *_ = host.agent()
    agent.reconcile()
    assert not [name for name in host.dm.tables if IMAGE in name or VOLUME in name]
    assert host.loops.loops == {}
    assert host.targets.exported == {}
    assert host.dm.thin_ids == {devnames.ZERO_ID}


def test_a_stray_that_is_in_use_stays_and_the_agent_starts(tmp_path: Path) -> None:
    host = Host(tmp_path)
    _, stacks, _, _ = host.agent()
    stacks.attach(PAYLOAD, LUN, soon())
    host.dm.held.add(f"thunder-local-{VOLUME}")
    host.file.unlink()
    agent, *_ = host.agent()
    agent.reconcile()
    assert host.volumes() == {f"thunder-local-{VOLUME}"}
    assert len(host.dm.thin_ids) == 3  # those of the zero device, the base and the stray
    host.dm.held.clear()
    agent.reconcile()
    assert host.volumes() == set()
    assert host.dm.thin_ids == {devnames.ZERO_ID}


@pytest.mark.usefixtures("one_more")
def test_one_more_device_passes_the_crash_sweep(tmp_path: Path) -> None:
    test_agent.test_wherever_the_agent_dies_a_restart_converges(tmp_path)


def test_the_entries_of_a_state_file_are_what_is_expected(tmp_path: Path) -> None:
    """The lab's audit reads the file beside the agent."""
    host = Host(tmp_path)
    _, stacks, _, store = host.agent()
    stacks.attach(PAYLOAD, LUN, soon())
    bases, entries = state.entries(json.loads(host.file.read_text()))
    assert devices.expected("cmp1", bases, entries).names == host.dm.tables.keys()
    assert bases == list(store.bases.values())
