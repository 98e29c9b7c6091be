"""Is all there that Thunder needs on this host? What is not, with its remedy; nothing is changed.

A check is a function that says what it found, or raises :class:`Fault`. What it looks at is asked
of a :class:`Surroundings`, for which the unit tests have a fake.
"""

from __future__ import annotations

import logging
import os
import shutil
import socket
import stat
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from oslo_config import cfg

from os_brick_thunder.client import AgentClient
from os_brick_thunder.common import conf as options
from os_brick_thunder.common import errors, rpc
from os_brick_thunder.common.mechanism import blockdev
from os_brick_thunder.common.mechanism.dmsetup import DmSetup
from os_brick_thunder.common.policy import devnames, dmstatus
from os_brick_thunder.common.policy.devnames import POOL_LV
from os_brick_thunder.common.policy.dmtable import SECTOR, ThinPool
from os_brick_thunder.common.run import run
from os_brick_thunder.common.transport import iscsi

LOG = logging.getLogger(__name__)

OK, WARN, FAIL, SKIP = "ok", "warn", "FAIL", "skip"
MIB = 1 << 20
#: Seconds that the agent, and an answer by RPC, may take.
PATIENCE = 5.0
#: Seconds by which clocks may differ: a quarter of the silence after which a host is dead.
SKEW = 5.0
#: Per cent of the pool's metadata above which it is to be enlarged.
METADATA_FULL = 90


@dataclass(frozen=True)
class Check:
    """One line of the report; ``found`` says what there is, ``remedy`` what to do about it."""

    name: str
    result: str
    found: str
    remedy: str = ""


class Fault(Exception):
    """Something is not as it must be."""

    def __init__(self, found: str, remedy: str) -> None:
        self.found = found
        self.remedy = remedy
        super().__init__(found)


class Doubt(Fault):
    """Something may be as it must be, or not: an operator should have a look."""


class NotHere(Exception):
    """There is nothing to check; says why."""


def examine(checks: Mapping[str, Callable[[], str]]) -> list[Check]:
    """Run checks, each whatever the others found."""
    report = []
    for name, check in checks.items():
        try:
            report.append(Check(name, OK, check()))
        except NotHere as reason:
            report.append(Check(name, SKIP, _line(reason)))
        except Fault as fault:
            result = WARN if isinstance(fault, Doubt) else FAIL
            report.append(Check(name, result, " ".join(fault.found.split()), fault.remedy))
        except Exception as error:  # a check that cannot be made is no check that was passed
            LOG.debug("Could not check %s", name, exc_info=True)
            found = f"could not be checked: {type(error).__name__}: {_line(error)}"
            report.append(Check(name, FAIL, found, "run it with --verbose and see"))
    return report


def _line(error: Exception) -> str:
    return " ".join(str(error).split())


def skipped(names: Iterable[str], reason: str) -> list[Check]:
    """All of these, as not to be checked here."""
    return [Check(name, SKIP, reason) for name in names]


#: Debian's package of each tool that we call on a compute host.
COMPUTE_TOOLS = {
    "dmsetup": "dmsetup",
    "losetup": "mount",
    "blkid": "util-linux",
    "iscsiadm": "open-iscsi",
    "cache_restore": "thin-provisioning-tools",
    "thin_dump": "thin-provisioning-tools",
}
GROUP_TOOLS = {"vgs": "lvm2", "lvcreate": "lvm2"}

#: What is in each kernel module that we need: by what it is for.
MAPPER_MODULES = {
    "dm_mod": "device-mapper",
    "dm_thin_pool": "targets thin-pool and thin",
    "dm_cache": "target cache",
    "dm_cache_smq": "its policy cleaner",
    "dm_multipath": "target multipath",
    "dm_round_robin": "its path selector",
    "loop": "loop devices",
}
TARGET_MODULES = {
    "target_core_mod": "LIO",
    "target_core_iblock": "its block devices",
    "iscsi_target_mod": "its iSCSI target",
}
INITIATOR_MODULES = {"iscsi_tcp": "the iSCSI initiator"}


class Surroundings(Protocol):
    """What checks look at."""

    def is_root(self) -> bool: ...
    def has_tool(self, name: str) -> bool: ...
    def has_module(self, name: str) -> bool: ...
    def has_configfs(self) -> bool: ...
    def has_iscsid(self) -> bool: ...
    def has_address(self, address: str) -> bool: ...
    def initiator_name(self) -> str: ...
    def device_size(self, device: str) -> int: ...
    def pool(self) -> dmstatus.PoolStatus | None: ...
    def suspended(self) -> list[str]: ...
    def socket_mode(self, path: str) -> int | None: ...
    def agent(self, path: str) -> Mapping[str, Any]: ...
    def tracker_clock(self) -> float: ...
    def clock(self) -> float: ...


class ThisHost:
    """The host that we run on."""

    def __init__(self, config_file: str) -> None:
        """:param config_file: says where RabbitMQ is (``transport_url``)"""
        self._config_file = config_file
        self._dm = DmSetup()

    def is_root(self) -> bool:
        return os.geteuid() == 0

    def has_tool(self, name: str) -> bool:
        # As the daemons' PATH has it, whatever that of who asks is.
        return shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin") is not None

    def has_module(self, name: str) -> bool:
        """It is loaded, built in, or there to be loaded."""
        if Path("/sys/module", name).exists():
            return True
        try:
            run("modprobe", "--dry-run", "--quiet", name)
        except errors.ProcessError:
            return False
        return True

    def has_configfs(self) -> bool:
        mounts = Path("/proc/mounts").read_text().splitlines()
        return any(line.split()[1:3] == ["/sys/kernel/config", "configfs"] for line in mounts)

    def has_iscsid(self) -> bool:
        """Somebody (iscsid, or systemd for it) listens where iscsiadm asks for a login."""
        return "@ISCSIADM_ABSTRACT_NAMESPACE" in Path("/proc/net/unix").read_text()

    def has_address(self, address: str) -> bool:
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            try:
                probe.bind((address.strip("[]"), 0))
            except OSError:
                return False
        return True

    def initiator_name(self) -> str:
        return iscsi.initiator_name()

    def device_size(self, device: str) -> int:
        return blockdev.size(device)

    def pool(self) -> dmstatus.PoolStatus | None:
        table = self._dm.table(devnames.POOL)
        if table is None:
            return None
        target = table.segments[0].target
        block = target.block * SECTOR if isinstance(target, ThinPool) else 0
        return dmstatus.pool(self._dm.status(devnames.POOL), block)

    def suspended(self) -> list[str]:
        return [device.name for device in self._dm.devices() if device.suspended]

    def socket_mode(self, path: str) -> int | None:
        try:
            return stat.S_IMODE(os.stat(path).st_mode)
        except FileNotFoundError:
            return None

    def agent(self, path: str) -> Mapping[str, Any]:
        return AgentClient(path, PATIENCE).status()

    def tracker_clock(self) -> float:
        # The global options: oslo.messaging registers some of its own nowhere else.
        cfg.CONF(["--config-file", self._config_file], project="thunder")
        return rpc.RpcTracker(rpc.transport(cfg.CONF), PATIENCE).clock()

    def clock(self) -> float:
        return time.time()


class ComputeHost:
    """The checks of a host with an agent.

    :param mine: the options of group ``thunder``
    """

    def __init__(self, mine: Any, host: Surroundings) -> None:
        self._mine = mine
        self._host = host

    def checks(self) -> dict[str, Callable[[], str]]:
        """By name, in the order in which one needs the other."""
        return {
            "rights": lambda: check_rights(self._host),
            "options": self.options,
            "tools": self.tools,
            "device-mapper": lambda: check_modules(self._host, MAPPER_MODULES),
            "iSCSI target": lambda: check_target(self._host),
            "iSCSI initiator": self.initiator,
            "address": self.address,
            "local pool": self.pool,
            "devices": self.devices,
            "agent": self.agent,
            "RPC": self.rpc,
            "clock": self.clock,
        }

    def options(self) -> str:
        if not self._mine.address:
            raise Fault(
                "option address of [thunder] is not set",
                "give the address at which other hosts reach this one",
            )
        if bool(self._mine.pool_device) == bool(self._mine.pool_volume_group):
            raise Fault(
                "one of pool_device and pool_volume_group is to be set in [thunder], not "
                + ("both" if self._mine.pool_device else "none"),
                "give the local pool a disk, a partition or a volume group of its own",
            )
        return (
            f"host {self._mine.host}, rack {self._mine.rack or '-'}, zone {self._mine.zone or '-'}"
        )

    def tools(self) -> str:
        group = GROUP_TOOLS if self._mine.pool_volume_group else {}
        return check_tools(self._host, COMPUTE_TOOLS | group)

    def initiator(self) -> str:
        check_modules(self._host, INITIATOR_MODULES)
        self._for_root()  # the file of the name is root's: who cannot read it knows nothing
        try:
            name = self._host.initiator_name()
        except errors.LoginError as error:
            raise Fault(
                str(error), "echo InitiatorName=$(iscsi-iname) > /etc/iscsi/initiatorname.iscsi"
            ) from error
        if not self._host.has_iscsid():
            raise Fault("iscsid does not run", "systemctl enable --now iscsid")
        return name

    def address(self) -> str:
        address = self._mine.address
        if not address:
            raise NotHere("no address is set, see options")
        if not self._host.has_address(address):
            raise Fault(
                f"{address} is not an address of this host: nobody could read its replicas",
                "correct address in [thunder], or bring the interface up",
            )
        return str(address)

    def pool(self) -> str:
        self._for_root()
        device = self._mine.pool_device or f"/dev/{self._mine.pool_volume_group}/{POOL_LV}"
        pool = self._host.pool()
        try:
            self._host.device_size(device)
        except errors.DeviceNotFound as error:
            if pool or self._mine.pool_device:
                raise Fault(
                    str(error),
                    "see whether the disk is there (lsblk, dmesg); correct pool_device if it has "
                    "another name; volumes go on without their caches meanwhile",
                ) from error
        if pool is None:
            raise Fault(
                f"device {devnames.POOL} is not there", "start thunder-agent: it assembles the pool"
            )
        if not pool.total:
            raise Fault(
                "the pool has failed",
                "see dmesg; volumes go on without their caches; detach them, then wipefs --all "
                f"{device} and restart thunder-agent for an empty pool",
            )
        if not pool.healthy:
            raise Fault(
                "the pool takes no writes" + (", it is full" if pool.full else " (needs a check)"),
                "see dmesg; evict images here that nothing uses (thunder image evict)"
                if pool.full
                else "see dmesg; detach this host's volumes, stop thunder-agent, take the pool's "
                "devices down (dmsetup remove) and run thin_check on its metadata",
            )
        metadata = 100 * pool.metadata_used // max(pool.metadata_total, 1)
        share = 100 * pool.used // pool.total
        if metadata >= METADATA_FULL:
            raise Fault(
                f"{metadata} % of the pool's metadata is in use",
                "give the pool larger blocks (pool_block_kib), which wants a new one",
            )
        if share >= self._mine.pool_high_percent:
            raise Fault(
                f"{share} % of the pool is in use, pool_high_percent is "
                f"{self._mine.pool_high_percent}: new volumes get no cache",
                "detach volumes, evict images, or enlarge the pool",
            )
        return f"{share} % of {pool.total // MIB} MiB in use, {metadata} % of its metadata"

    def devices(self) -> str:
        """What an agent that died in the wrong moment leaves behind: I/O to it hangs."""
        self._for_root()
        suspended = self._host.suspended()
        if suspended:
            raise Fault(
                f"{', '.join(suspended)}: suspended, what is read or written there waits",
                "start thunder-agent again: it resumes them",
            )
        return "none is suspended"

    def agent(self) -> str:
        path = self._mine.socket
        try:
            mode = self._host.socket_mode(path)
        except PermissionError:
            self._for_root()
            raise
        self._for_root()
        if mode is None:
            raise Fault(
                f"thunder-agent does not run: there is no {path}",
                "systemctl start thunder-agent; journalctl -u thunder-agent says why it ended",
            )
        if mode & 0o077:
            raise Fault(
                f"{path} has mode {mode:o}: others than root could have devices built",
                f"chmod 600 {path}",
            )
        try:
            says = self._host.agent(path)
        except errors.AgentError as error:
            raise Fault(
                str(error), "systemctl restart thunder-agent; journalctl -u thunder-agent"
            ) from error
        bases, stacks = says.get("bases", []), says.get("stacks", [])
        failed = [entry["volume_id"] for entry in stacks if entry.get("failed")]
        if failed:
            raise Fault(
                f"volumes with a path that has failed: {', '.join(failed)}",
                "thunder stack list; one that left its cache gets a new one when it is attached "
                "again, one whose LUN is away waits for its storage host",
            )
        return f"answers; {len(bases)} base(s), {len(stacks)} stack(s)"

    def rpc(self) -> str:
        self._skew()
        return "a tracker answers"

    def clock(self) -> str:
        try:
            skew = self._skew()
        except Fault as fault:
            raise NotHere("no tracker answers, see RPC") from fault
        return check_skew(skew, "the tracker's")

    def _skew(self) -> float:
        before = self._host.clock()
        try:
            there = self._host.tracker_clock()
        except errors.ThunderError as error:
            raise Fault(
                str(error),
                "compare transport_url in [DEFAULT] with Cinder's; see that RabbitMQ and "
                "cinder-volume run and that this host reaches them",
            ) from error
        after = self._host.clock()
        return difference(there, before, after)

    def _for_root(self) -> None:
        if not self._host.is_root():
            raise NotHere("for root alone, see rights")


def difference(there: float, before: float, after: float) -> float:
    """How far a clock that was read between two looks at ours is off; 0 if it may be right."""
    if there > after:
        return there - after
    return min(0.0, there - before)


def check_skew(skew: float, whose: str) -> str:
    """:raises Fault: our clock and another differ too much"""
    if abs(skew) > SKEW:
        way = "behind" if skew > 0 else "ahead of"
        raise Fault(
            f"this host's clock is {abs(skew):.1f} s {way} {whose}",
            "synchronise the clocks of all hosts (chrony): who seems silent is taken for dead",
        )
    return f"within {SKEW:g} s of {whose}"


def check_rights(host: Surroundings) -> str:
    if not host.is_root():
        raise Fault("not root: devices and the agent's socket are out of reach", "run it as root")
    return "root"


def check_tools(host: Surroundings, tools: Mapping[str, str]) -> str:
    """:param tools: each with the Debian package that has it"""
    missing = [name for name in tools if not host.has_tool(name)]
    if missing:
        packages = " ".join(sorted({tools[name] for name in missing}))
        raise Fault(f"not installed: {', '.join(missing)}", f"apt install {packages}")
    return f"all {len(tools)} are installed"


def check_modules(host: Surroundings, modules: Mapping[str, str]) -> str:
    """:param modules: each with what it is for"""
    missing = {name: what for name, what in modules.items() if not host.has_module(name)}
    if missing:
        said = ", ".join(f"{name} ({what})" for name, what in missing.items())
        raise Fault(
            f"the kernel has no {said}",
            f"modprobe -a {' '.join(missing)}; where there are none, install the full kernel "
            "package (linux-image-amd64; Ubuntu: linux-modules-extra)",
        )
    return ", ".join(modules)


def check_target(host: Surroundings) -> str:
    found = check_modules(host, TARGET_MODULES)
    if not host.has_configfs():
        raise Fault(
            "configfs is not mounted: LIO cannot be set up",
            "mount -t configfs configfs /sys/kernel/config",
        )
    return found


def compute_report(config_file: str, host: Surroundings | None = None) -> list[Check]:
    """All checks of a compute host, by the agent's configuration."""
    host = host or ThisHost(config_file)
    config = cfg.ConfigOpts()
    options.register(config, agent=True)
    try:
        config(["--config-file", config_file], project="thunder")
        for option in options.AGENT_OPTS:
            config.thunder[option.name]  # a value is parsed when it is asked for
    except (cfg.Error, ValueError) as error:
        rest = [name for name in ComputeHost(None, host).checks() if name != "options"]
        fault = Check("options", FAIL, _line(error), f"correct {config_file}")
        return [fault, *skipped(rest, "the options cannot be read")]
    return examine(ComputeHost(config.thunder, host).checks())
