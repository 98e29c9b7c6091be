"""Agents with other options than the lab's."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator

from lab.cloud import config
from lab.nodes.node import Node


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
