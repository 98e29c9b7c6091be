"""Fakes of what the agent's services need of the world.

They keep the rules that the kernel keeps, and tests/contract runs the same assertions on them
and on the kernel: a fake that the kernel would contradict is a bug.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

from os_brick_thunder.agent.app import Settings
from os_brick_thunder.agent.policy import layout
from os_brick_thunder.agent.ports import Kit
from os_brick_thunder.common import errors, wire
from os_brick_thunder.common.mechanism.dmioctl import MappedDevice
from os_brick_thunder.common.policy import devnames, dmtable
from os_brick_thunder.common.policy.dmstatus import PoolStatus
from os_brick_thunder.common.policy.dmtable import Table
from os_brick_thunder.common.policy.extents import Extents
from os_brick_thunder.common.transport.base import Credentials, Endpoint, Session, Target

#: An agent that fills no bases: its devices are not files that could be read.
SETTINGS = Settings(
    portal="10.0.0.1:3260",
    parent_wait=5.0,
    drain_timeout=30.0,
    pool_low_percent=80,
    pool_high_percent=90,
    fill_workers=0,
    fill_rate=0,
    heartbeat_interval=60.0,
    attach_budget=5.0,
)
MAPPER = "/dev/mapper/"
#: What makes a path a device number here: the kernel's have a colon, too.
NUMBER = "253:"
#: The disks of replicas, which are large where nothing is said.
REPLICA = "/dev/sdm"
#: A cache of 600 blocks for 1000, 3 of 4 reads answered.
CACHE_STATUS = (
    "cache 8 34/1024 128 600/1000 75 25 8 2 0 0 0 3 metadata2 writethrough no_discard_passdown "
    "2 migration_threshold 0 cleaner 0 rw -"
)


@dataclass
class Region:
    """Statistics of a device: its areas, and those that were read or written; in sectors."""

    start: int
    length: int
    step: int
    program: str
    word: str
    read: set[int] = field(default_factory=set)
    written: set[int] = field(default_factory=set)

    def touched(self, start: int, length: int) -> set[int]:
        first, last = max(start - self.start, 0), min(start - self.start + length, self.length)
        return set(range(first // self.step, -(-last // self.step)))

    def counters(self) -> str:
        areas = range(-(-self.length // self.step))
        return "".join(
            f"{self.start + each * self.step}+{self.step} {int(each in self.read)} 0 0 0 "
            f"{int(each in self.written)} 0 0 0 0 0 0 0 0\n"
            for each in areas
        )


class FakeDeviceMapper:
    """Devices refer to each other by path; other paths (``/dev/sdb``) are taken as there."""

    def __init__(self) -> None:
        self.tables: dict[str, tuple[Table, bool]] = {}
        self.held: set[str] = set()
        self.suspended: set[str] = set()
        self.failed: dict[str, set[str]] = {}
        self.log: list[str] = []
        self.thin_ids: set[int] = set()
        self.mapped: dict[int, int] = {}  # bytes of thin devices that have blocks
        self.bare: set[str] = set()  # without a table
        self.queueing: set[str] = set()  # multipath devices whose I/O waits for a path
        self.delay = 0.0  # seconds that the creation of a device takes
        self.regions: dict[str, dict[int, Region]] = {}
        self.requests: dict[str, int] = {}  # that devices have completed
        self.corrupted: set[str] = set()  # verity devices that have met a wrong block

    def create(self, name: str, table: Table, readonly: bool = False) -> None:
        time.sleep(self.delay)
        if name in self.tables:
            if self.tables[name][0] != table:
                raise errors.TableMismatch(name, str(table), str(self.tables[name][0]))
            return
        self._check(name, table)
        self.tables[name] = (table, readonly)
        self.failed.pop(name, None)
        self.log.append(f"create {name}")

    def reload(self, name: str, table: Table, readonly: bool = False) -> None:
        if name not in self.tables:
            raise errors.ProcessError(["dmsetup", "load", name], 1, "No such device or address")
        table = table.resolved(lambda device: device.removeprefix(NUMBER))
        self._check(name, table)
        kinds = [{type(s.target) for s in each.segments} for each in (self.tables[name][0], table)]
        if dmtable.Multipath in kinds[0] and kinds[0] != kinds[1]:  # an immutable target
            raise errors.ProcessError(["dmsetup", "load", name], 1, "Invalid argument")
        self.tables[name] = (table, readonly)
        self.failed.pop(name, None)
        self.suspended.discard(name)
        self.queueing.discard(name)
        self.log.append(f"reload {name}")

    def reload_noflush(self, name: str, table: Table, readonly: bool = False) -> None:
        self.reload(name, table, readonly)

    def suspend(self, name: str) -> float:
        self.suspended.add(name)
        return time.monotonic()

    def swap(self, name: str, table: Table) -> float:
        self.reload(name, table)
        return time.monotonic()

    def write(self, name: str, offset: int, length: int) -> None:
        """Somebody writes to a device, in bytes."""
        assert name not in self.suspended
        for region in self.regions.get(name, {}).values():
            region.written |= region.touched(offset // 512, -(-length // 512))
        self.requests[name] = self.requests.get(name, 0) + 1

    def read(self, name: str, offset: int, length: int) -> None:
        """Somebody reads from a device, in bytes."""
        assert name not in self.suspended
        for region in self.regions.get(name, {}).values():
            region.read |= region.touched(offset // 512, -(-length // 512))
        self.requests[name] = self.requests.get(name, 0) + 1

    def resume(self, name: str) -> None:
        self.suspended.discard(name)

    def queue(self, name: str) -> None:
        self.message(name, "queue_if_no_path")
        self.queueing.add(name)

    def unqueue(self, name: str) -> None:
        self.queueing.discard(name)

    def wipe(self, name: str) -> None:
        if name not in self.tables:
            raise errors.ProcessError(["dmsetup", "wipe_table", name], 1, "No such device")
        table, readonly = self.tables[name]
        self.tables[name] = (Table.of((table.length, dmtable.Error())), readonly)
        self.log.append(f"wipe {name}")

    def remove(self, name: str) -> None:
        if name not in self.tables:
            return
        if opened := self._opened(name):
            raise errors.DeviceBusy(name, f"{opened} opener(s)")
        assert name not in self.queueing  # what waits in it would wait for ever
        del self.tables[name]
        self.regions.pop(name, None)
        self.requests.pop(name, None)
        self.log.append(f"remove {name}")

    def message(self, name: str, text: str) -> str:
        if name not in self.tables:
            raise errors.ProcessError(["dmsetup", "message", name], 1, "No such device or address")
        verb, *args = text.split()
        if verb.startswith("@stats_"):  # for the device rather than its table
            return self._stats(name, verb, args)
        if name in self.suspended:
            raise errors.ProcessError(["dmsetup", "message", name], 16, "Device or resource busy")
        if verb == "switch_group":
            self.log.append(f"{text} {name}")
        elif verb == "fail_path":
            self.failed.setdefault(name, set()).add(args[0].removeprefix(NUMBER))
        elif verb == "reinstate_path":
            self.failed.get(name, set()).discard(args[0].removeprefix(NUMBER))
        return ""

    def _stats(self, name: str, verb: str, args: list[str]) -> str:
        regions = self.regions.setdefault(name, {})
        if verb == "@stats_list":
            return "".join(
                f"{i}: {r.start}+{r.length} {r.step} {r.program} {r.word or '-'}\n"
                for i, r in regions.items()
                if args in ([], [r.program])
            )
        if verb == "@stats_create":
            new = next(i for i in range(99) if i not in regions)
            place, step, program, word = (*args, "")[:4]
            start, length = map(int, place.split("+"))
            regions[new] = Region(start, length, int(step), program, word)
            return str(new)
        found = regions.get(int(args[0]))
        if found is None:
            raise errors.ProcessError(["dmsetup", "message", name], 2, "No such file or directory")
        if verb == "@stats_print":
            return found.counters()
        assert verb == "@stats_delete"
        del regions[int(args[0])]
        return ""

    def status(self, name: str) -> str:
        if name in self.bare:
            return ""
        if name not in self.tables:
            raise errors.ProcessError(["dmsetup", "status", name], 1, "Device does not exist")
        target = self.tables[name][0].segments[0].target
        if isinstance(target, dmtable.Thin):
            return f"thin {self.mapped.get(target.id, 0) // 512} 0"
        if isinstance(target, dmtable.Cache):
            return CACHE_STATUS
        if isinstance(target, dmtable.Verity):
            return f"verity {'C' if name in self.corrupted else 'V'}"
        if not isinstance(target, dmtable.Multipath):
            return f"{str(target).split()[0]} "
        words = ["multipath", "2", "0", "0", "0", "1", "1"]
        for path in self.tables[name][0].devices:
            flag = "F" if path in self.failed.get(name, set()) else "A"
            words += ["A", "0", "1", "0", NUMBER + path, flag, "0"]
        return " ".join(words)

    def table(self, name: str) -> Table | None:
        if name in self.bare:
            return Table(())
        found = self.tables.get(name)
        return found[0] if found else None

    def has_target(self, kind: str) -> bool:
        return kind in ("linear", "verity")

    def devices(self) -> list[MappedDevice]:
        return [
            MappedDevice(
                name,
                devnames.UUID_PREFIX + name,
                NUMBER + MAPPER + name,
                self._opened(name),
                readonly,
                name in self.suspended,
            )
            for name, (_table, readonly) in self.tables.items()
        ]

    def _opened(self, name: str) -> int:
        below = sum(MAPPER + name in table.devices for table, _ in self.tables.values())
        return below + (name in self.held)

    def _check(self, name: str, table: Table) -> None:
        for device in table.devices:
            if device.startswith(MAPPER) and device.removeprefix(MAPPER) not in self.tables:
                raise errors.ProcessError(["dmsetup", "create", name], 1, f"{device}: not found")
        for segment in table.segments:
            if isinstance(segment.target, dmtable.Thin) and segment.target.id not in self.thin_ids:
                raise errors.ProcessError(["dmsetup", "create", name], 1, "No such thin device")


@dataclass
class FakePool:
    dm: FakeDeviceMapper
    block: int = 64 << 10
    total: int = 1 << 30

    def create_thin(self, thin_id: int) -> None:
        if thin_id in self.dm.thin_ids:
            raise errors.ProcessError(["dmsetup", "message"], 1, "File exists")
        self.dm.thin_ids.add(thin_id)

    def delete_thin(self, thin_id: int) -> None:
        for table, _ in self.dm.tables.values():
            for segment in table.segments:
                if isinstance(segment.target, dmtable.Thin) and segment.target.id == thin_id:
                    raise errors.ProcessError(["dmsetup", "message"], 1, "Device busy")
        self.dm.thin_ids.discard(thin_id)
        self.dm.mapped.pop(thin_id, None)

    def status(self) -> PoolStatus:
        used = sum(self.dm.mapped.values())
        return PoolStatus(used, self.total, healthy=used < self.total, full=used >= self.total)


@dataclass
class FakeMetadata:
    dm: FakeDeviceMapper
    filled: dict[int, Extents] = field(default_factory=dict)

    def mapped(self, thin_id: int) -> Extents:
        return self.filled.get(thin_id, Extents())

    def ids(self) -> set[int]:
        return set(self.dm.thin_ids)


@dataclass
class FakeLoops:
    dm: FakeDeviceMapper
    loops: dict[str, str] = field(default_factory=dict)
    made: int = 0  # that ever were: a name is not given twice

    def attach(self, device: str, count: int) -> list[str]:
        for number in range(self.made, self.made + count - len(self.find(device))):
            self.loops[f"/dev/loop{number}"] = device
            self.made = number + 1
        self.dm.held.add(device.removeprefix(MAPPER))
        return self.find(device)

    def find(self, device: str) -> list[str]:
        return [name for name, back in self.loops.items() if back == device]

    def reopen(self, device: str, read_ahead: int) -> None:
        """Nothing is read ahead here."""

    def detach(self, loop: str) -> None:
        device = self.loops.pop(loop, None)
        if device and not self.find(device):
            self.dm.held.discard(device.removeprefix(MAPPER))


@dataclass
class FakeInitiator:
    unreachable: set[str] = field(default_factory=set)  # portals at which nobody answers
    revoked: set[str] = field(default_factory=set)  # passwords
    logged_in: dict[tuple[str, str], str] = field(default_factory=dict)
    disks: int = 0  # that ever were: a name is not given twice

    def login(self, export: wire.Export) -> str:
        key = (export.iqn, export.portal)
        if key not in self.logged_in:
            if export.portal in self.unreachable:
                raise errors.LoginError(f"{export.iqn} at {export.portal}: no route")
            if export.password in self.revoked:
                raise errors.LoginRefused(f"{export.iqn} at {export.portal}: authorization failure")
            self.logged_in[key] = f"{REPLICA}{self.disks}"
            self.disks += 1
        return self.logged_in[key]

    def set_timeouts(self, endpoint: Endpoint) -> None:
        pass

    def logout(self, endpoint: Endpoint) -> None:
        key = (endpoint.target, endpoint.portal)
        self.logged_in.pop(key, None)

    def sessions(self) -> list[Session]:
        return [
            Session(Endpoint(iqn, portal), device, alive=portal not in self.unreachable)
            for (iqn, portal), device in self.logged_in.items()
        ]


@dataclass
class FakeTargets:
    exported: dict[str, tuple[str, str]] = field(default_factory=dict)
    admitted: dict[tuple[str, str], Credentials] = field(default_factory=dict)
    readers: dict[str, set[str]] = field(default_factory=dict)  # of each export

    def export(self, device: str, iqn: str, portal: str) -> None:
        self.exported[iqn] = (device, portal)

    def admit(self, iqn: str, initiator: str) -> Credentials:
        if iqn not in self.exported:
            raise errors.ExportError(f"there is no export {iqn} to admit {initiator} to")
        fresh = Credentials("user", f"secret-{len(self.admitted)}")
        return self.admitted.setdefault((iqn, initiator), fresh)

    def revoke(self, iqn: str, initiator: str) -> None:
        self.admitted.pop((iqn, initiator), None)

    def unexport(self, iqn: str) -> None:
        self.exported.pop(iqn, None)
        for key in [key for key in self.admitted if key[0] == iqn]:
            del self.admitted[key]

    def targets(self, prefix: str = "") -> tuple[Target, ...]:
        return tuple(
            Target(
                iqn,
                device,
                (portal,),
                tuple(i for q, i in self.admitted if q == iqn),
                tuple(sorted(self.readers.get(iqn, ()))),
            )
            for iqn, (device, portal) in sorted(self.exported.items())
            if iqn.startswith(prefix)
        )


@dataclass
class FakeBlocks:
    sizes: dict[str, int] = field(default_factory=dict)
    dm: FakeDeviceMapper | None = None  # where devices of device-mapper are
    silent: set[str] = field(default_factory=set)
    sectors: dict[str, int] = field(default_factory=dict)  # 512 bytes where nothing is said
    reading: dict[str, int] = field(default_factory=dict)  # reads that devices have in flight
    dropped: list[tuple[str, int, int]] = field(default_factory=list)  # from page caches

    def sector(self, device: str) -> int:
        return self.sectors.get(device, 512)

    def size(self, device: str) -> int:
        device = device.removeprefix(NUMBER)
        if device not in self.sizes and not device.startswith(REPLICA):
            raise errors.DeviceNotFound(device)
        return self.sizes.get(device, 1 << 40)

    def bytes_read(self, device: str) -> int:
        raise errors.DeviceNotFound(device)

    def requests(self, device: str) -> int:
        name = device.removeprefix(MAPPER)
        if self.dm is None or name not in self.dm.tables:
            raise errors.DeviceNotFound(device)
        return self.dm.requests.get(name, 0)

    def devnum(self, device: str) -> str:
        return NUMBER + device.removeprefix(NUMBER)

    def in_flight(self, device: str) -> int:
        return self.reading.get(device, 0)

    def answers(self, device: str) -> bool:
        return device not in self.silent

    def drop_cache(self, device: str, offset: int, length: int) -> None:
        self.dropped.append((device, offset, length))

    def page_cache(self, device: str, size: int) -> FakePageCache:
        return FakePageCache()


class FakePageCache:
    """That of a device of which nothing is read."""

    def share(self, start: int, end: int) -> float:
        return 0.0

    def close(self) -> None:
        pass


@dataclass
class FakeFailover:
    absent: bool = False  # no watcher can be run
    excluded_now: set[str] = field(default_factory=set)

    def ensure(self) -> None:
        if self.absent:
            raise errors.WatcherError("the failover watcher has ended")

    @contextlib.contextmanager
    def excluded(self, volume_id: str) -> Iterator[None]:
        self.excluded_now.add(volume_id)
        try:
            yield
        finally:
            self.excluded_now.discard(volume_id)


@dataclass
class FakeTracker:
    """Answers with the plan it was given; ``down`` makes every call fail.

    It has rows of what it planned or was told of: ``locations`` by image, ``stacks`` by volume.
    """

    plan: wire.Plan | None = None
    down: bool = False
    delay: float = 0.0  # seconds that plan_attach takes
    orders: wire.Orders = field(default_factory=wire.Orders)
    excluded: list[tuple[str, ...]] = field(default_factory=list)  # of each plan_sources
    reports: list[wire.LocationReport] = field(default_factory=list)
    recordings: list[wire.Recording] = field(default_factory=list)
    released: list[str] = field(default_factory=list)
    closed: list[str] = field(default_factory=list)
    locations: set[str] = field(default_factory=set)
    stacks: set[str] = field(default_factory=set)
    modes: dict[str, str] = field(default_factory=dict)  # in the rows of ``stacks``
    stack_ids: dict[str, str] = field(default_factory=dict)
    admitted: set[str] = field(default_factory=set)  # exporters at which the host is
    passwords: dict[str, str] = field(default_factory=dict)  # by host, of the next export only
    sizes: dict[str, int] = field(default_factory=dict)  # of exports by host; others are large

    def _check(self) -> None:
        if self.down:
            raise errors.TrackerUnavailable("thunder-tracker did not answer")

    def heartbeat(self, topology: wire.Topology) -> wire.Orders:
        self._check()
        return self.orders

    def plan_attach(
        self, server: str, volume_id: str, topology: wire.Topology, stack_id: str = ""
    ) -> wire.Plan:
        self._check()
        time.sleep(self.delay)
        assert self.plan is not None
        self.stacks.add(volume_id)
        self.stack_ids[volume_id] = stack_id
        self.modes[volume_id] = self.plan.mode
        if self.plan.image:
            self.locations.add(self.plan.image.id)
        return self.plan

    def plan_sources(
        self, image_id: str, topology: wire.Topology, exclude: tuple[str, ...] = ()
    ) -> wire.Plan:
        self._check()
        assert self.plan is not None
        self.excluded.append(exclude)
        if self.plan.image:
            self.locations.add(self.plan.image.id)
        return self.plan

    def manifest(self, image_id: str) -> wire.ImageDigests:
        self._check()
        raise errors.NoReplica(f"there is no manifest of image {image_id}")

    def release(self, volume_id: str, host: str, stack_id: str = "") -> None:
        self._check()
        self.released.append(volume_id)
        if stack_id and self.stack_ids.get(volume_id) not in ("", stack_id):
            return  # that of a newer stack stays
        self.stacks.discard(volume_id)
        self.modes.pop(volume_id, None)

    def report(self, report: wire.LocationReport) -> None:
        self._check()
        self.reports.append(report)
        if report.state == "gone":
            self.locations.discard(report.image_id)
        else:
            self.locations.add(report.image_id)

    def profile_report(self, recording: wire.Recording) -> None:
        self._check()
        self.recordings.append(recording)

    def open_export(
        self, source: wire.Source, image_id: str, initiator: str, wait: float
    ) -> wire.Export:
        self._check()
        self.admitted.add(source.exporter)
        iqn = f"iqn.2026-11.org.thunder:{source.host}:{image_id}"
        password = self.passwords.pop(source.host, "secret")
        size = self.sizes.get(source.host, 1 << 40)
        return wire.Export(f"{source.host}:3260", iqn, 0, "user", password, size)

    def close_export(self, exporter: str, image_id: str, initiator: str) -> None:
        self._check()
        self.closed.append(exporter)
        self.admitted.discard(exporter)


def fake_kit() -> Kit:
    """A host with an empty pool."""
    dm = FakeDeviceMapper()
    for name in (devnames.POOL_METADATA, devnames.POOL_DATA):
        dm.create(name, Table.of((1 << 21, dmtable.Linear("/dev/vdb"))))
    pool = dmtable.ThinPool(
        devnames.path(devnames.POOL_METADATA), devnames.path(devnames.POOL_DATA), 128, 1
    )
    dm.create(devnames.POOL, Table.of((1 << 21, pool)))
    dm.thin_ids.add(devnames.ZERO_ID)
    dm.create(
        devnames.ZERO, layout.thin_table(devnames.ZERO_LENGTH, devnames.ZERO_ID), readonly=True
    )
    return Kit(
        dm=dm,
        pool=FakePool(dm),
        metadata=FakeMetadata(dm),
        loops=FakeLoops(dm),
        initiator=FakeInitiator(),
        targets=FakeTargets(),
        blocks=FakeBlocks(dm=dm),
        failover=FakeFailover(),
        restore_cache=lambda device, xml: None,
    )
