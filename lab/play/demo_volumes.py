"""``make demo-volumes``: six volumes of one image on three hosts at once, then by plain iSCSI.

Every step is what a user or nova-compute would do. It ends with a table, the relay tree and the
bytes that left the storage host, and writes them to demo.json in the current folder.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from rich.console import Console
from rich.table import Table
from rich.tree import Tree

from lab.cluster import Cluster
from lab.errors import LabError
from lab.guests import guest
from lab.inside import blocks
from lab.nodes.node import Node
from lab.nodes.topology import Topology
from lab.play import agents
from lab.play.journey import Attached, Journey, cached_after
from lab.progress import Steps

_T = TypeVar("_T")
_R = TypeVar("_R")
_V = TypeVar("_V", bound="Result")
MIB = 1 << 20
VOLUMES = 6


@dataclass
class Volume:
    """A row of the table.

    :ivar cached_s: seconds from the end of the attach until the cache was in use; 0: at once
    :ivar image_bytes_from_network: counted while it was attached and read
    """

    id: str
    host: str
    source: str = ""
    attach_s: float = 0.0
    cached_s: float = 0.0
    content_ok: bool = False
    image_bytes_from_network: int = 0


@dataclass
class Result:
    """demo.json. Egress: bytes that the storage host sent while volumes were in use."""

    elapsed_s: float
    image_allocated_bytes: int
    thunder: dict[str, int]
    plain: dict[str, int]
    volumes: list[Volume]


def at_once(function: Callable[[_T], _R], items: Iterable[_T]) -> list[_R]:
    with ThreadPoolExecutor(32) as threads:
        return list(threads.map(function, items))


class Demo:
    """The demo, step by step; keeps the state that later steps need."""

    def __init__(self, cluster: Cluster, raw: Path, upload: Path, disk_format: str) -> None:
        self.cluster = cluster
        self.journey = Journey(cluster, client=True)
        self.raw = raw  # the expected start of every volume
        self.upload = upload
        self.disk_format = disk_format
        self.size = raw.stat().st_size
        self.gib = -(-self.size // (1 << 30))
        self.allocated = 0
        self.image = ""
        self.storage = cluster.of_kind("storage")[0]
        self.compute = cluster.of_kind("compute")
        self.rows: list[Volume] = []
        self.attached: dict[str, Attached] = {}
        # A page at the image's start, middle and end, and one beyond it.
        self.offsets = [
            0,
            self.size // 2 // blocks.PAGE * blocks.PAGE,
            (self.size - blocks.PAGE) // blocks.PAGE * blocks.PAGE,
            self.gib * (1 << 30) - blocks.PAGE,
        ]

    def create(self) -> None:
        """Create all volumes: the first downloads the image, the others are snapshots."""
        self.image = self.journey.upload(self.upload, "demo-image", self.disk_format)
        source = ("--image", self.image)
        first = self.journey.create_volume("demo-0", self.gib, *source)
        names = [f"demo-{i}" for i in range(1, VOLUMES)]
        others = at_once(lambda n: self.journey.create_volume(n, self.gib, *source), names)
        hosts = [node.name for node in self.compute for _ in range(VOLUMES // len(self.compute))]
        self.rows = [Volume(v, h) for v, h in zip([first, *others], hosts, strict=True)]

    def _node(self, row: Volume) -> Node:
        return self.cluster.node(row.host)

    def _egress(self, body: Callable[[], None]) -> int:
        before = self.storage.counters().sent
        body()
        return self.storage.counters().sent - before

    # -- with Thunder -----------------------------------------------------------------------

    def attach_all(self) -> None:
        def one(row: Volume) -> Attached:
            return self.journey.attach(self._node(row), row.id)

        for row, attached in zip(self.rows, at_once(one, self.rows), strict=True):
            self.attached[row.id] = attached
            row.attach_s = attached.attach_s

    def await_caches(self, note: Callable[[str], None]) -> None:
        """Wait for the caches that are added after the attach because a plan or base was late."""
        hosts = {row.id: self._node(row) for row in self.rows}
        try:
            stacks = self.journey.await_caches(hosts, note)
        except LabError as error:
            warnings = [w for attached in self.attached.values() for w in attached.warnings]
            raise LabError("; ".join([str(error), *warnings])) from error
        for row in self.rows:
            row.source = agents.source(self._node(row), self.image)
            row.cached_s = cached_after(stacks[row.id])

    def read_all(self) -> None:
        """Read the hosts' first volumes, then the second ones, to tell their bytes apart."""
        expected = blocks.expected_digest(self.raw, ())
        by_host = len(self.rows) // len(self.compute)
        seen = {node.name: 0 for node in self.compute}
        for turn in range(by_host):
            rows = self.rows[turn::by_host]

            def one(row: Volume) -> str:
                path = self.attached[row.id].path
                return self.journey.digest(self._node(row), path, self.size)

            for row, digest in zip(rows, at_once(one, rows), strict=True):
                row.content_ok = digest == expected
            for row in rows:
                total = self.journey.from_network(self._node(row))
                row.image_bytes_from_network = total - seen[row.host]
                seen[row.host] = total

    def write_all(self) -> None:
        def one(row: Volume) -> None:
            node, path = self._node(row), self.attached[row.id].path
            self.journey.write(node, path, row.id, self.offsets)
            if wrong := self.journey.differing(node, path, row.id, self.offsets):
                raise LabError(f"volume {row.id}: written pages differ at {wrong}")

        at_once(one, self.rows)

    def detach_all(self, plain: bool = False) -> None:
        at_once(lambda row: self.journey.detach(self._node(row), row.id, plain), self.rows)

    def move_one(self) -> None:
        """Attach the first volume on another host and check all of its contents."""
        row, node = self.rows[0], self.compute[-1]
        attached = self.journey.attach(node, row.id)
        self._check_written(node, row, attached)
        self.journey.detach(node, row.id)

    def _check_written(self, node: Node, row: Volume, attached: Attached) -> None:
        if wrong := self.journey.differing(node, attached.path, row.id, self.offsets):
            raise LabError(f"volume {row.id} on {node.name}: writes are missing at {wrong}")
        patches = [(row.id, offset) for offset in self.offsets if offset < self.size]
        expected = blocks.expected_digest(self.raw, patches)
        if self.journey.digest(node, attached.path, self.size) != expected:
            raise LabError(f"volume {row.id} on {node.name} differs from image and writes")

    # -- without Thunder --------------------------------------------------------------------

    def plain_run(self) -> None:
        """The same attaches and reads through os-brick's own connector."""

        def attach(row: Volume) -> Attached:
            return self.journey.attach(self._node(row), row.id, plain=True)

        found = dict(zip((r.id for r in self.rows), at_once(attach, self.rows), strict=True))
        at_once(lambda r: self._check_written(self._node(r), r, found[r.id]), self.rows)

    # -- the end ----------------------------------------------------------------------------

    def clean(self) -> list[str]:
        """Delete everything that was created.

        :returns: what is left nevertheless
        """
        self.journey.delete_volumes(row.id for row in self.rows)
        self.cluster.thunder("image", "evict", self.image)
        self.cluster.openstack("image", "delete", self.image)
        return self.journey.all_leftovers()


def _prepare(image: Path | None, say: Callable[[str], None]) -> tuple[Path, str]:
    """The file to upload and its format."""
    upload = image or guest.build(progress=say)
    info = json.loads(
        subprocess.run(
            ["qemu-img", "info", "--output", "json", str(upload)],
            check=True, capture_output=True, text=True,
        ).stdout
    )  # fmt: skip
    return upload, str(info["format"])


def run(cluster: Cluster, image: Path | None, steps: Steps) -> Result:
    """Run the demo in a lab that is brought up for it and taken down at the end."""
    began = time.monotonic()
    with lab_with(cluster, image, steps) as demo:
        result = journey(demo, steps)
    return dataclasses.replace(result, elapsed_s=round(time.monotonic() - began, 1))


@contextlib.contextmanager
def lab_with(cluster: Cluster, image: Path | None, steps: Steps) -> Iterator[Demo]:
    """Bring the lab up while the body runs, and prepare a demo of an image in it.

    :param image: a disk image; None to build Debian
    """
    with steps.step("image"):
        upload, disk_format = _prepare(image, lambda text: None)
    with steps.step("lab up"):
        cluster.up(steps.brief(), bound=True)
    try:
        # In the lab's folder, which is deleted with the lab, even if this process is killed.
        raw = cluster.folder / "demo.raw"
        subprocess.run(["qemu-img", "convert", "-O", "raw", str(upload), str(raw)], check=True)
        yield Demo(cluster, raw, upload, disk_format)
    finally:
        with steps.step("lab down"):
            cluster.down()


def journey(demo: Demo, steps: Steps) -> Result:
    """Run all steps in a lab that is up.

    :raises LabError: a step failed, or something was left behind
    """
    began = time.monotonic()
    thunder, plain, left = _journey(demo, steps)
    if left:
        raise LabError("left behind: " + ", ".join(left))
    return Result(
        elapsed_s=round(time.monotonic() - began, 1),
        image_allocated_bytes=demo.allocated,
        thunder={"storage_egress_bytes": thunder},
        plain={"storage_egress_bytes": plain},
        volumes=demo.rows,
    )


def _journey(demo: Demo, steps: Steps) -> tuple[int, int, list[str]]:
    def step(what: str, body: Callable[[], None]) -> None:
        with steps.step(what):
            body()

    with ThreadPoolExecutor(1) as aside:  # the stand-ins for nova-compute
        bricks = aside.submit(demo.journey.start_bricks)
        step(f"upload the image, create {VOLUMES} volumes from it", demo.create)
        bricks.result()
    demo.allocated = demo.journey.allocated(demo.image)

    def use() -> None:
        step(f"attach {VOLUMES} volumes at once", demo.attach_all)
        step("wait until all are cached", lambda: demo.await_caches(steps.note))
        step("read them all, compare with the image", demo.read_all)
        step("write to each", demo.write_all)
        step("detach", demo.detach_all)
        with ThreadPoolExecutor(1) as aside:
            bricks = aside.submit(demo.journey.start_bricks, plain=True)
            step("re-attach one on another host, verify its writes", demo.move_one)
            bricks.result()

    def use_plain() -> None:
        step("plain iSCSI: attach, read and compare all", demo.plain_run)
        step("plain iSCSI: detach", lambda: demo.detach_all(plain=True))

    thunder = demo._egress(use)
    plain = demo._egress(use_plain)
    with steps.step("delete everything, check for leftovers"):
        left = demo.clean()
    return thunder, plain, left


_WORDS = ("volume", "host", "read from", "")


def when_cached(seconds: float) -> str:
    """When a volume got its cache, relative to the end of its attach."""
    return f"{seconds:.1f} s later" if seconds else "at once"


def show(result: Result, console: Console) -> None:
    """Print the table, the tree and the two totals."""
    table = Table(title="six volumes of one image on three hosts at once")
    for heading in (
        "volume",
        "host",
        "read from",
        "attach",
        "cached",
        "image bytes over network",
        "",
    ):
        table.add_column(heading, justify="left" if heading in _WORDS else "right")
    for row in result.volumes:
        table.add_row(
            row.id[:8],
            row.host,
            row.source,
            f"{row.attach_s:.1f} s",
            when_cached(row.cached_s),
            f"{row.image_bytes_from_network / MIB:.1f} MiB",
            "equals the image" if row.content_ok else "[red]DIFFERS",
        )
    console.print(table)
    late = sum(row.cached_s > 0 for row in result.volumes)
    console.print(f"{len(result.volumes) - late} volumes were cached at once, {late} later")
    console.print(tree({row.host: row.source for row in result.volumes}))
    allocated = result.image_allocated_bytes
    for name, egress in (("thunder", result.thunder), ("plain iSCSI", result.plain)):
        sent = egress["storage_egress_bytes"]
        console.print(
            f"{name + ':':12} the storage host sent {sent / MIB:8.1f} MiB, "
            f"{sent / allocated:.2f} times the {allocated / MIB:.1f} MiB that the image holds"
        )


def tree(parents: dict[str, str]) -> Tree:
    """The relay tree; hosts that do not read from another host are the roots."""
    drawn = Tree("relay tree")

    def grow(above: Tree, parent: str) -> None:
        for child in sorted(host for host, source in parents.items() if source == parent):
            if child != parent:
                grow(above.add(child), child)

    for root in sorted(set(parents.values()) - set(parents)):
        grow(drawn.add(f"[bold]{root}"), root)
    return drawn


def main(arguments: Sequence[str] | None = None) -> int:
    def body(image: Path | None, name: str, steps: Steps) -> Result:
        return run(Cluster(name, Topology.standard()), image, steps)

    return command("demo_volumes", __doc__, body, show, arguments)


def command(
    name: str,
    about: str | None,
    body: Callable[[Path | None, str, Steps], _V],
    show: Callable[[_V, Console], None],
    arguments: Sequence[str] | None,
) -> int:
    """The command line of a demo: runs ``body``, writes demo.json, shows the result.

    :param body: called with the image, the lab's name and steps; its result goes to demo.json
    :returns: 0; 1 if it failed or some content was wrong; 2 on invalid input
    """
    parser = argparse.ArgumentParser(prog=name, description=about)
    parser.add_argument("--image", type=Path, help="a disk image to use instead of Debian's")
    parser.add_argument("--name", default="demo", help="name of the lab (default: demo)")
    parsed = parser.parse_args(arguments)
    if parsed.image and not parsed.image.is_file():
        print(f"demo: there is no image file {parsed.image}", file=sys.stderr)
        return 2
    console = Console(width=None if sys.stdout.isatty() else 110)
    try:
        with Steps() as steps:
            result = body(parsed.image, parsed.name, steps)
    except (LabError, guest.GuestError) as error:
        print(f"demo: {error}", file=sys.stderr)
        return 1
    raw: dict[str, Any] = dataclasses.asdict(result)
    Path("demo.json").write_text(json.dumps(raw, indent=2) + "\n")
    show(result, console)
    console.print(f"{result.elapsed_s:.0f} s in total; the figures are in demo.json")
    return 0 if all(row.content_ok for row in result.volumes) else 1


if __name__ == "__main__":
    sys.exit(main())
