"""The agent: start-up, reconciliation, what it does in the background, and what it is asked."""

from __future__ import annotations

import dataclasses
import logging
import threading
from collections.abc import Callable, Mapping
from typing import Any

from os_brick_thunder.agent.base.bases import Bases
from os_brick_thunder.agent.base.filler import Filler
from os_brick_thunder.agent.base.watch import Watch
from os_brick_thunder.agent.pool.guard import PoolGuard
from os_brick_thunder.agent.ports import Host, Kit, Tracker
from os_brick_thunder.agent.reconcile import reconcile
from os_brick_thunder.agent.stack.recache import Recacher
from os_brick_thunder.agent.stack.stacks import Attached, Stacks
from os_brick_thunder.common import errors, wire
from os_brick_thunder.common import stats as figures
from os_brick_thunder.common.state import READY, Base, StateFile

LOG = logging.getLogger(__name__)


class Agent:
    """One host's agent."""

    def __init__(
        self,
        kit: Kit,
        store: StateFile,
        tracker: Tracker,
        topology: wire.Topology,
        bases: Bases,
        stacks: Stacks,
        filler: Filler,
        interval: float,
        guard: PoolGuard | None = None,
    ) -> None:
        """:param interval: seconds between heartbeats"""
        self._kit = kit
        self._store = store
        self._tracker = tracker
        self._topology = topology
        self._bases = bases
        self._stacks = stacks
        self._filler = filler
        self._interval = interval
        self._guard = guard
        self._orphaned: list[Base] = []
        self._stop = threading.Event()
        self._loop = threading.Thread(target=self._beat, name="heartbeat", daemon=True)
        self._watch = Watch(store, bases)
        self._recacher = Recacher(stacks, guard.may_build_unasked if guard else lambda: True)
        bases.on_ready = filler.start

    def start(self) -> None:
        if self._guard:
            self._guarded(self._guard.poll)  # guests may be waiting for room: they come first
        self.reconcile()
        if self._guard:
            self._guard.start()
        for base in self._store.bases.values():
            if base.phase == READY and not base.complete:
                self._filler.start(base.image_id)
        self._loop.start()
        self._watch.start()
        self._recacher.start()

    def stop(self) -> None:
        """Stop what runs in the background; the devices stay."""
        self._stop.set()
        self._recacher.stop()
        if self._guard:
            self._guard.stop()
        self._watch.stop()
        self._filler.stop()
        if self._loop.is_alive():
            self._loop.join(timeout=self._interval)

    # -- asked by the connector -------------------------------------------------------------

    def attach(self, payload: wire.Payload, device: str, deadline: float) -> Attached:
        return self._stacks.attach(payload, device, deadline)

    def detach(self, volume_id: str) -> None:
        self._stacks.detach(volume_id)

    def extend(self, volume_id: str) -> Attached:
        return self._stacks.extend(volume_id)

    def status(self) -> Mapping[str, Any]:
        """What is here, in JSON types; ``from_network`` counts image bytes read from replicas."""
        pool = self._kit.pool.status()
        return {
            "topology": self._topology.to_wire(),
            "pool": dataclasses.asdict(pool),
            "drain_timeout": self._bases.drain_timeout,
            "space": self._guard.status() if self._guard else None,
            "bases": [
                {
                    "image_id": base.image_id,
                    "size": base.size,
                    "phase": base.phase,
                    "complete": base.complete,
                    "filled": self._bases.filled(base) if base.phase == READY else 0,
                    "sources": [path.host for path in base.paths if path.iqn],
                    "from_network": self._bases.from_network(base),
                }
                for base in self._store.bases.values()
            ],
            "stacks": [figures.of_stack(self._kit.dm, s) for s in self._store.stacks.values()],
        }

    # -- reconciliation ---------------------------------------------------------------------

    def reconcile(self) -> None:
        """See :func:`os_brick_thunder.agent.reconcile.reconcile`."""
        host = Host(self._kit, self._store, self._tracker, self._topology)
        self._orphaned = reconcile(host, self._bases, self._stacks)

    # -- in the background ------------------------------------------------------------------

    def _beat(self) -> None:
        while not self._stop.is_set():
            try:
                orders = self._tracker.heartbeat(self._topology)
                self._watch.obey(orders)
                self._recacher.obey(orders.recache)
                self.catch_up()
            except errors.ThunderError as error:
                LOG.warning("heartbeat: %s", error)
            except Exception:
                LOG.exception("heartbeat")
            self._guarded(self._stacks.reinstate_luns)
            self._stop.wait(self._interval)

    def catch_up(self) -> None:
        """Tell the tracker what is here and what is not, and do what had to wait for it.

        :raises errors.ThunderError: not now
        """
        self._bases.withdraw_all()
        self._bases.tell_all()
        self._stacks.release_all()
        self._restore_orphaned()

    def _restore_orphaned(self) -> None:
        failed: errors.ThunderError | None = None
        for base in list(self._orphaned):
            try:
                self._bases.restore(base)
                self._orphaned.remove(base)
            except errors.ThunderError as error:  # the others may be luckier
                failed = error
        if failed:
            raise failed

    @staticmethod
    def _guarded(function: Callable[[], object]) -> None:
        try:
            function()
        except Exception:
            LOG.exception("%s", function.__name__)
