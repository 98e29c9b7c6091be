"""Puts our connector in os-brick's maps: the only module that reaches into os-brick.

os-brick has no plug-in point for connectors; it looks the protocol up in dictionaries of its
module at every call.
"""

from __future__ import annotations

from types import ModuleType

import wrapt

MODULE = "os_brick.initiator.connector"
CLASS = "os_brick_thunder.connector.ThunderISCSIConnector"
_MAPS = (
    "_connector_mapping_linux",
    "_connector_mapping_linux_s390x",
    "_connector_mapping_linux_ppc64",
)


def register() -> None:
    """Make our class os-brick's connector for iSCSI, as soon as os-brick is imported. Idempotent.

    Not before: nova-compute refuses to start when os-brick has brought eventlet in
    (nova/monkey_patch.py). Errors are those of :func:`put`, raised by whoever imports os-brick.
    """
    wrapt.register_post_import_hook(put, MODULE)


def put(connector: ModuleType) -> None:
    """Put our class in the maps of os-brick's module.

    :raises RuntimeError: this os-brick has no such maps; its version is not one we know
    """
    for name in _MAPS:
        mapping = getattr(connector, name, None)
        if mapping is None or "ISCSI" not in mapping:
            raise RuntimeError(
                f"os_brick.initiator.connector has no {name}['ISCSI']: "
                "this os-brick is not supported, see setup.cfg for the versions that are"
            )
        mapping["ISCSI"] = CLASS
    if CLASS not in connector.unix_connector_list:
        connector.unix_connector_list.append(CLASS)
