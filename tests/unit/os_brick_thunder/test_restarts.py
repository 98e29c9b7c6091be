"""After a reboot an agent depends on nobody else's start, and disturbs nobody on its host."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from os_brick_thunder.agent.mechanism.localpool import LocalPool
from os_brick_thunder.common import errors
from os_brick_thunder.common.mechanism.devicemapper import KernelDeviceMapper
from os_brick_thunder.common.policy.iscsinames import iqn_of
from os_brick_thunder.common.transport.base import Credentials
from tests.unit.os_brick_thunder.test_agent import IMAGE, LUN, PAYLOAD, VOLUME, Host, soon

READER = "iqn.x:cmp3"


@pytest.fixture
def host(tmp_path: Path) -> Host:
    return Host(tmp_path)


def test_a_restart_leaves_the_masters_of_a_cinder_volume_on_the_same_host(host: Host) -> None:
    agent, stacks, _, _ = host.agent()
    master = iqn_of("cmp1@thunder", IMAGE)
    host.targets.export(f"/dev/cinder-volumes/thunder-master-{IMAGE}", master, "10.0.0.1:3260")
    credentials = host.targets.admit(master, READER)
    stacks.attach(PAYLOAD, LUN, soon())
    agent.reconcile()
    assert host.targets.admit(master, READER) == credentials
    assert set(host.targets.exported) == {master, iqn_of("cmp1", IMAGE)}


def test_a_restart_removes_exports_of_an_agent_of_another_name(host: Host) -> None:
    """The option ``host`` was changed: the export would keep its device open."""
    agent, *_ = host.agent()
    for iqn, device in (
        (iqn_of("oldname", IMAGE), f"/dev/mapper/thunder-export-{IMAGE}"),
        (iqn_of("cmp1", "half-built"), ""),
    ):
        host.targets.export(device, iqn, "10.0.0.1:3260")
    agent.reconcile()
    assert host.targets.exported == {}


def test_an_export_that_somebody_else_cleared_is_back_for_its_next_reader(host: Host) -> None:
    """targetctl and cinder-rtstool remove all targets before they restore their own."""
    _, stacks, _, store = host.agent()
    stacks.attach(PAYLOAD, LUN, soon())
    before = host.app.base.exports.open(IMAGE, READER, 0.0)
    host.targets.exported.clear()
    host.targets.admitted.clear()
    export = host.app.base.exports.open(IMAGE, READER, 0.0)
    assert (export.iqn, export.portal) == (before.iqn, before.portal)
    assert set(host.targets.exported) == {export.iqn}
    assert host.leftovers(store) == []


def test_a_base_that_is_removed_while_it_is_opened_is_none(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, stacks, bases, _ = host.agent()
    stacks.attach(PAYLOAD, LUN, soon())
    stacks.detach(VOLUME)
    admit = host.targets.admit

    def slow(iqn: str, initiator: str) -> Credentials:
        credentials = admit(iqn, initiator)
        bases.remove(IMAGE)
        return credentials

    monkeypatch.setattr(host.targets, "admit", slow)
    with pytest.raises(errors.NoReplica, match="cmp1 has no base of img-1"):
        host.app.base.exports.open(IMAGE, READER, 0.0)


class Lvm:
    """A volume group in which somebody has, or has not, made the pool's volume."""

    def __init__(self, *volumes: str, fails: str = "") -> None:
        self.volumes = volumes
        self.fails = fails
        self.ran: list[str] = []

    def __call__(self, *argv: str, stdin: str | None = None, timeout: float = 60.0) -> str:
        self.ran.append(" ".join(argv))
        if argv[0] == self.fails:
            raise errors.ProcessError(argv, 5, "device-mapper: reload ioctl failed")
        return "".join(f"  {name}\n" for name in self.volumes) if argv[0] == "lvs" else ""


def test_the_pools_volume_is_activated_if_nobody_has_done_so() -> None:
    lvm = Lvm("root", "thunder-pool")
    assert LocalPool(KernelDeviceMapper(), lvm).resolve_group("vg", 0) == "/dev/vg/thunder-pool"
    assert lvm.ran[-1] == "lvchange --activate y vg/thunder-pool"
    assert not any("lvcreate" in command for command in lvm.ran)


def test_a_pool_that_cannot_be_activated_is_not_made_anew() -> None:
    lvm = Lvm("thunder-pool", fails="lvchange")
    with pytest.raises(errors.PoolError, match="vg/thunder-pool could not be activated"):
        LocalPool(KernelDeviceMapper(), lvm).resolve_group("vg", 0)
    assert not any("lvcreate" in command for command in lvm.ran)


def test_a_pool_is_made_in_a_group_without_one() -> None:
    lvm = Lvm("root")
    assert LocalPool(KernelDeviceMapper(), lvm).resolve_group("vg", 3) == "/dev/vg/thunder-pool"
    assert lvm.ran[-1].startswith("lvcreate")
    assert "--size 3g" in lvm.ran[-1]


def test_an_active_pool_is_used_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os.path, "exists", lambda path: path == "/dev/vg/thunder-pool")
    lvm = Lvm("thunder-pool")
    assert LocalPool(KernelDeviceMapper(), lvm).resolve_group("vg", 0) == "/dev/vg/thunder-pool"
    assert lvm.ran == ["vgs --noheadings vg"]
