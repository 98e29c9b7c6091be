"""Devices that go away while they are looked at."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from os_brick_thunder.common import errors
from os_brick_thunder.common.mechanism import blockdev


@pytest.mark.parametrize("code", [errno.ENOENT, errno.ENODEV])
def test_a_device_that_has_just_gone(monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    """sysfs fails to open its files, and to read those that are open."""

    def fail(_path: Path) -> str:
        raise OSError(code, "gone")

    monkeypatch.setattr(Path, "read_text", fail)
    for look in (blockdev.size, blockdev.sector, blockdev.bytes_read, blockdev.requests):
        with pytest.raises(errors.DeviceNotFound, match="there is no block device 8:0"):
            look("8:0")


def test_another_failure_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_path: Path) -> str:
        raise OSError(errno.EIO, "broken")

    monkeypatch.setattr(Path, "read_text", fail)
    with pytest.raises(OSError, match="broken"):
        blockdev.size("8:0")


def test_sizes_are_bytes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    folder = tmp_path / "dev/block/8:0"
    (folder / "queue").mkdir(parents=True)
    (folder / "queue/logical_block_size").write_text("4096\n")
    (folder / "size").write_text("2048\n")
    (folder / "stat").write_text("  1 0 16 0 0 0 0 0 0 0 0\n")
    monkeypatch.setattr(blockdev, "SYSFS", tmp_path)
    assert blockdev.size("8:0") == 1 << 20
    assert blockdev.sector("8:0") == 4096
    assert blockdev.bytes_read("8:0") == 8192


def test_what_is_in_a_page_cache(tmp_path: Path) -> None:
    (tmp_path / "disk").write_bytes(bytes(1 << 20))
    cache = blockdev.page_cache(str(tmp_path / "disk"), 1 << 20)
    assert cache.share(5000, 6000) == 1
    with pytest.raises(OSError, match="disk"):
        cache.share(1 << 40, (1 << 40) + 1)
    cache.close()
    with pytest.raises(OSError, match="absent"):
        blockdev.page_cache(str(tmp_path / "absent"), 1 << 20)
    with pytest.raises(OSError, match="disk"):
        blockdev.page_cache(str(tmp_path / "disk"), 0)
