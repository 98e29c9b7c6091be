"""Agents with other options than the lab's."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator

from lab.cloud import config
from lab.nodes.node import Node
from lab.play.daemons import restart


def restart_as(node: Node, module: str) -> None:
    """Restart the agent of a compute host as another program, from now on."""
    service = node.catalog["thunder-agent"]
    python, _, _, *arguments = service.argv
    restart(node, dataclasses.replace(service, argv=(python, "-m", module, *arguments)))


@contextlib.contextmanager
def options(node: Node, **changed: object) -> Iterator[None]:
    """Restart the agent of a compute host with these options in [thunder], and after the body with
    the lab's.
    """
    service = node.catalog["thunder-agent"]
    files = {**service.files, "/etc/thunder/thunder.conf": config.agent(node.spec, **changed)}
    restart(node, dataclasses.replace(service, files=files))
    try:
        yield
    finally:
        restart(node, service)
