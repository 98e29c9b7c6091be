"""Builds and removes the devices of a graph, and tells which devices a host should have.

What a graph consists of is decided in :mod:`os_brick_thunder.agent.policy.layout` alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from os_brick_thunder.agent.policy import layout
from os_brick_thunder.agent.policy.layout import BuildInputs, DeviceSpec, Graph
from os_brick_thunder.agent.ports import Kit
from os_brick_thunder.agent.undo import UndoStack
from os_brick_thunder.common.policy import devnames
from os_brick_thunder.common.policy.dmtable import Table
from os_brick_thunder.common.policy.iscsinames import iqn_of
from os_brick_thunder.common.state import Base, Stack


@dataclass(frozen=True)
class Expected:
    """What a host should have according to its state file, the pool's own devices included."""

    names: frozenset[str]
    thin_ids: frozenset[int]
    loops: Mapping[str, int]  # by the path of the device under them
    exports: frozenset[str]  # iqns


def expected(host: str, bases: Iterable[Base], stacks: Iterable[Stack]) -> Expected:
    """What belongs to these bases and stacks of a host."""
    graphs = [layout.base_devices(base, iqn_of(host, base.image_id)) for base in bases]
    graphs += [layout.stack_devices(stack) for stack in stacks]
    specs = [spec for graph in graphs for spec in graph if spec.expected]
    pool = (devnames.POOL, devnames.POOL_METADATA, devnames.POOL_DATA, devnames.ZERO)
    return Expected(
        names=frozenset(pool).union(spec.name for spec in specs),
        thin_ids=frozenset(
            (devnames.ZERO_ID, *(spec.thin_id for spec in specs if spec.thin_id is not None))
        ),
        loops={devnames.path(spec.name): spec.loops for spec in specs if spec.loops},
        exports=frozenset(spec.export for spec in specs if spec.export),
    )


def is_whole(graph: Graph, present: set[str]) -> bool:
    """Whether all devices of a graph that are expected are among those present."""
    return present.issuperset(spec.name for spec in graph if spec.expected)


def assemble(
    kit: Kit, graph: Graph, inputs: BuildInputs, undo: UndoStack, new_thin: bool = True
) -> None:
    """Create the expected devices of a graph, in order. ``undo`` removes what was created.

    :param new_thin: create the thin ids too; otherwise they exist, and undo keeps them
    :raises errors.ThunderError: a device could not be created
    """
    loops: dict[str, str] = {}
    for spec in graph:
        if spec.expected:
            if new_thin and spec.thin_id is not None:
                kit.pool.create_thin(spec.thin_id)
                undo.push(kit.pool.delete_thin, spec.thin_id)  # one that existed is not ours
            _push_removal(kit, spec, undo, delete_thin=False)
            _create(kit, spec, inputs, loops)


def _create(kit: Kit, spec: DeviceSpec, inputs: BuildInputs, loops: dict[str, str]) -> None:
    device = devnames.path(spec.name)
    kit.dm.create(spec.name, _table(spec, inputs, loops), readonly=spec.readonly)
    if spec.cache_metadata:
        kit.restore_cache(device, spec.cache_metadata(inputs))
    if spec.loops:
        found = kit.loops.attach(device, spec.loops)
        for number in range(spec.loops):
            loops[layout.loop_over(spec.name, number)] = found[number % len(found)]
    if spec.export:
        kit.targets.export(device, spec.export, inputs.portal)


def _table(spec: DeviceSpec, inputs: BuildInputs, loops: dict[str, str]) -> Table:
    return spec.table(inputs).resolved(lambda device: loops.get(device, device))


def reload(kit: Kit, graph: Graph, name: str, inputs: BuildInputs) -> None:
    """Swap the table of one device of a graph; none that reads through loop devices.

    :raises errors.ThunderError: it has its table as before
    """
    spec = next(spec for spec in graph if spec.name == name)
    kit.dm.reload(name, spec.table(inputs), readonly=spec.readonly)


def export(kit: Kit, graph: Graph, portal: str) -> None:
    """Have a graph's exports as they should be, where its devices are there already."""
    for spec in graph:
        if spec.export:
            kit.targets.export(devnames.path(spec.name), spec.export, portal)


def dismantle(kit: Kit, graph: Graph, what: str, delete_thin: bool = True) -> None:
    """Remove whatever there is of a graph, last created first, expected or not.

    :param what: for messages: "removal of ..."
    :param delete_thin: delete the thin ids too: their blocks return to the pool
    :raises errors.UndoFailed: with everything that failed; the rest was removed
    """
    with UndoStack(what) as undo:
        push_removal(kit, graph, undo, delete_thin)
        undo.run()


def push_removal(kit: Kit, graph: Graph, undo: UndoStack, delete_thin: bool = True) -> None:
    """Have ``undo`` remove whatever there is of a graph."""
    for spec in graph:
        _push_removal(kit, spec, undo, delete_thin)


def _push_removal(kit: Kit, spec: DeviceSpec, undo: UndoStack, delete_thin: bool) -> None:
    if delete_thin and spec.thin_id is not None:
        undo.push(kit.pool.delete_thin, spec.thin_id)
    undo.push(kit.dm.remove, spec.name)
    if spec.loops:
        undo.push(detach_loops, kit, spec.name)
    if spec.export:
        undo.push(kit.targets.unexport, spec.export)


def detach_loops(kit: Kit, name: str) -> None:
    """Detach the loop devices over a device; absent is success."""
    for loop in kit.loops.find(devnames.path(name)):
        kit.loops.detach(loop)
