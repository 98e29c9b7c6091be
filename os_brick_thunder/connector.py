"""The iSCSI connector that asks the local agent to build a stack over a volume.

It serves every iSCSI backend of the process that it is registered in. Without a ``thunder`` key in
the connection data it behaves exactly as os-brick's own connector. With one, any failure of the
agent results in the plain iSCSI device and a warning.
"""

from __future__ import annotations

import logging
import os
from typing import Any

from os_brick import exception as brick_exception
from os_brick.initiator.connectors import iscsi as brick_iscsi

from os_brick_thunder.client import AgentClient
from os_brick_thunder.common import conf, errors, wire
from os_brick_thunder.common.policy import devnames
from os_brick_thunder.common.policy.devnames import VolumeNames
from os_brick_thunder.common.transport import iscsi

LOG = logging.getLogger(__name__)
KEY = "thunder"


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


class ThunderISCSIConnector(brick_iscsi.ISCSIConnector):
    """os-brick's ISCSIConnector, with a stack on top where possible."""

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

        :raises brick_exception.BrickException: the stack could not be removed; unless ``force``
        """
        volume_id = (connection_properties.get(KEY) or {}).get("volume_id")
        if volume_id and _has_stack(volume_id):
            try:
                self._agent().detach(volume_id)
            except Exception as error:
                if not force:
                    raise brick_exception.BrickException(
                        f"volume {volume_id} stays connected, as its stack could not be removed: "
                        f"{error}. Its data is safe; check thunder-agent and detach again"
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
        """Adopt the volume's new size: the LUN first, then the stack on top of it."""
        size: int | None = super().extend_volume(connection_properties)
        volume_id = (connection_properties.get(KEY) or {}).get("volume_id")
        if volume_id and _has_stack(volume_id):
            self._agent().extend(volume_id)
        return size

    @staticmethod
    def _agent() -> AgentClient:
        mine = conf.load_connector()
        return AgentClient(mine.socket, mine.attach_deadline)


def _has_stack(volume_id: str) -> bool:
    return os.path.exists(devnames.path(VolumeNames(volume_id).vol))
