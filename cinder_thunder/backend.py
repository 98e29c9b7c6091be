"""Assembles one backend: what cinder-volume runs beside Cinder's LVM driver."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cinder import exception, rpc
from oslo_config import cfg
from oslo_log import log as logging

from cinder_thunder import announcements, concurrency, conf, privileged, volumes
from cinder_thunder.announcements import Announcer
from cinder_thunder.db import migration
from cinder_thunder.db.api import Database
from cinder_thunder.masters.cleaning import Cleaner
from cinder_thunder.masters.exporter import MasterExporter
from cinder_thunder.masters.freespace import FreeSpace
from cinder_thunder.masters.glance import Glance
from cinder_thunder.masters.masters import Masters
from cinder_thunder.masters.peers import Peers
from cinder_thunder.masters.replicas import Replicas
from cinder_thunder.masters.templates import Templates
from cinder_thunder.mechanism.lvm import ThinVolumes
from cinder_thunder.mechanism.thinpool import NOT_ZEROED, StoragePool
from cinder_thunder.mechanism.thintools import ToolTrial
from cinder_thunder.policy.ranking import Limits
from cinder_thunder.target import MasterTargets
from cinder_thunder.tracker import lanes
from cinder_thunder.tracker.profiles import BootProfiles
from cinder_thunder.tracker.reaper import INTERVAL, Reaper
from cinder_thunder.tracker.server import Server
from cinder_thunder.tracker.service import TrackerService
from os_brick_thunder.common import errors, wire
from os_brick_thunder.common.mechanism.thinmeta import Reservation
from os_brick_thunder.common.periodic import Task
from os_brick_thunder.common.policy.iscsinames import iqn_of, portal_of
from os_brick_thunder.common.rpc import RpcTracker

LOG = logging.getLogger(__name__)

#: Seconds between two checks whether a master is not active.
ACTIVATE_INTERVAL = 30.0
#: Seconds between two checks whether images have too few masters.
REPLICAS_INTERVAL = 30.0
#: Seconds that another storage host may take to answer.
RPC_TIMEOUT = 30.0
#: The options of Cinder's [database] that define an engine.
ENGINE_OPTIONS = (
    "connection_recycle_time",
    "max_overflow",
    "max_pool_size",
    "max_retries",
    "mysql_sql_mode",
    "pool_timeout",
    "retry_interval",
)


def open_database(options: Any) -> Database:
    """The database with our tables, in the process that uses it: engines do not survive a fork.

    :param options: the backend's configuration, of Cinder's class ``Configuration``
    """
    engine = {name: cfg.CONF.database[name] for name in ENGINE_OPTIONS}
    engine["max_pool_size"] = max(engine["max_pool_size"] or 0, lanes.CONNECTIONS)
    return Database(
        conf.connection(cfg.CONF), heartbeat_timeout=options.thunder_heartbeat_timeout, **engine
    )


def check_tables(database: Database) -> None:
    """:raises cinder.exception.VolumeBackendAPIException: their revision is not this code's"""
    found, expected = migration.version(database.engine), migration.head()
    if found != expected:
        raise misconfigured(
            f"thunder's tables are at revision {found}, this code needs {expected}: "
            "run thunder db upgrade"
        )


def misconfigured(reason: str) -> exception.VolumeBackendAPIException:
    return exception.VolumeBackendAPIException(data=reason)


@dataclass(frozen=True)
class StorageBackend:
    """The parts of one backend.

    :ivar host: its name (``stor1@thunder``)
    :ivar server: serves the tracker and the exporter, and runs what is periodic
    :ivar thin_tools: whether maps can be computed on this host
    """

    host: str
    database: Database
    volumes: ThinVolumes
    masters: Masters
    announcer: Announcer
    exporter: MasterExporter
    server: Server
    pool: StoragePool
    thin_tools: ToolTrial

    def start(self) -> None:
        self.thin_tools()  # logs what is wrong with them
        self.pool.release_stale()
        self._check_zeroing()
        self.exporter.reconcile()  # first: an export keeps its volume open
        self.masters.reconcile()
        self._forget_foreign_volumes()
        self.server.start()

    def stop(self) -> None:
        self.server.stop()

    def _check_zeroing(self) -> None:
        try:
            if not self.pool.zeroes_blocks():
                LOG.warning("%s: %s", self.pool.name, NOT_ZEROED)
        except errors.ThunderError as error:  # without volumes the pool may be inactive
            LOG.debug("Cannot read the table of %s: %s", self.pool.name, error)

    def _forget_foreign_volumes(self) -> None:
        """Drop the records of volumes that another driver deleted or took over."""
        for volume_id in self.database.volumes.ids_on(self.host):
            if not volumes.is_on(volume_id, self.host):
                self.database.volumes.drop(volume_id)


def build(
    host: str, options: Any, database: Database, group: Any, initialized: Callable[[], bool]
) -> StorageBackend:
    """Build a backend; nothing is started, nothing on disk is touched.

    :param options: as for :func:`open_database`
    :param group: the volume group, of os-brick's class ``LVM``
    :param initialized: whether Cinder has finished this backend's start
    """
    folder = Path(cfg.CONF.state_path, "thunder")
    thin = ThinVolumes(group.vg_name, group.vg_thin_pool, privileged.run, group.LVM_CMD_PREFIX)
    tools = ToolTrial(privileged.thin_tools_flaw)
    pool = StoragePool(
        group.vg_name,
        group.vg_thin_pool,
        privileged.run,
        privileged.PrivilegedDm(),
        tools,
        Reservation(folder / f"{host}.metadata-snapshot"),
        privileged.same_mappings,
    )
    peers = Peers(
        RpcTracker(rpc.TRANSPORT, RPC_TIMEOUT),
        privileged,
        folder / host,
    )
    targets = MasterTargets()
    masters = Masters(
        host,
        database,
        thin,
        pool,
        options.volume_dd_blocksize,
        peers,
        lambda image_id: targets.unexport(iqn_of(host, image_id)),
        options.thunder_hash_trees,
    )
    exporter = MasterExporter(
        host,
        portal_of(options.target_ip_address, options.target_port),
        database,
        targets,
        masters.trees.exported,
        masters.remove,
        initialized,
    )
    server = Server(
        rpc.TRANSPORT,
        "eventlet" if concurrency.is_green() else "threading",  # as cinder.rpc chooses
        topology(host, options),
        TrackerService(
            host,
            database,
            pool,
            limits(options),
            volumes.find_volume,
            BootProfiles(database.profiles) if options.thunder_profiles else None,
        ),
        exporter,
        Templates(database, thin, masters, lambda found: volumes.origin(found, host)),
        options.thunder_heartbeat_interval,
        FreeSpace(pool.status, (options.reserved_percentage or 0) / 100).bytes,
        tuple(tasks(host, options, database, masters, exporter, initialized)),
    )
    announcer = Announcer(RpcTracker(rpc.TRANSPORT, announcements.TIMEOUT).announce)
    return StorageBackend(host, database, thin, masters, announcer, exporter, server, pool, tools)


def topology(host: str, options: Any) -> wire.Topology:
    return wire.Topology(
        host=host,
        address=options.target_ip_address,
        rack=options.thunder_rack,
        zone=options.thunder_zone,
        initiator="",
        kind="storage",
    )


def limits(options: Any) -> Limits:
    return Limits(
        fanout=options.thunder_fanout,
        storage_fanout=options.thunder_storage_fanout,
        creating=options.thunder_creating_timeout,
    )


def tasks(
    host: str,
    options: Any,
    database: Database,
    masters: Masters,
    exporter: MasterExporter,
    initialized: Callable[[], bool],
) -> Iterator[Task]:
    """What runs in the background once Cinder has started this backend."""
    glance = Glance(cfg.CONF, cfg.CONF.config_file or (), cfg.CONF.config_dir or ())
    yield Task("thunder-activate", ACTIVATE_INTERVAL, masters.activate, initialized)
    cleaner = Cleaner(host, database, glance.present, exporter.evict, volumes.is_in_cinder)
    yield Task("thunder-clean", options.thunder_clean_interval, cleaner.run, initialized)
    yield Task("thunder-sweep", options.thunder_clean_interval, masters.sweep, initialized)
    reaper = Reaper(host, database, volumes.is_on, options.thunder_creating_timeout)
    yield Task("thunder-reap", INTERVAL, reaper.run, initialized)
    minimum = options.thunder_min_replicas
    if minimum > 1:
        grace = options.thunder_replica_grace
        replicas = Replicas(host, database, minimum, grace, masters.replicate)
        yield Task("thunder-replicas", REPLICAS_INTERVAL, replicas.run, initialized)
