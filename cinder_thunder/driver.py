"""Cinder's LVM driver, with volumes that share their blocks with a replicated image.

What Thunder adds never fails what LVM does: when its own records cannot be kept, a volume is
made, attached and deleted all the same, and is merely not accelerated.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from cinder import context as cinder_context
from cinder import exception, interface, monkey_patch, objects, rpc
from cinder.volume import volume_utils
from cinder.volume.drivers import lvm
from oslo_config import cfg
from oslo_log import log as logging

from cinder_thunder import conf, privileged
from cinder_thunder.db import migration
from cinder_thunder.db.api import Database
from cinder_thunder.db.values import ClonedVolume
from cinder_thunder.masters import masters as master
from cinder_thunder.masters.cleaning import Cleaner
from cinder_thunder.masters.exporter import Exporter
from cinder_thunder.masters.glance import Glance
from cinder_thunder.masters.peers import Peers
from cinder_thunder.masters.replicas import Replicas, Room
from cinder_thunder.mechanism.lvm import ThinVolumes
from cinder_thunder.mechanism.thinpool import ThinPool
from cinder_thunder.policy.ranking import Limits
from cinder_thunder.target import LioTarget, locked
from cinder_thunder.tracker.server import Server
from cinder_thunder.tracker.service import CinderVolume, Tracker
from os_brick_thunder.common import errors, wire
from os_brick_thunder.common.periodic import Task
from os_brick_thunder.common.rpc import RpcTracker
from os_brick_thunder.common.transport import lio

LOG = logging.getLogger(__name__)

GIB = 1 << 30
#: Seconds between two looks whether an image has too few masters.
REPLICAS_INTERVAL = 30.0
#: Seconds that another storage host may take to answer.
RPC_TIMEOUT = 30.0
#: Of Cinder's [database] options, those that make an engine what it is.
ENGINE_OPTIONS = (
    "connection_recycle_time",
    "max_overflow",
    "max_pool_size",
    "max_retries",
    "mysql_sql_mode",
    "pool_timeout",
    "retry_interval",
)


@interface.volumedriver
class ThunderDriver(lvm.LVMVolumeDriver):
    """Thin LVM over LIO. A volume made from an image is a snapshot of the image's master."""

    VERSION = "0.1.0"
    CI_WIKI_NAME = "Cinder_Jenkins"

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.configuration.append_config_values(conf.backend_opts)
        conf.register_database(cfg.CONF)
        if self.configuration.target_helper == "lioadm":
            self.target_driver = LioTarget(configuration=self.configuration, executor=self._execute)
        self._server: Server | None = None

    @classmethod
    def get_driver_options(cls) -> list[Any]:
        return [*super().get_driver_options(), *conf.backend_opts]

    # Start

    def do_setup(self, context: Any) -> None:
        """Runs in the process that serves: engines and threads do not survive a fork."""
        super().do_setup(context)
        self._database = Database(
            conf.connection(cfg.CONF),
            heartbeat_timeout=self.configuration.thunder_heartbeat_timeout,
            **{name: cfg.CONF.database[name] for name in ENGINE_OPTIONS},
        )

    def check_for_setup_error(self) -> None:
        """:raises cinder.exception.VolumeBackendAPIException: says which option is wrong"""
        if self.configuration.target_helper != "lioadm":
            raise _misconfigured(
                f"target_helper is {self.configuration.target_helper}: set it to lioadm, as only "
                "LIO can give every host a read-only access of its own to a master"
            )
        if self.configuration.lvm_type == "default":
            raise _misconfigured("lvm_type is default: set it to thin, masters are thin volumes")
        super().check_for_setup_error()
        if self.configuration.lvm_type != "thin":
            raise _misconfigured(
                f"volume group {self.vg.vg_name} has volumes but no thin pool: make one "
                f"(lvcreate --type thin-pool), named {self.vg.vg_name}-pool, and set lvm_type "
                "to thin"
            )
        self._check_tables()
        self._volumes = ThinVolumes(
            self.vg.vg_name, self.vg.vg_thin_pool, privileged.run, self.vg.LVM_CMD_PREFIX
        )
        pool = ThinPool(
            self.vg.vg_name, self.vg.vg_thin_pool, privileged.run, privileged.DeviceMapper()
        )
        self._masters = master.Masters(
            self.host,
            self._database,
            self._volumes,
            pool,
            self.configuration.volume_dd_blocksize,
            Peers(
                RpcTracker(rpc.TRANSPORT, RPC_TIMEOUT),
                privileged,
                Path(cfg.CONF.state_path, "thunder", self.host),
            ),
        )
        portal = lio.portal_of(self.configuration.target_ip_address, self.configuration.target_port)
        exporter = Exporter(
            self.host,
            portal,
            self._database,
            _LockedExports(),
            self._masters.path,
            self._masters.remove,
            lambda: bool(self.initialized),
        )
        tracker = Tracker(self.host, self._database, pool, self._limits(), _find_volume)
        self._masters.reconcile()
        exporter.reconcile()
        self._forget_foreign_volumes()
        room = Room(pool.status, (self.configuration.reserved_percentage or 0) / 100)
        self._serve(tracker, exporter, room)

    def _check_tables(self) -> None:
        found, wanted = migration.version(self._database.engine), migration.head()
        if found != wanted:
            raise _misconfigured(
                f"thunder's tables are at revision {found}, this code needs {wanted}: "
                "run thunder db upgrade"
            )

    def _limits(self) -> Limits:
        return Limits(
            fanout=self.configuration.thunder_fanout,
            storage_fanout=self.configuration.thunder_storage_fanout,
            creating=self.configuration.thunder_creating_timeout,
        )

    def _tasks(self, exporter: Exporter) -> Iterator[Task]:
        """What goes on in the background once Cinder has started this backend."""

        def started() -> bool:
            return bool(self.initialized)

        glance = Glance(cfg.CONF, cfg.CONF.config_file or (), cfg.CONF.config_dir or ())
        cleaner = Cleaner(self.host, self._database, glance.present, exporter.evict)
        interval = self.configuration.thunder_clean_interval
        yield Task("thunder-clean", interval, cleaner.run, started)
        wanted = self.configuration.thunder_min_replicas
        if wanted > 1:
            grace = self.configuration.thunder_replica_grace
            replicas = Replicas(self.host, self._database, wanted, grace, self._masters.replicate)
            yield Task("thunder-replicas", REPLICAS_INTERVAL, replicas.run, started)

    def _serve(self, tracker: Tracker, exporter: Exporter, room: Room) -> None:
        if self._server is not None:  # Cinder sets a driver up again when it failed to start
            self._server.stop()
        topology = wire.Topology(
            host=self.host,
            address=self.configuration.target_ip_address,
            rack=self.configuration.thunder_rack,
            zone=self.configuration.thunder_zone,
            initiator="",
            kind="storage",
        )
        self._server = Server(
            rpc.TRANSPORT,
            "eventlet" if monkey_patch.is_patched() else "threading",  # as cinder.rpc has it
            topology,
            tracker,
            exporter,
            self.configuration.thunder_heartbeat_interval,
            room.free,
            tuple(self._tasks(exporter)),
        )
        self._server.start()

    def _forget_foreign_volumes(self) -> None:
        """Drop records of volumes that another driver deleted or took over."""
        recorded = self._database.volumes.ids_on(self.host)
        for volume_id in recorded:
            with contextlib.suppress(exception.VolumeNotFound):
                volume = objects.Volume.get_by_id(cinder_context.get_admin_context(), volume_id)
                if str(volume.host).split("#")[0] == self.host:
                    continue
            self._database.volumes.drop(volume_id)

    # Volumes

    def clone_image(
        self,
        context: Any,
        volume: Any,
        image_location: Any,
        image_meta: dict[str, Any],
        image_service: Any,
    ) -> tuple[dict[str, Any] | None, bool]:
        """Make a volume as a thin snapshot of its image's master.

        After it Cinder neither extends the volume nor checks a signature: both are done here.
        """
        image_id = image_meta["id"]
        found = self._masters.ensure(context, image_service, image_meta, volume.size)
        try:
            self._snapshot(volume, image_id, found.size)
        except errors.ProcessError as error:
            if not self._masters.forget_if_gone(image_id):
                raise exception.VolumeBackendAPIException(data=str(error)) from error
            return self.clone_image(context, volume, image_location, image_meta, image_service)
        if found.signature_verified is not None:
            self._note(
                self.db.volume_glance_metadata_bulk_create,
                context,
                volume.id,
                {"signature_verified": found.signature_verified},
            )
        self._note(self._database.volumes.put, ClonedVolume(volume.id, image_id, self.host))
        return {}, True

    def _snapshot(self, volume: Any, image_id: str, size: int) -> None:
        """Make the LV of a volume, or leave none. ``size`` is the image's, in bytes."""
        self._volumes.snapshot(volume.name, master.MASTER + image_id)
        if volume.size * GIB <= self._volumes.rounded(size):
            return  # LVM refuses to extend to the size that there is
        try:
            self._volumes.extend(volume.name, volume.size * GIB)
        except errors.ProcessError:
            self._delete_quietly(volume.name)
            raise

    def _delete_quietly(self, name: str) -> None:
        try:
            self._volumes.remove(name)
        except errors.ThunderError:
            LOG.exception("Could not remove %s after a failure; remove it by hand", name)

    def create_volume_from_snapshot(self, volume: Any, snapshot: Any) -> Any:
        update = super().create_volume_from_snapshot(volume, snapshot)
        self._note(self._database.volumes.inherit, volume.id, snapshot.volume_id, self.host)
        return update

    def create_cloned_volume(self, volume: Any, src_vref: Any) -> Any:
        update = super().create_cloned_volume(volume, src_vref)
        self._note(self._database.volumes.inherit, volume.id, src_vref["id"], self.host)
        return update

    def delete_volume(self, volume: Any) -> None:
        super().delete_volume(volume)
        self._note(self._database.volumes.drop, volume.id)

    def unmanage(self, volume: Any) -> None:
        super().unmanage(volume)
        self._note(self._database.volumes.drop, volume.id)

    def migrate_volume(
        self,
        ctxt: Any,
        volume: Any,
        host: dict[str, Any],
        thin: bool = False,
        mirror_count: int = 0,
    ) -> tuple[bool, dict[str, Any] | None]:
        moved, update = super().migrate_volume(ctxt, volume, host, thin, mirror_count)
        if moved:  # a copy in another volume group, which shares nothing with the master
            self._note(self._database.volumes.drop, volume.id)
        return moved, update

    def update_migrated_volume(
        self, ctxt: Any, volume: Any, new_volume: Any, original_volume_status: str
    ) -> dict[str, Any]:
        update: dict[str, Any] = super().update_migrated_volume(
            ctxt, volume, new_volume, original_volume_status
        )
        self._note(self._database.volumes.drop, volume.id)  # copied here, it shares nothing
        return update

    def get_manageable_volumes(
        self,
        cinder_volumes: Any,
        marker: Any,
        limit: Any,
        offset: Any,
        sort_keys: Any,
        sort_dirs: Any,
    ) -> list[dict[str, Any]]:
        """Without masters: whoever managed one could delete or write what others read."""
        entries = super().get_manageable_volumes(
            cinder_volumes, None, sys.maxsize, None, ["reference"], ["asc"]
        )
        page: list[dict[str, Any]] = volume_utils.paginate_entries_list(
            [entry for entry in entries if not master.is_ours(entry["reference"]["source-name"])],
            marker,
            limit,
            offset,
            sort_keys,
            sort_dirs,
        )
        return page

    def manage_existing_get_size(self, volume: Any, existing_ref: dict[str, Any]) -> int:
        name = str(existing_ref.get("source-name", ""))
        if master.is_ours(name):
            raise exception.ManageExistingInvalidReference(
                existing_ref=existing_ref, reason=f"{name} is the master of an image"
            )
        return int(super().manage_existing_get_size(volume, existing_ref))

    # Attachments

    def initialize_connection(self, volume: Any, connector: dict[str, Any]) -> dict[str, Any]:
        """Plain iSCSI connection data; for hosts that announced themselves, a hint besides."""
        info: dict[str, Any] = super().initialize_connection(volume, connector)
        payload = self._note(self._payload, volume, connector)
        if payload is not None:
            info["data"]["thunder"] = payload.to_wire()
        return info

    def _payload(self, volume: Any, connector: dict[str, Any]) -> wire.Payload | None:
        topology = _topology(connector)
        if topology is None or volume.multiattach:
            return None
        record = self._database.volumes.get(volume.id)
        if record is None or record.host != self.host:
            return None
        return wire.Payload(volume.id, record.image_id, self.host)

    def terminate_connection(self, volume: Any, connector: Any, **kwargs: Any) -> bool:
        """:returns: True while another attachment needs the export"""
        shared = bool(super().terminate_connection(volume, connector, **kwargs))
        topology = _topology(connector)
        if topology is not None:  # the agent said so itself, unless it was down
            self._note(self._database.volumes.release_stack, volume.id, topology.host)
        return shared

    def _note(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Call what only acceleration needs; a failure costs that, and no more."""
        try:
            return function(*arguments)
        except Exception:
            LOG.exception(
                "%s failed; the volume works, but may not be accelerated", function.__name__
            )
            return None


def _topology(connector: dict[str, Any] | None) -> wire.Topology | None:
    """What a host said of itself; None if it said nothing, or nothing that we understand."""
    raw = (connector or {}).get("thunder")
    if raw is None:
        return None
    try:
        topology = wire.parse(wire.Topology, raw)
    except wire.MalformedValue as error:
        LOG.warning("A host announced itself in a way that is not understood: %s", error)
        return None
    if topology.version != wire.PAYLOAD_VERSION:
        LOG.warning(
            "%s speaks version %s of thunder, this host %s: its volumes are plain iSCSI",
            topology.host,
            topology.version,
            wire.PAYLOAD_VERSION,
        )
        return None
    return topology


def _find_volume(volume_id: str) -> CinderVolume | None:
    try:
        volume = objects.Volume.get_by_id(cinder_context.get_admin_context(), volume_id)
    except exception.VolumeNotFound:
        return None
    hosts = set()
    for attachment in volume.volume_attachment:
        connector = attachment.connector or {}
        topology = _topology(connector)
        # A host's name to Nova and to its agent may differ, so its own word comes first.
        host = topology.host if topology else connector.get("host") or attachment.attached_host
        if host:
            hosts.add(host)
    return CinderVolume(volume.name, bool(volume.multiattach), frozenset(hosts))


def _misconfigured(reason: str) -> exception.VolumeBackendAPIException:
    return exception.VolumeBackendAPIException(data=reason)


class _LockedExports:
    """:mod:`cinder_thunder.privileged`, one at a time with ``cinder-rtstool``."""

    @locked
    def export(self, device: str, iqn: str, portal: str) -> None:
        privileged.export(device, iqn, portal)

    @locked
    def admit(self, iqn: str, initiator: str) -> lio.Credentials:
        return privileged.admit(iqn, initiator)

    @locked
    def revoke(self, iqn: str, initiator: str) -> None:
        privileged.revoke(iqn, initiator)

    @locked
    def unexport(self, iqn: str) -> None:
        privileged.unexport(iqn)

    @locked
    def exports(self, prefix: str) -> list[str]:
        found: list[str] = privileged.exports(prefix)
        return found
