"""A tracker in a process of its own, of this tree or of an older one.

It is run by path, with the tree to be measured in PYTHONPATH, and imports nothing else. Real are
the server, the service, the policy, the tables and the sharing of metadata snapshots. Played, by
the times in :class:`Costs`, are the kernel, thin_delta and Cinder's database.
"""

from __future__ import annotations

import importlib
import json
import logging
import sys
import threading
import time
from dataclasses import dataclass
from typing import Any

import oslo_messaging
from oslo_config import cfg

IMAGE = "11111111-2222-3333-4444-555555555555"
GIB = 1 << 30
#: Allocated ranges: a few hundred, as in a distribution's cloud image.
RANGES = 400
BLOCK_SECTORS = 128


@dataclass(frozen=True)
class Costs:
    """Seconds.

    :ivar commit: of the pool's metadata, for each message to it
    :ivar delta: thin_delta of a 4 GiB image
    :ivar process: of a process such as dmsetup
    :ivar cinder_cpu: CPU time of Cinder's code to read a volume from its database
    :ivar cinder: how long Cinder's database then takes
    :ivar roots: to see that a clone was never written, of which the older code knows nothing
    :ivar fresh: the volumes are such clones
    :ivar cores: of the storage host: so many thin_deltas run at a time
    """

    commit: float = 0.03
    delta: float = 0.12
    process: float = 0.01
    cinder_cpu: float = 0.004
    cinder: float = 0.005
    cores: int = 16
    roots: float = 0.004
    fresh: bool = True


class Played:
    """The kernel and the tools of one storage host."""

    def __init__(self, costs: Costs) -> None:
        self._costs = costs
        self._cores = threading.BoundedSemaphore(costs.cores)
        self._commits = threading.Lock()  # the kernel commits one after the other
        self._root = 0

    # device-mapper by ioctl

    def table(self, name: str) -> str:
        return f"0 2097152 thin 253:0 {1 if 'master' in name else 2}"

    def status(self, name: str) -> str:
        held = str(self._root) if self._root else "-"
        words = "rw discard_passdown queue_if_no_space - 1024"
        return f"thin-pool 1 10/4096 10/65536 {held} {words}"

    def message(self, name: str, text: str) -> str:
        with self._commits:
            time.sleep(self._costs.commit)
            self._root = 7 if text.startswith("reserve") else 0
        return ""

    def same(self, metadata: str, root: int, one: int, other: int) -> bool:
        time.sleep(self._costs.roots)
        return self._costs.fresh

    # processes

    def run(self, *argv: str, stdin: str | None = None, timeout: float = 60.0) -> str:
        with self._cores:
            time.sleep(self._costs.process)
            if argv[0] == "thin_delta":
                time.sleep(self._costs.delta)
                return f'<superblock data_block_size="{BLOCK_SECTORS}"><diff></diff></superblock>'
            if argv[1] == "table":
                return self.table(argv[2])
            if argv[1] == "status":
                return f"0 2097152 {self.status(argv[2])}"
        return self.message(argv[2], argv[-1])


def tracker(url: str, host: str, costs: Costs, volumes: dict[str, str]) -> Any:
    """A tracker on the tables at ``url``, and how it is served.

    :param volumes: each volume's id and the host that it is attached to
    """
    played = Played(costs)

    def found(volume_id: str) -> tuple[str, str]:
        until = time.thread_time() + costs.cinder_cpu
        while time.thread_time() < until:
            pass
        time.sleep(costs.cinder)
        return f"volume-{volume_id}", volumes[volume_id]

    from cinder_thunder.policy.ranking import Limits
    from cinder_thunder.tracker import service

    if hasattr(service, "TrackerService"):
        from cinder_thunder.mechanism.thinpool import StoragePool
        from cinder_thunder.volumes import Attachment, CinderVolume

        def volume(volume_id: str) -> CinderVolume:
            name, attached = found(volume_id)
            return CinderVolume(name, False, frozenset({Attachment(attached)}))

        pool = StoragePool("vg", "pool", played.run, played, same=played.same)
        tables = database(url)
        more: list[Any] = []
        if hasattr(tables, "profiles"):
            from cinder_thunder.tracker.profiles import BootProfiles

            more.append(BootProfiles(tables.profiles))
        return service.TrackerService(host, tables, pool, Limits(), volume, *more)
    thinpool: Any = importlib.import_module("cinder_thunder.mechanism.thinpool")
    former: Any = service

    def older(volume_id: str) -> Any:
        name, attached = found(volume_id)
        return former.CinderVolume(name, False, frozenset({attached}))

    older_pool = thinpool.ThinPool("vg", "pool", played.run)
    return former.Tracker(host, database(url), older_pool, Limits(), older)


def common(name: str) -> Any:
    """A module that both sides of Thunder have in common."""
    try:
        return importlib.import_module(f"os_brick_thunder.common.{name}")
    except ImportError:
        return importlib.import_module(f"os_brick_thunder.{name}")


def database(url: str) -> Any:
    api: Any = importlib.import_module("cinder_thunder.db.api")
    if hasattr(api, "Database"):
        lanes: Any = importlib.import_module("cinder_thunder.tracker.lanes")
        connections = getattr(lanes, "CONNECTIONS", 5)
        return api.Database(url, max_pool_size=connections)
    return api.Store(url)


def prepare(url: str, storage: list[str], volumes: list[list[str]]) -> None:
    """Create the tables, an image with a master on each storage host, and volumes of it.

    :param volumes: id and storage host of each
    """
    from cinder_thunder.db import migration

    api: Any = importlib.import_module("cinder_thunder.db.api")
    extents = common("policy.extents").Extents
    topology = common("wire").Topology
    made = database(url)
    migration.upgrade(made.engine)
    step = GIB // RANGES // 65536 * 65536
    allocated = extents.of((at * step, at * step + step // 2) for at in range(RANGES))
    new = hasattr(made, "hosts") and not callable(made.hosts)
    for number, name in enumerate(storage):
        beat = made.hosts.heartbeat if new else made.heartbeat
        beat(topology(name, f"10.0.0.{number + 1}", "s", "z0", "", "storage"))
        if new:
            from cinder_thunder.db.values import ClonedVolume, Image

            made.images.add_master(Image(IMAGE, GIB, allocated), name)
        else:
            made.add_master(api.Image(IMAGE, GIB, allocated), name)
    for volume_id, host in volumes:
        if new:
            made.volumes.put(ClonedVolume(volume_id, IMAGE, host))
        else:
            made.put_volume(api.Volume(volume_id, IMAGE, host))


def serve(url: str, transport_url: str, host: str, costs: Costs, volumes: dict[str, str]) -> None:
    """Serve until standard input ends, then print the CPU seconds that it took."""
    from cinder_thunder.tracker.server import Server

    cfg.CONF([], project="bench", default_config_files=[])
    transport = oslo_messaging.get_rpc_transport(cfg.CONF, url=transport_url)
    address = f"10.0.0.{host.partition('@')[0].removeprefix('stor')}"
    topology = common("wire").Topology(host, address, "s", "z0", "", "storage")
    made = tracker(url, host, costs, volumes)
    server = Server(transport, "threading", topology, made, None, None, 5.0, lambda: None)  # type: ignore[arg-type]
    server.start()
    print("ready", flush=True)
    sys.stdin.readline()
    before = time.process_time()
    sys.stdin.read()
    print(time.process_time() - before, flush=True)


def main() -> None:
    logging.basicConfig(level=logging.ERROR)
    what, *arguments = sys.argv[1:]
    if what == "prepare":
        prepare(arguments[0], *json.loads(sys.stdin.read()))
        return
    url, transport_url, host = arguments
    costs, volumes = json.loads(sys.stdin.readline())
    serve(url, transport_url, host, Costs(**costs), volumes)


if __name__ == "__main__":
    main()
