"""What udev makes of our devices, with the rules that are installed with us."""

from __future__ import annotations

import subprocess
from pathlib import Path

from os_brick_thunder.common.policy import devnames
from tests.contract.conftest import World
from tests.contract.test_devicemapper import linear


def test_a_device_keeps_its_name_when_udev_is_told_of_it_anew(world: World) -> None:
    """As in ``udevadm trigger --action=add``, of all devices."""
    world.kit.dm.create("thunder-a", linear(world))
    link = Path(devnames.path("thunder-a"))
    kernel = link.resolve().name
    entry = f"/sys/block/{kernel}"
    subprocess.run(["udevadm", "trigger", "--action=add", "--settle", entry], check=True)
    assert link.resolve().name == kernel


def test_the_link_goes_with_the_device(world: World) -> None:
    """Before another device can get its number."""
    link = Path(devnames.path("thunder-a"))
    for _ in range(5):
        world.kit.dm.create("thunder-a", linear(world))
        assert link.is_block_device()
        world.kit.dm.remove("thunder-a")
        assert not link.is_symlink()
