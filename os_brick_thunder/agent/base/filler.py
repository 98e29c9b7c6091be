"""Filling bases in the background: read the source, write the same bytes to the base.

Each chunk is checked with the image's hash tree, or its manifest, before it is written. The base
has no other writer, so this is safe at any time and may be interrupted at any point: what is mapped
in the pool is filled, and a restart goes on from there.

What boots of the image read comes first (:mod:`os_brick_thunder.agent.base.pieces`). The rest
waits while guests of this host read the base, and is filled at a part of its rate while volumes use
it, within limits; if no boot was recorded, it waits only where guests would wait behind it. While
guests read volumes that have no cache yet, what boots read is filled at a part of its rate, too.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import threading
import time
from collections.abc import Callable, Set
from concurrent.futures import ThreadPoolExecutor

from os_brick_thunder.agent.base import paths as replica_paths
from os_brick_thunder.agent.base.demand import Demand
from os_brick_thunder.agent.base.pieces import Misses, Pieces
from os_brick_thunder.agent.base.readahead import Readahead
from os_brick_thunder.agent.base.treecheck import TreeCheck
from os_brick_thunder.agent.policy import layout
from os_brick_thunder.agent.ports import Host
from os_brick_thunder.common import errors
from os_brick_thunder.common.backoff import Backoff
from os_brick_thunder.common.copyends import Disk
from os_brick_thunder.common.mechanism.blockdev import drop_cache, read_ahead
from os_brick_thunder.common.pace import LinkPaces, Pace
from os_brick_thunder.common.periodic import PeriodicThread, Task
from os_brick_thunder.common.policy import devnames
from os_brick_thunder.common.policy.devnames import ImageNames
from os_brick_thunder.common.policy.extents import Extents
from os_brick_thunder.common.policy.manifest import Manifest
from os_brick_thunder.common.state import READY, Base
from os_brick_thunder.common.transfer import PIECE, Check, copy

LOG = logging.getLogger(__name__)

#: Seconds between two checks for bases that are due.
INTERVAL = 1.0
#: Seconds between two polls of a pool that has no space.
NO_SPACE = 1.0


class Filler:
    """Fills a bounded number of bases at one time.

    A base whose source fails gives its turn to the others: those that were tried less often come
    first. One that only lacks the rest gives its turn to one that lacks what boots read and has not
    failed.
    """

    def __init__(
        self,
        host: Host,
        readahead: Readahead,
        complete: Callable[[Base], None],
        on_wrong_bytes: Callable[[Base], None],
        may_fill: Callable[[], bool],
        workers: int,
        rate: int = 0,
        link_rate: int = 0,
        rest: bool = True,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """
        :param complete: called with a base that holds all of its image
        :param on_wrong_bytes: called with a base whose source's bytes are not the image
        :param may_fill: whether the pool has space; asked before each chunk
        :param workers: how many bases are filled at one time; with 0 none is: what they do not hold
            is read through from their sources
        :param rate: bytes a second, of all bases together; 0 is unlimited
        :param link_rate: the same of those together that are filled from one host
        :param rest: whether what no boot of the image reads is filled, too
        """
        self._host = host
        self._readahead = readahead
        self._store = host.store
        self._block = host.kit.pool.block
        self._complete = complete
        self._on_wrong_bytes = on_wrong_bytes
        self._may_fill = may_fill
        self._pace, self._links = Pace(rate), LinkPaces(link_rate)
        self._rest = rest
        self._clock = clock
        self._most = workers
        self._workers = ThreadPoolExecutor(workers, "fill") if workers else None
        #: Thin ids, as an image may get another base while its old one still is being filled.
        self._busy: set[int] = set()
        self._tried: dict[int, Backoff] = {}
        #: By thin id, the profile that a base was filled with.
        self._followed: dict[int, str] = {}
        #: Whether a base waits for its turn that lacks what boots read.
        self._urgent = False
        self._demand: dict[int, Demand] = {}
        self._lock = threading.Lock()
        self._thread = PeriodicThread(Task("filler", INTERVAL, self._assign, at_once=True))

    def start(self) -> None:
        """Fill all bases that are not complete, now and whenever there is another one."""
        if self._workers:
            self._thread.start()

    def wake(self) -> None:
        """There may be another base to fill."""
        self._thread.wake()

    def is_idle(self) -> bool:
        """Whether no base is being filled."""
        with self._lock:
            return not self._busy

    def stop(self) -> None:
        self._thread.stop()
        if self._workers:
            self._workers.shutdown(wait=True)

    def _assign(self) -> None:
        """Give the free workers bases that are due."""
        bases = {base.thin_id: base for base in self._store.bases.values() if _is_filling(base)}
        now = self._clock()
        with self._lock:
            self._forget_all_but(bases.keys() | self._busy)
            used = self._used()
            lacking = {
                key
                for key, base in bases.items()
                if not self._is_followed(base) or self._is_rest_wanted(base, used)
            }
            tried = {key: self._tried.get(key, Backoff()) for key in lacking - self._busy}
            due = [key for key in tried if tried[key].due <= now]
            first = {
                key for key in due if not (tried[key].attempts or self._is_followed(bases[key]))
            }
            due.sort(key=lambda key: (key not in first, tried[key].attempts, tried[key].due, key))
            free = self._most - len(self._busy)
            for key in due[:free]:
                if self._workers and not self._thread.stopping:
                    self._busy.add(key)
                    self._workers.submit(self._work, bases[key])
            self._urgent = not first.isdisjoint(due[free:])

    def _forget_all_but(self, thin_ids: Set[int]) -> None:
        self._tried = {key: each for key, each in self._tried.items() if key in thin_ids}
        self._followed = {key: each for key, each in self._followed.items() if key in thin_ids}
        self._demand = {key: each for key, each in self._demand.items() if key in thin_ids}

    def _is_followed(self, base: Base) -> bool:
        """Whether a base has what boots of its image read, as far as that is known."""
        return self._followed.get(base.thin_id, "") == base.profile

    def _used(self) -> set[str | None]:
        """The images of the bases that volumes of this host use."""
        return {stack.base_image_id for stack in self._store.stacks.values()}

    def _is_rest_wanted(self, base: Base, used: Set[str | None]) -> bool:
        """Whether a base is to have what no boot reads, too."""
        return self._rest and base.is_for_all(base.image_id in used)

    def _work(self, base: Base) -> None:
        worked = False
        try:
            if self._fill(base):
                self._complete(base)
            worked = True
        except errors.WrongDigest as error:
            LOG.error("filling base of %s: %s; it is tried again", base.image_id, error)
            self._on_wrong_bytes(base)
        except Exception as error:
            # The multipath device and then the tracker deal with a source that fails; guests read
            # from their LUNs meanwhile.
            LOG.warning("filling base of %s: %s; it is tried again", base.image_id, error)
        finally:
            with self._lock:
                self._busy.discard(base.thin_id)
                tried = self._tried.pop(base.thin_id, Backoff())
                if not worked:
                    self._tried[base.thin_id] = tried.after_attempt(self._clock())
            self._thread.wake()

    def _fill(self, base: Base) -> bool:
        """:returns: whether the base is full; False when it has given its turn away, is not to have
        the rest, was removed, or the filler stopped
        """
        names = ImageNames(base.image_id)
        paths = devnames.path(names.paths)
        needed = layout.fill_extents(base.length, base.needed, self._block)
        present = self._host.kit.metadata.mapped(base.thin_id)
        began = time.monotonic()
        # Through the page cache: what was read ahead is there, and what guests and others miss.
        source = Disk(
            paths, base.length, needed, cached=True, forget=lambda *piece: pieces.was_read(*piece)
        )
        try:
            check = self._check(base, source)
            target = Disk(
                devnames.path(names.base),
                base.length,
                write=True,
                present=present,
                block=self._block,
            )
        except BaseException:
            source.close()
            raise
        demand = self._demand_of(base)
        read_through = devnames.path(layout.read_through(base))
        misses = Misses(self._host.kit.blocks, read_through, base.length)
        pieces = Pieces(
            base.size,
            lambda: self._newest(base).profile,
            functools.partial(self._may_go_on, base, demand),
            demand,
            misses,
            lambda little: self._readahead.set(base, little=little),
            functools.partial(_read_ahead, paths, needed, check),
            functools.partial(_forget, paths),
        )
        filling = copy(
            source,
            target,
            check=check,
            pace=functools.partial(self._after, base),
            proceed=functools.partial(self._goes_on, base),
            order=pieces,
            piece=PIECE,
            spawn=lambda work: work(),  # this thread has nothing else to do
        )
        try:
            filling.wait()
        except errors.TransferCancelled:
            return False
        finally:
            with contextlib.suppress(OSError):
                pieces.close()
            misses.close()
            if self._is_wanted(base):
                self._readahead.set(base, little=False)
        seconds = time.monotonic() - began
        LOG.info("base of %s: filled %d MiB in %.1f s", base.image_id, filling.done >> 20, seconds)
        return pieces.all

    def _after(self, base: Base, count: int) -> float:
        """When to go on after so many bytes of a base: see :meth:`Pace.after`."""
        found = self._newest(base)
        nearest = next((path.host for path in replica_paths.in_use(found)), "")
        return max(self._pace.after(count), self._links.after(nearest, count))

    def _newest(self, base: Base) -> Base:
        """A base as it is recorded now."""
        found = self._store.bases.get(base.image_id, base)
        return found if found.thin_id == base.thin_id else base

    def _demand_of(self, base: Base) -> Demand:
        with self._lock:
            if base.thin_id not in self._demand:
                self._demand[base.thin_id] = Demand(self._host, base.image_id, self._clock)
            return self._demand[base.thin_id]

    def _may_go_on(self, base: Base, demand: Demand, profile: str, rate: float) -> bool:
        """Whether a base that has all of a profile is to be filled with the rest now.

        Waits while guests of this host read the base, unless that has been long enough. Where no
        boot was recorded the rest may be what they read next.

        :param rate: bytes a second at which the base is filled
        """
        with self._lock:
            self._followed[base.thin_id] = profile
        while not self._urgent and self._is_wanted(base):
            if not self._is_rest_wanted(self._newest(base), self._used()):
                return False
            if not (pause := demand.pause(0.0 if profile else rate)):
                return True
            time.sleep(pause)
        return False

    def _check(self, base: Base, source: Disk) -> Check | None:
        """What the base is checked with; None for an image that has nothing.

        Not the manifest where there is a tree: of a large image it is megabytes, which all hosts of
        a storm would ask the trackers for at once.

        :raises errors.ThunderError: no tracker answers
        :raises ValueError: the manifest is not of this image
        """
        if base.root:
            return TreeCheck(base.size, base.root, source)
        try:
            found = self._host.tracker.manifest(base.image_id)
        except errors.NoReplica:
            LOG.warning("image %s has no manifest: its base is not checked", base.image_id)
            return None
        return Manifest.parse(base.size, found.chunk, found.digests)

    def _goes_on(self, base: Base) -> bool:
        """Wait for space in the pool.

        :returns: False if the base was removed or the filler stopped meanwhile
        """
        while self._is_wanted(base):
            if self._may_fill():
                return True
            time.sleep(NO_SPACE)
        return False

    def _is_wanted(self, base: Base) -> bool:
        found = self._store.bases.get(base.image_id)
        is_there = found is not None and found.thin_id == base.thin_id and _is_filling(found)
        return is_there and not self._thread.stopping


def _is_filling(base: Base) -> bool:
    return base.phase == READY and not base.complete


def _read_ahead(device: str, needed: Extents, check: Check | None, start: int, end: int) -> None:
    with contextlib.suppress(OSError):  # the read itself will tell
        for first, last in needed.within(start, end):
            read_ahead(device, first, last - first)
        for first, last in check.beside(start, end) if check else ():
            read_ahead(device, first, last - first)


def _forget(device: str, start: int, end: int) -> None:
    drop_cache(device, start, end - start)
