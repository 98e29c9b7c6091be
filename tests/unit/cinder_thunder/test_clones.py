"""Volumes from masters: how many LVM commands they take, and that none is of another image."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from cinder_thunder.masters import clones as clones_module
from cinder_thunder.masters.clones import FILLING, MASTER, MOST_SIZES, SIZED, TREE, Clones
from os_brick_thunder.common import errors
from tests.fake_storage import EXTENT, FileVolumes

MASTER_SIZE, SIZE = EXTENT, 4 * EXTENT


class CountedVolumes(FileVolumes):
    """Keeps the commands that were given."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.commands: list[str] = []

    def snapshot(self, name: str, origin: str) -> None:
        self.commands.append("snapshot")
        super().snapshot(name, origin)

    def extend(self, name: str, size: int) -> None:
        self.commands.append("extend")
        super().extend(name, size)

    def rename(self, name: str, to: str) -> None:
        self.commands.append("rename")
        super().rename(name, to)


@pytest.fixture
def lvm(tmp_path: Path) -> CountedVolumes:
    lvm = CountedVolumes(tmp_path / "vg")
    add_master(lvm, "i", b"image")
    return lvm


@pytest.fixture
def clones(lvm: CountedVolumes) -> Clones:
    return Clones(lvm)  # type: ignore[arg-type]


def add_master(lvm: FileVolumes, image: str, content: bytes) -> None:
    lvm.create(MASTER + image, MASTER_SIZE)
    with open(lvm.path(MASTER + image), "r+b") as file:
        file.write(content)


def make(clones: Clones, lvm: CountedVolumes, name: str, size: int = SIZE) -> list[str]:
    """:returns: the commands that it took"""
    lvm.commands.clear()
    clones.make("i", MASTER_SIZE, name, size)
    path = Path(lvm.path(name))
    assert path.stat().st_size == size
    assert path.read_bytes()[:5] == b"image"
    return list(lvm.commands)


def test_a_bulk_takes_one_command_a_volume(clones: Clones, lvm: CountedVolumes) -> None:
    assert make(clones, lvm, "a") == ["snapshot", "extend"]
    assert make(clones, lvm, "b") == ["snapshot", "extend", "rename", "snapshot"]
    assert [make(clones, lvm, name) for name in "cde"] == [["snapshot"]] * 3
    assert make(clones, lvm, "as-large-as-the-image", MASTER_SIZE) == ["snapshot"]
    assert not lvm.is_active(f"{SIZED}i-{SIZE}")


def test_a_bulk_at_once_makes_one_sized_snapshot(clones: Clones, lvm: CountedVolumes) -> None:
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda n: clones.make("i", MASTER_SIZE, f"v{n}", SIZE), range(16)))
    assert lvm.commands.count("rename") == 1
    assert {Path(lvm.path(f"v{n}")).stat().st_size for n in range(16)} == {SIZE}


def test_single_volumes_of_many_sizes_leave_nothing(clones: Clones, lvm: CountedVolumes) -> None:
    for times in range(2, 8):
        make(clones, lvm, f"v{times}", times * EXTENT)
    assert not [name for name in lvm.names() if name.startswith((SIZED, FILLING))]


def test_an_image_has_few_sized_snapshots(clones: Clones, lvm: CountedVolumes) -> None:
    for times in range(2, 2 + 2 * MOST_SIZES):
        for n in range(3):
            make(clones, lvm, f"v{times}-{n}", times * EXTENT)
    assert len([name for name in lvm.names() if name.startswith(SIZED)]) == MOST_SIZES


def test_one_that_is_gone_costs_no_volume(clones: Clones, lvm: CountedVolumes) -> None:
    for name in "ab":
        make(clones, lvm, name)
    lvm.remove(f"{SIZED}i-{SIZE}")  # by an operator
    assert make(clones, lvm, "c") == ["snapshot", "snapshot", "extend"]


@pytest.mark.parametrize("verb", ["snapshot", "extend", "rename"])
def test_one_that_cannot_be_made_costs_no_volume_and_leaves_nothing(
    clones: Clones, lvm: CountedVolumes, verb: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(clones, lvm, "a")
    failing = f"{FILLING}{SIZED}i-{SIZE}"
    whole = getattr(FileVolumes, verb)

    def refuse(self: FileVolumes, name: str, other: object) -> None:
        if name == failing:
            raise errors.ProcessError((verb, name), 5, "refused")
        whole(self, name, other)

    monkeypatch.setattr(FileVolumes, verb, refuse)
    make(clones, lvm, "b")
    assert lvm.names() == {MASTER + "i", "a", "b"}


def test_what_an_earlier_process_made_is_used(clones: Clones, lvm: CountedVolumes) -> None:
    for name in "ab":
        make(clones, lvm, name)
    again = Clones(lvm)  # type: ignore[arg-type]
    again.adopt(lvm.names())
    assert make(again, lvm, "c") == ["snapshot"]


def test_sized_snapshots_end_with_their_master(clones: Clones, lvm: CountedVolumes) -> None:
    add_master(lvm, "j", b"other")
    for image in "ij":
        for name in "ab":
            clones.make(image, MASTER_SIZE, f"{name}-{image}", SIZE)
    lvm.remove(MASTER + "i")
    clones.forget("i")
    assert {n for n in lvm.names() if n.startswith(SIZED)} == {f"{SIZED}j-{SIZE}"}
    add_master(lvm, "i", b"newer")
    for name in "cde":
        clones.make("i", MASTER_SIZE, name, SIZE)
        assert Path(lvm.path(name)).read_bytes()[:5] == b"newer"


@pytest.mark.parametrize(
    ("volume", "image"),
    [
        (f"{SIZED}1-2-4096", "1-2"),
        (f"{MASTER}1-2", "1-2"),
        (f"{TREE}1-2", "1-2"),
        (f"{FILLING}{SIZED}1-2-4096", ""),
        (f"{FILLING}1-2", ""),
        ("volume-1-2", ""),
    ],
)
def test_names(volume: str, image: str) -> None:
    assert clones_module.image_of(volume) == image
    assert clones_module.is_ours(volume) == (not volume.startswith("volume-"))
