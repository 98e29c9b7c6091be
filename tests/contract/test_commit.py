"""What of the local pool is on disk at once: not collected without a kernel."""

from __future__ import annotations

from pathlib import Path

from os_brick_thunder.common.policy import devnames
from os_brick_thunder.common.run import run
from tests.contract.conftest import World


def test_a_thin_device_outlives_a_power_cut_right_after_it_was_created(
    world: World, tmp_path: Path
) -> None:
    """The kernel commits the metadata before it answers such a message: an entry that was recorded
    as ready never lacks its thin device.
    """
    world.kit.pool.create_thin(7)
    now = tmp_path / "metadata"
    metadata = devnames.path(devnames.POOL_METADATA)
    run("dd", f"if={metadata}", f"of={now}", "bs=1M", "iflag=direct")
    assert "7" in run("thin_ls", "--no-headers", "--format", "DEV", str(now)).split()
