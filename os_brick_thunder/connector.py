"""The iSCSI connector that asks the local agent to build a stack over a volume.

It serves every iSCSI backend of the process that it is registered in. Without a ``thunder`` key in
the connection data it behaves exactly as os-brick's own connector. With one, any failure of the
agent results in the plain iSCSI device and a warning.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from os_brick import exception as brick_exception
from os_brick.initiator import linuxscsi
from os_brick.initiator.connectors import iscsi as brick_iscsi

from os_brick_thunder import extending, takedown
from os_brick_thunder.client import AgentClient
from os_brick_thunder.common import conf, errors, wire
from os_brick_thunder.common.policy import devnames
from os_brick_thunder.common.transport import iscsi

LOG = logging.getLogger(__name__)
KEY = "thunder"
SYSFS = Path("/sys/block")


def _payload(properties: dict[str, Any]) -> wire.Payload | None:
    """The payload in connection data; None, with a warning, if it is not supported."""
    raw = properties.get(KEY)
    if raw is None:
        return None
    try:
        version = raw.get("version") if isinstance(raw, dict) else raw
        if version != wire.PAYLOAD_VERSION:
            raise errors.UnknownVersion(version, wire.PAYLOAD_VERSION)
        return wire.parse(wire.Payload, raw)
    except (errors.UnknownVersion, wire.MalformedValue) as error:
        LOG.warning("Attaching as plain iSCSI: %s", error)
        return None


def _volume_id(properties: dict[str, Any]) -> str:
    """The volume in connection data of whatever version; empty if it is not ours."""
    raw = properties.get(KEY)
    return str(raw.get("volume_id") or "") if isinstance(raw, dict) else ""


class _LinuxSCSI(linuxscsi.LinuxSCSI):
    """os-brick's functions on disks, which do not take our devices for multipaths."""

    def find_sysfs_multipath_dm(self, device_names: Iterable[str]) -> str | None:
        for name in device_names:
            for holder in sorted((SYSFS / name / "holders").glob("dm-*")):
                if not _is_ours(holder.name):
                    return holder.name
        return None


def _is_ours(dm: str) -> bool:
    try:
        return (SYSFS / dm / "dm" / "uuid").read_text().startswith(devnames.UUID_PREFIX)
    except OSError:  # just removed
        return False


class ThunderISCSIConnector(brick_iscsi.ISCSIConnector):
    """os-brick's ISCSIConnector, with a stack on top where possible."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._linuxscsi = _LinuxSCSI(self._root_helper, execute=self._execute)

    @staticmethod
    def get_connector_properties(root_helper: str, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Announce this host to the driver.

        Never raises: os-brick collects the properties of all connectors, so an error here would
        fail attachments of other protocols, too.
        """
        properties: dict[str, Any] = brick_iscsi.ISCSIConnector.get_connector_properties(
            root_helper, *args, **kwargs
        )
        try:
            mine = conf.load_connector()
            if mine.address:
                topology = wire.Topology(
                    host=mine.host,
                    address=mine.address,
                    rack=mine.rack,
                    zone=mine.zone,
                    initiator=properties.get("initiator") or iscsi.initiator_name(),
                )
                properties = {**properties, KEY: topology.to_wire()}
        except Exception as error:
            LOG.warning("This host is not announced to thunder: %s", error)
        return properties

    def connect_volume(self, connection_properties: dict[str, Any]) -> dict[str, Any]:
        """Log in to the volume, then have the agent build a stack on top of it if possible."""
        result: dict[str, Any] = super().connect_volume(connection_properties)
        payload = _payload(connection_properties)
        if payload is None or not isinstance(result, dict) or "path" not in result:
            return result
        try:
            path = self._agent().attach(payload, result["path"])
        except Exception as error:
            LOG.warning("Volume %s is attached as plain iSCSI: %s", payload.volume_id, error)
            return result
        return {**result, "path": path}

    def disconnect_volume(
        self,
        connection_properties: dict[str, Any],
        device_info: dict[str, Any] | None,
        force: bool = False,
        ignore_errors: bool = False,
    ) -> None:
        """Remove the stack, if there is one, then log out of the volume.

        :param force: log out even below a stack that is open, as os-brick does below any device
        :raises brick_exception.BrickException: the stack could not be removed; unless ``force``
        """
        volume_id = _volume_id(connection_properties)
        try:
            if volume_id:
                self._remove_stack(volume_id)
        except Exception as error:
            if not force:
                raise brick_exception.BrickException(
                    f"volume {volume_id} stays connected, as its stack could not be removed: "
                    f"{error}. Its data is safe; end what has it open and detach again"
                ) from error
            LOG.warning("Volume %s is logged out below its stack: %s", volume_id, error)
        if device_info and str(device_info.get("path", "")).startswith(
            devnames.path(devnames.PREFIX)
        ):
            # os-brick then finds the LUN's own path from the connection data.
            device_info = {k: v for k, v in device_info.items() if k != "path"}
        super().disconnect_volume(
            connection_properties, device_info, force=force, ignore_errors=ignore_errors
        )

    def extend_volume(self, connection_properties: dict[str, Any]) -> int | None:
        """Adopt the volume's new size: the LUN first, then the stack on top of it.

        :raises Exception: the stack could not; it can be asked again
        """
        size: int | None = super().extend_volume(connection_properties)
        volume_id = _volume_id(connection_properties)
        if volume_id and takedown.has_devices(volume_id):
            try:
                self._agent().extend(volume_id)
            except Exception as error:  # it is down, hung, busy with something else, or cannot
                LOG.warning("Volume %s is extended without thunder-agent: %s", volume_id, error)
                extending.extend(volume_id)
        return size

    def _execute(self, *args: Any, **kwargs: Any) -> tuple[str, str]:
        """As os-brick's, but iscsiadm gets another chance where a removal by the agent of a record
        of its own comes between.
        """
        execute: Callable[..., tuple[str, str]] = super()._execute
        if args[0] != "iscsiadm":
            return execute(*args, **kwargs)
        return iscsi.run_again(
            lambda: execute(*args, **kwargs), lambda error: getattr(error, "exit_code", None)
        )

    def _remove_stack(self, volume_id: str) -> None:
        """Have the agent remove a stack, or remove its devices without the agent.

        :raises Exception: the volume is open, or a device could not be removed
        """
        if not takedown.has_devices(volume_id):
            return
        reason = "it has no entry for these devices"
        try:
            self._agent().detach(volume_id)
        except Exception as error:  # it is down, hung, busy with something else, or cannot
            reason = str(error)
        if takedown.has_devices(volume_id):
            takedown.take_down(volume_id)
            LOG.warning("Stack of volume %s removed without thunder-agent: %s", volume_id, reason)

    @staticmethod
    def _agent() -> AgentClient:
        mine = conf.load_connector()
        return AgentClient(mine.socket, mine.attach_deadline)
