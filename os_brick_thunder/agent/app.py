"""Where the agent is put together, for the daemon, the tests and the benches alike."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from os_brick_thunder.agent.agent import Agent
from os_brick_thunder.agent.availability import Availability
from os_brick_thunder.agent.base.bases import Bases
from os_brick_thunder.agent.base.building import BaseBuilder
from os_brick_thunder.agent.base.completion import Completion
from os_brick_thunder.agent.base.devices import BaseDevices
from os_brick_thunder.agent.base.exports import Exports
from os_brick_thunder.agent.base.filler import Filler
from os_brick_thunder.agent.base.health import PathHealth
from os_brick_thunder.agent.base.hoarder import Hoarder
from os_brick_thunder.agent.base.learner import Learner
from os_brick_thunder.agent.base.paths import Paths
from os_brick_thunder.agent.base.precache import Precacher
from os_brick_thunder.agent.base.readahead import Readahead
from os_brick_thunder.agent.base.remote import RemoteReplicas
from os_brick_thunder.agent.base.sources import Sources
from os_brick_thunder.agent.base.verified import VerifiedPaths
from os_brick_thunder.agent.base.watch import SourceWatch
from os_brick_thunder.agent.heartbeat import Heartbeat
from os_brick_thunder.agent.pool.guard import PoolGuard
from os_brick_thunder.agent.pool.usage import PoolUsage
from os_brick_thunder.agent.ports import Host, Kit
from os_brick_thunder.agent.reaper import Reaper
from os_brick_thunder.agent.reporter import Reporter
from os_brick_thunder.agent.stack.admission import Admission
from os_brick_thunder.agent.stack.cache import CacheBuilder
from os_brick_thunder.agent.stack.devices import StackDevices
from os_brick_thunder.agent.stack.direct import CacheRemover
from os_brick_thunder.agent.stack.recache import Recacher
from os_brick_thunder.agent.stack.recorder import Recorder
from os_brick_thunder.agent.stack.registry import StackRegistry
from os_brick_thunder.agent.stack.stacks import Stacks
from os_brick_thunder.agent.stack.watch import FailoverWatch
from os_brick_thunder.common import wire
from os_brick_thunder.common.policy import timelimits
from os_brick_thunder.common.policy.iscsinames import portal_of

LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Settings:
    """The options that the agent's services depend on; see :mod:`os_brick_thunder.common.conf`.

    :ivar portal: "address:port" of this host's exports
    :ivar fill_rate: bytes a second, as ``fill_link_rate``; 0 is unlimited
    """

    portal: str
    parent_wait: float
    drain_timeout: float
    pool_low_percent: int
    pool_high_percent: int
    fill_workers: int
    fill_rate: int
    heartbeat_interval: float
    attach_budget: float
    fill_link_rate: int = 0
    fill_rest: bool = True
    hoard_images: int = 0
    checked_only: bool = False
    verified: bool = False

    @classmethod
    def of(cls, options: Any) -> Settings:
        """:param options: the group [thunder] of the configuration"""
        _warn_of_limits(options)
        return cls(
            portal=portal_of(options.address, options.export_port),
            parent_wait=options.parent_wait,
            drain_timeout=options.drain_timeout,
            pool_low_percent=options.pool_low_percent,
            pool_high_percent=options.pool_high_percent,
            fill_workers=options.fill_workers,
            fill_rate=options.fill_rate_mib << 20,
            fill_link_rate=options.fill_link_rate_mib << 20,
            heartbeat_interval=options.heartbeat_interval,
            attach_budget=options.attach_budget,
            fill_rest=options.fill_rest,
            hoard_images=options.hoard_images,
            checked_only=options.unfilled_reads == "storage",
            verified=options.unfilled_reads == "verified",
        )


def _warn_of_limits(options: Any) -> None:
    """Warn of options with which somebody would not wait for what takes longer."""
    limits = timelimits.Options(
        attach_budget=options.attach_budget,
        attach_deadline=options.attach_deadline,
        rpc_timeout=options.rpc_timeout,
        drain_timeout=options.drain_timeout,
        heartbeat_interval=options.heartbeat_interval,
    )
    for wait in timelimits.on_a_compute_host(limits):
        if wait.is_too_short:
            LOG.warning("Time limits in [thunder]: %s", wait)


@dataclass(frozen=True)
class BaseParts:
    """What a host's bases consist of."""

    bases: Bases
    completion: Completion
    sources: Sources
    health: PathHealth
    exports: Exports
    reporter: Reporter


@dataclass(frozen=True)
class StackParts:
    """What a host's stacks consist of."""

    stacks: Stacks
    admission: Admission
    builder: CacheBuilder
    remover: CacheRemover
    recorder: Recorder


@dataclass(frozen=True)
class App:
    """An agent, and those of its parts that are called from outside."""

    agent: Agent
    base: BaseParts
    watch: SourceWatch
    precacher: Precacher
    usage: PoolUsage
    guard: PoolGuard
    stack: StackParts
    failover: FailoverWatch
    recacher: Recacher
    heartbeat: Heartbeat
    reaper: Reaper


def build(host: Host, settings: Settings) -> App:
    """Wire the services of a host. Nothing runs, and nothing was changed, before ``agent.start``.

    :raises errors.InvalidRequest: options contradict each other
    """
    interval = settings.heartbeat_interval
    usage = PoolUsage(host, settings.pool_low_percent, settings.pool_high_percent)

    # Bases and the filler call each other, as do stacks and the heartbeat.
    def on_ready() -> None:
        filler.wake()
        watch.wake()

    readahead = Readahead(host.kit.loops)
    base = _build_bases(host, settings, readahead, on_ready)
    bases, reporter = base.bases, base.reporter
    watch = SourceWatch(host.store, base.sources, base.health, bases.evict)
    filler = Filler(
        host,
        readahead,
        base.completion.complete,
        watch.on_wrong_bytes,
        usage.may_fill,
        settings.fill_workers,
        settings.fill_rate,
        settings.fill_link_rate,
        settings.fill_rest,
    )
    stack = _build_stacks(host, settings, bases, usage, on_removed=lambda: heartbeat.release_soon())
    guard = PoolGuard(usage, stack.remover, bases.evict)
    recacher = Recacher(stack.builder, guard.may_build_unasked)
    failover = FailoverWatch(host.kit.failover, stack.remover)
    reaper = Reaper(bases, stack.stacks)
    precacher = Precacher(host, bases, reporter, usage.refusal)
    hoarder = Hoarder(host.store, settings.hoard_images, precacher.hoard, filler.is_idle)
    learner = Learner(host.store, bases)

    def obey(orders: wire.Orders) -> None:
        watch.obey(orders)
        recacher.obey(orders.recache)
        reaper.drop(orders.drop)
        hoarder.obey(orders.popular)
        learner.obey(orders.profiles)

    chores = (reporter.withdraw_all, reporter.report_all)
    heartbeat = Heartbeat(host, interval, obey, stack.stacks.release_all, chores)
    recorder = stack.recorder
    services = (
        failover, guard, filler, heartbeat, watch, recacher, stack.builder, reaper, recorder,
    )  # fmt: skip
    agent = Agent(
        host,
        bases,
        stack.stacks,
        reporter,
        guard,
        base.health.wrong,
        settings.drain_timeout,
        services,
    )
    return App(
        agent, base, watch, precacher, usage, guard, stack, failover, recacher, heartbeat, reaper
    )


def _build_bases(
    host: Host, settings: Settings, readahead: Readahead, on_ready: Callable[[], None]
) -> BaseParts:
    portal = settings.portal
    availability = Availability(host.store)
    reporter = Reporter(host, availability, portal)
    paths = Paths(host, availability)
    replicas = RemoteReplicas(host, settings.parent_wait)
    verified = VerifiedPaths(host.kit)
    sources = Sources(host, availability, paths, replicas, verified, reporter)
    exports = Exports(host, availability, reporter, portal, settings.drain_timeout)
    devices = BaseDevices(host, portal, verified, readahead)
    completion = Completion(host, availability, devices, sources, reporter)
    builder = BaseBuilder(availability, devices, sources, settings.parent_wait)
    bases = Bases(
        host,
        availability,
        devices,
        sources,
        builder,
        exports,
        completion,
        reporter,
        on_ready,
        settings.checked_only,
        settings.verified and _has_verity(host.kit),
    )
    health = PathHealth(host, paths, verified)
    return BaseParts(bases, completion, sources, health, exports, reporter)


def _has_verity(kit: Kit) -> bool:
    """Whether the kernel can check what is read of other hosts' bases."""
    if kit.dm.has_target("verity"):
        return True
    LOG.warning(
        "The kernel has no target verity (dm-verity): what guests read of an image before it is "
        "here is not checked. Install the module, or set unfilled_reads to storage"
    )
    return False


def _build_stacks(
    host: Host,
    settings: Settings,
    bases: Bases,
    usage: PoolUsage,
    on_removed: Callable[[], None],
) -> StackParts:
    registry = StackRegistry(host.store)
    devices = StackDevices(host)
    recorder = Recorder(host)
    admission = Admission(host, bases, usage.refusal, settings.attach_budget, recorder.planned)
    remover = CacheRemover(host, registry, devices)
    builder = CacheBuilder(host, registry, devices, bases, admission, remover)
    stacks = Stacks(host, registry, devices, admission, builder, remover, on_removed)
    return StackParts(stacks, admission, builder, remover, recorder)
