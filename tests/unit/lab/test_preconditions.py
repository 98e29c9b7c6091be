"""A machine that cannot run a lab gets one line with a remedy."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from lab.cli import main
from lab.errors import PreconditionError
from lab.nodes import preconditions
from lab.nodes.topology import Topology

_TOPOLOGY = Topology.standard(storage=1, compute=3)


@pytest.fixture(autouse=True)
def good_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pretend that this machine has everything."""
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(preconditions, "TUN", Path("/dev/null"))
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=2**40))


def test_a_good_machine_passes() -> None:
    preconditions.check(control_plane=True)
    preconditions.check_memory(_TOPOLOGY)


def test_not_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(PreconditionError, match=r"^the lab makes .* taps: run it as root$"):
        preconditions.check(control_plane=False)


def test_no_tun_device(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(preconditions, "TUN", tmp_path / "tun")
    with pytest.raises(PreconditionError, match=r"there is no .*/tun: run `modprobe tun`"):
        preconditions.check(control_plane=False)


def test_missing_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    missing = {"linux.uml", "mariadbd"}
    monkeypatch.setattr(shutil, "which", lambda name: None if name in missing else name)
    with pytest.raises(PreconditionError, match=r"`apt-get install user-mode-linux`$"):
        preconditions.check(control_plane=False)
    with pytest.raises(PreconditionError, match=r"install mariadb-server user-mode-linux`$"):
        preconditions.check(control_plane=True)


def test_too_little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=3 << 30))
    with pytest.raises(PreconditionError, match=r"^3072 MiB .* up to 4096 MiB: bring up fewer"):
        preconditions.check_memory(_TOPOLOGY)


def test_the_command_says_it_in_one_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("THUNDER_LAB_STATE", str(tmp_path / "state"))
    monkeypatch.setattr(os, "geteuid", lambda: 1000)

    assert main(["up"]) == 2

    output = capsys.readouterr().err
    assert output.startswith("lab: the lab makes network namespaces")
    assert output.count("\n") == 1
    assert not (tmp_path / "state").exists()
