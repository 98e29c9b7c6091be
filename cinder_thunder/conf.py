"""Options of cinder-volume's side. Each is registered by a function, none on import."""

from __future__ import annotations

from typing import Any

from oslo_config import cfg

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
        "replicas. 1 makes chains: the least load and the longest way.",
    ),
    cfg.IntOpt(
        "thunder_storage_fanout",
        default=2,
        min=1,
        help="How many hosts may read an image from all storage hosts together, while another "
        "replica has room. It bounds the traffic that an image takes out of the storage "
        "hosts to that many times its allocated size.",
    ),
    cfg.FloatOpt(
        "thunder_heartbeat_interval",
        default=5.0,
        min=0.5,
        help="Seconds between two heartbeats of this storage host. That of compute hosts is "
        "heartbeat_interval in their thunder.conf.",
    ),
    cfg.FloatOpt(
        "thunder_heartbeat_timeout",
        default=20.0,
        min=1.0,
        help="Seconds of silence after which a host is dead: those that read from it are given "
        "another source. After half of them it is suspect, and nobody new is sent there. Four "
        "times the longest heartbeat interval is sensible; the same on every storage host.",
    ),
    cfg.IntOpt(
        "thunder_min_replicas",
        default=1,
        min=1,
        help="How many storage hosts should hold each image at least. What is missing is copied in "
        "the background, between storage hosts, to those in other zones and racks first, then to "
        "those with more free space. Set it alike on every storage host.",
    ),
    cfg.FloatOpt(
        "thunder_replica_grace",
        default=600.0,
        min=1.0,
        help="Seconds of silence after which the images of a storage host do not count towards "
        "thunder_min_replicas: a host that restarts should not have all of them copied.",
    ),
    cfg.FloatOpt(
        "thunder_clean_interval",
        default=300.0,
        min=1.0,
        help="Seconds between two looks whether Glance still has the images that this storage host "
        "holds. It is asked as the user of [service_user] or [keystone_authtoken], who needs the "
        "role admin for it. Replicas of an image that was deleted go when no volume is made of it.",
    ),
    cfg.FloatOpt(
        "thunder_creating_timeout",
        default=120.0,
        min=1.0,
        help="Seconds within which a host that was given a plan must have begun its replica to be "
        "chosen as a source.",
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
    """Seconds of silence after which a host is dead, as the first backend that says so has it."""
    conf.register_opt(cfg.ListOpt("enabled_backends", default=[]))
    option = next(opt for opt in backend_opts if opt.name == "thunder_heartbeat_timeout")
    for backend in conf.enabled_backends:
        conf.register_opt(option, group=backend)
        if conf[backend].thunder_heartbeat_timeout != option.default:
            return float(conf[backend].thunder_heartbeat_timeout)
    return float(option.default)


def list_opts() -> list[tuple[str, list[Any]]]:
    """For oslo-config-generator."""
    return [("backend_defaults", backend_opts), (DATABASE_GROUP, database_opts)]
