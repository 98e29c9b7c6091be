"""What the agent relies on in device-mapper, thin pool, loop devices and LIO."""

from __future__ import annotations

import pytest

from os_brick_thunder.agent.policy import layout
from os_brick_thunder.common import errors
from os_brick_thunder.common.policy import devnames, dmstatus, dmtable
from os_brick_thunder.common.policy.dmtable import Table
from tests.contract.conftest import MIB, World

SECTORS = 64 * MIB // 512


def linear(world: World, offset: int = 0) -> Table:
    return Table.of((SECTORS - offset, dmtable.Linear(world.disk, offset)))


def opened(world: World, name: str) -> int:
    return next(device.opened for device in world.kit.dm.devices() if device.name == name)


def test_create_matches_what_is_there(world: World) -> None:
    dm = world.kit.dm
    dm.create("thunder-a", linear(world))
    dm.create("thunder-a", linear(world))
    found = dm.table("thunder-a")
    assert found is not None
    assert found.resolved(world.kit.blocks.devnum) == linear(world).resolved(
        world.kit.blocks.devnum
    )


def test_create_refuses_another_table_under_the_name(world: World) -> None:
    dm = world.kit.dm
    dm.create("thunder-a", linear(world))
    with pytest.raises(errors.TableMismatch, match="thunder-a exists with another table"):
        dm.create("thunder-a", linear(world, 8))
    found = dm.table("thunder-a")
    assert found is not None
    assert found.length == SECTORS


def test_create_over_nothing_fails_and_leaves_nothing(world: World) -> None:
    table = Table.of((8, dmtable.Linear(devnames.path("thunder-nothing"))))
    with pytest.raises((errors.ProcessError, errors.DeviceNotFound)):
        world.kit.dm.create("thunder-a", table)
    assert world.kit.dm.table("thunder-a") is None


def test_remove_of_what_is_absent_is_success(world: World) -> None:
    world.kit.dm.remove("thunder-never-was")
    assert world.kit.dm.table("thunder-never-was") is None


def test_what_another_device_uses_is_not_removed(world: World) -> None:
    dm = world.kit.dm
    dm.create("thunder-a", linear(world))
    dm.create("thunder-b", Table.of((8, dmtable.Linear(devnames.path("thunder-a")))))
    assert opened(world, "thunder-a") == 1
    with pytest.raises(errors.DeviceBusy, match="thunder-a"):
        dm.remove("thunder-a")
    dm.remove("thunder-b")
    dm.remove("thunder-a")
    assert {"thunder-a", "thunder-b"}.isdisjoint(d.name for d in dm.devices())


def test_reload_swaps_the_table(world: World) -> None:
    dm = world.kit.dm
    dm.create("thunder-a", linear(world))
    dm.reload("thunder-a", Table.of((SECTORS, dmtable.Zero())))
    found = dm.table("thunder-a")
    assert found is not None
    assert found.devices == ()
    with pytest.raises(errors.ProcessError):
        dm.reload("thunder-b", linear(world))


def test_a_suspended_device_says_so(world: World) -> None:
    dm = world.kit.dm
    dm.create("thunder-a", linear(world))
    dm.suspend("thunder-a")
    assert next(d for d in dm.devices() if d.name == "thunder-a").suspended
    dm.reload("thunder-a", linear(world, 8))
    assert not next(d for d in dm.devices() if d.name == "thunder-a").suspended
    dm.suspend("thunder-a")
    dm.resume("thunder-a")
    assert not next(d for d in dm.devices() if d.name == "thunder-a").suspended


def test_read_only_devices_say_so(world: World) -> None:
    world.kit.dm.create("thunder-a", linear(world), readonly=True)
    found = next(d for d in world.kit.dm.devices() if d.name == "thunder-a")
    assert found.readonly
    assert found.uuid == "THUNDER-thunder-a"


def test_multipath_fails_over_and_back_by_message(world: World) -> None:
    dm = world.kit.dm
    dm.create("thunder-a", linear(world))
    paths = (devnames.path("thunder-a"), world.disk)
    dm.create("thunder-m", Table.of((SECTORS, dmtable.Multipath(paths))))
    number = world.kit.blocks.devnum(devnames.path("thunder-a"))

    def flag() -> str:
        words = dm.status("thunder-m").split()
        return words[words.index(number) + 1]

    assert flag() == "A"
    dm.message("thunder-m", f"fail_path {number}")
    assert flag() == "F"
    dm.message("thunder-m", f"reinstate_path {number}")
    assert flag() == "A"
    dm.message("thunder-m", "switch_group 1")
    dm.message("thunder-m", f"fail_path {number}")
    dm.reload("thunder-m", Table.of((SECTORS, dmtable.Multipath(paths[::-1]))))
    assert flag() == "A"  # a new table knows nothing of old failures


def test_a_suspended_multipath_takes_no_message(world: World) -> None:
    dm = world.kit.dm
    dm.create("thunder-m", Table.of((SECTORS, dmtable.Multipath((world.disk,)))))
    number = world.kit.blocks.devnum(world.disk)
    dm.suspend("thunder-m")
    with pytest.raises(errors.ProcessError, match="busy"):
        dm.message("thunder-m", f"fail_path {number}")
    assert dmstatus.paths(dm.status("thunder-m")) == {number: True}
    dm.resume("thunder-m")
    dm.message("thunder-m", f"fail_path {number}")
    assert dmstatus.paths(dm.status("thunder-m")) == {number: False}


def test_thin_devices_come_and_go(world: World) -> None:
    kit = world.kit
    with pytest.raises(errors.ProcessError):
        kit.dm.create("thunder-t", layout.thin_table(MIB, 7))
    kit.pool.create_thin(7)
    with pytest.raises(errors.ProcessError, match="exists"):
        kit.pool.create_thin(7)
    assert kit.metadata.ids() == {devnames.ZERO_ID, 7}
    kit.dm.create("thunder-t", layout.thin_table(MIB, 7))
    with pytest.raises(errors.ProcessError, match="busy"):
        kit.pool.delete_thin(7)
    kit.dm.remove("thunder-t")
    kit.pool.delete_thin(7)
    kit.pool.delete_thin(7)  # absent is success
    assert kit.metadata.ids() == {devnames.ZERO_ID}
    status = kit.pool.status()
    assert status.healthy
    assert status.used == 0


def test_a_wiped_device_fails_lets_go_and_can_be_removed(world: World) -> None:
    kit = world.kit
    kit.pool.create_thin(7)
    kit.dm.create("thunder-t", layout.thin_table(64 * MIB, 7))
    over = Table.of((SECTORS, dmtable.Linear(devnames.path("thunder-t"))))
    kit.dm.create("thunder-o", over)
    kit.dm.wipe("thunder-t")
    table = kit.dm.table("thunder-t")
    assert table == Table.of((SECTORS, dmtable.Error()))
    kit.pool.delete_thin(7)  # though there still are the devices
    assert kit.metadata.ids() == {devnames.ZERO_ID}
    kit.dm.remove("thunder-o")
    kit.dm.remove("thunder-t")
    with pytest.raises(errors.ProcessError):
        kit.dm.wipe("thunder-t")


def test_what_is_asked_of_a_device_that_is_not_there_is_an_error(world: World) -> None:
    with pytest.raises(errors.ProcessError):
        world.kit.dm.status("thunder-never-was")
    with pytest.raises(errors.ProcessError):
        world.kit.dm.message("thunder-never-was", "fail_path 8:0")


def test_a_device_without_a_table_has_an_empty_status_and_table(world: World) -> None:
    """The state of every device for a moment after its creation."""
    world.create_bare("thunder-b")
    assert world.kit.dm.status("thunder-b") == ""
    assert world.kit.dm.table("thunder-b") == Table(())


def test_a_table_of_many_segments_is_told_whole(world: World) -> None:
    """It does not fit into the first buffer that is passed to the kernel."""
    linear = ((8, dmtable.Linear(world.disk, 8 * (i % 100))) for i in range(600))
    expected = Table.of(*linear, (8, dmtable.Zero()), (8, dmtable.Error()))
    world.kit.dm.create("thunder-a", expected)
    devnum = world.kit.blocks.devnum
    found = world.kit.dm.table("thunder-a")
    assert found is not None
    assert found.resolved(devnum) == expected.resolved(devnum)


def test_a_thin_device_is_told_by_its_pool_and_id(world: World) -> None:
    world.kit.pool.create_thin(7)
    world.kit.dm.create("thunder-t", layout.thin_table(MIB, 7))
    found = world.kit.dm.table("thunder-t")
    assert found is not None
    (segment,) = found.segments
    assert isinstance(segment.target, dmtable.Thin)
    assert segment.target.id == 7
    assert segment.length == MIB // 512
    devnum = world.kit.blocks.devnum
    assert devnum(segment.target.pool) == devnum(devnames.path(devnames.POOL))


def test_a_thin_device_tells_what_it_holds(world: World) -> None:
    world.kit.pool.create_thin(7)
    world.kit.dm.create("thunder-t", layout.thin_table(64 * MIB, 7))
    assert dmstatus.mapped(world.kit.dm.status("thunder-t")) == 0
    world.kit.dm.remove("thunder-t")
    world.kit.pool.delete_thin(7)


def test_loops_are_found_again_and_hold_their_device(world: World) -> None:
    kit = world.kit
    kit.dm.create("thunder-a", linear(world), readonly=True)
    device = devnames.path("thunder-a")
    (first,) = kit.loops.attach(device, 1)
    loops = kit.loops.attach(device, 2)
    assert len(loops) == 2
    assert first in loops
    assert sorted(kit.loops.attach(device, 2)) == sorted(kit.loops.find(device)) == sorted(loops)
    for loop in loops:
        with pytest.raises(errors.DeviceBusy):
            kit.dm.remove("thunder-a")
        kit.loops.detach(loop)
        kit.loops.detach(loop)
    assert kit.loops.find(device) == []
    kit.dm.remove("thunder-a")


def test_exports_admit_by_name_and_secret(world: World) -> None:
    kit, iqn = world.kit, "iqn.2026-11.org.thunder:here:image"
    kit.dm.create("thunder-a", linear(world), readonly=True)
    kit.dm.create(
        "thunder-e", Table.of((SECTORS, dmtable.Linear(devnames.path("thunder-a")))), True
    )
    with pytest.raises(errors.ExportError, match="no export"):
        kit.targets.admit(iqn, "iqn.2026-11.org.example:one")
    kit.targets.export(devnames.path("thunder-e"), iqn, "127.0.0.1:3260")
    kit.targets.export(devnames.path("thunder-e"), iqn, "127.0.0.1:3260")
    one = kit.targets.admit(iqn, "iqn.2026-11.org.example:one")
    assert kit.targets.admit(iqn, "iqn.2026-11.org.example:one") == one
    assert kit.targets.admit(iqn, "iqn.2026-11.org.example:two").password != one.password
    kit.targets.revoke(iqn, "iqn.2026-11.org.example:one")
    kit.targets.revoke(iqn, "iqn.2026-11.org.example:one")
    (found,) = kit.targets.targets()
    assert (found.iqn, found.initiators) == (iqn, ("iqn.2026-11.org.example:two",))
    assert found.readers == ()  # admitted, and never logged in
    kit.targets.unexport(iqn)
    kit.targets.unexport(iqn)
    assert kit.targets.targets() == ()
    kit.dm.remove("thunder-e")


def test_targets_that_the_kernel_has(world: World) -> None:
    assert world.kit.dm.has_target("verity")  # a module, which this loads
    assert world.kit.dm.has_target("linear")
    assert not world.kit.dm.has_target("thunder")
