"""LIO's targets of volumes beside those of replicas: not collected without a kernel."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import rtslib_fb
from cinder.cmd import rtstool

from cinder_thunder.mechanism import volumetargets
from os_brick_thunder.common.mechanism.dmsetup import DmSetup
from os_brick_thunder.common.policy.dmtable import Linear, Table
from os_brick_thunder.common.policy.iscsinames import iqn_of
from os_brick_thunder.common.transport import lio
from tests.contract.conftest import World

PORTAL = "127.0.0.1:3260"
VOLUME = "iqn.2010-10.org.openstack:volume-v"
HOST, READER = "iqn.1993-08.org.debian:01:cmp1", "iqn.1993-08.org.debian:01:cmp2"
REPLICA = iqn_of("here", "image")
#: Half of the disk is a volume, half of it is a base.
HALF = 32 << 11


@pytest.fixture
def disks(world: World) -> tuple[str, str]:
    """The devices of a volume and of a base; they are removed with the world."""
    dm = DmSetup()
    for at, name in enumerate(("thunder-volume", "thunder-base")):
        dm.create(name, Table.of((HALF, Linear(world.disk, at * HALF))))
    return "/dev/mapper/thunder-volume", "/dev/mapper/thunder-base"


@pytest.fixture
def saved(tmp_path: Path, disks: tuple[str, str]) -> Iterator[Path]:
    """A configuration with a volume's target, saved while a base was exported, too."""
    _create(disks[0])
    lio.export(disks[1], REPLICA, PORTAL)
    lio.admit(REPLICA, READER)
    rtstool.save_to_file(str(tmp_path / "saved.json"))
    yield tmp_path / "saved.json"
    volumetargets._remove(VOLUME)
    lio.unexport(REPLICA)


def _create(disk: str) -> None:
    lio.forget_cached()
    rtstool.create(disk, VOLUME, "user", "secret", "False", None, ["127.0.0.1"])
    rtstool.add_initiator(VOLUME, HOST, "user", "secret")


def _reboot() -> None:
    """The kernel forgets its targets, and the agent's are there first."""
    rtslib_fb.RTSRoot().clear_existing(confirm=True)


def _described(iqn: str) -> tuple[str, list[tuple[str, str]]]:
    """The identity of a target's disk, and its initiators with their secrets."""
    lio.forget_cached()
    target = next(t for t in rtslib_fb.RTSRoot().targets if t.wwn == iqn)
    (group,) = target.tpgs
    (lun,) = group.luns
    initiators = [(acl.node_wwn, acl.chap_password) for acl in group.node_acls]
    return lun.storage_object.wwn, sorted(initiators)


def test_a_volume_is_restored_beside_an_agents_export(saved: Path, disks: tuple[str, str]) -> None:
    before = _described(VOLUME)
    _reboot()
    lio.export(disks[1], REPLICA, PORTAL)
    lio.admit(REPLICA, READER)
    replica = _described(REPLICA)
    assert volumetargets.restore(VOLUME, saved)
    assert _described(VOLUME) == before
    assert before[1] == [(HOST, "secret")]
    assert _described(REPLICA) == replica
    assert volumetargets.restore(VOLUME, saved)  # nothing is left to do
    assert _described(VOLUME) == before


def test_a_target_without_its_disk_is_restored_when_the_disk_is_there(
    saved: Path, disks: tuple[str, str]
) -> None:
    """A service that restores everything at once comes before the volumes are active."""
    before = _described(VOLUME)
    _reboot()
    table = DmSetup().table("thunder-volume")
    assert table is not None
    DmSetup().remove("thunder-volume")
    rtstool.restore_from_file(str(saved))
    assert not volumetargets._is_whole(VOLUME)
    DmSetup().create("thunder-volume", table)
    assert volumetargets.restore(VOLUME, saved)
    assert _described(VOLUME) == before


@pytest.mark.parametrize("content", [None, "{", '{"storage_objects": [], "targets": []}'])
def test_nothing_is_left_of_a_target_that_cannot_be_restored(
    saved: Path, disks: tuple[str, str], content: str | None
) -> None:
    """So that it can be made anew: cinder-rtstool takes a disk without a target for a target."""
    _reboot()
    rtslib_fb.BlockStorageObject(VOLUME, dev=disks[0])
    if content is None:
        saved.unlink()
    else:
        saved.write_text(content)
    assert not volumetargets.restore(VOLUME, saved)
    assert list(rtslib_fb.RTSRoot().storage_objects) == []
    _create(disks[0])
    assert volumetargets._is_whole(VOLUME)


def test_targets_of_other_backends_are_restored_and_replicas_are_not(
    saved: Path, disks: tuple[str, str]
) -> None:
    before = _described(VOLUME)
    _reboot()
    volumetargets.restore_others(saved)
    assert _described(VOLUME) == before
    assert lio.targets() == ()
    volumetargets.restore_others(saved)
    assert _described(VOLUME) == before


_ADMIT = """\
import sys
from os_brick_thunder.common.transport import lio
for n in range(20):
    lio.admit(sys.argv[1], sys.argv[2])
    lio.revoke(sys.argv[1], sys.argv[2])
"""


def test_two_processes_work_at_once(saved: Path) -> None:
    command = [sys.executable, "-c", _ADMIT, REPLICA]
    with subprocess.Popen([*command, HOST]) as one, subprocess.Popen([*command, VOLUME]) as other:
        assert (one.wait(120), other.wait(120)) == (0, 0)
