"""LIO's targets of volumes beside those of replicas: not collected without a kernel."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import rtslib_fb
from cinder.cmd import rtstool
from rtslib_fb.utils import RTSLibError

from cinder_thunder.mechanism import saveconfig, volumetargets
from os_brick_thunder.common.mechanism.devicemapper import KernelDeviceMapper
from os_brick_thunder.common.policy.dmtable import Linear, Table
from os_brick_thunder.common.policy.iscsinames import iqn_of
from os_brick_thunder.common.transport import lio
from tests.contract.conftest import World

PORTAL = "127.0.0.1:3260"
VOLUME, OTHER = "iqn.2010-10.org.openstack:volume-v", "iqn.2010-10.org.openstack:volume-w"
HOST, READER = "iqn.1993-08.org.debian:01:cmp1", "iqn.1993-08.org.debian:01:cmp2"
REPLICA = iqn_of("here", "image")
#: Half of the disk is a volume, half of it is a base.
HALF = 32 << 11


@pytest.fixture
def disks(world: World) -> Iterator[tuple[str, str]]:
    """The devices of a volume and of a base; they are removed with the world."""
    dm = KernelDeviceMapper()
    for at, name in enumerate(("thunder-volume", "thunder-base")):
        dm.create(name, Table.of((HALF, Linear(world.disk, at * HALF))))
    yield "/dev/mapper/thunder-volume", "/dev/mapper/thunder-base"
    for iqn in (VOLUME, OTHER):
        volumetargets.remove(iqn)


@pytest.fixture
def saved(tmp_path: Path, disks: tuple[str, str]) -> Iterator[Path]:
    """A configuration with a volume's target, saved while a base was exported, too."""
    _create(disks[0])
    lio.export(disks[1], REPLICA, PORTAL)
    lio.admit(REPLICA, READER)
    rtstool.save_to_file(str(tmp_path / "saved.json"))
    yield tmp_path / "saved.json"
    lio.unexport(REPLICA)


def _create(disk: str) -> None:
    volumetargets.create(disk, VOLUME, ["127.0.0.1"], 3260, iser=False)
    volumetargets.admit(VOLUME, HOST, "user", "secret")


def _dumped(iqn: str) -> Any:
    """What rtslib saves of a target and of its disk, without what is random."""

    def plain(found: Any) -> Any:
        if isinstance(found, dict):
            return {key: plain(value) for key, value in found.items() if key != "alias"}
        return [plain(each) for each in found] if isinstance(found, list) else found

    store, target = lio.find_store(iqn), lio.find(iqn)
    assert store is not None
    assert target is not None
    disk = store.dump()
    assert disk.pop("wwn")
    return plain([disk, target.dump()])


def _reboot() -> None:
    """The kernel forgets its targets, and the agent's are there first."""
    rtslib_fb.RTSRoot().clear_existing(confirm=True)


def _described(iqn: str) -> tuple[str, list[tuple[str, str]]]:
    """The identity of a target's disk, and its initiators with their secrets."""
    lio.forget_cached()
    target = lio.find(iqn)
    assert target is not None
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
    table = KernelDeviceMapper().table("thunder-volume")
    assert table is not None
    KernelDeviceMapper().remove("thunder-volume")
    rtstool.restore_from_file(str(saved))
    assert not volumetargets._is_whole(VOLUME)
    KernelDeviceMapper().create("thunder-volume", table)
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


def test_a_volume_is_exported_as_cinder_rtstool_exports_it(disks: tuple[str, str]) -> None:
    lio.forget_cached()
    rtstool.create(disks[0], VOLUME, "user", "secret", "False", None, ["127.0.0.1"])
    rtstool.add_initiator(VOLUME, HOST, "user", "secret")
    expected = _dumped(VOLUME)
    rtstool.delete(VOLUME)
    _create(disks[0])
    _create(disks[0])  # what is there stays
    assert _dumped(VOLUME) == expected
    volumetargets.revoke(VOLUME, HOST)
    assert _described(VOLUME)[1] == []
    volumetargets.revoke(VOLUME, HOST)
    lio.forget_cached()
    rtstool.add_initiator(VOLUME, HOST, "user", "secret")
    assert _dumped(VOLUME) == expected
    for _ in range(2):
        volumetargets.remove(VOLUME)
        assert not volumetargets.exists(VOLUME)
        assert list(rtslib_fb.RTSRoot().storage_objects) == []
        assert list(Path(lio._core()).glob("iblock_*")) == []
    volumetargets.revoke(VOLUME, HOST)
    with pytest.raises(RTSLibError, match="there is no target"):
        volumetargets.admit(VOLUME, HOST, "user", "secret")


def test_an_interrupted_attempt_to_export_is_completed(disks: tuple[str, str]) -> None:
    """cinder-rtstool takes a disk without a target for a target, and an ACL without a LUN for one
    that was admitted.
    """
    store = rtslib_fb.BlockStorageObject(VOLUME, dev=disks[0])
    target = rtslib_fb.Target(rtslib_fb.FabricModule("iscsi"), VOLUME, mode="create")
    rtslib_fb.TPG(target, 1, mode="create")
    volumetargets.create(disks[0], VOLUME, ["127.0.0.1"], 3260, iser=False)
    rtslib_fb.NodeACL(rtslib_fb.TPG(lio.find(VOLUME), 1, mode="lookup"), HOST, mode="create")
    volumetargets.admit(VOLUME, HOST, "user", "secret")
    made = _dumped(VOLUME)
    volumetargets.remove(VOLUME)
    assert not store.exists
    _create(disks[0])
    assert _dumped(VOLUME) == made
    group = rtslib_fb.TPG(lio.find(VOLUME), 1, mode="lookup")
    group.enable = False  # by an operator
    volumetargets.create(disks[0], VOLUME, ["127.0.0.1"], 3260, iser=False)
    assert not group.enable  # a host uses it: it is not made anew


def test_nothing_remains_of_an_export_that_failed(disks: tuple[str, str]) -> None:
    with pytest.raises(RTSLibError, match="Could not create NetworkPortal"):
        volumetargets.create(disks[0], VOLUME, ["127.0.0.1", "127.0.0.999"], 3260, iser=False)
    assert not volumetargets.exists(VOLUME)
    assert list(rtslib_fb.RTSRoot().storage_objects) == []
    _create(disks[0])


def test_what_has_changed_is_saved_as_if_everything_were(
    saved: Path, disks: tuple[str, str], tmp_path: Path
) -> None:
    def content(file: Path) -> Any:
        config = json.loads(file.read_text())
        for kind in ("storage_objects", "targets"):
            config[kind].sort(key=lambda entry: entry.get("name") or entry["wwn"])
        return config

    saveconfig.save(None, saved)
    assert [part["targets"][0]["wwn"] for part in saveconfig.parts(saved)] == [VOLUME]
    volumetargets.admit(VOLUME, READER, "user", "secret")
    lio.unexport(REPLICA)
    volumetargets.create(disks[1], OTHER, ["127.0.0.1"], 3260, iser=False)
    saveconfig.save([VOLUME, OTHER], saved)
    saveconfig.save(None, tmp_path / "whole.json")
    assert content(saved) == content(tmp_path / "whole.json")
    rtslib_fb.RTSRoot().save_to_file(str(tmp_path / "rtslib.json"))
    assert content(saved) == content(tmp_path / "rtslib.json")
    volumetargets.remove(OTHER)
    saveconfig.save([OTHER], saved)
    before = _described(VOLUME)
    _reboot()
    rtstool.restore_from_file(str(saved))
    assert _described(VOLUME) == before
    assert lio.names() == [VOLUME]


def test_a_target_that_rtslib_refuses_stops_no_other(saved: Path, disks: tuple[str, str]) -> None:
    """A name with an underscore is one for the kernel and none for rtslib."""
    foreign = Path(rtslib_fb.FabricModule("iscsi").path) / "iqn.2026-11.org.example:not_ours"
    foreign.mkdir()
    try:
        lio.export(disks[1], REPLICA, PORTAL)
        lio.admit(REPLICA, HOST)
        assert [target.initiators for target in lio.targets()] == [tuple(sorted((HOST, READER)))]
        volumetargets.admit(VOLUME, READER, "user", "secret")
        lio.unexport(REPLICA)
        volumetargets.remove(VOLUME)
        assert lio.names() == [foreign.name]
    finally:
        foreign.rmdir()


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
