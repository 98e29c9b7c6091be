"""``thunder-status upgrade check``: its results and exit codes."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import os_brick.initiator.connector as brick
import pytest
import sqlalchemy as sa
from packaging.requirements import Requirement

from cinder_thunder.cli import base, status
from cinder_thunder.cli.doctor import upgrade
from cinder_thunder.cli.doctor.checks import Fault, NotApplicable, Warn
from cinder_thunder.db import migration

SUCCESS, WARNING, FAILURE, NOTHING = 0, 1, 2, 255
CINDER = """\
[DEFAULT]
enabled_backends = thunder, plain
[database]
connection = sqlite:///{folder}/cinder.sqlite
[thunder]
volume_driver = cinder_thunder.driver.ThunderDriver
lvm_type = thin
target_helper = lioadm
target_ip_address = 192.0.2.11
[plain]
target_helper = tgtadm
"""


class Host:
    """A healthy host with a cinder.conf, until a test changes it."""

    def __init__(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.conf = folder / "cinder.conf"
        self.conf.write_text(CINDER.format(folder=folder))
        self.database = sa.create_engine(f"sqlite:///{folder}/cinder.sqlite")
        migration.upgrade(self.database)
        self._capsys = capsys

    def replace(self, old: str, new: str) -> None:
        text = self.conf.read_text()
        assert old in text
        self.conf.write_text(text.replace(old, new))

    def check(self) -> tuple[int, dict[str, tuple[int, str]]]:
        """The exit code, and the result of each check."""
        code = status.main(["--config-file", str(self.conf), "upgrade", "check", "--json"])
        said = json.loads(self._capsys.readouterr().out)
        return code, {c["check"]: (c["result"], c["details"]) for c in said["checks"]}


@pytest.fixture
def host(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Host:
    return Host(tmp_path, capsys)


def test_all_is_well(host: Host) -> None:
    code, found = host.check()
    assert code == SUCCESS
    assert {result for result, _ in found.values()} == {SUCCESS}
    assert {name: details for name, (_, details) in found.items() if name != "Versions"} == {
        "Thunder's tables": f"revision {migration.head()}",
        "Cinder's driver interface": f"cinder {metadata.version('cinder')}",
        "os-brick's connectors": f"os-brick {metadata.version('os-brick')}",
        "Backend thunder": "volume group cinder-volumes, thin, lioadm",
        "thin_delta": "thin_delta is right about a known file",
    }


def test_the_table(host: Host, capsys: pytest.CaptureFixture[str]) -> None:
    assert status.main(["--config-file", str(host.conf), "upgrade", "check"]) == SUCCESS
    said = capsys.readouterr()
    assert "| Check: Backend thunder " in said.out
    assert said.err == ""


def test_old_tables(host: Host) -> None:
    migrated = sa.Table(migration.VERSION_TABLE, sa.MetaData(), autoload_with=host.database)
    with host.database.begin() as connection:
        connection.execute(sa.update(migrated).values(version_num="0001"))
    code, found = host.check()
    assert code == FAILURE
    assert found["Thunder's tables"] == (
        FAILURE,
        f"Thunder's tables are at revision 0001, this code needs {migration.head()}. "
        "Remedy: thunder db upgrade, or install the same version everywhere",
    )


def test_no_database(host: Host) -> None:
    host.replace("sqlite:///", "mysql+pymysql://a:SECRET@127.0.0.1:1/")
    code, found = host.check()
    assert code == FAILURE
    result, details = found["Thunder's tables"]
    assert result == FAILURE
    assert details.startswith("does not answer: ")
    assert "SECRET" not in details


@pytest.mark.parametrize(
    ("old", "new", "result", "details"),
    [
        (
            "target_helper = lioadm",
            "target_helper = tgtadm",
            FAILURE,
            "target_helper is tgtadm. Remedy: set it to lioadm in [thunder]",
        ),
        (
            "lvm_type = thin",
            "lvm_type = default",
            FAILURE,
            "lvm_type is default. Remedy: set it to thin in [thunder]",
        ),
        (
            "target_ip_address = 192.0.2.11",
            "",
            WARNING,
            "target_ip_address is not set: hosts are sent to Cinder's my_ip. Remedy: set it in "
            "[thunder] to the address at which hosts reach volumes and masters",
        ),
    ],
)
def test_options_of_a_backend(host: Host, old: str, new: str, result: int, details: str) -> None:
    host.replace(old, new)
    code, found = host.check()
    assert code == result
    assert found["Backend thunder"] == (result, details)


def test_an_address_that_is_another_option(host: Host) -> None:
    host.replace("= 192.0.2.11", "= $my_ip")
    host.replace("[DEFAULT]", "[DEFAULT]\nmy_ip = 192.0.2.12")
    assert host.check()[0] == SUCCESS


def test_no_backend_of_ours(host: Host) -> None:
    host.replace("enabled_backends = thunder, plain", "enabled_backends = plain")
    code, found = host.check()
    assert code == SUCCESS
    assert found["Backends"][1].startswith("not a storage host: no backend in enabled_backends")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "Failed to find some config files: "),
        ("= x\n", "Failed to parse "),
        (
            "[DEFAULT]\nenabled_backends = a\n[a]\nvolume_driver = $nothing\n",
            "no such option nothing in group [DEFAULT]",
        ),
    ],
)
def test_a_configuration_that_cannot_be_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str | None, said: str
) -> None:
    path = tmp_path / "cinder.conf"
    if text is not None:
        path.write_text(text)
    assert status.main(["--config-file", str(path), "upgrade", "check"]) == NOTHING
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"thunder-status: {said}")


def test_no_configuration(capsys: pytest.CaptureFixture[str]) -> None:
    assert status.main(["upgrade", "check"]) == NOTHING
    assert "/etc/cinder/cinder.conf" in capsys.readouterr().err


def test_a_host_without_cinder() -> None:
    program = (
        "import sys\n"
        "sys.modules['oslo_upgradecheck'] = None\n"
        "from cinder_thunder.cli import status\n"
        "sys.exit(status.main(['upgrade', 'check']))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == NOTHING
    (line,) = done.stderr.splitlines()
    assert line == (
        "thunder-status: it needs oslo_upgradecheck, which is not installed: "
        f"{base.WHERE_CINDER_IS}"
    )


INSTALLED = {"cinder": "29.1.0", "os-brick": "8.0.0.dev3", "rich": "15.0.0"}


def version(name: str) -> str:
    if name not in INSTALLED:
        raise metadata.PackageNotFoundError(name)
    return INSTALLED[name]


def check_versions(*wanted: str) -> str:
    return upgrade.check_versions([Requirement(line) for line in wanted], version)


def test_versions() -> None:
    assert check_versions("cinder<30,>=25", "rich<16,>=13") == "all within their ranges"
    assert check_versions("os-brick>=7,<9") == "all within their ranges"  # a pre-release
    with pytest.raises(Warn, match=r"^cinder is 29\.1\.0, not <29,>=25; rich is "):
        check_versions("cinder<29,>=25", "rich<15", "os-brick")
    with pytest.raises(Fault, match="not installed: cliff, waitress") as caught:
        check_versions("cliff", "rich<15", "waitress")
    assert not isinstance(caught.value, Warn)


def test_what_is_required_where_cinder_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "openstack_thunder-1.0.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: openstack-thunder\nVersion: 1.0\n"
        "Requires-Dist: os-brick<8\n"
        'Requires-Dist: cinder<30; extra == "cinder"\n'
        'Requires-Dist: glance<34; extra == "lab"\n'
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    assert [str(requirement) for requirement in upgrade.required()] == [
        "os-brick<8",
        'cinder<30; extra == "cinder"',
    ]


def test_a_source_tree_does_not_say_what_it_requires(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [])
    with pytest.raises(NotApplicable, match="source tree"):
        upgrade.required()


def test_an_os_brick_without_the_maps(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(brick, "_connector_mapping_linux")
    code, found = host.check()
    assert code == FAILURE
    result, details = found["os-brick's connectors"]
    assert result == FAILURE
    assert "has no _connector_mapping_linux['ISCSI']" in details


class Theirs:
    def __init__(self, execute: Any) -> None: ...
    def extend(self, volume: Any, size: int) -> None: ...
    def delete(self, volume: Any, force: bool = False) -> None: ...
    def retype(self, volume: Any) -> None: ...


class Ours(Theirs):
    def __init__(self) -> None: ...
    def extend(self, volume: Any, size: int) -> None: ...
    def delete(self, volume: Any) -> None: ...  # type: ignore[override]
    def of_our_own(self) -> None: ...


def test_methods_with_other_arguments() -> None:
    assert upgrade.overridden(Ours, Theirs) == ["delete", "extend"]
    assert upgrade.differences(Ours, Theirs) == ["delete"]
