"""What root does with names that came from another host, and where node records are."""

from __future__ import annotations

import dataclasses
import errno
import os
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from os_brick_thunder.common import errors, wire
from os_brick_thunder.common.policy.iscsinames import (
    iqn_of,
    portal_of,
    same_address,
    split_portal,
)
from os_brick_thunder.common.run import DEFAULT_TIMEOUT
from os_brick_thunder.common.transport import iscsi
from os_brick_thunder.common.transport.base import Endpoint, Session

IQN = iqn_of("stor1@thunder", "img-1")
PORTAL = "10.0.0.1:3260"
EXPORT = wire.Export(PORTAL, IQN, 0, "0123456789abcdef", "fedcba9876543210" * 2)
RECORD = "# BEGIN RECORD 2.1.8\nnode.name = x\nnode.session.auth.password = old\n# END RECORD\n"


class Tool:
    """An iscsiadm that keeps records as the real one does, and a kernel that logs in at once."""

    def __init__(self, root: Path) -> None:
        self.records = root / "nodes"
        self.sessions = root / "sessions"
        self.device = root / "sdx"
        self.portal_group = ""  # of a portal that was discovered before
        self.login_code = 0
        self.broken = 0  # calls that meet a record which is being removed
        self.calls: list[tuple[str, ...]] = []

    def __call__(
        self, *argv: str, stdin: str | None = None, timeout: float = DEFAULT_TIMEOUT
    ) -> str:
        self.calls.append(argv)
        if self.broken:
            self.broken -= 1
            raise errors.ProcessError(argv, iscsi.DATABASE_FAILURE, "could not stat")
        iqn, portal = argv[4], argv[6]
        if argv[-2:] == ("--op", "new"):
            record = self.record(iqn, portal)
            record.parent.mkdir(parents=True, exist_ok=True)
            record.write_text(RECORD)
        if argv[-1] == "--login" and self.login_code:
            raise errors.ProcessError(argv, self.login_code, "refused")
        return ""

    def record(self, iqn: str, portal: str) -> Path:
        address, port = split_portal(portal)
        folder = self.records / iqn
        if self.portal_group:
            return folder / f"{address},{port},{self.portal_group}" / "default"
        return folder / f"{address},{port}"

    @property
    def actions(self) -> list[str]:
        return [" ".join(argv[7:9]) for argv in self.calls]


@pytest.fixture
def tool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Tool:
    made = Tool(tmp_path / "var")
    monkeypatch.setattr(iscsi, "RECORDS", (tmp_path / "etc" / "nodes", made.records))
    return made


def initiator(tool: Tool, monkeypatch: pytest.MonkeyPatch) -> iscsi.IscsiAdm:
    adm = iscsi.IscsiAdm(tool, appear=0.0)
    monkeypatch.setattr(adm, "_await_device", lambda endpoint: "/dev/sdx")
    return adm


def test_secrets_go_into_one_record_and_never_into_argv(
    tool: Tool, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = tool.record(IQN, "10.0.0.2:3260")
    other.parent.mkdir(parents=True)
    other.write_text(RECORD)
    assert initiator(tool, monkeypatch).login(EXPORT) == "/dev/sdx"
    record = tool.record(IQN, PORTAL)
    lines = record.read_text().splitlines()
    assert lines[-1] == "# END RECORD"
    assert f"node.session.auth.username = {EXPORT.username}" in lines
    assert f"node.session.auth.password = {EXPORT.password}" in lines
    assert len([line for line in lines if "password" in line]) == 1
    assert record.stat().st_mode & 0o777 == 0o600
    assert other.read_text() == RECORD
    assert tool.actions == ["--op new", "--op update", "--login"]
    words = [word for argv in tool.calls for word in argv]
    assert not {EXPORT.username, EXPORT.password} & set(words)
    assert "node.session.auth.authmethod" in words


@pytest.mark.parametrize("portal", [PORTAL, "[fd00::1]:3260"])
@pytest.mark.parametrize("group", ["", "1"])
def test_records_of_every_form_are_found(
    tool: Tool, monkeypatch: pytest.MonkeyPatch, portal: str, group: str
) -> None:
    tool.portal_group = group
    initiator(tool, monkeypatch).login(dataclasses.replace(EXPORT, portal=portal))
    assert EXPORT.password in tool.record(IQN, portal).read_text()


def test_of_two_places_with_a_record_the_newer_one_is_used(
    tool: Tool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = tmp_path / "etc" / "nodes" / IQN / "10.0.0.1,3260"
    old.parent.mkdir(parents=True)
    old.write_text(RECORD)
    initiator(tool, monkeypatch).login(EXPORT)
    assert old.read_text() == RECORD
    assert EXPORT.password in tool.record(IQN, PORTAL).read_text()


def test_an_iscsiadm_with_records_elsewhere_is_an_error_that_says_so(
    tool: Tool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tool.records = tmp_path / "elsewhere"
    with pytest.raises(errors.LoginError, match=r"no record of .* in .*etc/nodes or .*var/nodes"):
        initiator(tool, monkeypatch).login(EXPORT)
    assert tool.actions[-2:] == ["--logout", "--op delete"]


@pytest.mark.parametrize(("code", "kind"), [(24, errors.LoginRefused), (8, errors.LoginError)])
def test_a_failed_login_leaves_no_record(
    tool: Tool, monkeypatch: pytest.MonkeyPatch, code: int, kind: type[errors.LoginError]
) -> None:
    tool.login_code = code
    with pytest.raises(errors.LoginError) as caught:
        initiator(tool, monkeypatch).login(EXPORT)
    assert type(caught.value) is kind
    assert tool.actions[-2:] == ["--logout", "--op delete"]


def test_a_record_that_goes_meanwhile_is_no_failure(tool: Tool) -> None:
    """Of another target, by another iscsiadm: each looks through all of them."""
    initiator = iscsi.IscsiAdm(tool)
    tool.broken = 2
    initiator.logout(Endpoint(IQN, PORTAL))
    assert tool.actions == ["--logout"] * 3 + ["--op delete"]
    tool.broken = 3
    with pytest.raises(errors.ProcessError, match="could not stat"):
        initiator.logout(Endpoint(IQN, PORTAL))


def test_a_disk_is_waited_for_until_it_can_be_opened(
    tool: Tool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = tmp_path / "sdx"
    disk.touch()
    adm = iscsi.IscsiAdm(tool, appear=30.0)
    monkeypatch.setattr(
        adm, "sessions", lambda: [Session(Endpoint.of(EXPORT), str(disk), alive=True)]
    )
    naps: list[float] = []

    def sleep(seconds: float) -> None:
        naps.append(seconds)

    real_open = os.open

    def refuse(path: str, flags: int, mode: int = 0o777) -> int:
        if path == str(disk) and len(naps) < 3:
            raise OSError(errno.ENXIO, "No such device or address")
        return real_open(path, flags, mode)

    monkeypatch.setattr(time, "sleep", sleep)
    monkeypatch.setattr(os, "open", refuse)
    assert adm.login(EXPORT) == str(disk)
    assert len(naps) == 3


HOSTILE = [
    {"iqn": "../../cron.d"},
    {"iqn": "iqn.2026-11.org.thunder:../../../cron.d:i"},
    {"iqn": "iqn.2010-10.org.openstack:volume-1"},
    {"iqn": "iqn.2026-11.org.thunder:h:i\n"},
    {"username": "x\n* * * * * root id\n#"},
    {"password": "x\nnode.startup = automatic"},
    {"portal": "10.0.0.1:3260 -T other"},
    {"portal": "--logoutall=all"},
]


@pytest.mark.parametrize("change", HOSTILE)
def test_a_hostile_export_reaches_neither_a_file_nor_a_tool(
    tool: Tool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, str]
) -> None:
    cron = tmp_path / "cron.d" / "existing"
    cron.parent.mkdir()
    cron.write_text("# a job\n")
    with pytest.raises(errors.LoginError, match="not the export of a replica"):
        initiator(tool, monkeypatch).login(dataclasses.replace(EXPORT, **change))  # type: ignore[arg-type]
    assert tool.calls == []
    assert cron.read_text() == "# a job\n"


def test_the_session_of_a_volume_is_not_logged_out(
    tool: Tool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    initiator(tool, monkeypatch).logout(Endpoint("iqn.2010-10.org.openstack:volume-1", PORTAL))
    assert tool.calls == []
    assert "not the export of a replica" in caplog.text


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.text(), st.text(), st.text(), st.text())
def test_no_text_of_a_peer_gets_into_the_way(
    tool: Tool, monkeypatch: pytest.MonkeyPatch, iqn: str, portal: str, name: str, secret: str
) -> None:
    adm = initiator(tool, monkeypatch)
    for hostile in (
        dataclasses.replace(EXPORT, iqn=iqn),
        dataclasses.replace(EXPORT, iqn="iqn.2026-11.org.thunder:" + iqn),
        dataclasses.replace(EXPORT, portal=portal),
        dataclasses.replace(EXPORT, username=name),
        dataclasses.replace(EXPORT, password=secret),
    ):
        tool.calls.clear()
        try:
            adm.login(hostile)
        except errors.LoginError:
            assert tool.calls == []


def test_a_host_without_a_name_says_what_to_install(tmp_path: Path) -> None:
    with pytest.raises(errors.LoginError, match="install open-iscsi"):
        iscsi.initiator_name(tmp_path / "initiatorname.iscsi")
    file = tmp_path / "named"
    file.write_text("# by the installer\nInitiatorName = iqn.1993-08.org.debian:01:abc\n")
    assert iscsi.initiator_name(file) == "iqn.1993-08.org.debian:01:abc"


def test_names_and_portals() -> None:
    assert iqn_of("stor1@thunder", "img_1") == "iqn.2026-11.org.thunder:stor1.thunder:img-1"
    for address, portal in (("10.0.0.1", PORTAL), ("fd00::1", "[fd00::1]:3260")):
        assert portal_of(address) == portal
        assert split_portal(portal) == (address, 3260)
    assert same_address("[fd00:0::1]", "FD00::1")
    assert same_address("Stor1.example.org", "stor1.example.org")
    assert not same_address("10.0.0.1", "10.0.0.11")
