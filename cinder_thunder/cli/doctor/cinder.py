"""The contents of cinder.conf, and the cloud that it describes, for the doctor's checks."""

from __future__ import annotations

import socket
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Protocol

import sqlalchemy as sa
from oslo_config import cfg

from cinder_thunder import conf
from cinder_thunder.cli import cloud
from cinder_thunder.cli.doctor import checks
from cinder_thunder.db import migration
from cinder_thunder.db.values import KnownHost
from cinder_thunder.mechanism.thinpool import StoragePool
from os_brick_thunder.common.policy.dmstatus import PoolStatus
from os_brick_thunder.common.run import run

DRIVER = "cinder_thunder.driver.ThunderDriver"
#: The options of a backend that matter here, with the defaults of Cinder.
_BACKEND = (
    cfg.StrOpt("volume_driver", default="cinder.volume.drivers.lvm.LVMVolumeDriver"),
    cfg.StrOpt("volume_group", default="cinder-volumes"),
    cfg.StrOpt("lvm_type", default="auto"),
    cfg.StrOpt("target_helper", default="tgtadm"),
    cfg.StrOpt("target_ip_address", default=""),
)


@dataclass(frozen=True)
class Backend:
    """A Thunder backend in cinder.conf.

    :ivar server: its name in RPC, host@name
    :ivar target_ip_address: empty if it is not set; Cinder then uses its my_ip
    """

    name: str
    server: str
    volume_group: str
    lvm_type: str
    target_helper: str
    target_ip_address: str


class Configured(Protocol):
    """The contents of cinder.conf, and the revision of the tables in its database."""

    def backends(self) -> list[Backend]: ...
    def revision(self) -> tuple[str | None, str | None]: ...


class Cloud(Configured, Protocol):
    """What checks ask about the cloud."""

    def hosts(self) -> list[KnownHost]: ...
    def database_clock(self) -> float | None: ...
    def tracker_clock(self, server: str | None) -> float: ...
    def volume_groups(self) -> list[str]: ...
    def pool(self, group: str) -> PoolStatus: ...
    def zeroes_blocks(self, group: str) -> bool: ...


class CinderConf:
    """A parsed cinder.conf."""

    def __init__(self, config: cfg.ConfigOpts) -> None:
        """:param config: has the options of :func:`cinder_thunder.cli.cloud.register`"""
        self._config = config

    def backends(self) -> list[Backend]:
        """The enabled backends with our driver."""
        config = self._config
        config.register_opts([cfg.StrOpt("host"), cfg.ListOpt("enabled_backends", default=[])])
        config.register_opt(cfg.StrOpt("my_ip", default=""))  # other options refer to it
        defaults = [cfg.StrOpt(option.name) for option in _BACKEND]
        config.register_opts(_BACKEND, group=conf.BACKEND_DEFAULTS)
        found = []
        for name in config.enabled_backends:
            config.register_opts(defaults, group=name)
            values = {
                option.name: config[name][option.name] or config[conf.BACKEND_DEFAULTS][option.name]
                for option in _BACKEND
            }
            if values.pop("volume_driver") == DRIVER:
                config.register_opts([cfg.StrOpt("backend_host")], group=name)
                host = config[name].backend_host or config.host or socket.gethostname()
                found.append(Backend(name, f"{host}@{name}", **values))
        return found

    def engine(self) -> sa.Engine:
        return sa.create_engine(conf.connection(self._config))

    def revision(self) -> tuple[str | None, str | None]:
        return migration.version(self.engine()), migration.head()


class ThisCloud(CinderConf):
    """The cloud that a cinder.conf describes."""

    def __init__(self, config_file: str) -> None:
        """:raises oslo_config.cfg.Error: it cannot be read"""
        super().__init__(cloud.configuration(config_file))
        self._file = config_file

    def hosts(self) -> list[KnownHost]:
        return cloud.database(self._file).hosts.all()

    def database_clock(self) -> float | None:
        engine = self.engine()
        if engine.dialect.name not in ("mysql", "mariadb"):
            return None
        with engine.connect() as connection:
            now: datetime = connection.execute(sa.text("SELECT UTC_TIMESTAMP(6)")).scalar_one()
        return now.replace(tzinfo=UTC).timestamp()

    def tracker_clock(self, server: str | None) -> float:
        return cloud.hosts_rpc(self._file, checks.TIMEOUT).clock(server)

    def volume_groups(self) -> list[str]:
        return run("vgs", "--noheadings", "--options", "vg_name").split()

    def pool(self, group: str) -> PoolStatus:
        return StoragePool(group, f"{group}-pool", run).status()

    def zeroes_blocks(self, group: str) -> bool:
        return StoragePool(group, f"{group}-pool", run).zeroes_blocks()
