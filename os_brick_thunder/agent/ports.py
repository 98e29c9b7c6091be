"""What the agent requires of its host: ports as protocols, and the values that bundle them.

The real implementations are in ``mechanism``; the unit tests pass fakes, and the contract tests run
the same assertions on both.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

from os_brick_thunder.common.mechanism.dmsetup import MappedDevice
from os_brick_thunder.common.policy.dmstatus import PoolStatus
from os_brick_thunder.common.policy.dmtable import Table
from os_brick_thunder.common.policy.extents import Extents
from os_brick_thunder.common.state import StateFile
from os_brick_thunder.common.transport.base import Initiator, Targets
from os_brick_thunder.common.wire import (
    Export,
    ImageDigests,
    LocationReport,
    Orders,
    Plan,
    Source,
    Topology,
)


class DeviceMapper(Protocol):
    def create(self, name: str, table: Table, readonly: bool = False) -> None: ...
    def reload(self, name: str, table: Table, readonly: bool = False) -> None: ...
    def reload_noflush(self, name: str, table: Table, readonly: bool = False) -> None: ...
    def suspend(self, name: str) -> None: ...
    def resume(self, name: str) -> None: ...
    def wipe(self, name: str) -> None: ...
    def remove(self, name: str) -> None: ...
    def message(self, name: str, text: str) -> str: ...
    def status(self, name: str) -> str: ...
    def table(self, name: str) -> Table | None: ...
    def devices(self) -> list[MappedDevice]: ...


class Pool(Protocol):
    block: int

    def create_thin(self, thin_id: int) -> None: ...
    def delete_thin(self, thin_id: int) -> None: ...
    def status(self) -> PoolStatus: ...


class PoolMetadata(Protocol):
    def mapped(self, thin_id: int) -> Extents: ...
    def ids(self) -> set[int]: ...


class Loops(Protocol):
    def attach(self, device: str) -> str: ...
    def find(self, device: str) -> str | None: ...
    def detach(self, loop: str) -> None: ...


class Blocks(Protocol):
    def size(self, device: str) -> int: ...
    def sector(self, device: str) -> int: ...
    def bytes_read(self, device: str) -> int: ...
    def devnum(self, device: str) -> str: ...
    def in_flight(self, device: str) -> int: ...
    def answers(self, device: str) -> bool: ...


class Failover(Protocol):
    """The failover watcher, another process; see :mod:`os_brick_thunder.failover`."""

    def ensure(self) -> None: ...
    def excluded(self, volume_id: str) -> AbstractContextManager[None]: ...


class RestoreCache(Protocol):
    def __call__(self, device: str, xml: str) -> None: ...


class Tracker(Protocol):
    def heartbeat(self, topology: Topology) -> Orders: ...
    def plan_attach(
        self, server: str, volume_id: str, topology: Topology, stack_id: str = ""
    ) -> Plan: ...
    def plan_sources(
        self, image_id: str, topology: Topology, exclude: tuple[str, ...] = ()
    ) -> Plan: ...
    def manifest(self, image_id: str) -> ImageDigests: ...
    def release(self, volume_id: str, host: str, stack_id: str = "") -> None: ...
    def report(self, report: LocationReport) -> None: ...
    def open_export(self, source: Source, image_id: str, initiator: str, wait: float) -> Export: ...
    def close_export(self, exporter: str, image_id: str, initiator: str) -> None: ...


@dataclass(frozen=True)
class Kit:
    """The mechanisms of one host."""

    dm: DeviceMapper
    pool: Pool
    metadata: PoolMetadata
    loops: Loops
    initiator: Initiator
    targets: Targets
    blocks: Blocks
    failover: Failover
    restore_cache: RestoreCache


@dataclass(frozen=True)
class Host:
    """This host: its mechanisms, its state file, the trackers, and its place in the topology."""

    kit: Kit
    store: StateFile
    tracker: Tracker
    topology: Topology
