"""Options of the storage side (cinder.conf). Each is registered by a function, none on import."""

from __future__ import annotations

import copy
from typing import Any

from oslo_config import cfg

from os_brick_thunder.common.policy import timelimits

#: In the backend's own section of cinder.conf.
backend_opts = [
    cfg.StrOpt(
        "thunder_rack",
        default="",
        help="The rack that this storage host stands in. Hosts of one rack and zone read from "
        "each other first.",
    ),
    cfg.StrOpt("thunder_zone", default="", help="The zone that this storage host stands in."),
    cfg.IntOpt(
        "thunder_fanout",
        default=2,
        min=1,
        help="How many hosts may read an image from one compute host while they fill their own "
        "replicas. 1 builds chains: the least load per host, and the longest path.",
    ),
    cfg.IntOpt(
        "thunder_storage_fanout",
        default=2,
        min=1,
        help="How many hosts may read an image from all storage hosts together, while another "
        "replica has capacity. It limits the traffic that an image takes out of the storage "
        "hosts to that many times its allocated size.",
    ),
    cfg.FloatOpt(
        "thunder_heartbeat_interval",
        default=timelimits.HEARTBEAT_INTERVAL,
        min=0.5,
        help="Seconds between two heartbeats of this storage host. That of compute hosts is "
        "heartbeat_interval in their thunder.conf.",
    ),
    cfg.FloatOpt(
        "thunder_heartbeat_timeout",
        default=timelimits.HEARTBEAT_TIMEOUT,
        min=1.0,
        help="Seconds without a heartbeat after which a host is dead: hosts that read from it are "
        "given another source. After half of that it is suspect, and no further host is sent to "
        "it. Use about four times the longest heartbeat interval, and the same value on every "
        "storage host.",
    ),
    cfg.IntOpt(
        "thunder_min_replicas",
        default=1,
        min=1,
        help="Minimum number of storage hosts that hold each image. Missing replicas are copied in "
        "the background, between storage hosts, to those in other zones and racks first, then to "
        "those with more free space. Use the same value on every storage host.",
    ),
    cfg.FloatOpt(
        "thunder_replica_grace",
        default=600.0,
        min=1.0,
        help="Seconds without a heartbeat after which the images of a storage host no longer count "
        "towards thunder_min_replicas. The restart of a host should not start copies of all of "
        "them.",
    ),
    cfg.FloatOpt(
        "thunder_clean_interval",
        default=300.0,
        min=1.0,
        help="Seconds between two checks whether the images that this storage host holds still "
        "exist in Glance. Glance is asked as the user of [service_user] or [keystone_authtoken], "
        "which needs the role admin for it. Replicas of a deleted image are removed once no "
        "volume uses them. Volumes of masters that are not recorded any longer are removed as "
        "often.",
    ),
    cfg.FloatOpt(
        "thunder_creating_timeout",
        default=timelimits.CREATING_TIMEOUT,
        min=1.0,
        help="Seconds within which a host that was given a plan must begin its replica. After that "
        "it is no longer chosen as a source until it reports one.",
    ),
    cfg.BoolOpt(
        "thunder_profiles",
        default=True,
        help="Record in which order boots read an image, and have hosts fill it in that order. A "
        "few boots of each image are recorded, for two minutes at most, with counters of the "
        "kernel; once they agree, one of twenty is. False: images are filled from their start to "
        "their end. Use the same value on every storage host.",
    ),
    cfg.BoolOpt(
        "thunder_hash_trees",
        default=True,
        help="Give new masters a hash tree (dm-verity), with which the kernels of compute hosts "
        "check what they read of an image through other hosts before their own replica has it. It "
        "takes a 128th of the image's size, holes included, on each storage host and in each "
        "replica, and the image is hashed once more when a master is made. Images of more than "
        "64 GiB, and those whose size is no multiple of 256 KiB, have none. An image whose first "
        "master was made without one gets none later. Use the same value on every storage host.",
    ),
]

database_opts = [
    cfg.StrOpt(
        "connection",
        default="",
        secret=True,
        help="URL of the database with Thunder's tables. Empty: Cinder's own ([database] "
        "connection); all names of ours begin with thunder_.",
    ),
]

DATABASE_GROUP = "thunder_database"
#: The section of cinder.conf that is for all backends.
BACKEND_DEFAULTS = "backend_defaults"


def register_database(conf: cfg.ConfigOpts) -> None:
    conf.register_opts(database_opts, group=DATABASE_GROUP)


def connection(conf: cfg.ConfigOpts) -> str:
    """URL of the database with our tables.

    :raises ValueError: none is configured
    """
    url = conf[DATABASE_GROUP].connection or conf.database.connection
    if not url:
        raise ValueError(
            f"no database: set connection in [{DATABASE_GROUP}], or in [database], of cinder.conf"
        )
    return str(url)


def heartbeat_timeout(conf: cfg.ConfigOpts) -> float:
    """Seconds of silence after which a host is dead, for those who are no backend themselves.

    As for a backend, its own section comes before ``[backend_defaults]``. The option has to be the
    same on every storage host; the first backend that sets it decides.
    """
    name = "thunder_heartbeat_timeout"
    conf.register_opt(cfg.ListOpt("enabled_backends", default=[]))
    conf.register_opt(_option(name), group=BACKEND_DEFAULTS)
    for backend in conf.enabled_backends:
        own = _option(name)
        own.default = None  # as Cinder does it: None means that the section does not set it
        conf.register_opt(own, group=backend)
        if conf[backend][name] is not None:
            return float(conf[backend][name])
    return float(conf[BACKEND_DEFAULTS][name])


def _option(name: str) -> cfg.Opt:
    """A copy of one of a backend's options."""
    return copy.copy(next(option for option in backend_opts if option.name == name))


def list_opts() -> list[tuple[str, list[Any]]]:
    """For oslo-config-generator."""
    return [(BACKEND_DEFAULTS, backend_opts), (DATABASE_GROUP, database_opts)]
