"""``thunder-agent``: wires the mechanisms of this host to its services and runs them."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
from pathlib import Path
from types import FrameType
from typing import Any

import waitress
from oslo_config import cfg
from oslo_log import log

from os_brick_thunder.agent import failpoints
from os_brick_thunder.agent.agent import Agent
from os_brick_thunder.agent.api import application
from os_brick_thunder.agent.base.bases import Bases
from os_brick_thunder.agent.base.filler import Filler
from os_brick_thunder.agent.base.precache import Precacher
from os_brick_thunder.agent.exporter import ExporterEndpoint, exporter_server
from os_brick_thunder.agent.mechanism import cachemeta
from os_brick_thunder.agent.mechanism.localpool import LocalPool
from os_brick_thunder.agent.mechanism.losetup import LoSetup
from os_brick_thunder.agent.pool.guard import PoolGuard
from os_brick_thunder.agent.pool.usage import PoolUsage
from os_brick_thunder.agent.ports import Kit, Tracker
from os_brick_thunder.agent.stack.stacks import Stacks
from os_brick_thunder.common import conf as options
from os_brick_thunder.common import errors, rpc, wire
from os_brick_thunder.common.mechanism import blockdev
from os_brick_thunder.common.mechanism.dmioctl import DmIoctl
from os_brick_thunder.common.mechanism.dmsetup import DmSetup
from os_brick_thunder.common.mechanism.thinmeta import ThinMetadata
from os_brick_thunder.common.policy import devnames
from os_brick_thunder.common.state import StateFile
from os_brick_thunder.common.transport import iscsi, lio

LOG = logging.getLogger(__name__)
_THREADS = 16
#: The share of rpc_timeout within which a tracker must answer before a guest is made to wait.
_SOON = 0.6


def kernel_kit(dm: DmSetup, pool: LocalPool) -> Kit:
    """The mechanisms of this host, over a pool that is open."""
    return Kit(
        dm=dm,
        pool=pool,
        metadata=ThinMetadata(devnames.POOL, devnames.path(devnames.POOL_METADATA), dm),
        loops=LoSetup(),
        initiator=iscsi.IscsiAdm(),
        targets=lio,
        blocks=blockdev,
        restore_cache=cachemeta.restore,
    )


def _kit(conf: Any) -> Kit:
    dm = DmIoctl()
    pool = LocalPool(dm)
    device = conf.pool_device
    if bool(device) == bool(conf.pool_volume_group):
        raise errors.PoolError("set one of pool_device and pool_volume_group for the local pool")
    if conf.pool_block_kib % 64:
        raise errors.PoolError(f"pool_block_kib {conf.pool_block_kib} is no multiple of 64")
    if not device:
        device = pool.resolve_group(conf.pool_volume_group, conf.pool_size_gib)
    pool.open(device, conf.pool_block_kib << 10)
    return kernel_kit(dm, pool)


def _serve(socket: Path, agent: Agent) -> Any:
    socket.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    os.chmod(socket.parent, 0o700)
    return waitress.create_server(
        application(agent), unix_socket=str(socket), unix_socket_perms="600", threads=_THREADS
    )


def run(conf: cfg.ConfigOpts) -> None:
    """Run the agent until SIGTERM or SIGINT.

    :raises errors.ThunderError: it cannot start; says why
    """
    mine = conf.thunder
    if not mine.address:
        raise errors.InvalidRequest(
            "option address of [thunder] is not set: "
            "give the address at which other hosts reach this one"
        )
    if os.geteuid() != 0:
        raise errors.InvalidRequest("thunder-agent works on devices: run it as root")
    topology = wire.Topology(
        host=mine.host,
        address=mine.address,
        rack=mine.rack,
        zone=mine.zone,
        initiator=iscsi.initiator_name(),
    )
    store = StateFile(Path(mine.state_file))
    kit = _kit(mine)
    transport = rpc.transport(conf)
    tracker: Tracker = rpc.RpcTracker(transport, mine.rpc_timeout)
    if watch := failpoints.from_environment():
        store = failpoints.WatchedStore(Path(mine.state_file), watch)
        kit = failpoints.watched_kit(kit, watch)
        tracker = failpoints.watched_tracker(tracker, watch)
    portal = lio.portal_of(mine.address, mine.export_port)
    bases = Bases(kit, store, tracker, topology, portal, mine.parent_wait, mine.drain_timeout)
    usage = PoolUsage(kit, store, mine.pool_low_percent, mine.pool_high_percent)
    soon = _SOON * mine.rpc_timeout
    stacks = Stacks(kit, store, bases, tracker, topology, usage.refusal, soon)
    guard = PoolGuard(usage, stacks, bases.evict)
    rate = mine.fill_rate_mib << 20
    workers = mine.fill_workers
    filler = Filler(
        store, bases, tracker, kit.metadata, kit.pool.block, workers, rate, usage.may_fill
    )
    interval = mine.heartbeat_interval
    agent = Agent(kit, store, tracker, topology, bases, stacks, filler, interval, guard)
    agent.start()

    precacher = Precacher(store, bases, tracker, topology, usage.refusal)
    endpoint = ExporterEndpoint(bases, precacher.precache, agent.status)
    exporter = exporter_server(transport, mine.host, endpoint)
    # RabbitMQ may be away for now: volumes are direct, and get their caches when it is back.
    threading.Thread(target=exporter.start, name="exporter", daemon=True).start()
    server = _serve(Path(mine.socket), agent)

    def stop(signum: int, frame: FrameType | None) -> None:
        raise SystemExit(0)

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    LOG.info("thunder-agent of %s serves %s", mine.host, mine.socket)
    try:
        server.run()
    finally:
        agent.stop()
        LOG.info("thunder-agent stopped; devices stay as they are")


def main(argv: list[str] | None = None) -> int:
    conf = cfg.CONF
    options.register(conf, agent=True)
    log.register_options(conf)
    conf(
        sys.argv[1:] if argv is None else argv,
        project="thunder",
        default_config_files=[options.DEFAULT_FILE] if Path(options.DEFAULT_FILE).exists() else [],
    )
    log.setup(conf, "thunder-agent")
    try:
        run(conf)
    except errors.ThunderError as error:
        LOG.error("%s", error)
        print(f"thunder-agent: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
