"""The checks of a host with cinder.conf: its database, the cloud's hosts, and its Thunder backends.

Nothing is changed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial

import sqlalchemy as sa
from oslo_db import exception as db_exc

from cinder_thunder import conf
from cinder_thunder.cli.doctor.checks import (
    Check,
    Fault,
    HostProbe,
    NotApplicable,
    Warn,
    check_modules,
    check_rights,
    check_skew,
    check_target,
    check_thin_tools,
    check_tools,
    difference,
    examine,
)
from cinder_thunder.cli.doctor.cinder import DRIVER, Backend, Cloud, Configured, ThisCloud
from cinder_thunder.cli.doctor.host import ThisHost
from cinder_thunder.db.values import KnownHost
from cinder_thunder.mechanism.thinpool import NOT_ZEROED
from cinder_thunder.policy import ranking
from os_brick_thunder.common import errors
from os_brick_thunder.common.policy.dmstatus import PoolStatus

NO_BACKEND = f"not a storage host: no backend in enabled_backends has {DRIVER}"
#: The tools that cinder-volume calls for us, each with its Debian package.
_THIN_TOOLS = ("thin_delta", "thin_dump", "thin_restore")
TOOLS = {
    "lvs": "lvm2",
    "lvcreate": "lvm2",
    "dmsetup": "dmsetup",
    "qemu-img": "qemu-utils",
} | dict.fromkeys(_THIN_TOOLS, "thin-provisioning-tools")
_MAPPER = {"dm_thin_pool": "targets thin-pool and thin"}
#: Per cent of a storage host's thin pool, or of its metadata, from which on it is a fault.
_POOL_FULL = 95


class CinderHost:
    """The checks of a host with cinder.conf; without backends, a storage host's are skipped."""

    def __init__(self, found: Cloud, host: HostProbe) -> None:
        self._cloud = found
        self._host = host
        self._backends = found.backends()

    def checks(self) -> dict[str, Callable[[], str]]:
        """By name; a check comes after those that it depends on."""
        checks: dict[str, Callable[[], str]] = {
            "database": self.database,
            "tables": self.tables,
            "database's clock": self.clock,
            "hosts": self.hosts,
            "trackers": lambda: self.tracker(None),
        }
        on_storage: dict[str, Callable[[], str]] = {
            "storage: rights": lambda: check_rights(self._host),
            "storage: tools": lambda: check_tools(self._host, TOOLS),
            "storage: thin_delta": self.thin_tools,
            "storage: device-mapper": lambda: check_modules(self._host, _MAPPER),
            "storage: iSCSI target": lambda: check_target(self._host),
        }
        if not self._backends:
            return checks | dict.fromkeys([*on_storage, "backends"], _no_backend)
        checks |= on_storage
        for backend in self._backends:
            checks |= {
                f"{backend.name}: options": partial(check_options, backend),
                f"{backend.name}: thin pool": partial(self.pool, backend),
                f"{backend.name}: RPC": partial(self.tracker, backend.server),
            }
        return checks

    def database(self) -> str:
        revisions(self._cloud)
        return "answers"

    def tables(self) -> str:
        return check_tables(*self._revisions())

    def _revisions(self) -> tuple[str | None, str | None]:
        try:
            return revisions(self._cloud)
        except Fault as fault:
            raise NotApplicable("the database does not answer") from fault

    def clock(self) -> str:
        self._revisions()
        before = self._host.clock()
        there = self._cloud.database_clock()
        after = self._host.clock()
        if there is None:
            raise NotApplicable("this database has no clock of its own")
        return check_skew(difference(there, before, after), "the database's")

    def hosts(self) -> str:
        found, wanted = self._revisions()
        if found != wanted:
            raise NotApplicable("the tables are not up to date")
        hosts = self._cloud.hosts()
        check_identities(hosts)
        late = [host for host in hosts if host.state != ranking.ALIVE and not host.drained]
        if late:
            message = ", ".join(f"{h.host} {h.state}, silent for {h.silent:.0f} s" for h in late)
            raise Fault(
                message,
                "start thunder-agent (compute) or cinder-volume (storage) there; thunder host "
                "drain HOST for a host that is to stay off",
            )
        if not any(host.kind == "storage" for host in hosts):
            raise Fault("no storage host has ever sent a heartbeat", "start cinder-volume")
        return f"all {len(hosts)} are alive, or drained"

    def tracker(self, server: str | None) -> str:
        before = self._host.clock()
        try:
            there = self._cloud.tracker_clock(server)
        except errors.ThunderError as error:
            raise Fault(
                str(error),
                "check transport_url in [DEFAULT] of cinder.conf, and that RabbitMQ and "
                f"cinder-volume{f' of {server}' if server else ''} are running",
            ) from error
        skew = difference(there, before, self._host.clock())
        return "answers; this host's clock is " + check_skew(skew, "the tracker's")

    def thin_tools(self) -> str:
        missing = [tool for tool in _THIN_TOOLS if not self._host.has_tool(tool)]
        if missing:
            raise NotApplicable(f"{', '.join(missing)} not installed, see tools")
        return check_thin_tools(self._host.thin_tools_flaw())

    def pool(self, backend: Backend) -> str:
        if not self._host.is_root():
            raise NotApplicable("requires root, see rights")
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
                f"start cinder-volume, which creates it; or vgchange --activate y {group}",
            ) from error
        found = check_thin_pool(pool, f"{group}/{group}-pool")
        if not self._cloud.zeroes_blocks(group):
            raise Warn(
                f"{group}/{group}-pool: {NOT_ZEROED}",
                f"lvchange --zero y {group}/{group}-pool, unless nobody else has deleted volumes",
            )
        return found


def _no_backend() -> str:
    raise NotApplicable(NO_BACKEND)


def check_identities(hosts: Iterable[KnownHost]) -> None:
    """:raises Fault: two hosts have one name or one initiator name: volumes are direct on one"""
    rivals = [f"{host.rival} is refused beside {host.host}" for host in hosts if host.rival]
    if rivals:
        raise Fault(
            f"{'; '.join(rivals)}: they use one name, or one initiator name",
            "set host in [thunder] of thunder.conf, or give each host an initiator name of its own "
            "(echo InitiatorName=$(iscsi-iname) > /etc/iscsi/initiatorname.iscsi), and restart "
            "iscsid, thunder-agent and nova-compute there",
        )


def check_thin_pool(pool: PoolStatus, name: str) -> str:
    """:param name: group/pool
    :raises Fault: it takes no writes, or is nearly full
    """
    if not pool.healthy:
        raise Fault(
            f"thin pool {name} takes no writes",
            "see dmesg and lvmthin(7); "
            + ("lvextend it, it is full" if pool.full else "lvconvert --repair"),
        )
    data = 100 * pool.used // max(pool.total, 1)
    metadata = 100 * pool.metadata_used // max(pool.metadata_total, 1)
    if max(data, metadata) >= _POOL_FULL:
        raise Fault(
            f"{data} % of {name} is in use, {metadata} % of its metadata",
            "lvextend it (--poolmetadatasize for its metadata), delete volumes or evict images",
        )
    return f"{data} % in use, {metadata} % of its metadata"


def revisions(found: Configured) -> tuple[str | None, str | None]:
    """The revision of the tables, and the one that this code needs.

    :raises Fault: the database does not answer
    """
    try:
        return found.revision()
    except (sa.exc.SQLAlchemyError, db_exc.DBError, ValueError) as error:
        message = str(getattr(error, "orig", None) or error)
        raise Fault(
            f"does not answer: {message}",
            "check that it is running, and connection in [database] of cinder.conf (or in "
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
    """:raises Fault: the driver would refuse to start
    :raises Warn: it would start, with a default that may be wrong
    """
    if backend.target_helper != "lioadm":
        raise Fault(
            f"target_helper is {backend.target_helper}", f"set it to lioadm in [{backend.name}]"
        )
    if backend.lvm_type not in ("thin", "auto"):
        raise Fault(f"lvm_type is {backend.lvm_type}", f"set it to thin in [{backend.name}]")
    if not backend.target_ip_address:
        raise Warn(
            "target_ip_address is not set: hosts are sent to Cinder's my_ip",
            f"set it in [{backend.name}] to the address at which hosts reach volumes and masters",
        )
    return f"volume group {backend.volume_group}, {backend.lvm_type}, {backend.target_helper}"


def cinder_report(config_file: str) -> list[Check]:
    """Run all checks of a host with cinder.conf.

    :raises oslo_config.cfg.Error: it cannot be read
    """
    host = CinderHost(ThisCloud(config_file), ThisHost(config_file))
    return examine(host.checks())
