"""Puts our connector into os-brick's maps: the only module that changes os-brick.

os-brick has no plug-in point for connectors; on every call it looks up the protocol in
dictionaries of its module.
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

    os-brick is not imported here: nova-compute refuses to start if eventlet was imported before it
    (nova/monkey_patch.py), and os-brick imports it.

    :raises RuntimeError: as :func:`maps`, here if os-brick was imported before, else in its import
    """
    wrapt.register_post_import_hook(_put, MODULE)


def maps(connector: ModuleType | None = None) -> list[dict[str, str]]:
    """os-brick's own maps from a protocol to the name of a class.

    :param connector: os-brick's module; imported if not given
    :raises RuntimeError: this version of os-brick has no such maps, so it is not supported
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
