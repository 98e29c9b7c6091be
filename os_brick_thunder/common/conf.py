"""Options of the agent and the connector, both read from ``/etc/thunder/thunder.conf``."""

from __future__ import annotations

import os
import socket
from typing import Any

from oslo_config import cfg

from os_brick_thunder.common.policy import timelimits
from os_brick_thunder.common.policy.iscsinames import PORT

GROUP = "thunder"
DEFAULT_FILE = "/etc/thunder/thunder.conf"
#: Environment variable with the path of another file, for the connector inside nova-compute.
FILE_VARIABLE = "THUNDER_CONF"

COMMON_OPTS: list[cfg.Opt] = [
    cfg.StrOpt(
        "host",
        default=socket.gethostname(),
        sample_default="<hostname>",
        help="Name of this host, unique in the cloud. Use the same as nova-compute's host.",
    ),
    cfg.StrOpt(
        "address",
        default="",
        help="Address at which other hosts reach this host's replicas (iSCSI). Required for the "
        "agent.",
    ),
    cfg.StrOpt("rack", default="", help="Rack that this host is in. Replicas in it are preferred."),
    cfg.StrOpt("zone", default="", help="Zone that this host is in; hosts of one zone are near."),
    cfg.StrOpt(
        "socket",
        default="/run/thunder/agent.sock",
        help="Unix socket on which the agent serves the connector of this host. Its folder and "
        "the socket itself are for root only.",
    ),
]

CONNECTOR_OPTS: list[cfg.Opt] = [
    cfg.FloatOpt(
        "attach_deadline",
        default=timelimits.ATTACH_DEADLINE,
        min=0.1,
        help="Seconds that the agent may take to build or to remove a volume's stack. If it does "
        "not answer in time, an attach returns the plain iSCSI device, with a warning.",
    ),
]

AGENT_OPTS: list[cfg.Opt] = [
    cfg.StrOpt(
        "pool_device",
        default="",
        help="Block device for the local thin pool, for the exclusive use of Thunder. A device "
        "that is in use, or carries other data, is refused and left untouched.",
    ),
    cfg.StrOpt(
        "pool_volume_group",
        default="",
        help="LVM volume group for the local thin pool, instead of pool_device.",
    ),
    cfg.IntOpt(
        "pool_size_gib",
        default=0,
        min=0,
        help="Size of the pool in pool_volume_group in GiB; 0 is all free space.",
    ),
    cfg.IntOpt(
        "pool_block_kib",
        default=64,
        min=64,
        max=1024 * 1024,
        help="Block size of a new local pool and of the caches in it, in KiB, a multiple of 64. "
        "Smaller blocks share more with the image, larger ones need less metadata.",
    ),
    cfg.IntOpt(
        "pool_low_percent",
        default=80,
        min=1,
        max=99,
        help="Low watermark: target maximum usage of the local pool, in per cent. Above it the "
        "agent removes bases that no volume uses, least recently used first, and then switches "
        "volumes to their storage host alone, the ones with the most local blocks first.",
    ),
    cfg.IntOpt(
        "pool_high_percent",
        default=90,
        min=1,
        max=99,
        help="High watermark: usage of the local pool that must not be exceeded, in per cent, "
        "larger than pool_low_percent. Above it no base is started or filled, and volumes are "
        "attached without a cache. Guests write into the space between the two while the agent "
        "frees space: leave more of it on a small pool.",
    ),
    cfg.StrOpt(
        "state_file",
        default="/var/lib/thunder/state.json",
        help="File in which the agent records what it has built, to find it again after a restart.",
    ),
    cfg.PortOpt("export_port", default=PORT, help="iSCSI port of this host's exports."),
    cfg.IntOpt(
        "fill_rate_mib",
        default=0,
        min=0,
        help="Limit for the background filling of all bases of this host together, in MiB/s; 0 is "
        "no limit. It does not limit reads of guests.",
    ),
    cfg.IntOpt(
        "fill_link_rate_mib",
        default=0,
        min=0,
        help="Limit for the background filling from any one other host, in MiB/s; 0 is no limit. "
        "That host's guests or volumes need its network, too.",
    ),
    cfg.IntOpt("fill_workers", default=2, min=1, help="Number of bases that are filled at a time."),
    cfg.BoolOpt(
        "fill_rest",
        default=True,
        help="Whether a base is filled with all of its image, after what the boots of the image "
        "read. If not, it takes less space, but is never complete: what it lacks is read through "
        "it from other hosts, whenever it is read, and where no boot was recorded nothing is "
        "filled.",
    ),
    cfg.StrOpt(
        "unfilled_reads",
        default="verified",
        choices=[
            (
                "verified",
                "the host that fills it, which may be a compute host; the kernel checks "
                "each block (dm-verity), and reads a wrong one from the next source",
            ),
            ("nearest", "the same, unchecked"),
            ("storage", "a storage host, as without a cache"),
        ],
        help="From where guests read what a base does not hold yet. What a base is filled with is "
        "checked in any case, which is too late for a guest that reads it before. "
        "With 'verified' it is checked then, too, if the image has a hash tree: those have one "
        "whose first master was made with thunder_hash_trees. Of others nothing is checked, as "
        "with 'nearest'. With 'storage' nothing that another compute host sends reaches a guest, "
        "and storage hosts are read more. Bases that are here already stay as they are.",
    ),
    cfg.IntOpt(
        "hoard_images",
        default=0,
        min=0,
        max=16,
        help="Number of images of which this host keeps what boots read, some 100 MiB each, before "
        "anything boots here: those with the most volumes in the cloud, one after the other, while "
        "no base is being filled. They go like any unused base when the local pool runs low.",
    ),
    cfg.FloatOpt(
        "attach_budget",
        default=timelimits.ATTACH_BUDGET,
        min=0,
        help="Seconds that an attach waits for the tracker and the replicas, less than "
        "attach_deadline. If they take longer, the volume is attached to its storage host alone, "
        "and gets its cache while it is in use.",
    ),
    cfg.FloatOpt(
        "parent_wait",
        default=timelimits.PARENT_WAIT,
        min=0,
        max=600,
        help="Seconds to wait for a parent that is still building its replica, before the base "
        "reads from the next one.",
    ),
    cfg.FloatOpt(
        "drain_timeout",
        default=timelimits.DRAIN_TIMEOUT,
        min=0,
        help="Seconds that other hosts have to stop reading from a replica that this host is about "
        "to remove; if one still reads from it then, the replica stays. They are told at their "
        "next heartbeat.",
    ),
    cfg.FloatOpt(
        "heartbeat_interval",
        default=timelimits.HEARTBEAT_INTERVAL,
        min=0.5,
        help="Seconds between heartbeats.",
    ),
    cfg.FloatOpt(
        "rpc_timeout",
        default=timelimits.RPC_TIMEOUT,
        min=0.5,
        help="Seconds to wait for the tracker.",
    ),
]


def register(conf: cfg.ConfigOpts, agent: bool = False) -> None:
    """Register our options on ``conf``, with ``agent`` also the agent's."""
    conf.register_opts(COMMON_OPTS + CONNECTOR_OPTS, group=GROUP)
    if agent:
        conf.register_opts(AGENT_OPTS, group=GROUP)


def load_connector(path: str | None = None) -> Any:
    """The connector's options, on a ConfigOpts of its own: it runs inside other services.

    Without a file all options have their defaults.
    """
    path = path or os.environ.get(FILE_VARIABLE, DEFAULT_FILE)
    conf = cfg.ConfigOpts()
    register(conf)
    conf(args=[], default_config_files=[path] if os.path.exists(path) else [], project="thunder")
    return conf.thunder


def list_opts() -> list[tuple[str, list[cfg.Opt]]]:
    """For oslo-config-generator."""
    return [(GROUP, COMMON_OPTS + CONNECTOR_OPTS + AGENT_OPTS)]
