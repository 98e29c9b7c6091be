"""The effect of a parent's failure on its child: longest read, failed reads, wrong bytes.

One compute host reads an image from another one while neither base is complete (filling is limited
to 1 MiB/s). A reader on the child reads blocks that it does not have yet, bypassing all caches, and
checks them; meanwhile the parent's power is cut. Then the parent is started again, and the child's
base is rebuilt as its child.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lab.cloud import config
from lab.cluster import Cluster
from lab.errors import LabError
from lab.inside import blocks
from lab.nodes.node import Node
from lab.nodes.topology import Topology
from lab.play.demo_volumes import at_once
from lab.play.journey import Journey
from lab.progress import Steps
from lab.shell import wait_for

MIB = 1 << 20
GIB = 1 << 30
SEED = "stall"
#: Seconds that the reader runs, and after which the power is cut.
READ, PULL = 10, 3
#: MiB of the image that a round may fill, at 1 MiB/s, and the reserve for the first one.
PER_KILL, AT_FIRST = 40, 80


@dataclass(frozen=True)
class Kill:
    """One kill: the killed host, the child's next source, and what its reader saw."""

    parent: str
    then: str
    calls: int
    longest_s: float
    failed: int
    wrong: int


class Scene:
    """Two compute hosts of a running lab, one of which reads an image from the other."""

    def __init__(self, journey: Journey, parent: Node, child: Node, length: int) -> None:
        """:param length: size of the image in bytes, a multiple of 64 KiB"""
        self.journey = journey
        self.parent = parent
        self.child = child
        self._length = length
        self._volumes: list[str] = []
        self._catalog = {node: node.catalog["thunder-agent"] for node in (parent, child)}
        self.image = ""

    @property
    def volume(self) -> str:
        """The volume on the child."""
        return self._volumes[1]

    def open(self) -> None:
        """Upload the image, and attach a volume of it on the parent, then one on the child.

        :raises LabError: the child does not read from the parent
        """
        self._restart(slow=True)
        with tempfile.NamedTemporaryFile(prefix="thunder-stall-", dir="/var/tmp") as file:
            blocks.make(Path(file.name), SEED, self._length)
            self.image = self.journey.upload(Path(file.name), "stall", "raw")
        gib = -(-self._length // GIB)
        for name in ("parent", "child"):
            made = self.journey.create_volume(f"stall-{name}", gib, "--image", self.image)
            self._volumes.append(made)
        self.journey.attach_cached(self.parent, self._volumes[0])
        self.attach()

    def close(self) -> None:
        """Restore the lab's original state."""
        for node in (self.parent, self.child):
            if not node.running():
                self.restart_parent()
        for node, volume in zip((self.parent, self.child), self._volumes, strict=False):
            self.journey.detach(node, volume)
        self.journey.delete_volumes(self._volumes)
        if self.image:
            self.journey.cluster.openstack("image", "delete", self.image)
        self._restart(slow=False)

    def _restart(self, slow: bool) -> None:
        """Restart both agents, with filling as slow as possible if ``slow``."""

        def restart(node: Node) -> None:
            service = self._catalog[node]
            if slow:
                settings = config.agent(node.spec, fill_rate_mib=1)
                files = {**service.files, "/etc/thunder/thunder.conf": settings}
                service = dataclasses.replace(service, files=files)
            node.service_stop("thunder-agent")
            node.catalog["thunder-agent"] = service
            node.service_start("thunder-agent")

        at_once(restart, (self.parent, self.child))

    def sources(self, node: Node) -> list[str]:
        """The sources of a host's base of the image, in order."""
        bases = self.journey.agent(node)["bases"]
        return next((base["sources"] for base in bases if base["image_id"] == self.image), [])

    def attach(self) -> None:
        """Attach the child's volume, so that its base is built.

        :raises LabError: its base does not read from the parent
        """
        self.journey.attach_cached(self.child, self.volume)
        found = self.sources(self.child)
        if found[:1] != [self.parent.name]:
            raise LabError(f"{self.child.name} reads from {found}, not from {self.parent.name}")
        wait_for(
            f"{self.child.name} to have a second source",
            lambda: len(self.sources(self.child)) > 1,
            timeout=30,
        )

    def kill(self) -> Kill:
        """Cut the parent's power while the child reads."""
        path = f"/dev/mapper/thunder-vol-{self.volume}"
        command = (
            f"python -m lab.inside.blocks watch {path} {SEED} {self._length} {READ} "
            f"/dev/mapper/thunder-paths-{self.image}"
        )
        with ThreadPoolExecutor(1) as threads:
            reader = threads.submit(self.child.run, command, timeout=300)
            time.sleep(PULL)
            self.parent.kill()
            seen: dict[str, Any] = json.loads(reader.result().stdout)
        self.await_reparented()
        return Kill(self.parent.name, self.sources(self.child)[0], **seen)

    def await_reparented(self) -> None:
        """Wait until the child's agent has replaced the dead parent."""
        wait_for(
            f"{self.child.name} to have another source",
            lambda: self.parent.name not in self.sources(self.child),
            timeout=60,
        )

    def restart_parent(self) -> None:
        """Start the parent again, and wait until its base is back."""
        wait_for("the killed host to be off", lambda: not self.parent.running(), timeout=10)
        self.parent.start()
        self.parent.service_start("thunder-agent")
        wait_for(
            f"{self.parent.name}: its base to be back",
            lambda: self.parent.run(
                f"dmsetup info thunder-export-{self.image}", check=False
            ).returncode == 0,
            timeout=120,
        )  # fmt: skip

    def below_again(self) -> None:
        """Rebuild the child's base, so that it reads from the parent again."""
        self.journey.detach(self.child, self.volume)
        self.journey.evict(self.child, self.image)
        self.attach()


def measure(scene: Scene, kills: int, show: bool = True) -> list[Kill]:
    """Run the kills one after the other; on an error, return the results so far."""
    seen: list[Kill] = []
    try:
        scene.open()
        for number in range(kills):
            if number:
                scene.restart_parent()
                scene.below_again()
            seen.append(scene.kill())
            if show:
                print(f"{number + 1:3}  {_line(seen[-1])}", flush=True)
    except Exception as error:
        print(f"stopped after {len(seen)} kills: {type(error).__name__}: {error}", flush=True)
    return seen


def _line(kill: Kill) -> str:
    return (
        f"{kill.parent} killed, then read from {kill.then}: longest read {kill.longest_s:.2f} s, "
        f"{kill.failed} errors, {kill.wrong} wrong pages in {kill.calls} reads"
    )


def main() -> int:
    parser = argparse.ArgumentParser(prog="bench.stall", description=__doc__)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--name", default="stall", help="name of the lab")
    parsed = parser.parse_args()
    cluster = Cluster(parsed.name, Topology.standard(storage=1, compute=3))
    cluster.up(Steps(), bound=True)
    try:
        parent, child, *_ = cluster.of_kind("compute")
        length = (AT_FIRST + PER_KILL * parsed.kills) * MIB
        seen = measure(Scene(Journey(cluster), parent, child, length), parsed.kills)
    finally:
        cluster.down()
    if seen:
        print(
            f"{len(seen)} kills: longest stall {max(k.longest_s for k in seen):.2f} s (limit: 3), "
            f"{sum(k.failed for k in seen)} I/O errors, {sum(k.wrong for k in seen)} wrong pages "
            f"in {sum(k.calls for k in seen)} reads"
        )
    return 0 if len(seen) == parsed.kills else 1


if __name__ == "__main__":
    sys.exit(main())
