"""``thunder-agent``: an agent over the mechanisms of this host, and its two interfaces."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import uuid
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

import waitress
from oslo_config import cfg
from oslo_log import log

from os_brick_thunder.agent import app
from os_brick_thunder.agent.agent import Agent
from os_brick_thunder.agent.api import application
from os_brick_thunder.agent.exporter import AgentEndpoint, agent_server
from os_brick_thunder.agent.mechanism import cachemeta, hostlock, loops
from os_brick_thunder.agent.mechanism.failover import FailoverProcess
from os_brick_thunder.agent.mechanism.localpool import LocalPool
from os_brick_thunder.agent.policy import identity
from os_brick_thunder.agent.ports import Host, Kit, PoolMetadata
from os_brick_thunder.common import conf as options
from os_brick_thunder.common import errors, rpc, wire
from os_brick_thunder.common.mechanism import blockdev
from os_brick_thunder.common.mechanism.devicemapper import KernelDeviceMapper
from os_brick_thunder.common.mechanism.thinmeta import ThinMetadata
from os_brick_thunder.common.policy import devnames
from os_brick_thunder.common.state import StateFile
from os_brick_thunder.common.transport import iscsi, lio

LOG = logging.getLogger(__name__)
#: Threads of the API. Attaches that wait for each other must not keep detaches from being answered.
_THREADS = 64


def kernel_kit(dm: KernelDeviceMapper, pool: LocalPool) -> Kit:
    """The mechanisms of this host, over a pool that is open."""
    return Kit(
        dm=dm,
        pool=pool,
        metadata=ThinMetadata(devnames.POOL, devnames.path(devnames.POOL_METADATA), dm),
        loops=loops,
        initiator=iscsi.IscsiAdm(),
        targets=lio,
        blocks=blockdev,
        failover=FailoverProcess(),
        restore_cache=cachemeta.restore,
    )


def _kit(conf: Any, pool: LocalPool) -> Kit:
    device = conf.pool_device
    if bool(device) == bool(conf.pool_volume_group):
        raise errors.PoolError("set one of pool_device and pool_volume_group for the local pool")
    if conf.pool_block_kib % 64:
        raise errors.PoolError(f"pool_block_kib {conf.pool_block_kib} is not a multiple of 64")
    if not device:
        device = pool.resolve_group(conf.pool_volume_group, conf.pool_size_gib)
    pool.open(device, conf.pool_block_kib << 10)
    return kernel_kit(KernelDeviceMapper(), pool)


def kernel_host(conf: cfg.ConfigOpts, transport: Any) -> Host:
    """This host, as the options describe it, with its pool open.

    :param transport: oslo.messaging's, to the trackers
    :raises errors.ThunderError: an option is wrong, the host is not prepared, or another agent runs
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
    hostlock.hold(Path(f"{mine.state_file}.lock"))
    store = StateFile(Path(mine.state_file))
    pool = LocalPool(KernelDeviceMapper())
    kit = _kit(mine, pool)
    try:
        claim(store, pool, kit.metadata)
    except errors.StateError:
        if pool.assembled:
            pool.close()
        raise
    return Host(kit, store, rpc.RpcTracker(transport, mine.rpc_timeout), topology)


class IdentifiedPool(Protocol):
    """A local pool that can be told from others."""

    @property
    def identity(self) -> str: ...
    def identify(self, identity: str) -> None: ...


def claim(store: StateFile, pool: IdentifiedPool, metadata: PoolMetadata) -> None:
    """Make sure that the state file is that of this pool. Whichever has no identity gets one.

    :raises errors.StateError: it is that of another pool; nothing was changed
    """
    found = pool.identity
    if found and found == store.pool:
        return
    present = metadata.ids() - {devnames.ZERO_ID}
    claims = identity.Claims(store.pool, store.thin_ids, store.next_thin_id)
    if not identity.belong_together(claims, found, present):
        raise errors.StateError(
            f"the state file is that of another local pool ({store.pool or 'without identity'}) "
            f"than the one on this host ({found or 'without identity'}): set pool_device, or "
            "pool_volume_group, to this host's own pool. To begin anew with this one, detach this "
            "host's volumes and move the state file away; no volume's data is in either"
        )
    if not found:
        found = uuid.uuid4().hex
        pool.identify(found)
    store.adopt_pool(found, max(present, default=devnames.ZERO_ID) + 1)


def serve(conf: cfg.ConfigOpts, host: Host, transport: Any) -> None:
    """Run the agent of a host, and serve its interfaces, until SIGTERM or SIGINT.

    :raises errors.ThunderError: it cannot start
    """
    mine = conf.thunder
    found = app.build(host, app.Settings.of(mine))
    agent = found.agent
    agent.start()
    endpoint = AgentEndpoint(
        found.base.exports,
        found.base.bases.evict,
        found.precacher.precache,
        found.precacher.announced,
        agent.status,
    )
    exporter = agent_server(transport, mine.host, endpoint)
    # This waits for RabbitMQ. Without it volumes are attached direct, and get their caches later.
    threading.Thread(target=exporter.start, name="exporter", daemon=True).start()
    server = _api_server(Path(mine.socket), agent)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _exit)
    LOG.info("thunder-agent of %s serves %s", mine.host, mine.socket)
    try:
        server.run()
    finally:
        agent.stop()
        LOG.info("thunder-agent stopped; devices stay as they are")


def _api_server(socket: Path, agent: Agent) -> Any:
    socket.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    os.chmod(socket.parent, 0o700)
    return waitress.create_server(
        application(agent), unix_socket=str(socket), unix_socket_perms="600", threads=_THREADS
    )


def _exit(signum: int, frame: FrameType | None) -> None:
    raise SystemExit(0)


def configure(argv: list[str] | None = None) -> cfg.ConfigOpts:
    """Read the options and set logging up.

    :param argv: without the program's name; by default the process's
    """
    conf = cfg.CONF
    options.register(conf, agent=True)
    log.register_options(conf)
    conf(
        sys.argv[1:] if argv is None else argv,
        project="thunder",
        default_config_files=[options.DEFAULT_FILE] if Path(options.DEFAULT_FILE).exists() else [],
    )
    log.setup(conf, "thunder-agent")
    return conf


def main(argv: list[str] | None = None) -> int:
    conf = configure(argv)
    try:
        transport = rpc.transport(conf)
        serve(conf, kernel_host(conf, transport), transport)
    except errors.ThunderError as error:
        LOG.error("%s", error)
        print(f"thunder-agent: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
