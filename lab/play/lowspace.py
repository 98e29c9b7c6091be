"""Driving a host's local pool low: writes to its volumes as fast as they are accepted.

For the test and the benchmark. ``python -m lab.play.lowspace FILE`` in a node prints a line with
``[seconds since 1970, bytes]`` for every change of the pool's use, until FILE exists.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from lab import pace
from lab.inside import blocks
from lab.nodes.node import Node
from lab.play.journey import Attached, Journey

MIB = 1 << 20
CONF = "/etc/thunder/thunder.conf"


def make_image(folder: Path, name: str, size: int, data: int) -> Path:
    """Create a qcow2 image of ``size`` bytes that begins with ``data`` random bytes."""
    raw, qcow2 = folder / f"{name}.raw", folder / f"{name}.qcow2"
    with open(raw, "wb") as file:
        file.truncate(size)
        file.write(random.Random(name).randbytes(data))  # noqa: S311 - reproducible, not a secret
    subprocess.run(["qemu-img", "convert", "-f", "raw", "-O", "qcow2", raw, qcow2], check=True)
    return qcow2


@contextlib.contextmanager
def agent_options(node: Node, **options: object) -> Iterator[None]:
    """Run a node's agent with other options in [thunder] during the body; stacks are kept."""
    service = node.catalog["thunder-agent"]
    dropped = [line for line in service.files[CONF].splitlines() if _key(line) not in options]
    lines = "".join(f"{key} = {value}\n" for key, value in options.items())
    text = "\n".join(dropped).replace("[thunder]\n", f"[thunder]\n{lines}") + "\n"
    try:
        node.service_stop("thunder-agent")
        node.catalog["thunder-agent"] = dataclasses.replace(service, files={CONF: text})
        node.service_start("thunder-agent")
        yield
    finally:
        node.service_stop("thunder-agent")
        node.catalog["thunder-agent"] = service
        node.service_start("thunder-agent")


def _key(line: str) -> str:
    return line.split("=", 1)[0].strip()


class Watch:
    """Samples a node's pool about 50 times a second, independently of the agent."""

    def __init__(self, node: Node) -> None:
        self._node = node
        self._stop = f"/run/lab/lowspace-{time.monotonic_ns()}"
        self._thread = ThreadPoolExecutor(1)
        self.samples: list[tuple[float, int]] = []

    def __enter__(self) -> Watch:
        self._sampling = self._thread.submit(self._run)
        # Wait for the first sample, so that nothing is missed.
        self._node.run(f"until [ -e {self._stop}.begun ]; do sleep 0.1; done", timeout=60)
        return self

    def __exit__(self, *_: object) -> None:
        self._node.run(["touch", self._stop])
        self._thread.shutdown()
        self.samples = self._sampling.result()

    def _run(self) -> list[tuple[float, int]]:
        output = self._node.run(f"python -m lab.play.lowspace {self._stop}", timeout=600).stdout
        return [(at, used) for at, used in map(json.loads, output.splitlines())]

    @property
    def peak(self) -> int:
        """The peak use in bytes."""
        return max(used for _, used in self.samples)


def fill(node: Node, attached: Attached, seed: str, length: int) -> dict[str, float]:
    """Write the start of a volume at full speed; see :func:`lab.inside.blocks.fill`."""
    command = f"python -m lab.inside.blocks fill {attached.path} {seed} {length}"
    found: dict[str, float] = json.loads(node.run(command, timeout=300).stdout)
    return found


def expected(seed: str, length: int) -> str:
    """SHA-256 of what :func:`fill` wrote."""
    found = hashlib.sha256()
    for at in range(0, length, MIB):
        found.update(blocks.filled(seed, at))
    return found.hexdigest()


def given_up(journey: Journey, node: Node, since: float) -> list[dict[str, Any]]:
    """What the agent has given up since a time, in order: kind, id, bytes, time."""
    found: list[dict[str, Any]] = journey.agent(node)["space"]["given_up"]
    return [each for each in found if each["at"] >= since]


def await_below(journey: Journey, node: Node, timeout: float = 30) -> dict[str, Any]:
    """Wait until the pool is at its low watermark or below.

    :returns: the agent's status
    """
    until = pace.deadline(timeout)
    while True:
        status = journey.agent(node)
        if status["pool"]["used"] <= status["space"]["low"] or time.monotonic() > until:
            return status
        time.sleep(0.5)


def main(arguments: list[str]) -> int:
    from os_brick_thunder.common.mechanism.dmioctl import status
    from os_brick_thunder.common.policy import devnames, dmstatus

    stop, last = Path(arguments[0]), -1
    table = subprocess.run(
        ["dmsetup", "table", devnames.POOL], check=True, capture_output=True, text=True
    ).stdout
    block = int(table.split()[5]) * 512
    Path(f"{stop}.begun").touch()
    while not stop.exists():
        used = dmstatus.pool(status(devnames.POOL), block).used
        if used != last:
            print(json.dumps([time.time(), used]), flush=True)
        last = used
        time.sleep(0.02)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
