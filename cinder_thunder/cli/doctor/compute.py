"""The checks of a compute host: what Thunder needs there, and a remedy for whatever is missing.

Nothing is changed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from oslo_config import cfg

from cinder_thunder.cli.doctor.checks import (
    FAIL,
    Check,
    Fault,
    HostProbe,
    NotApplicable,
    Warn,
    check_modules,
    check_rights,
    check_skew,
    check_target,
    check_tools,
    difference,
    examine,
    one_line,
    skipped,
)
from cinder_thunder.cli.doctor.host import ThisHost
from os_brick_thunder.common import conf as options
from os_brick_thunder.common import errors
from os_brick_thunder.common.policy import devnames
from os_brick_thunder.common.policy.devnames import POOL_LV
from os_brick_thunder.common.policy.dmstatus import PoolStatus

MIB = 1 << 20
#: Per cent of the pool's metadata from which on the pool is to be remade with larger blocks.
METADATA_FULL = 90
#: The tools that the agent calls, each with its Debian package.
COMPUTE_TOOLS = {
    "dmsetup": "dmsetup",
    "blkid": "util-linux",
    "iscsiadm": "open-iscsi",
    "cache_restore": "thin-provisioning-tools",
    "thin_dump": "thin-provisioning-tools",
}
#: Further tools for a local pool in a volume group.
GROUP_TOOLS = {"vgs": "lvm2", "lvcreate": "lvm2"}
#: Kernel modules, each with its purpose.
MAPPER_MODULES = {
    "dm_mod": "device-mapper",
    "dm_thin_pool": "targets thin-pool and thin",
    "dm_cache": "target cache",
    "dm_cache_smq": "its policy cleaner",
    "dm_multipath": "target multipath",
    "dm_round_robin": "its path selector",
    "dm_verity": "target verity",
    "loop": "loop devices",
}
INITIATOR_MODULES = {"iscsi_tcp": "the iSCSI initiator"}
#: The rules of udev that are installed with the agent, and what those of earlier releases lack.
RULES, RULES_FLAG = "59-thunder.rules", "DM_UDEV_PRIMARY_SOURCE_FLAG"


class ComputeHost:
    """The checks of a host with an agent.

    :param mine: the options of group ``thunder``
    """

    def __init__(self, mine: Any, host: HostProbe) -> None:
        self._mine = mine
        self._host = host

    def checks(self) -> dict[str, Callable[[], str]]:
        """By name; a check comes after those that it depends on."""
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
            "udev rules": self.udev_rules,
            "failover": self.failover,
            "agent": self.agent,
            "RPC": self.rpc,
            "clock": self.clock,
        }

    def options(self) -> str:
        if not self._mine.address:
            raise Fault(
                "option address of [thunder] is not set",
                "set it to the address at which other hosts reach this one",
            )
        if bool(self._mine.pool_device) == bool(self._mine.pool_volume_group):
            raise Fault(
                "exactly one of pool_device and pool_volume_group must be set in [thunder], not "
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
        self._for_root()  # only root can read the file with the name
        try:
            name = self._host.initiator_name()
        except errors.LoginError as error:
            raise Fault(
                str(error), "echo InitiatorName=$(iscsi-iname) > /etc/iscsi/initiatorname.iscsi"
            ) from error
        if not self._host.has_iscsid():
            raise Fault("iscsid is not running", "systemctl enable --now iscsid")
        return name

    def address(self) -> str:
        address = self._mine.address
        if not address:
            raise NotApplicable("no address is set, see options")
        if not self._host.has_address(address):
            raise Fault(
                f"{address} is not an address of this host: no other host could read its replicas",
                "correct address in [thunder], or bring up the interface",
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
                    "check whether the disk is there (lsblk, dmesg); correct pool_device if its "
                    "name has changed; volumes work without their caches meanwhile",
                ) from error
        if pool is None:
            raise Fault(
                f"device {devnames.POOL} is not there", "start thunder-agent: it assembles the pool"
            )
        check_pool_health(pool, device)
        if failed := self._host.pool_io_failed():
            raise Fault(
                f"I/O of {' and '.join(failed)} has failed; no volume gets a cache",
                f"see dmesg and replace {device} if it is bad; then restart thunder-agent",
            )
        return check_pool_usage(pool, self._mine.pool_high_percent)

    def devices(self) -> str:
        """An agent that was killed while it changed a table leaves a device suspended."""
        self._for_root()
        suspended = self._host.suspended()
        if suspended:
            raise Fault(
                f"{', '.join(suspended)}: suspended, all I/O to it waits",
                "restart thunder-agent: it resumes suspended devices",
            )
        return "none is suspended"

    def udev_rules(self) -> str:
        """Only a warning, as a container may not see those of its host."""
        found = self._host.udev_rules()
        remedy = f"copy {RULES} to /etc/udev/rules.d of the host, then udevadm control --reload"
        if not found:
            raise Warn(f"{RULES} is not there: the host probes images and volumes", remedy)
        if not any(RULES_FLAG in text for text in found):
            raise Warn(
                f"{RULES} is an older one: udevadm trigger would remove links in /dev/mapper",
                remedy,
            )
        return RULES

    def failover(self) -> str:
        self._for_root()
        process = self._host.watcher()
        if not process:
            raise Fault(
                "thunder-failover is not running: no volume gets a cache, and one whose cache and "
                "LUN have failed gets I/O errors until it does",
                "restart thunder-agent, which starts it; journalctl -u thunder-agent",
            )
        return f"process {process}"

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
                f"thunder-agent is not running: there is no {path}",
                "systemctl start thunder-agent; journalctl -u thunder-agent shows why it ended",
            )
        if mode & 0o077:
            raise Fault(
                f"{path} has mode {mode:o}: users other than root could have devices built",
                f"chmod 600 {path}",
            )
        try:
            status = self._host.agent(path)
        except errors.AgentError as error:
            raise Fault(
                str(error), "systemctl restart thunder-agent; journalctl -u thunder-agent"
            ) from error
        bases, stacks = status.get("bases", []), status.get("stacks", [])
        failed = [entry["volume_id"] for entry in stacks if entry.get("failed")]
        if failed:
            raise Fault(
                f"volumes with a failed path: {', '.join(failed)}",
                "see thunder stack list; a volume that has left its cache gets a new one later, "
                "one whose LUN is unavailable waits for its storage host",
            )
        return f"answers; {len(bases)} base(s), {len(stacks)} stack(s)"

    def rpc(self) -> str:
        self._skew()
        return "a tracker answers"

    def clock(self) -> str:
        try:
            skew = self._skew()
        except Fault as fault:
            raise NotApplicable("no tracker answers, see RPC") from fault
        return check_skew(skew, "the tracker's")

    def _skew(self) -> float:
        before = self._host.clock()
        try:
            there = self._host.tracker_clock()
        except errors.ThunderError as error:
            raise Fault(
                str(error),
                "compare transport_url in [DEFAULT] with Cinder's; check that RabbitMQ and "
                "cinder-volume are running and that this host can reach them",
            ) from error
        after = self._host.clock()
        return difference(there, before, after)

    def _for_root(self) -> None:
        if not self._host.is_root():
            raise NotApplicable("requires root, see rights")


def check_pool_health(pool: PoolStatus, device: str) -> None:
    """:param device: the block device below the local pool
    :raises Fault: the pool takes no writes
    """
    if not pool.total:
        raise Fault(
            "the pool has failed",
            "see dmesg; volumes work without their caches; detach them, then wipefs --all "
            f"{device} and restart thunder-agent for an empty pool",
        )
    if pool.healthy:
        return
    if pool.full:
        raise Fault(
            "the pool takes no writes, it is full",
            "see dmesg; evict images that no volume of this host uses (thunder image evict)",
        )
    raise Fault(
        "the pool takes no writes (its metadata needs a check)",
        "see dmesg; detach this host's volumes, stop thunder-agent, remove the pool's devices "
        "(dmsetup remove) and run thin_check on its metadata",
    )


def check_pool_usage(pool: PoolStatus, high: int) -> str:
    """:param high: per cent of the pool above which no cache is created
    :raises Fault: the pool or its metadata is nearly full
    """
    metadata = 100 * pool.metadata_used // max(pool.metadata_total, 1)
    share = 100 * pool.used // pool.total
    if metadata >= METADATA_FULL:
        raise Fault(
            f"{metadata} % of the pool's metadata is in use",
            "create a new pool with larger blocks (pool_block_kib)",
        )
    if share >= high:
        raise Fault(
            f"{share} % of the pool is in use, pool_high_percent is {high}: new volumes get no "
            "cache",
            "detach volumes, evict images, or enlarge the pool",
        )
    return f"{share} % of {pool.total // MIB} MiB in use, {metadata} % of its metadata"


def compute_report(config_file: str, host: HostProbe | None = None) -> list[Check]:
    """All checks of a compute host, by the agent's configuration."""
    host = host or ThisHost(config_file)
    config = cfg.ConfigOpts()
    options.register(config, agent=True)
    try:
        config(["--config-file", config_file], project="thunder")
        for option in options.AGENT_OPTS:
            config.thunder[option.name]  # a value is parsed when it is read
    except (cfg.Error, ValueError) as error:
        rest = [name for name in ComputeHost(None, host).checks() if name != "options"]
        fault = Check("options", FAIL, one_line(error), f"correct {config_file}")
        return [fault, *skipped(rest, "the options cannot be read")]
    return examine(ComputeHost(config.thunder, host).checks())
