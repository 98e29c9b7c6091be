"""``thunder``: what all commands share, and ``thunder db``."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import sqlalchemy as sa

from cinder_thunder import conf
from cinder_thunder.cli import thunder
from cinder_thunder.db import migration


@pytest.fixture
def cinder_conf_file(tmp_path: Path) -> Path:
    path = tmp_path / "cinder.conf"
    path.write_text(f"[database]\nconnection = sqlite:///{tmp_path}/cinder.sqlite\n")
    return path


def test_upgrade_and_version(cinder_conf_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    option = ["--config-file", str(cinder_conf_file)]
    head = migration.head()
    said = []
    for command in ("version", "upgrade", "upgrade", "version"):
        assert thunder.main(["db", command, *option]) == 0
        said.append(capsys.readouterr().out.strip())
    assert said == [
        "none: run thunder db upgrade",
        f"the tables were at revision None and are at {head} now",
        f"the tables are at revision {head}",
        head,
    ]


def test_a_database_of_its_own(cinder_conf_file: Path, tmp_path: Path) -> None:
    with cinder_conf_file.open("a") as file:
        file.write(f"[{conf.DATABASE_GROUP}]\nconnection = sqlite:///{tmp_path}/own.sqlite\n")
    assert thunder.main(["db", "upgrade", "--config-file", str(cinder_conf_file)]) == 0
    assert not (tmp_path / "cinder.sqlite").exists()
    own = sa.create_engine(f"sqlite:///{tmp_path}/own.sqlite")
    assert migration.version(own) == migration.head()


def test_no_database(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "cinder.conf"
    path.write_text("")
    assert thunder.main(["db", "upgrade", "--config-file", str(path)]) == 1
    assert (
        "no database: set connection in [thunder_database], or in [database], of cinder.conf"
        in capsys.readouterr().err
    )


def test_no_configuration(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert thunder.main(["db", "version", "--config-file", str(tmp_path / "none")]) == 2
    assert "Failed to find some config files" in capsys.readouterr().err


def said(caplog: pytest.LogCaptureFixture) -> str:
    """The error of the last command, in one line."""
    (line,) = [r.message for r in caplog.records if r.levelname == "ERROR"]
    assert "\n" not in line
    return line


def test_no_tables(cinder_conf_file: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert thunder.main(["host", "list", "--config-file", str(cinder_conf_file)]) == 1
    assert said(caplog).startswith("Thunder's tables do not exist: run thunder db upgrade (")


def test_no_server(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "cinder.conf"
    path.write_text("[database]\nconnection = mysql+pymysql://a:SECRET@127.0.0.1:1/cinder\n")
    assert thunder.main(["host", "list", "--config-file", str(path)]) == 1
    line = said(caplog)
    assert line.startswith("the database: ")
    assert line.endswith("; check connection in [database] of cinder.conf")
    assert "SECRET" not in line


@pytest.mark.parametrize(
    "arguments",
    [["image", "show"], ["image", "list", "--nonsense"], ["image", "precache", "i", "--timeout=x"]],
)
def test_usage(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        thunder.main(arguments)
    assert ended.value.code == 2
    assert "usage: thunder image " in capsys.readouterr().err


def test_an_unknown_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert thunder.main(["image", "paint"]) == 2


def test_help_teaches(capsys: pytest.CaptureFixture[str]) -> None:
    """Every command is listed with a line on what it does."""
    with pytest.raises(SystemExit):
        thunder.main(["--help"])
    listed = capsys.readouterr().out
    for name in thunder.COMMANDS:
        (line,) = [line for line in listed.splitlines() if line.strip().startswith(f"{name}  ")]
        assert len(line.strip().removeprefix(name).strip()) > 20
    assert "Could not load" not in listed


def test_stacks_are_for_root(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    config = tmp_path / "thunder.conf"
    config.write_text("[thunder]\nstate_file = /x/state.json\n")
    assert thunder.main(["stack", "list", "--agent-config-file", str(config)]) == 2
    assert said(caplog) == "no permission to read /x/state.json and device-mapper: run it as root"
