"""What filling a base costs on this machine's own kernel: CPU seconds for each GiB.

The agent's filler reads one loop device, checks the bytes and writes another one, as it does with a
replica and a thin device. What the kernel does for a network or a thin pool beside that is not in
it. In a virtual node (:mod:`bench.agent`) it would be: there the kernel's time for the network is
counted as that of the process which happens to run.
"""

from __future__ import annotations

import argparse
import os
import resource
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

from lab.shell import run
from os_brick_thunder.agent.base.filler import Filler
from os_brick_thunder.agent.base.readahead import Readahead
from os_brick_thunder.agent.ports import Host
from os_brick_thunder.common import wire
from os_brick_thunder.common.copyends import GRAIN, Disk
from os_brick_thunder.common.mechanism import blockdev
from os_brick_thunder.common.policy import devnames, hashtree
from os_brick_thunder.common.policy.devnames import ImageNames
from os_brick_thunder.common.policy.extents import Extents
from os_brick_thunder.common.state import READY, Base, StateFile
from os_brick_thunder.common.transfer import PIECE, copy
from os_brick_thunder.common.treewriter import TreeWriter

GIB = 1 << 30
IMAGE = "fill"
NAMES = ImageNames(IMAGE)


class Costs:
    """CPU and wall-clock seconds since this was made."""

    def __init__(self) -> None:
        self._began = time.monotonic()
        self._before = resource.getrusage(resource.RUSAGE_SELF)

    def text(self, gib: float) -> str:
        now, before = resource.getrusage(resource.RUSAGE_SELF), self._before
        user, system = now.ru_utime - before.ru_utime, now.ru_stime - before.ru_stime
        return (
            f"{(user + system) / gib:.2f} CPU seconds a GiB ({user / gib:.2f} of the process, "
            f"{system / gib:.2f} of the kernel), {time.monotonic() - self._began:.1f} s"
        )


def make(image: Path, size: int) -> str:
    """Write random bytes, and their hash tree behind them; returns its root."""
    with image.open("wb") as file:
        for _ in range(0, size, PIECE):
            file.write(os.urandom(PIECE))
        file.truncate(size + hashtree.length(size))
    whole = Extents.of([(0, size)])
    tree = TreeWriter(str(image), size, whole, GRAIN, PIECE)
    copy(Disk(str(image), size, whole), tree).wait()
    return tree.root


@contextmanager
def loop(file: Path) -> Iterator[str]:
    """A loop device over a file, past the file's page cache."""
    device = run(["losetup", "--find", "--show", "--direct-io=on", str(file)]).stdout.strip()
    try:
        yield device
    finally:
        run(["losetup", "--detach", device])


def fill(store: StateFile) -> None:
    """Fill the base that is in ``store``."""
    filled = threading.Event()
    kit: Any = SimpleNamespace(
        blocks=blockdev,
        loops=SimpleNamespace(reopen=lambda device, read_ahead: None),
        metadata=SimpleNamespace(mapped=lambda thin_id: Extents()),
        pool=SimpleNamespace(block=GRAIN),
    )

    def complete(_base: Base) -> None:
        store.drop_base(IMAGE)
        filled.set()

    def on_wrong_bytes(_base: Base) -> None:
        raise AssertionError("the source has other bytes than were written to it")

    tracker: Any = None  # the filler needs none for an image that has a tree
    here = wire.Topology("here", "127.0.0.1", "r", "z", "iqn.x:here")
    host = Host(kit, store, tracker, here)
    filler = Filler(host, Readahead(kit.loops), complete, on_wrong_bytes, lambda: True, 1)
    filler.start()
    filled.wait()
    filler.stop()


def main() -> None:
    parser = argparse.ArgumentParser(prog="bench.fill", description=__doc__)
    parser.add_argument("--gib", type=int, default=1, help="size of the image")
    parser.add_argument("--turns", type=int, default=3)
    options = parser.parse_args()
    size = options.gib * GIB
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(dir="/var/tmp")))
        source, target = folder / "source", folder / "target"
        root = make(source, size)
        with target.open("wb") as file:
            file.truncate(source.stat().st_size)
        devices = {
            NAMES.paths: stack.enter_context(loop(source)),
            NAMES.base: stack.enter_context(loop(target)),
        }
        stack.enter_context(mock.patch.object(devnames, "path", devices.__getitem__))
        store = StateFile(folder / "state")
        for _ in range(options.turns):
            store.put(Base(IMAGE, size, ((0, size),), "l", thin_id=1, phase=READY, root=root))
            costs = Costs()
            fill(store)
            print(f"filled {options.gib} GiB: {costs.text(options.gib)}", flush=True)
        costs, data = Costs(), bytes(PIECE)
        for _ in range(0, size, PIECE):
            hashtree.hashes(data)
        print(f"of that, its hashes: {costs.text(options.gib)}")


if __name__ == "__main__":
    main()
