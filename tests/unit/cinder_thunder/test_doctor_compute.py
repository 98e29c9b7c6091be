"""Each fault of a compute host, injected into a fake: the doctor finds it, with a remedy."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import pytest

from cinder_thunder.cli.doctor import checks as framework
from cinder_thunder.cli.doctor import host as host_module
from cinder_thunder.cli.doctor.checks import FAIL, OK, SKIP, WARN, Check
from cinder_thunder.cli.doctor.compute import MAPPER_MODULES, compute_report
from cinder_thunder.cli.doctor.host import ThisHost
from os_brick_thunder.common import errors
from os_brick_thunder.common.policy.dmstatus import PoolStatus

_T = TypeVar("_T")
GIB = 1 << 30
MIB = 1 << 20
CONFIG = """\
[thunder]
host = cmp1
address = 10.0.0.1
rack = r1
zone = z1
pool_device = /dev/vdb
socket = /run/thunder/agent.sock
"""


RULES = Path(__file__).parents[3] / "etc/udev/rules.d/59-thunder.rules"


class FakeHost:
    """A healthy host, until a test breaks it."""

    def __init__(self) -> None:
        self.root = True
        self.missing: set[str] = set()  # tools and modules
        self.configfs = self.iscsid = True
        self.addresses = {"10.0.0.1"}
        self.initiator: str | Exception = "iqn.2026-11.org.example:cmp1"
        self.devices = {"/dev/vdb"}
        self.status: PoolStatus | None = PoolStatus(GIB, 8 * GIB, True, MIB, 64 * MIB)
        self.left_suspended: list[str] = []
        self.io_failed: list[str] = []
        self.rules = [RULES.read_text()]
        self.watching = 77
        self.mode: int | None = 0o600
        self.says: Mapping[str, Any] | Exception = {"bases": [{}], "stacks": []}
        self.tracker: float | Exception = 0.0  # seconds that it is ahead
        self.flaw = ""  # of the thin tools
        self.now = 1000.0

    def is_root(self) -> bool:
        return self.root

    def has_tool(self, name: str) -> bool:
        return name not in self.missing

    def thin_tools_flaw(self) -> str:
        return self.flaw

    def has_module(self, name: str) -> bool:
        return name not in self.missing

    def has_configfs(self) -> bool:
        return self.configfs

    def has_iscsid(self) -> bool:
        return self.iscsid

    def has_address(self, address: str) -> bool:
        return address in self.addresses

    def initiator_name(self) -> str:
        return _value(self.initiator)

    def device_size(self, device: str) -> int:
        if device not in self.devices:
            raise errors.DeviceNotFound(device)
        return 8 * GIB

    def pool(self) -> PoolStatus | None:
        return self.status

    def suspended(self) -> list[str]:
        return self.left_suspended

    def pool_io_failed(self) -> list[str]:
        return self.io_failed

    def udev_rules(self) -> list[str]:
        return self.rules

    def watcher(self) -> int:
        return self.watching

    def socket_mode(self, path: str) -> int | None:
        return self.mode

    def agent(self, path: str) -> Mapping[str, Any]:
        return _value(self.says)

    def tracker_clock(self) -> float:
        return self.now + _value(self.tracker)

    def clock(self) -> float:
        return self.now


def _value(value: _T | Exception) -> _T:
    if isinstance(value, Exception):
        raise value
    return value


def report(folder: Path, host: FakeHost, config: str = CONFIG) -> dict[str, Check]:
    file = folder / "thunder.conf"
    file.write_text(config)
    return {check.name: check for check in compute_report(str(file), host)}


def test_a_healthy_host(tmp_path: Path) -> None:
    found = report(tmp_path, FakeHost())
    assert {check.result for check in found.values()} == {OK}
    assert {name: check.found for name, check in found.items()} == {
        "rights": "root",
        "options": "host cmp1, rack r1, zone z1",
        "tools": "all 5 are installed",
        "device-mapper": ", ".join(MAPPER_MODULES),
        "iSCSI target": "target_core_mod, target_core_iblock, iscsi_target_mod",
        "iSCSI initiator": "iqn.2026-11.org.example:cmp1",
        "address": "10.0.0.1",
        "local pool": "12 % of 8192 MiB in use, 1 % of its metadata",
        "devices": "none is suspended",
        "udev rules": "59-thunder.rules",
        "failover": "process 77",
        "agent": "answers; 1 base(s), 0 stack(s)",
        "RPC": "a tracker answers",
        "clock": "within 5 s of the tracker's",
    }


def pool(**changes: Any) -> PoolStatus:
    return dataclasses.replace(PoolStatus(GIB, 8 * GIB, True, MIB, 64 * MIB), **changes)


FAULTS: list[tuple[Callable[[FakeHost], object], str, str, str]] = [
    (
        lambda h: h.missing.update(["thin_dump", "cache_restore", "iscsiadm"]),
        *("tools", "not installed: iscsiadm, cache_restore, thin_dump"),
        "apt install open-iscsi thin-provisioning-tools",
    ),
    (
        lambda h: h.missing.add("dm_cache"),
        *("device-mapper", "the kernel has no dm_cache (target cache)"),
        "modprobe -a dm_cache; if they do not exist, install the full kernel package",
    ),
    (
        lambda h: h.missing.add("loop"),
        *("device-mapper", "the kernel has no loop (loop devices)", "modprobe -a loop; "),
    ),
    (
        lambda h: h.missing.add("iscsi_target_mod"),
        *("iSCSI target", "the kernel has no iscsi_target_mod (its iSCSI target)"),
        "modprobe -a iscsi_target_mod; ",
    ),
    (
        lambda h: setattr(h, "configfs", False),
        *("iSCSI target", "configfs is not mounted: LIO cannot be set up"),
        "mount -t configfs configfs /sys/kernel/config",
    ),
    (
        lambda h: h.missing.add("iscsi_tcp"),
        *("iSCSI initiator", "the kernel has no iscsi_tcp (the iSCSI initiator)"),
        "modprobe -a iscsi_tcp; ",
    ),
    (
        lambda h: setattr(h, "initiator", errors.LoginError("/x gives no InitiatorName")),
        *("iSCSI initiator", "/x gives no InitiatorName", "echo InitiatorName=$(iscsi-iname) > "),
    ),
    (
        lambda h: setattr(h, "iscsid", False),
        *("iSCSI initiator", "iscsid is not running", "systemctl enable --now iscsid"),
    ),
    (
        lambda h: h.addresses.clear(),
        *("address", "10.0.0.1 is not an address of this host: no other host could read its "),
        "correct address in [thunder]",
    ),
    (
        lambda h: h.devices.clear(),
        *("local pool", "there is no block device /dev/vdb: check the path"),
        "check whether the disk is there (lsblk, dmesg)",
    ),
    (
        lambda h: setattr(h, "status", None),
        *("local pool", "device thunder-pool is not there", "start thunder-agent"),
    ),
    (
        lambda h: setattr(h, "status", PoolStatus(0, 0, healthy=False)),
        *("local pool", "the pool has failed", "see dmesg; volumes work without their caches"),
    ),
    (
        lambda h: setattr(h, "status", pool(healthy=False)),
        *(
            "local pool",
            "the pool takes no writes (its metadata needs a check)",
            "see dmesg; detach this",
        ),
    ),
    (
        lambda h: setattr(h, "status", pool(healthy=False, full=True)),
        *("local pool", "the pool takes no writes, it is full", "see dmesg; evict images that"),
    ),
    (
        lambda h: setattr(h, "status", pool(metadata_used=60 * MIB)),
        *(
            "local pool",
            "93 % of the pool's metadata is in use",
            "create a new pool with larger blocks",
        ),
    ),
    (
        lambda h: setattr(h, "status", pool(used=15 * GIB // 2)),
        *("local pool", "93 % of the pool is in use, pool_high_percent is 90: new volumes get no"),
        "detach volumes, evict images, or enlarge the pool",
    ),
    (
        lambda h: h.left_suspended.append("thunder-vol-1"),
        *("devices", "thunder-vol-1: suspended, all I/O to it waits"),
        "restart thunder-agent: it resumes",
    ),
    (
        lambda h: h.io_failed.append("thunder-pool-data"),
        *("local pool", "I/O of thunder-pool-data has failed; no volume gets a cache"),
        "see dmesg and replace /dev/vdb if it is bad",
    ),
    (
        lambda h: setattr(h, "watching", 0),
        *("failover", "thunder-failover is not running: no volume gets a cache, and one whose"),
        "restart thunder-agent, which starts it",
    ),
    (
        lambda h: setattr(h, "mode", None),
        *("agent", "thunder-agent is not running: there is no /run/thunder/agent.sock"),
        "systemctl start thunder-agent",
    ),
    (
        lambda h: setattr(h, "mode", 0o666),
        *("agent", "/run/thunder/agent.sock has mode 666: users other than root could have"),
        "chmod 600 /run/thunder/agent.sock",
    ),
    (
        lambda h: setattr(h, "says", errors.AgentUnavailable("it did not answer in 5 s")),
        *("agent", "it did not answer in 5 s", "systemctl restart thunder-agent"),
    ),
    (
        lambda h: setattr(h, "says", {"stacks": [{"volume_id": "v1", "failed": 1}]}),
        *("agent", "volumes with a failed path: v1", "see thunder stack list; "),
    ),
    (
        lambda h: setattr(h, "tracker", 7.5),
        *("clock", "this host's clock is 7.5 s behind the tracker's", "synchronise the clocks"),
    ),
    (
        lambda h: setattr(h, "tracker", -7.5),
        *("clock", "this host's clock is 7.5 s ahead of the tracker's", "synchronise the clocks"),
    ),
]


@pytest.mark.parametrize(("inject", "name", "found", "remedy"), FAULTS)
def test_a_fault(
    tmp_path: Path, inject: Callable[[FakeHost], object], name: str, found: str, remedy: str
) -> None:
    """Its check fails, and no other."""
    host = FakeHost()
    inject(host)
    checks = report(tmp_path, host)
    assert {check.name for check in checks.values() if check.result != OK} == {name}
    assert checks[name].result == FAIL
    assert checks[name].found.startswith(found)
    assert checks[name].remedy.startswith(remedy)


@pytest.mark.parametrize(
    ("rules", "found"),
    [
        ([], "59-thunder.rules is not there: the host probes images and volumes"),
        (["THUNDER-*"], "59-thunder.rules is an older one: udevadm trigger would remove links"),
    ],
)
def test_rules_of_udev(tmp_path: Path, rules: list[str], found: str) -> None:
    """A container may not see those of its host."""
    host = FakeHost()
    host.rules = rules
    checks = report(tmp_path, host)
    assert {check.name for check in checks.values() if check.result != OK} == {"udev rules"}
    assert checks["udev rules"].result == WARN
    assert checks["udev rules"].found.startswith(found)
    assert checks["udev rules"].remedy.startswith("copy 59-thunder.rules to /etc/udev/rules.d")


def test_the_rules_that_udev_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One in /etc replaces that of the same name in /usr/lib, whatever else it says."""
    mine, packaged = tmp_path / "etc", tmp_path / "usr"
    monkeypatch.setattr(host_module, "UDEV_RULES", (mine, tmp_path / "absent", packaged))
    host = ThisHost("/nonexistent")
    assert host.udev_rules() == []
    packaged.mkdir()
    (packaged / "60-block.rules").write_text("other devices")
    (packaged / "59-thunder.rules").write_text(RULES.read_text())
    assert host.udev_rules() == [RULES.read_text()]
    mine.mkdir()
    (mine / "59-thunder.rules").write_text("")
    assert host.udev_rules() == []


def test_no_tracker(tmp_path: Path) -> None:
    host = FakeHost()
    host.tracker = errors.TrackerUnavailable("thunder-tracker did not answer clock in 5 s")
    checks = report(tmp_path, host)
    assert checks["RPC"].result == FAIL
    assert checks["RPC"].found == "thunder-tracker did not answer clock in 5 s"
    assert checks["RPC"].remedy.startswith("compare transport_url in [DEFAULT] with Cinder's")
    assert checks["clock"] == Check("clock", SKIP, "no tracker answers, see RPC")


def test_without_root(tmp_path: Path) -> None:
    host = FakeHost()
    host.root = False
    host.initiator = errors.LoginError("/x gives no InitiatorName")  # that one cannot read
    checks = report(tmp_path, host)
    assert checks["rights"].result == FAIL
    assert checks["rights"].remedy == "run it as root"
    skipped = {check.name for check in checks.values() if check.result == SKIP}
    assert skipped == {"iSCSI initiator", "local pool", "devices", "failover", "agent"}


@pytest.mark.parametrize(
    ("line", "instead", "found"),
    [
        ("address = 10.0.0.1\n", "", "option address of [thunder] is not set"),
        (
            "pool_device = /dev/vdb\n",
            "pool_device = /dev/vdb\npool_volume_group = vg\n",
            "exactly one of pool_device and pool_volume_group must be set in [thunder], not both",
        ),
        (
            "pool_device = /dev/vdb\n",
            "",
            "exactly one of pool_device and pool_volume_group must be set in [thunder], not none",
        ),
        ("[thunder]\n", "[thunder]\nexport_port = many\n", "Value for option export_port from "),
        ("[thunder]\n", "host cmp1\n", "Failed to parse "),
    ],
)
def test_options(tmp_path: Path, line: str, instead: str, found: str) -> None:
    checks = report(tmp_path, FakeHost(), CONFIG.replace(line, instead))
    assert checks["options"].result == FAIL
    assert checks["options"].found.startswith(found)
    assert checks["options"].remedy


def test_a_check_that_cannot_run_is_not_passed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The traceback is in the log, for --verbose."""
    caplog.set_level("DEBUG", framework.__name__)
    host = FakeHost()
    host.says = RuntimeError("what\nis this")
    found = report(tmp_path, host)["agent"]
    assert (found.result, found.found) == (
        *(FAIL,),
        "could not be checked: RuntimeError: what is this",
    )
    assert "Traceback" in caplog.text


@pytest.mark.parametrize(("there", "off"), [(99.0, -1.0), (100.0, 0.0), (104.0, 0.0), (106.0, 1.0)])
def test_a_slow_answer_is_no_skew(there: float, off: float) -> None:
    assert framework.difference(there, before=100.0, after=105.0) == off


def test_the_probe_of_this_host() -> None:
    """It works on any host."""
    host = ThisHost("/nonexistent")
    assert host.has_tool("sh")
    assert not host.has_tool("no-such-tool")
    assert not host.has_module("no_such_module")
    assert host.has_address("127.0.0.1")
    assert not host.has_address("192.0.2.1")
    assert host.socket_mode("/nonexistent") is None
    assert isinstance(host.has_configfs(), bool)
    assert isinstance(host.has_iscsid(), bool)
