"""Agents: with other options than the lab's, and what their logs say."""

from __future__ import annotations

import contextlib
import dataclasses
import re
from collections.abc import Iterator

from lab.cloud import config
from lab.errors import LabError
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


def source(node: Node, image: str) -> str:
    """The nearest host that a node's base reads from, or did until it was complete: by the log of
    its agent, as a complete base reads from its own host alone.
    """
    log = (node.logs / "thunder-agent.log").read_text(errors="replace")
    found = re.findall(rf"base of image {image} reads from ([^\s,]+)", log)
    if not found:
        raise LabError(f"{node.name}: no base of image {image} was made, by its agent's log")
    return str(found[-1])
