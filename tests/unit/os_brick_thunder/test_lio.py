"""What root does with names that came from another host, and what rtslib requires of a host."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rtslib_fb.utils import RTSLibError

from os_brick_thunder.common import errors
from os_brick_thunder.common.policy.iscsinames import iqn_of
from os_brick_thunder.common.transport import lio

IQN = iqn_of("stor1@thunder", "img-1")
PORTAL = "10.0.0.1:3260"
NAME = "iqn.1993-08.org.debian:01:abc"


class Root:
    """rtslib without a kernel, as far as it refuses a host without the folder it requires."""

    def __init__(self) -> None:
        if not lio.DBROOT.is_dir():
            raise RTSLibError(f"Cannot set dbroot to {lio.DBROOT}")
        self.targets: list[Any] = []
        self.storage_objects: list[Any] = []

    def invalidate_caches(self) -> None:
        pass


@pytest.fixture(autouse=True)
def dbroot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(lio, "DBROOT", tmp_path / "etc" / "target")
    monkeypatch.setattr("rtslib_fb.RTSRoot", Root)
    return lio.DBROOT


def test_a_host_without_the_folder_of_rtslib_gets_it(dbroot: Path) -> None:
    assert lio.targets() == ()
    assert dbroot.is_dir()


def test_the_folder_is_roots_alone_whatever_the_umask(dbroot: Path) -> None:
    """oslo.privsep's daemon has none, and the folder has the secrets of volumes in it."""
    before = os.umask(0)
    try:
        lio.targets()
    finally:
        os.umask(before)
    assert dbroot.stat().st_mode & 0o777 == 0o755


def test_a_folder_that_cannot_be_made_is_an_error_of_the_export(dbroot: Path) -> None:
    dbroot.parent.write_text("a file")
    with pytest.raises(errors.ExportError, match=r"Not a directory|File exists"):
        lio.targets()


@pytest.mark.parametrize(
    "iqn",
    ["", "../../x", "iqn.2010-10.org.openstack:volume-1", IQN + "/x", IQN + "\n", IQN + " x"],
)
def test_only_targets_with_names_of_replicas_are_touched(iqn: str) -> None:
    for call in (
        lambda: lio.export("/dev/x", iqn, PORTAL),
        lambda: lio.admit(iqn, NAME),
        lambda: lio.revoke(iqn, NAME),
        lambda: lio.unexport(iqn),
    ):
        with pytest.raises(errors.ExportError, match="the iSCSI name of a replica was expected"):
            call()


@pytest.mark.parametrize("name", ["", "cmp1", "iqn.x:../../y", "iqn.x:a b", "iqn.x:a\nb"])
def test_a_name_that_is_no_initiators_is_not_admitted(name: str) -> None:
    with pytest.raises(errors.ExportError, match="initiator: "):
        lio.admit(IQN, name)


#: Holds a lock on the folder given until its standard input ends.
_HOLDER = """\
import fcntl, os, sys
fcntl.flock(os.open(sys.argv[1], os.O_RDONLY), fcntl.LOCK_EX)
print("held", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def other_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Another process of ours on this host, which uses rtslib."""
    monkeypatch.setattr(lio, "CONFIGFS", tmp_path)
    holder = subprocess.Popen(
        [sys.executable, "-c", _HOLDER, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    yield holder
    holder.kill()
    holder.wait()
    holder.stdout.close()


def test_two_processes_do_not_use_rtslib_at_once(other_process: Any) -> None:
    done = threading.Event()

    def work() -> None:
        lio.targets()
        done.set()

    threading.Thread(target=work, daemon=True).start()
    assert not done.wait(0.5)
    other_process.stdin.close()
    assert done.wait(15)


def test_a_process_that_hangs_in_the_kernel_stops_no_other_for_good(
    other_process: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(lio, "LIO_LOCK", 0.2)
    assert lio.targets() == ()
    assert "LIO has been in use by another process" in caplog.text


def test_the_lock_is_free_after_a_call_within_a_call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lio, "CONFIGFS", tmp_path)
    with lio.exclusive():
        assert lio.targets() == ()
        with pytest.raises(errors.ExportError):
            lio.export("/dev/x", "no name of a replica", PORTAL)
    other = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.close(other)


@pytest.fixture
def configfs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The kernel's tree, as far as look-ups read it."""
    monkeypatch.setattr("rtslib_fb.node.CFSNode.configfs_dir", str(tmp_path))
    return tmp_path


def test_targets_and_disks_are_found_by_name(configfs: Path) -> None:
    assert (lio.names(), lio.find(IQN), lio.find_store("a")) == ([], None, None)
    (configfs / "iscsi" / "discovery_auth").mkdir(parents=True)
    for name in (IQN, "iqn.2026-11.org.example:not_ours"):  # rtslib refuses an underscore
        (configfs / "iscsi" / name).mkdir()
    found = lio.find(IQN)
    assert found is not None
    assert found.wwn == IQN
    assert lio.find(IQN + "2") is None
    assert sorted(lio.names()) == sorted(["iqn.2026-11.org.example:not_ours", IQN])
    assert [target.iqn for target in lio.targets()] == [IQN]
    for folder in ("alua", "iblock_0/a", "fileio_1/b", "rd_mcp_2/c", "iblock_4/d"):
        (configfs / "core" / folder).mkdir(parents=True)
    store = lio.find_store("d")
    assert store is not None
    assert store.path == str(configfs / "core/iblock_4/d")
    assert lio.find_store("b") is None
    assert sorted(index for _, index in lio._backstores()) == [0, 1, 2, 4]
