"""Cinder's LVM driver, with volumes that share their blocks with a replicated image.

Thunder never fails what the LVM driver does: if its own records cannot be written, a volume is
created, attached and deleted all the same, and is merely not accelerated.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from cinder import context as cinder_context
from cinder import exception, interface
from cinder.volume import volume_utils
from cinder.volume.drivers import lvm
from oslo_config import cfg
from oslo_log import log as logging

from cinder_thunder import backend, conf, volumes
from cinder_thunder.db.values import ClonedVolume
from cinder_thunder.masters.clones import has_no_data, is_ours
from cinder_thunder.target import VolumeTargetDriver
from cinder_thunder.volumes import announced
from os_brick_thunder.common import errors, wire

LOG = logging.getLogger(__name__)

GIB = 1 << 30
#: Added to the name of an LV that is about to replace the LV of a volume.
_REVERTED = "-reverted"


@interface.volumedriver
class ThunderDriver(lvm.LVMVolumeDriver):
    """Thin LVM over LIO. A volume made from an image is a snapshot of the image's master."""

    VERSION = "0.1.0"

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.configuration.append_config_values(conf.backend_opts)
        conf.register_database(cfg.CONF)
        if self.configuration.target_helper == "lioadm":
            self.target_driver = VolumeTargetDriver(
                configuration=self.configuration, executor=self._execute
            )
        self._backend: backend.StorageBackend | None = None

    @classmethod
    def get_driver_options(cls) -> list[Any]:
        return [*super().get_driver_options(), *conf.backend_opts]

    # Start

    def do_setup(self, context: Any) -> None:
        super().do_setup(context)
        self._database = backend.open_database(self.configuration)

    def check_for_setup_error(self) -> None:
        """Check the configuration, and start the backend.

        :raises cinder.exception.VolumeBackendAPIException: says which option is wrong
        """
        _check_options(self.configuration)
        super().check_for_setup_error()
        if self.configuration.lvm_type != "thin":  # "auto" was resolved by the call above
            raise backend.misconfigured(
                f"volume group {self.vg.vg_name} has volumes but no thin pool: make one "
                f"(lvcreate --type thin-pool), named {self.vg.vg_name}-pool, and set lvm_type "
                "to thin"
            )
        backend.check_tables(self._database)
        if self._backend is not None:  # Cinder repeats a start that failed
            self._backend.stop()
        self._backend = backend.build(
            self.host, self.configuration, self._database, self.vg, lambda: bool(self.initialized)
        )
        self._masters = self._backend.masters
        self._announce = self._backend.announcer.announce
        self._volumes = self._backend.volumes
        self._restore_exports()
        self._backend.start()

    def _restore_exports(self) -> None:
        """Cinder's start goes on with the volumes "in-use", and those alone."""
        context = cinder_context.get_admin_context()
        if isinstance(self.target_driver, VolumeTargetDriver):
            self._note(self.target_driver.restore_others)
        for volume in self._note(volumes.attached_in_passing_states, self.host) or ():
            try:
                self.ensure_export(context, volume)
            except Exception:
                LOG.exception("Volume %s could not be exported again", volume.id)

    def _update_volume_stats(self) -> None:
        """Cinder's driver counts all LVs as provisioned, also those that have no data of their own:
        the scheduler would refuse volumes for their sake.
        """
        super()._update_volume_stats()
        if self.vg is not None:
            empty = sum(float(v["size"]) for v in self.vg.get_volumes() if has_no_data(v["name"]))
            for pool in self._stats["pools"]:
                pool["provisioned_capacity_gb"] = round(pool["provisioned_capacity_gb"] - empty, 2)

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

        Cinder neither extends such a volume nor checks a signature: both are done here.
        """
        image_id = image_meta["id"]
        try:
            found = self._masters.ensure(context, image_service, image_meta, volume.size)
        except exception.CinderException:  # of the image: Cinder would meet it, too
            raise
        except Exception:
            LOG.exception("Volume %s is made without a replica of its image", volume.id)
            return None, False
        clone = image_id, found.size, volume.name, volume.size * GIB
        try:
            self._masters.clones.make(*clone)
        except errors.ProcessError:
            if self._masters.forget_if_missing(image_id):
                return self.clone_image(context, volume, image_location, image_meta, image_service)
            try:  # another request that met the same may have made the master again
                self._masters.clones.make(*clone)
            except errors.ProcessError as error:
                raise exception.VolumeBackendAPIException(data=str(error)) from error
        if found.signature_verified is not None:
            self._note(
                self.db.volume_glance_metadata_bulk_create,
                context,
                volume.id,
                {"signature_verified": found.signature_verified},
            )
        self._note(self._database.volumes.put, ClonedVolume(volume.id, image_id, self.host))
        return {}, True

    def create_volume_from_snapshot(self, volume: Any, snapshot: Any) -> Any:
        update = super().create_volume_from_snapshot(volume, snapshot)
        self._inherit(volume, snapshot.id, snapshot.volume_id)
        return update

    def create_cloned_volume(self, volume: Any, src_vref: Any) -> Any:
        update = super().create_cloned_volume(volume, src_vref)
        self._inherit(volume, src_vref["id"])
        return update

    def _inherit(self, volume: Any, *sources: str) -> None:
        self._note(self._database.volumes.inherit, volume.id, sources, self.host)

    def revert_to_snapshot(self, context: Any, volume: Any, snapshot: Any) -> None:
        """Replace the LV by a new thin snapshot of its snapshot.

        Cinder's LVM driver cannot revert thin volumes. The copy that Cinder makes instead skips
        zeros, so that what was written where the snapshot has zeros would remain.
        """
        new = f"{volume.name}{_REVERTED}"
        names = self._volumes.names()
        if new in names:  # of an attempt that was interrupted
            self._volumes.remove(new)
        self._volumes.snapshot(new, self._escape_snapshot(snapshot.name))
        try:
            if volume.name in names:
                self._volumes.remove(volume.name)
        except errors.ProcessError:  # in use
            self._volumes.remove(new)
            raise
        self._volumes.rename(new, volume.name)

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
        """Without masters: one that is managed could be deleted or written while hosts read it."""
        entries = super().get_manageable_volumes(
            cinder_volumes, None, sys.maxsize, None, ["reference"], ["asc"]
        )
        return _without_masters(entries, marker, limit, offset, sort_keys, sort_dirs)

    def get_manageable_snapshots(
        self,
        cinder_snapshots: Any,
        marker: Any,
        limit: Any,
        offset: Any,
        sort_keys: Any,
        sort_dirs: Any,
    ) -> list[dict[str, Any]]:
        """Without masters."""
        entries = super().get_manageable_snapshots(
            cinder_snapshots, None, sys.maxsize, None, ["reference"], ["asc"]
        )
        return _without_masters(entries, marker, limit, offset, sort_keys, sort_dirs)

    def manage_existing_object_get_size(
        self, existing_object: Any, existing_ref: dict[str, Any], object_type: str
    ) -> int:
        """Refuse masters, also as a snapshot: whoever deletes that would delete the master."""
        name = str(existing_ref.get("source-name", ""))
        if is_ours(name):
            raise exception.ManageExistingInvalidReference(
                existing_ref=existing_ref, reason=f"{name} is the master of an image"
            )
        return int(
            super().manage_existing_object_get_size(existing_object, existing_ref, object_type)
        )

    # Attachments

    def initialize_connection(self, volume: Any, connector: dict[str, Any]) -> dict[str, Any]:
        """Plain iSCSI connection data, with a payload for hosts that announced their agent."""
        payload = self._note(self._payload, volume, connector)  # first: the agent is told there
        info: dict[str, Any] = super().initialize_connection(volume, connector)
        if payload is not None:
            info["data"]["thunder"] = payload.to_wire()
        return info

    def _payload(self, volume: Any, connector: dict[str, Any]) -> wire.Payload | None:
        """What a host needs for a cache, if the volume may have one. Its agent has a head start."""
        topology = announced(connector)
        if topology is None or volume.multiattach:
            return None
        record = self._database.volumes.get(volume.id)
        if record is None or record.host != self.host:
            return None
        self._note(self._announce, topology.host, record.image_id)
        return wire.Payload(volume.id, record.image_id, self.host)

    def terminate_connection(self, volume: Any, connector: Any, **kwargs: Any) -> bool:
        """:returns: True while another attachment needs the export"""
        shared = bool(super().terminate_connection(volume, connector, **kwargs))
        topology = announced(connector)
        if topology is not None:  # the agent releases the stack itself, unless it is down
            self._note(self._database.volumes.detach_stack, volume.id, topology.host)
        return shared

    def _note(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Call a function that only acceleration needs: a failure is logged, and ignored."""
        try:
            return function(*arguments)
        except Exception:
            LOG.exception(
                "%s failed; the volume works, but may not be accelerated", function.__name__
            )
            return None


def _without_masters(entries: list[dict[str, Any]], *paging: Any) -> list[dict[str, Any]]:
    """A page of what can be managed.

    :param paging: the arguments of Cinder's pages after the entries
    """
    page: list[dict[str, Any]] = volume_utils.paginate_entries_list(
        [entry for entry in entries if not is_ours(entry["reference"]["source-name"])], *paging
    )
    return page


def _check_options(options: Any) -> None:
    if options.target_helper != "lioadm":
        raise backend.misconfigured(
            f"target_helper is {options.target_helper}: set it to lioadm, as only LIO can give "
            "every host read-only access of its own to a master"
        )
    if options.lvm_type == "default":
        raise backend.misconfigured("lvm_type is default: set it to thin, masters are thin volumes")
