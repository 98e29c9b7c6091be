"""Ubuntu's guest: the keys that its packages are checked with. It is built by benchmarks alone."""

from __future__ import annotations

from pathlib import Path

import pytest

from lab.guests import ubuntu
from lab.guests.bootdisk import GuestError


@pytest.fixture
def archive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(ubuntu, "ARCHIVE", tmp_path.as_uri())
    return tmp_path


def test_other_keys_are_refused(archive: Path) -> None:
    package = archive / ubuntu.KEYS
    package.parent.mkdir(parents=True)
    package.write_bytes(b"other keys")
    with pytest.raises(GuestError, match=r"its SHA-256 is .*, not 36de43b1"):
        ubuntu.install(archive / "tree")
    assert not (archive / "keys.deb").exists()


def test_an_archive_that_does_not_answer(archive: Path) -> None:
    with pytest.raises(GuestError, match=ubuntu.KEYS):
        ubuntu.install(archive / "tree")
