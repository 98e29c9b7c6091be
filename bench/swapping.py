"""A volume that is given a cache under write load, again and again: only a kernel can tell.

``python -m bench.swapping --folder DIR`` runs it on this kernel, which is to be a lab node's:
:mod:`bench.swap` starts one.

The guest, a process of its own, writes, discards, zeroes and reads at random; it knows what each
page may hold. The agent's own code puts the cache under it, with a plan that is as old as a busy
tracker's: what was written since must not be read from the cache.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import fcntl
import itertools
import json
import mmap
import multiprocessing
import os
import random
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, cast

from os_brick_thunder.agent.main import kernel_kit
from os_brick_thunder.agent.mechanism.localpool import LocalPool
from os_brick_thunder.agent.policy import cachemap, layout
from os_brick_thunder.agent.ports import Host, Kit
from os_brick_thunder.agent.stack.devices import StackDevices
from os_brick_thunder.agent.undo import UndoStack
from os_brick_thunder.common.mechanism.devicemapper import KernelDeviceMapper
from os_brick_thunder.common.policy import devnames
from os_brick_thunder.common.policy.devnames import ImageNames, VolumeNames, path
from os_brick_thunder.common.policy.extents import Extents
from os_brick_thunder.common.state import Stack

MIB = 1 << 20
PAGE, BLOCK = 4096, 64 << 10
IMAGE, VOLUME = 128 * MIB, 130 * MIB
#: Each range of this size belongs to one thread of the guest; requests cross areas of the map.
UNIT = 256 << 10
_BLKDISCARD, _BLKZEROOUT = 0x1277, 0x127F
_ZERO = (1 << 64) - 1  # the version of a page of zeroes
NAMES = VolumeNames("v")


def page(number: int, version: int) -> bytes:
    """What a page holds; version 0 is the image's."""
    if version == _ZERO:
        return bytes(PAGE)
    return struct.pack("<QQ", number, version) * (PAGE // 16)


@dataclass
class Report:
    """What the guest did, and saw."""

    calls: int = 0
    longest: float = 0.0  # seconds
    wrong: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)


class Guest:
    """Reads and writes a device, until it is told to stop; it runs in a process of its own."""

    def __init__(self, threads: int, seed: int, pause: float) -> None:
        """:param pause: seconds of each thread between two requests"""
        self._threads, self._seed, self._pause = threads, seed, pause
        self._versions = [0] * (VOLUME // PAGE)
        self._serial = itertools.count(1)
        self._go, self._ended = threading.Event(), threading.Event()
        self._paused = threading.Semaphore(0)
        self.report = Report()

    def run(self, device: str, orders: Connection) -> None:
        """Obey "go", "pause", "forget" and "stop"; each is answered."""
        fds = [os.open(device, os.O_RDWR | os.O_DIRECT | flag) for flag in (0, os.O_DSYNC)]
        workers = [
            threading.Thread(target=self._work, args=(number, *fds), daemon=True)
            for number in range(self._threads)
        ]
        for worker in workers:
            worker.start()
        for _ in workers:  # they wait for the first "go"
            self._paused.acquire()
        while (order := orders.recv()) != "stop":
            if order == "go":
                self._go.set()
            elif order == "pause":
                self._go.clear()
                for _ in workers:
                    self._paused.acquire()
            elif order == "forget":
                self._versions = [0] * (VOLUME // PAGE)
            orders.send(order)
        self._ended.set()
        self._go.set()
        for worker in workers:
            worker.join()
        self._check_all(fds[0])
        orders.send(self.report)

    def _work(self, thread: int, plain: int, synced: int) -> None:
        chance = random.Random(f"{self._seed} {thread}")  # noqa: S311 - no secret
        buffer = mmap.mmap(-1, UNIT)
        while True:
            if not self._go.is_set():
                self._paused.release()
                self._go.wait()
            if self._ended.is_set():
                return
            unit = chance.randrange(VOLUME // UNIT // self._threads) * self._threads + thread
            first = unit * (UNIT // PAGE) + chance.randrange(UNIT // PAGE)
            room = (unit + 1) * (UNIT // PAGE) - first
            pages = range(first, first + chance.randint(1, min(room, 32)))
            kind = chance.choice(("write", "write", "sync", "discard", "zero", "read", "read"))
            began = time.monotonic()
            try:
                self._request(kind, pages, synced if kind == "sync" else plain, buffer)
            except OSError as error:
                self.report.errors.append(f"{kind} of page {first}: {error}")
            self.report.calls += 1
            self.report.longest = max(self.report.longest, time.monotonic() - began)
            if self._pause:
                time.sleep(self._pause)

    def _request(self, kind: str, pages: range, fd: int, buffer: mmap.mmap) -> None:
        offset, length = pages[0] * PAGE, len(pages) * PAGE
        if kind == "read":
            self._check(fd, pages, buffer)
        elif kind in ("write", "sync"):
            version = next(self._serial)
            buffer[:length] = b"".join(page(number, version) for number in pages)
            os.pwritev(fd, [memoryview(buffer)[:length]], offset)
            self._note(pages, [version] * len(pages))
        elif kind == "zero":
            fcntl.ioctl(fd, _BLKZEROOUT, struct.pack("QQ", offset, length))
            self._note(pages, [_ZERO] * len(pages))
        else:  # a page holds zeroes after it, or what it held; and stays so
            fcntl.ioctl(fd, _BLKDISCARD, struct.pack("QQ", offset, length))
            os.preadv(fd, [memoryview(buffer)[:length]], offset)
            data = buffer[:length]
            zero = [not any(data[at : at + PAGE]) for at in range(0, length, PAGE)]
            old = self._versions[pages[0] : pages[-1] + 1]
            self._note(pages, [_ZERO if z else was for z, was in zip(zero, old, strict=True)])
            self._check(fd, pages, buffer)

    def _note(self, pages: range, versions: list[int]) -> None:
        self._versions[pages[0] : pages[-1] + 1] = versions

    def _check(self, fd: int, pages: range, buffer: mmap.mmap) -> None:
        length = len(pages) * PAGE
        os.preadv(fd, [memoryview(buffer)[:length]], pages[0] * PAGE)
        for at, number in enumerate(pages):
            found, version = buffer[at * PAGE : (at + 1) * PAGE], self._versions[number]
            if found != page(number, version):
                has = struct.unpack_from("<QQ", found)
                self.report.wrong.append(f"page {number} has {has} instead of version {version}")

    def _check_all(self, fd: int) -> None:
        buffer = mmap.mmap(-1, UNIT)
        for start in range(0, VOLUME // PAGE, UNIT // PAGE):
            self._check(fd, range(start, start + UNIT // PAGE), buffer)


@dataclass(frozen=True)
class Swapped:
    """One cache that was put under the guest.

    :ivar seconds: for which the guest's I/O was held back
    :ivar planned: bytes that the plan would have read from the cache
    :ivar shared: bytes that are read from it
    """

    seconds: float
    planned: int
    shared: int


class Scene:
    """A volume on a LUN, a base of its image in a local pool, and a guest."""

    def __init__(self, kit: Kit, lun: str, guest: Connection) -> None:
        self.kit, self.lun = kit, lun
        self._guest = guest
        self.devices = StackDevices(Host(kit, *cast(Any, (None, None, None))))
        self.direct = Stack("v", "t", lun, "direct")
        self._thin_id = 10

    def tell(self, order: str) -> Any:
        """Have the guest obey; returns its answer."""
        self._guest.send(order)
        return self._guest.recv()

    def swap(self, plan_seconds: float, touch: bool = True) -> Swapped:
        """Put a cache under the guest, with a plan that is so many seconds old by then.

        :param touch: False: as a version would that does not look at what was written
        """
        self._thin_id += 2
        stack = dataclasses.replace(
            self.direct,
            base_image_id="i",
            local_id=self._thin_id,
            meta_id=self._thin_id + 1,
            cached=cachemap.cached_length(IMAGE, VOLUME, BLOCK),
        )
        with (
            UndoStack("the swap") as undo,
            self.devices.watching_writes(self.direct, IMAGE) as writes,
        ):
            planned = cachemap.shared(self._unmodified(), stack.cached, BLOCK)
            time.sleep(plan_seconds)
            self.devices.build_cache(stack, undo)
            stack = dataclasses.replace(stack, mode="cached")
            if not touch:
                cast(Any, writes).unwritten = lambda: Extents.of([(0, IMAGE)])
            seconds = self.devices.swap_in_cache(stack, planned, writes)
            undo.keep()
        table = self.kit.dm.table(NAMES.vol)
        assert table is not None
        shared = table.mapped_to(self.kit.blocks.devnum(path(NAMES.failover)))
        self._stack = stack
        return Swapped(seconds, planned.length, shared.length)

    def leave(self) -> None:
        """Take the cache away."""
        self.devices.reload_volume(self.direct)
        self.devices.remove_cache(self._stack)

    def renew(self) -> None:
        """Make the volume its image again."""
        self.tell("pause")
        write_image(self.lun, VOLUME)
        self.tell("forget")
        self.tell("go")

    def _unmodified(self) -> Extents:
        """What the LUN still has of the image, as the storage host knows it: what the guest's
        process takes down may be late. What is being written may be in it.
        """
        written = []
        fd = os.open(self.lun, os.O_RDONLY | os.O_DIRECT)
        with mmap.mmap(-1, MIB) as buffer:
            for offset in range(0, IMAGE, MIB):
                os.preadv(fd, [buffer], offset)
                for at in range(0, MIB, PAGE):
                    if buffer[at : at + PAGE] != page((offset + at) // PAGE, 0):
                        written.append((offset + at, offset + at + PAGE))
        os.close(fd)
        return Extents.of(written).complement(IMAGE)


def write_image(device: str, length: int) -> None:
    """Write the image's pages to a device."""
    fd = os.open(device, os.O_WRONLY | os.O_DIRECT)
    with mmap.mmap(-1, MIB) as buffer:
        for offset in range(0, length, MIB):
            first = offset // PAGE
            buffer[:] = b"".join(page(each, 0) for each in range(first, first + MIB // PAGE))
            os.pwritev(fd, [buffer], offset)
    os.fsync(fd)
    os.close(fd)


@contextlib.contextmanager
def scene(folder: Path, delay_ms: int = 0, pause: float = 0.0) -> Iterator[Scene]:
    """
    :param delay_ms: of each write of the LUN: some are in flight at any time
    :param pause: seconds of each thread of the guest between two requests
    """
    loops = [_loop(folder / "lun", VOLUME), _loop(folder / "pool", 768 * MIB)]
    dm, lun = KernelDeviceMapper(), loops[0]
    if delay_ms:
        table = f"0 {VOLUME // 512} delay {lun} 0 0 {lun} 0 {delay_ms}\n"
        subprocess.run(["dmsetup", "create", "under-lun"], input=table, text=True, check=True)
        lun = path("under-lun")
    pool = LocalPool(dm)
    pool.open(loops[1], BLOCK)
    kit = kernel_kit(dm, pool)
    kit.pool.create_thin(1)
    kit.dm.create(ImageNames("i").base, layout.thin_table(IMAGE, 1))
    write_image(path(ImageNames("i").base), IMAGE)
    write_image(lun, VOLUME)
    kit.dm.create(NAMES.vol, layout.vol_table(NAMES, lun, Extents(), VOLUME))
    here, there = multiprocessing.Pipe()
    fork = multiprocessing.get_context("fork")
    guest = fork.Process(target=Guest(4, 1, pause).run, args=(path(NAMES.vol), there))
    guest.start()
    try:
        yield Scene(kit, lun, here)
    finally:
        guest.kill()
        guest.join()
        _sweep(dm)
        if delay_ms:
            subprocess.run(["dmsetup", "remove", "--retry", "under-lun"], check=True)
        for loop in loops:
            subprocess.run(["losetup", "--detach", loop], check=True)


def _loop(file: Path, length: int) -> str:
    with open(file, "wb") as opened:
        opened.truncate(length)
    command = ["losetup", "--find", "--show", "--direct-io=on", str(file)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return done.stdout.strip()


def _sweep(dm: KernelDeviceMapper) -> None:
    while devices := dm.devices():
        for device in devices:
            if device.name.startswith(devnames.FAILOVER_PREFIX):
                dm.message(device.name, "fail_if_no_path")
            if not device.opened:
                dm.remove(device.name)


def main() -> int:
    parser = argparse.ArgumentParser(prog="bench.swapping", description=__doc__)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--swaps", type=int, default=200)
    parser.add_argument("--plan", type=float, default=0.3, help="seconds that a plan takes")
    parser.add_argument("--seconds", type=float, default=3600.0, help="begin no swap after these")
    args = parser.parse_args()
    done: list[Swapped] = []
    with scene(args.folder, pause=0.005) as found:
        found.tell("go")
        until = time.monotonic() + args.seconds
        while len(done) < args.swaps and time.monotonic() < until:
            done.append(found.swap(args.plan))
            time.sleep(0.1)
            found.leave()
            if done[-1].shared < IMAGE // 2:
                found.renew()
        report: Report = found.tell("stop")
    print(json.dumps([[dataclasses.asdict(each) for each in done], dataclasses.asdict(report)]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
