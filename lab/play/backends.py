"""Storage hosts with other options than the lab's."""

from __future__ import annotations

import dataclasses

from lab.cloud.config import BACKEND
from lab.nodes.node import Node


def restart_with(node: Node, **options: object) -> None:
    """Restart a storage host's cinder-volume with these options of its backend, from now on."""
    service = node.catalog["cinder-volume"]
    head = f"[{BACKEND}]\n"
    more = head + "".join(f"{name} = {value}\n" for name, value in options.items())
    files = {path: text.replace(head, more) for path, text in service.files.items()}
    assert files != service.files, f"cinder-volume of {node.name} has no section {head}"
    node.service_stop("cinder-volume")
    node.catalog["cinder-volume"] = dataclasses.replace(service, files=files)
    node.service_start("cinder-volume")
