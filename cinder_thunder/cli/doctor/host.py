"""The host that the doctor runs on."""

from __future__ import annotations

import os
import shutil
import socket
import stat
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from oslo_config import cfg

from cinder_thunder.cli.doctor import checks
from cinder_thunder.mechanism import thintools
from os_brick_thunder.client import AgentClient
from os_brick_thunder.common import errors, rpc
from os_brick_thunder.common.mechanism import blockdev, failoverlocks
from os_brick_thunder.common.mechanism.devicemapper import KernelDeviceMapper
from os_brick_thunder.common.policy import devnames, dmstatus
from os_brick_thunder.common.policy.dmtable import SECTOR, ThinPool
from os_brick_thunder.common.run import run
from os_brick_thunder.common.transport import iscsi

#: Where udev looks for rules, most important first: udev(7).
UDEV_RULES = tuple(
    Path(folder, "udev/rules.d")
    for folder in ("/etc", "/run", "/usr/local/lib", "/usr/lib", "/lib")
)


class ThisHost:
    """A :class:`~cinder_thunder.cli.doctor.checks.HostProbe` of the real host."""

    def __init__(self, config_file: str) -> None:
        """:param config_file: the configuration with ``transport_url``"""
        self._config_file = config_file
        self._dm = KernelDeviceMapper()

    def is_root(self) -> bool:
        return os.geteuid() == 0

    def has_tool(self, name: str) -> bool:
        # Daemons have the sbin folders in their PATH, an operator's shell may not.
        return shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin") is not None

    def has_module(self, name: str) -> bool:
        """It is loaded, built in, or can be loaded."""
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
        """iscsid, or systemd on its behalf, listens for iscsiadm's requests."""
        return "@ISCSIADM_ABSTRACT_NAMESPACE" in Path("/proc/net/unix").read_text()

    def has_address(self, address: str) -> bool:
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            try:
                probe.bind((address.strip("[]"), 0))
            except OSError:
                return False
        return True

    def thin_tools_flaw(self) -> str:
        return thintools.flaw()

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

    def pool_io_failed(self) -> list[str]:
        """The devices under the local pool that have had failed I/O."""
        names = (devnames.POOL_METADATA, devnames.POOL_DATA)
        present = {device.name for device in self._dm.devices()}
        return self._dm.with_failed_io(*(name for name in names if name in present))

    def udev_rules(self) -> list[str]:
        """The rules files, of those that udev reads, that name Thunder's devices; their text."""
        names = {path.name for folder in UDEV_RULES for path in folder.glob("*.rules")}
        found: list[str] = []
        for name in sorted(names):
            # As in udev(7): the file in the first folder replaces those of its name.
            first = next(path for folder in UDEV_RULES if (path := folder / name).exists())
            text = first.read_text(errors="replace")
            if f"{devnames.UUID_PREFIX}*" in text:
                found.append(text)
        return found

    def watcher(self) -> int:
        """The process of the failover watcher; 0 if none runs."""
        found = failoverlocks.running()
        return found.pid if found else 0

    def socket_mode(self, path: str) -> int | None:
        try:
            return stat.S_IMODE(os.stat(path).st_mode)
        except FileNotFoundError:
            return None

    def agent(self, path: str) -> Mapping[str, Any]:
        return AgentClient(path, checks.TIMEOUT).status()

    def tracker_clock(self) -> float:
        # The global options: oslo.messaging registers some of its own only there.
        cfg.CONF(["--config-file", self._config_file], project="thunder")
        return rpc.RpcTracker(rpc.transport(cfg.CONF), checks.TIMEOUT).clock()

    def clock(self) -> float:
        return time.time()
