"""Each fault of a host with cinder.conf, injected into a fake cloud: the doctor finds it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from cinder_thunder.cli import thunder
from cinder_thunder.cli.doctor import checks as framework
from cinder_thunder.cli.doctor.checks import FAIL, OK, SKIP, WARN, Check
from cinder_thunder.cli.doctor.cinder import Backend, ThisCloud
from cinder_thunder.cli.doctor.storage import CinderHost
from cinder_thunder.db import migration
from cinder_thunder.db.values import KnownHost
from os_brick_thunder.common import errors
from os_brick_thunder.common.policy.dmstatus import PoolStatus
from tests.unit.cinder_thunder.test_doctor_compute import FakeHost

GIB = 1 << 30
MIB = 1 << 20
BACKEND = Backend(
    "thunder", "stor1@thunder", "cinder-volumes", "thin", "lioadm", target_ip_address="10.0.0.1"
)


def known(host: str, kind: str, state: str = "alive", drained: bool = False) -> KnownHost:
    return KnownHost(host, kind, "r", "z", "10.0.0.1", 3.0, state, drained)


class FakeCloud:
    """A healthy cloud, until a test breaks it."""

    def __init__(self, host: FakeHost) -> None:
        self._host = host
        self.configured = [BACKEND]
        self.at: tuple[str | None, str | None] | Exception = ("0004", "0004")
        self.known = [known("stor1@thunder", "storage"), known("cmp1", "compute")]
        self.database: float | None = 0.0  # seconds that it is ahead
        self.tracker: float | Exception = 0.0
        self.groups = ["cinder-volumes"]
        self.zeroing = True
        self.status: PoolStatus | Exception = PoolStatus(GIB, 8 * GIB, True, MIB, 64 * MIB)

    def backends(self) -> list[Backend]:
        return self.configured

    def revision(self) -> tuple[str | None, str | None]:
        if isinstance(self.at, Exception):
            raise self.at
        return self.at

    def hosts(self) -> list[KnownHost]:
        return self.known

    def database_clock(self) -> float | None:
        return None if self.database is None else self._host.now + self.database

    def tracker_clock(self, server: str | None) -> float:
        if isinstance(self.tracker, Exception):
            raise self.tracker
        return self._host.now + self.tracker

    def volume_groups(self) -> list[str]:
        return self.groups

    def pool(self, group: str) -> PoolStatus:
        if isinstance(self.status, Exception):
            raise self.status
        return self.status

    def zeroes_blocks(self, group: str) -> bool:
        return self.zeroing


def report(inject: Callable[[FakeCloud, FakeHost], object]) -> dict[str, Check]:
    host = FakeHost()
    cloud = FakeCloud(host)
    inject(cloud, host)
    checks = framework.examine(CinderHost(cloud, host).checks())
    return {check.name: check for check in checks}


def test_a_healthy_storage_host() -> None:
    found = report(lambda cloud, host: None)
    assert {check.result for check in found.values()} == {OK}
    assert {name: check.found for name, check in found.items()} == {
        "database": "answers",
        "tables": "revision 0004",
        "database's clock": "within 5 s of the database's",
        "hosts": "all 2 are alive, or drained",
        "trackers": "answers; this host's clock is within 5 s of the tracker's",
        "storage: rights": "root",
        "storage: tools": "all 7 are installed",
        "storage: thin_delta": "thin_delta is right about a known file",
        "storage: device-mapper": "dm_thin_pool",
        "storage: iSCSI target": "target_core_mod, target_core_iblock, iscsi_target_mod",
        "thunder: options": "volume group cinder-volumes, thin, lioadm",
        "thunder: thin pool": "12 % in use, 1 % of its metadata",
        "thunder: RPC": "answers; this host's clock is within 5 s of the tracker's",
    }


def test_a_controller_without_backends() -> None:
    found = report(lambda cloud, host: setattr(cloud, "configured", []))
    skipped = {name for name, check in found.items() if check.result == SKIP}
    assert skipped == {"backends", *(name for name in found if name.startswith("storage: "))}
    assert FAIL not in {check.result for check in found.values()}


def pool(**changes: Any) -> PoolStatus:
    return dataclasses.replace(PoolStatus(GIB, 8 * GIB, True, MIB, 64 * MIB), **changes)


_GONE = errors.ProcessError(["dmsetup", "table", "x"], 1, "Device x not found")
FAULTS: list[tuple[Callable[[FakeCloud, FakeHost], object], str, str, str]] = [
    (
        lambda c, h: setattr(c, "at", ("0003", "0004")),
        *("tables", "Thunder's tables are at revision 0003, this code needs 0004"),
        "thunder db upgrade, or install the same version everywhere",
    ),
    (
        lambda c, h: setattr(c, "at", (None, "0004")),
        *("tables", "Thunder's tables are at revision None", "thunder db upgrade"),
    ),
    (
        lambda c, h: setattr(c, "database", 20.0),
        *("database's clock", "this host's clock is 20.0 s behind the database's"),
        "synchronise the clocks of all hosts",
    ),
    (
        lambda c, h: c.known.append(known("cmp2", "compute", "dead")),
        *("hosts", "cmp2 dead, silent for 3 s", "start thunder-agent (compute) or cinder-volume"),
    ),
    (
        lambda c, h: c.known.append(known("cmp2", "compute", "suspect")),
        *("hosts", "cmp2 suspect, silent for 3 s", "start thunder-agent (compute) or"),
    ),
    (
        lambda c, h: c.known.append(
            dataclasses.replace(known("cmp2", "compute"), rival="cmp2 at 10.0.0.3 (iqn.x:b)")
        ),
        *("hosts", "cmp2 at 10.0.0.3 (iqn.x:b) is refused beside cmp2: they use one name"),
        "set host in [thunder] of thunder.conf, or give each host an initiator name",
    ),
    (
        lambda c, h: c.known.clear(),
        *("hosts", "no storage host has ever sent a heartbeat", "start cinder-volume"),
    ),
    (
        lambda c, h: h.missing.add("thin_delta"),
        *("storage: tools", "not installed: thin_delta", "apt install thin-provisioning-tools"),
    ),
    (
        lambda c, h: setattr(h, "flaw", "thin_delta of this host gives a wrong answer"),
        *("storage: thin_delta", "thin_delta of this host gives a wrong answer: volumes are"),
        "install another version of thin-provisioning-tools",
    ),
    (
        lambda c, h: h.missing.add("dm_thin_pool"),
        *("storage: device-mapper", "the kernel has no dm_thin_pool", "modprobe -a dm_thin_pool"),
    ),
    (
        lambda c, h: setattr(h, "configfs", False),
        *("storage: iSCSI target", "configfs is not mounted", "mount -t configfs"),
    ),
    (
        lambda c, h: setattr(
            c, "configured", [dataclasses.replace(BACKEND, target_helper="tgtadm")]
        ),
        *("thunder: options", "target_helper is tgtadm", "set it to lioadm in [thunder]"),
    ),
    (
        lambda c, h: setattr(c, "configured", [dataclasses.replace(BACKEND, lvm_type="default")]),
        *("thunder: options", "lvm_type is default", "set it to thin in [thunder]"),
    ),
    (
        lambda c, h: setattr(c, "groups", ["system"]),
        *("thunder: thin pool", "there is no volume group cinder-volumes; there are: system"),
        "vgcreate cinder-volumes DEVICE, or correct volume_group of [thunder]",
    ),
    (
        lambda c, h: setattr(c, "status", _GONE),
        *("thunder: thin pool", "volume group cinder-volumes has no active thin pool cinder-"),
        "start cinder-volume, which creates it",
    ),
    (
        lambda c, h: setattr(c, "status", pool(healthy=False, full=True)),
        *("thunder: thin pool", "thin pool cinder-volumes/cinder-volumes-pool takes no writes"),
        "see dmesg and lvmthin(7); lvextend it, it is full",
    ),
    (
        lambda c, h: setattr(c, "status", pool(used=8 * GIB)),
        *("thunder: thin pool", "100 % of cinder-volumes/cinder-volumes-pool is in use"),
        "lvextend it",
    ),
]


@pytest.mark.parametrize(("inject", "name", "found", "remedy"), FAULTS)
def test_a_fault(
    inject: Callable[[FakeCloud, FakeHost], object], name: str, found: str, remedy: str
) -> None:
    checks = report(inject)
    assert {check.name for check in checks.values() if check.result == FAIL} == {name}
    assert checks[name].found.startswith(found)
    assert checks[name].remedy.startswith(remedy)


def test_a_pool_that_does_not_zero_new_blocks() -> None:
    checks = report(lambda c, h: setattr(c, "zeroing", False))
    assert {check.name: check.result for check in checks.values() if check.result != OK} == {
        "thunder: thin pool": WARN
    }
    assert checks["thunder: thin pool"].remedy.startswith("lvchange --zero y cinder-volumes/")


def test_a_warning() -> None:
    """Cinder has a default for the address, which may be right: no fault."""
    backend = dataclasses.replace(BACKEND, target_ip_address="")
    checks = report(lambda cloud, host: setattr(cloud, "configured", [backend]))
    assert {check.result for check in checks.values()} == {OK, WARN}
    assert checks["thunder: options"] == Check(
        "thunder: options",
        WARN,
        "target_ip_address is not set: hosts are sent to Cinder's my_ip",
        "set it in [thunder] to the address at which hosts reach volumes and masters",
    )


def test_no_database() -> None:
    error = sa.exc.OperationalError("SELECT 1", {}, Exception("Can't connect\nto 10.0.0.9"))
    checks = report(lambda cloud, host: setattr(cloud, "at", error))
    assert checks["database"].result == FAIL
    assert checks["database"].found == "does not answer: Can't connect to 10.0.0.9"
    assert "connection in [database] of cinder.conf" in checks["database"].remedy
    for name in ("tables", "database's clock", "hosts"):
        assert checks[name] == Check(name, SKIP, "the database does not answer")


def test_no_tracker() -> None:
    error = errors.TrackerUnavailable("thunder-tracker did not answer clock in 5 s")
    checks = report(lambda cloud, host: setattr(cloud, "tracker", error))
    failed = {name: check for name, check in checks.items() if check.result == FAIL}
    assert set(failed) == {"trackers", "thunder: RPC"}
    assert "cinder-volume of stor1@thunder are running" in failed["thunder: RPC"].remedy


def test_without_root() -> None:
    checks = report(lambda cloud, host: setattr(host, "root", False))
    assert checks["storage: rights"].result == FAIL
    assert checks["thunder: thin pool"].result == SKIP


CINDER = """\
[DEFAULT]
transport_url = fake://
host = stor1
enabled_backends = thunder, plain, other
[database]
connection = sqlite:///{folder}/cinder.sqlite
[backend_defaults]
lvm_type = thin
[thunder]
volume_driver = cinder_thunder.driver.ThunderDriver
target_helper = lioadm
target_ip_address = 10.0.0.1
[plain]
volume_group = plain
[other]
volume_driver = cinder_thunder.driver.ThunderDriver
backend_host = elsewhere
volume_group = other
"""


@pytest.fixture
def cinder_conf_file(tmp_path: Path) -> Path:
    file = tmp_path / "cinder.conf"
    file.write_text(CINDER.format(folder=tmp_path))
    return file


def test_backends_are_read_from_cinders_configuration(cinder_conf_file: Path) -> None:
    """Only ours; a section overrides [backend_defaults], which overrides Cinder's defaults."""
    assert ThisCloud(str(cinder_conf_file)).backends() == [
        BACKEND,
        Backend("other", "elsewhere@other", "other", "thin", "tgtadm", target_ip_address=""),
    ]


def test_the_command(
    cinder_conf_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """On a real database: each fault is a row, and the exit code is 1."""
    monkeypatch.setattr(framework, "TIMEOUT", 0.1)
    command = ["doctor", "--config-file", str(cinder_conf_file), "-f", "json"]

    def rows() -> dict[str, dict[str, str]]:
        assert thunder.main(command) == 1  # there is no tracker on this transport
        return {row["Check"]: row for row in json.loads(capsys.readouterr().out)}

    before = rows()
    assert before["tables"]["Result"] == FAIL
    assert before["tables"]["Remedy"] == "thunder db upgrade"
    migration.upgrade(sa.create_engine(f"sqlite:///{tmp_path}/cinder.sqlite"))
    after = rows()
    assert after["tables"]["Found"] == f"revision {migration.head()}"
    assert after["database's clock"]["Result"] == SKIP
    assert after["hosts"]["Found"] == "no storage host has ever sent a heartbeat"
    assert after["trackers"]["Result"] == FAIL
    assert after["other: options"]["Found"] == "target_helper is tgtadm"
    assert after["compute host"]["Result"] == SKIP


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (
            ["--config-file", "/nonexistent/cinder.conf"],
            "there is no /nonexistent/cinder.conf: correct the option that names it",
        ),
        (
            ["--agent-config-file", "/nonexistent/thunder.conf"],
            "there is no /nonexistent/thunder.conf: correct the option that names it",
        ),
        (
            [],
            "there is nothing to check here, neither /etc/thunder/thunder.conf nor "
            "/etc/cinder/cinder.conf: a compute host needs the first, a storage host the second",
        ),
    ],
)
def test_bad_options(options: list[str], said: str, caplog: pytest.LogCaptureFixture) -> None:
    assert thunder.main(["doctor", *options]) == 2
    (line,) = [r.message for r in caplog.records if r.levelname == "ERROR"]
    assert line == said
