"""Names of replicas in iSCSI: targets and portals. Nothing here does I/O."""

from __future__ import annotations

import ipaddress
import re

#: All of our targets, and no others, begin with it.
IQN_PREFIX = "iqn.2026-11.org.thunder:"
#: A replica is a target of its own, with one LUN.
LUN = 0
PORT = 3260


def iqn_of(host: str, image_id: str) -> str:
    """The iSCSI name of ``host``'s replica of an image.

    Both parts are reduced to what RFC 3722 allows in a name; ``host`` may be a Cinder backend
    (``stor1@thunder``).
    """
    return f"{IQN_PREFIX}{_plain(host)}:{_plain(image_id)}"


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9.-]+", ".", name.lower().replace("_", "-"))


def portal_of(address: str, port: int = PORT) -> str:
    """``address:port``, with the brackets that an IPv6 address needs."""
    return f"[{address}]:{port}" if ":" in address.strip("[]") else f"{address}:{port}"


def split_portal(portal: str) -> tuple[str, int]:
    """Address, without brackets, and port of a valid portal."""
    address, _, port = portal.rpartition(":")
    return address.strip("[]"), int(port)


def same_address(one: str, other: str) -> bool:
    """Whether two texts are the same address; IPv6 addresses can be written in many ways."""
    return _canonical(one) == _canonical(other)


def _canonical(address: str) -> str:
    try:
        return str(ipaddress.ip_address(address.strip("[]")))
    except ValueError:  # a DNS name
        return address.lower()
