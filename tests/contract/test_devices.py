"""The graphs of a base and of a stack are built, recognized and removed."""

from __future__ import annotations

import dataclasses

import pytest

from os_brick_thunder.agent import devices
from os_brick_thunder.agent.policy import layout
from os_brick_thunder.agent.policy.layout import BuildInputs, DeviceSpec, Graph
from os_brick_thunder.agent.undo import UndoStack
from os_brick_thunder.common import errors
from os_brick_thunder.common.policy import devnames, dmtable
from os_brick_thunder.common.policy.dmtable import Table
from os_brick_thunder.common.policy.extents import Extents
from os_brick_thunder.common.policy.iscsinames import iqn_of
from os_brick_thunder.common.state import Base, Stack
from tests.contract.conftest import MIB, World

BLOCK = 64 << 10
BASE = Base("i", 8 * MIB, ((0, MIB), (4 * MIB, MIB)), "l1", thin_id=1)


@pytest.fixture
def stack(world: World) -> Stack:
    return Stack("v", "t", world.disk, "cached", "i", local_id=2, meta_id=3, cached=8 * MIB)


def _kernel(world: World) -> set[str]:
    return {device.name for device in world.kit.dm.devices()}


def _graphs(stack: Stack) -> list[Graph]:
    return [layout.base_devices(BASE, iqn_of("here", "i")), layout.stack_devices(stack)]


def _build(world: World, graphs: list[Graph]) -> None:
    inputs = BuildInputs(
        BLOCK,
        lun_size=64 * MIB,
        portal="127.0.0.1:3260",
        shared=Extents.of([(0, 4 * MIB), (6 * MIB, 8 * MIB)]),
    )
    for graph in graphs:
        with UndoStack("the test") as undo:
            devices.assemble(world.kit, graph, inputs, undo)
            undo.keep()


def _remove(world: World, graphs: list[Graph]) -> None:
    for graph in reversed(graphs):
        devices.dismantle(world.kit, graph, "the test")


def test_the_graphs_consist_of_what_is_expected(world: World, stack: Stack) -> None:
    kit, before = world.kit, _kernel(world)
    _build(world, _graphs(stack))
    expected = devices.expected("here", [BASE], [stack])
    assert _kernel(world) == expected.names
    assert kit.metadata.ids() == expected.thin_ids
    assert {target.iqn for target in kit.targets.targets()} == expected.exports
    assert all(kit.loops.find(device) for device in expected.loops)
    _remove(world, _graphs(stack))
    _remove(world, _graphs(stack))  # absent is success
    assert _kernel(world) == before
    assert kit.metadata.ids() == {devnames.ZERO_ID}
    assert kit.targets.targets() == ()


def test_one_more_device_is_one_more_spec(
    world: World, stack: Stack, monkeypatch: pytest.MonkeyPatch
) -> None:
    base_devices, name = layout.base_devices, "thunder-copy-i"
    below = devnames.path(devnames.ImageNames("i").base)

    def longer(base: Base, iqn: str) -> Graph:
        copy = DeviceSpec(name, lambda _: layout.linear_table(below, base.size), readonly=True)
        return (*base_devices(base, iqn), copy)

    monkeypatch.setattr(layout, "base_devices", longer)
    before = _kernel(world)
    _build(world, _graphs(stack))
    assert name in _kernel(world)
    assert _kernel(world) == devices.expected("here", [BASE], [stack]).names
    _remove(world, _graphs(stack))
    assert _kernel(world) == before


def test_a_complete_base_needs_no_replica(world: World) -> None:
    complete = dataclasses.replace(BASE, complete=True)
    graph = layout.base_devices(complete, iqn_of("here", "i"))
    _build(world, [graph])
    assert world.kit.dm.table("thunder-paths-i") == Table.of((8 * MIB // 512, dmtable.Error()))
    assert _kernel(world) == devices.expected("here", [complete], []).names
    _remove(world, [graph])


def test_a_thin_id_that_is_there_already_is_not_deleted(world: World) -> None:
    """It is not ours: another agent's, or what a state file of before did not record."""
    world.kit.pool.create_thin(1)
    graph = layout.base_devices(BASE, iqn_of("here", "i"))
    with pytest.raises(errors.ProcessError, match="exists"):
        _build(world, [graph])
    assert world.kit.metadata.ids() == {devnames.ZERO_ID, 1}
    assert world.kit.dm.table("thunder-paths-i") is None
    world.kit.pool.delete_thin(1)
