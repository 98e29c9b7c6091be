"""Is all there that Thunder needs on a host with cinder.conf? The checks of ``thunder doctor``."""

from __future__ import annotations

import socket
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Protocol

import sqlalchemy as sa
from oslo_config import cfg
from oslo_db import exception as db_exc

from cinder_thunder import conf
from cinder_thunder.cli import cloud
from cinder_thunder.cli.doctor import compute as doctor
from cinder_thunder.cli.doctor.compute import Check, Doubt, Fault, NotHere
from cinder_thunder.db import migration
from cinder_thunder.db.values import KnownHost
from cinder_thunder.mechanism.thinpool import ThinPool
from cinder_thunder.policy import ranking
from os_brick_thunder.common import errors
from os_brick_thunder.common.policy.dmstatus import PoolStatus
from os_brick_thunder.common.run import run

DRIVER = "cinder_thunder.driver.ThunderDriver"
NO_BACKEND = f"not a storage host: no backend in enabled_backends has {DRIVER}"
TOOLS = {
    "lvs": "lvm2",
    "lvcreate": "lvm2",
    "dmsetup": "dmsetup",
    "thin_dump": "thin-provisioning-tools",
    "thin_delta": "thin-provisioning-tools",
    "qemu-img": "qemu-utils",
}
_MAPPER = {"dm_thin_pool": "targets thin-pool and thin"}
#: Per cent of a storage host's thin pool above which an operator is told.
_POOL_FULL = 95
_BACKEND = (
    cfg.StrOpt("volume_driver", default="cinder.volume.drivers.lvm.LVMVolumeDriver"),
    cfg.StrOpt("volume_group", default="cinder-volumes"),
    cfg.StrOpt("lvm_type", default="auto"),
    cfg.StrOpt("target_helper", default="tgtadm"),
    cfg.StrOpt("target_ip_address", default=""),
)


@dataclass(frozen=True)
class Backend:
    """What cinder.conf says of a backend of ours."""

    name: str
    server: str  # of its RPC: host@name
    volume_group: str
    lvm_type: str
    target_helper: str
    target_ip_address: str  # empty: Cinder takes its my_ip


class Configured(Protocol):
    """What cinder.conf says, and the tables that it names."""

    def backends(self) -> list[Backend]: ...
    def revision(self) -> tuple[str | None, str | None]: ...


class Cloud(Configured, Protocol):
    """What checks look at, beside the host itself."""

    def hosts(self) -> list[KnownHost]: ...
    def database_clock(self) -> float | None: ...
    def tracker_clock(self, server: str | None) -> float: ...
    def volume_groups(self) -> list[str]: ...
    def pool(self, group: str) -> PoolStatus: ...


class CinderConf:
    """A cinder.conf that was read."""

    def __init__(self, config: cfg.ConfigOpts) -> None:
        """:param config: has the options of :func:`cinder_thunder.cli.cloud.register`"""
        self._config = config

    def backends(self) -> list[Backend]:
        config = self._config
        config.register_opts([cfg.StrOpt("host"), cfg.ListOpt("enabled_backends", default=[])])
        config.register_opt(cfg.StrOpt("my_ip", default=""))  # others refer to it
        defaults = [cfg.StrOpt(option.name) for option in _BACKEND]
        config.register_opts(_BACKEND, group="backend_defaults")
        found = []
        for name in config.enabled_backends:
            config.register_opts(defaults, group=name)
            values = {
                option.name: config[name][option.name] or config.backend_defaults[option.name]
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
    """The cloud that a cinder.conf is about."""

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
        return cloud.hosts_rpc(self._file, doctor.PATIENCE).clock(server)

    def volume_groups(self) -> list[str]:
        return run("vgs", "--noheadings", "--options", "vg_name").split()

    def pool(self, group: str) -> PoolStatus:
        return ThinPool(group, f"{group}-pool", run).status()


class CinderHost:
    """The checks of a host with cinder.conf; those of its backends where it has some."""

    def __init__(self, found: Cloud, host: doctor.Surroundings) -> None:
        self._cloud = found
        self._host = host
        self._backends = found.backends()

    def checks(self) -> dict[str, Callable[[], str]]:
        checks: dict[str, Callable[[], str]] = {
            "database": self.database,
            "tables": self.tables,
            "database's clock": self.clock,
            "hosts": self.hosts,
            "trackers": lambda: self.tracker(None),
            "storage: rights": lambda: doctor.check_rights(self._host),
            "storage: tools": lambda: doctor.check_tools(self._host, TOOLS),
            "storage: device-mapper": lambda: doctor.check_modules(self._host, _MAPPER),
            "storage: iSCSI target": lambda: doctor.check_target(self._host),
        }
        for name in [name for name in checks if name.startswith("storage: ")]:
            checks[name] = self._on_storage(checks[name])
        if not self._backends:
            checks["backends"] = self._none
        for backend in self._backends:
            checks |= {
                f"{backend.name}: options": lambda b=backend: check_options(b),  # type: ignore[misc]
                f"{backend.name}: thin pool": lambda b=backend: self.pool(b),  # type: ignore[misc]
                f"{backend.name}: RPC": lambda b=backend: self.tracker(b.server),  # type: ignore[misc]
            }
        return checks

    def _on_storage(self, check: Callable[[], str]) -> Callable[[], str]:
        return check if self._backends else self._none

    @staticmethod
    def _none() -> str:
        raise NotHere(NO_BACKEND)

    def database(self) -> str:
        revisions(self._cloud)
        return "answers"

    def tables(self) -> str:
        return check_tables(*self._revisions())

    def _revisions(self) -> tuple[str | None, str | None]:
        try:
            return revisions(self._cloud)
        except Fault as fault:
            raise NotHere("the database does not answer") from fault

    def clock(self) -> str:
        self._revisions()
        before = self._host.clock()
        there = self._cloud.database_clock()
        after = self._host.clock()
        if there is None:
            raise NotHere("this database has no clock of its own")
        return doctor.check_skew(doctor.difference(there, before, after), "the database's")

    def hosts(self) -> str:
        found, wanted = self._revisions()
        if found != wanted:
            raise NotHere("the tables are not up to date")
        hosts = self._cloud.hosts()
        late = [host for host in hosts if host.state != ranking.ALIVE and not host.drained]
        if late:
            said = ", ".join(f"{h.host} {h.state}, silent for {h.silent:.0f} s" for h in late)
            raise Fault(
                said,
                "start thunder-agent (compute) or cinder-volume (storage) there; thunder host "
                "drain HOST for one that is to stay off",
            )
        if not any(host.kind == "storage" for host in hosts):
            raise Fault("no storage host was ever heard of", "start cinder-volume")
        return f"all {len(hosts)} are alive, or drained"

    def tracker(self, server: str | None) -> str:
        before = self._host.clock()
        try:
            there = self._cloud.tracker_clock(server)
        except errors.ThunderError as error:
            raise Fault(
                str(error),
                "see transport_url in [DEFAULT] of cinder.conf, and that RabbitMQ and "
                f"cinder-volume{f' of {server}' if server else ''} run",
            ) from error
        skew = doctor.difference(there, before, self._host.clock())
        return "answers; this host's clock is " + doctor.check_skew(skew, "the tracker's")

    def pool(self, backend: Backend) -> str:
        if not self._host.is_root():
            raise NotHere("for root alone, see rights")
        group = backend.volume_group
        groups = self._cloud.volume_groups()
        if group not in groups:
            raise Fault(
                f"there is no volume group {group}; there are: {', '.join(groups) or 'none'}",
                f"vgcreate {group} DEVICE, or correct volume_group of [{backend.name}]",
            )
        try:
            pool = self._cloud.pool(group)
        except errors.ProcessError as error:
            raise Fault(
                f"volume group {group} has no active thin pool {group}-pool: {error.err}",
                f"start cinder-volume, which makes it; or vgchange --activate y {group}",
            ) from error
        if not pool.healthy:
            raise Fault(
                f"thin pool {group}/{group}-pool takes no writes",
                "see dmesg and lvmthin(7); "
                + ("lvextend it, it is full" if pool.full else "lvconvert --repair"),
            )
        data = 100 * pool.used // max(pool.total, 1)
        metadata = 100 * pool.metadata_used // max(pool.metadata_total, 1)
        if max(data, metadata) >= _POOL_FULL:
            raise Fault(
                f"{data} % of {group}/{group}-pool is in use, {metadata} % of its metadata",
                "lvextend it (--poolmetadatasize for its metadata), delete volumes or evict images",
            )
        return f"{data} % in use, {metadata} % of its metadata"


def revisions(found: Configured) -> tuple[str | None, str | None]:
    """What the tables are at, and what this code needs.

    :raises Fault: the database does not answer
    """
    try:
        return found.revision()
    except (sa.exc.SQLAlchemyError, db_exc.DBError, ValueError) as error:
        said = str(getattr(error, "orig", None) or error)
        raise Fault(
            f"does not answer: {said}",
            "see that it runs, and connection in [database] of cinder.conf (or in "
            f"[{conf.DATABASE_GROUP}])",
        ) from error


def check_tables(found: str | None, wanted: str | None) -> str:
    """:raises Fault: the tables are not those of this code"""
    if found != wanted:
        raise Fault(
            f"Thunder's tables are at revision {found}, this code needs {wanted}",
            "thunder db upgrade"
            if found is None
            else "thunder db upgrade, or install the same version everywhere",
        )
    return f"revision {found}"


def check_options(backend: Backend) -> str:
    """:raises Fault: the driver would refuse to start; a Doubt where it does start"""
    if backend.target_helper != "lioadm":
        raise Fault(
            f"target_helper is {backend.target_helper}", f"set it to lioadm in [{backend.name}]"
        )
    if backend.lvm_type not in ("thin", "auto"):
        raise Fault(f"lvm_type is {backend.lvm_type}", f"set it to thin in [{backend.name}]")
    if not backend.target_ip_address:
        raise Doubt(
            "target_ip_address is not set: hosts are sent to Cinder's my_ip",
            f"set it in [{backend.name}] to the address at which hosts reach volumes and masters",
        )
    return f"volume group {backend.volume_group}, {backend.lvm_type}, {backend.target_helper}"


def cinder_report(config_file: str) -> list[Check]:
    """All checks of a host with cinder.conf.

    :raises oslo_config.cfg.Error: it cannot be read
    """
    host = CinderHost(ThisCloud(config_file), doctor.ThisHost(config_file))
    return doctor.examine(host.checks())
