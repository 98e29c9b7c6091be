"""Agents with other options than the lab's."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator

from lab.cloud import config
from lab.nodes.node import Node


def restart_as(node: Node, module: str) -> None:
    """Restart the agent of a compute host as another program, from now on."""
    service = node.catalog["thunder-agent"]
    python, _, _, *arguments = service.argv
    node.service_stop("thunder-agent")
    node.catalog["thunder-agent"] = dataclasses.replace(
        service, argv=(python, "-m", module, *arguments)
    )
    node.service_start("thunder-agent")


@contextlib.contextmanager
def options(node: Node, **changed: object) -> Iterator[None]:
    """Restart the agent of a compute host with these options in [thunder], and after the body with
    the lab's.
    """
    service = node.catalog["thunder-agent"]
    files = {**service.files, "/etc/thunder/thunder.conf": config.agent(node.spec, **changed)}
    node.service_stop("thunder-agent")
    node.catalog["thunder-agent"] = dataclasses.replace(service, files=files)
    node.service_start("thunder-agent")
    try:
        yield
    finally:
        node.service_stop("thunder-agent")
        node.catalog["thunder-agent"] = service
        node.service_start("thunder-agent")
