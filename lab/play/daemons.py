"""Daemons of nodes that are not started as the lab starts them."""

from __future__ import annotations

import dataclasses

from lab.cloud.config import BACKEND
from lab.nodes.node import Node
from lab.nodes.services import Service


def restart(node: Node, service: Service) -> None:
    """Restart the daemon of this name as this service, from now on."""
    node.service_stop(service.name)
    node.catalog[service.name] = service
    node.service_start(service.name)


def restart_backend(node: Node, **options: object) -> None:
    """Restart a storage host's cinder-volume with these options of its backend, from now on."""
    service = node.catalog["cinder-volume"]
    head = f"[{BACKEND}]\n"
    more = head + "".join(f"{name} = {value}\n" for name, value in options.items())
    files = {path: text.replace(head, more) for path, text in service.files.items()}
    assert files != service.files, f"cinder-volume of {node.name} has no section {head}"
    restart(node, dataclasses.replace(service, files=files))
