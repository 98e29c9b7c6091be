"""The agent of a host: what it is asked to do, and when it starts and stops what runs in it."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from os_brick_thunder.agent.base import paths as replica_paths
from os_brick_thunder.agent.base.bases import Bases
from os_brick_thunder.agent.pool.guard import PoolGuard
from os_brick_thunder.agent.ports import Host
from os_brick_thunder.agent.reconcile import reconcile
from os_brick_thunder.agent.reporter import Reporter
from os_brick_thunder.agent.stack.stacks import Attached, Stacks
from os_brick_thunder.common import stats, wire
from os_brick_thunder.common.state import READY

LOG = logging.getLogger(__name__)


class Lifecycle(Protocol):
    """Something that runs in the background; stopping it leaves all devices as they are."""

    def start(self) -> None: ...
    def stop(self) -> None: ...


class Agent:
    """One host's agent."""

    def __init__(
        self,
        host: Host,
        bases: Bases,
        stacks: Stacks,
        reporter: Reporter,
        guard: PoolGuard,
        wrong_bytes: Mapping[str, int],
        drain_timeout: float,
        services: Sequence[Lifecycle],
    ) -> None:
        """
        :param wrong_bytes: for the status: how often the bytes of a host were not the image
        :param drain_timeout: for the status: seconds that an eviction may wait for readers
        :param services: started in this order, the guard among them, and stopped in reverse
        """
        self._host = host
        self._bases = bases
        self._stacks = stacks
        self._reporter = reporter
        self._guard = guard
        self._wrong_bytes = wrong_bytes
        self._drain_timeout = drain_timeout
        self._services = services

    def start(self) -> None:
        """Reconcile, and start the services.

        :raises errors.ThunderError: the kernel and the state file could not be made to agree
        """
        try:
            self._guard.poll()  # guests may be waiting for space: they come first
        except Exception:
            LOG.exception("polling the local pool")
        self.reconcile()
        for service in self._services:
            service.start()

    def stop(self) -> None:
        """Stop what runs in the background; the devices stay."""
        for service in reversed(self._services):
            service.stop()

    # -- for the connector ------------------------------------------------------------------

    def attach(self, payload: wire.Payload, device: str, deadline: float) -> Attached:
        return self._stacks.attach(payload, device, deadline)

    def detach(self, volume_id: str, deadline: float) -> None:
        self._stacks.detach(volume_id, deadline)

    def extend(self, volume_id: str) -> Attached:
        return self._stacks.extend(volume_id)

    def status(self) -> Mapping[str, Any]:
        """What is here, in JSON types; ``from_network`` counts image bytes read from replicas."""
        kit, store = self._host.kit, self._host.store
        return {
            "topology": self._host.topology.to_wire(),
            "pool": dataclasses.asdict(kit.pool.status()),
            "drain_timeout": self._drain_timeout,
            "space": self._guard.status(),
            "wrong_bytes": dict(self._wrong_bytes),
            "bases": [
                {
                    "image_id": base.image_id,
                    "size": base.size,
                    "phase": base.phase,
                    "complete": base.complete,
                    "checked_only": base.checked_only,
                    "verified": base.verified,
                    "filled": self._reporter.filled(base) if base.phase == READY else 0,
                    "sources": [path.host for path in replica_paths.in_use(base)],
                    "from_network": self._reporter.from_network(base),
                }
                for base in store.bases.values()
            ],
            "stacks": [stats.of_stack(kit.dm, stack) for stack in store.stacks.values()],
        }

    def reconcile(self) -> None:
        """See :func:`os_brick_thunder.agent.reconcile.reconcile`."""
        reconcile(self._host, self._bases, self._stacks)
