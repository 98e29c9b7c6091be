"""Puts our connector in os-brick's maps: the only module that reaches into os-brick.

os-brick has no plug-in point for connectors; it looks the protocol up in dictionaries of its
module at every call.
"""

from __future__ import annotations

import importlib
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
    (nova/monkey_patch.py).

    :raises RuntimeError: as :func:`maps` does, then or when os-brick is imported
    """
    wrapt.register_post_import_hook(_put, MODULE)


def maps(connector: ModuleType | None = None) -> list[dict[str, str]]:
    """os-brick's own maps, from a protocol to the name of a class; nothing is changed.

    :param connector: os-brick's module, else it is imported
    :raises RuntimeError: this os-brick has no such maps; its version is not one we know
    """
    module = connector or importlib.import_module(MODULE)
    found = []
    for name in _MAPS:
        mapping = getattr(module, name, None)
        if mapping is None or "ISCSI" not in mapping:
            raise RuntimeError(
                f"{MODULE} has no {name}['ISCSI']: "
                "this os-brick is not supported, see setup.cfg for the versions that are"
            )
        found.append(mapping)
    return found


def _put(connector: ModuleType) -> None:
    for mapping in maps(connector):
        mapping["ISCSI"] = CLASS
    if CLASS not in connector.unix_connector_list:
        connector.unix_connector_list.append(CLASS)
