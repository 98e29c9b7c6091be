"""Files are replaced whole."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from os_brick_thunder.common import files


def test_a_file_has_the_new_content_and_its_folder_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "file"
    for text in ("old, and longer", "new"):
        files.replace(path, text)
        assert path.read_text() == text
    assert [*path.parent.iterdir()] == [path]
    assert path.parent.stat().st_mode & 0o777 == 0o700


def test_a_failure_leaves_the_old_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    files.replace(path, "old")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left"):
            files.replace(path, "new")
    assert path.read_text() == "old"
    files.replace(path, "newer")
    assert [*tmp_path.iterdir()] == [path]


def test_content_and_folder_are_synced_in_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[str] = []
    real = os.fsync

    def fsync(descriptor: int) -> None:
        synced.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    files.replace(tmp_path / "file", "text")
    assert synced == [str(tmp_path / ".file.new"), str(tmp_path)]
