"""The lab's tiny guest: its initramfs, its disk, and the checker, which runs here on plain files.

Nothing is booted here: ``python -m lab.guests.tiny --check`` does that.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import stat
import struct
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from lab.guests import bootdisk, tiny
from lab.guests.bootdisk import MIB, SECTOR
from lab.guests.tiny import Entry

TOOLS = ("mmdebstrap", "mkfs.ext4", "e2fsck", "debugfs", "sfdisk", "grub-mkimage", "qemu-img")
needs_tools = pytest.mark.skipif(
    any(shutil.which(tool) is None for tool in TOOLS) or not (bootdisk.GRUB / "boot.img").exists(),
    reason=f"needs {', '.join(bootdisk.PACKAGES)}",
)
needs_gcc = pytest.mark.skipif(shutil.which("gcc") is None, reason="needs gcc and libc6-dev")

PAGE = 4096
# The tests' slots: half of them in the first MiB, half in the second.
STEP = 32 * 1024
SIZE = 2 * MIB


def unpacked(archive: bytes) -> Iterator[Entry]:
    at = 0
    while True:
        assert archive[at : at + 6] == b"070701"
        fields = [int(archive[at + 6 + 8 * i : at + 14 + 8 * i], 16) for i in range(13)]
        mode, size, length = fields[1], fields[6], fields[11]
        name = archive[at + 110 : at + 110 + length]
        assert name.endswith(b"\0")
        begin = at + -(-(110 + length) // 4) * 4
        at = begin + -(-size // 4) * 4
        if name == b"TRAILER!!!\0":
            return
        yield Entry(name[:-1].decode(), mode, archive[begin : begin + size])


def test_initramfs_is_what_was_packed() -> None:
    entries = [
        Entry("bin", stat.S_IFDIR | 0o755),
        Entry("bin/program", stat.S_IFREG | 0o755, os.urandom(4097)),
        Entry("bin/sh", stat.S_IFLNK | 0o777, b"program"),
        Entry("empty", stat.S_IFREG | 0o644),
    ]
    assert list(unpacked(tiny.cpio(entries))) == entries


def test_modules_come_after_what_they_need() -> None:
    dependencies = """\
kernel/a/virtio.ko:
kernel/a/virtio_ring.ko: kernel/a/virtio.ko
kernel/a/virtio_pci.ko: kernel/a/virtio_ring.ko kernel/a/virtio.ko
kernel/b/virtio_blk.ko: kernel/a/virtio_ring.ko kernel/a/virtio.ko
kernel/b/other.ko:
"""
    order = tiny.in_order(["virtio_pci", "virtio_blk"], dependencies)
    names = ["virtio", "virtio_ring", "virtio_pci", "virtio_blk"]
    assert [Path(path).stem for path in order] == names
    with pytest.raises(tiny.GuestError, match="no module absent"):
        tiny.in_order(["absent"], dependencies)


@pytest.mark.parametrize(("kernel", "initrd"), [(14 * MIB, 3 * MIB), (14186432, 3165001), (1, 1)])
def test_layout_has_room_for_all(kernel: int, initrd: int) -> None:
    layout, initrd_at = tiny.layout_of(kernel, initrd)
    assert tiny.KERNEL + kernel <= initrd_at
    assert initrd_at + initrd <= layout.start < initrd_at + initrd + 2 * MIB
    assert layout.start % MIB == 0
    areas = [tuple(map(int, area)) for area in re.findall(r"\)(\d+)\+(\d+)", layout.grub_config)]
    assert [start * SECTOR for start, _ in areas] == [tiny.KERNEL, initrd_at]
    for (_, count), size in zip(areas, (kernel, initrd), strict=True):
        assert 0 <= count * SECTOR - size < SECTOR
    assert len(layout.grub_config.splitlines()[0]) < 255, "of which the kernel's line is a part"


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The real image, raw; built here if it is not in the cache yet."""
    if os.geteuid() != 0 and not tiny.image_path().exists():
        pytest.skip("the guest is not built: sudo python -m lab.guests.tiny")
    raw = tmp_path_factory.mktemp("built") / "disk.raw"
    tiny.export(tiny.build(), raw)
    return raw


def debugfs(partition: str, request: str) -> str:
    done = subprocess.run(
        ["debugfs", "-R", request, partition], capture_output=True, text=True, check=True
    )
    return done.stdout


@needs_tools
def test_image_is_small(built: Path) -> None:
    virtual, allocated = tiny.sizes(tiny.image_path())
    assert virtual <= 48 * MIB
    assert virtual % MIB == 0
    assert allocated <= 40 * MIB


@needs_tools
def test_image_layout(built: Path) -> None:
    with built.open("rb") as file:
        file.seek(tiny.NEAR)
        area = file.read(tiny.NEAR_LENGTH)
        kernel = file.read(0x206)
        file.seek(446)
        active, kind, start, count = struct.unpack("<B3xB3xII", file.read(16))
    assert all(area[at : at + 512].strip(b"\0") for at in range(0, len(area), 512))
    assert kernel[0x202:] == b"HdrS"
    assert (active, kind) == (0x80, 0x83)
    assert (start + count) * SECTOR == built.stat().st_size
    partition = f"{built}?offset={start * SECTOR}"
    check = subprocess.run(["e2fsck", "-fn", partition], capture_output=True, text=True)
    assert check.returncode == 0, check.stdout
    assert debugfs(partition, "cat /var/boots") == "0\n"
    assert "has_journal" in debugfs(partition, "show_super_stats -h")


@needs_tools
def test_initramfs_of_the_image(built: Path) -> None:
    data = built.read_bytes()
    # It starts at a sector boundary, as do some of its files by chance.
    begin = next(
        at for at in range(tiny.KERNEL, len(data), SECTOR) if data[at : at + 6] == b"070701"
    )
    files = {entry.path: entry for entry in unpacked(data[begin:])}
    assert files["init"].data.decode() == tiny.INIT
    assert files["bin/sh"].data == b"busybox"
    assert files["bin/checker"].data.startswith(b"\x7fELF")
    modules = sorted(path for path in files if path.startswith("modules/"))
    assert [path[-13:] for path in modules if "virtio_blk" in path] == ["virtio_blk.ko"]
    assert any("button" in path for path in modules)


def test_cached_image_needs_neither_root_nor_tools(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    image = tiny.image_path(tmp_path)
    image.touch()
    assert tiny.build(tmp_path) == image


@pytest.mark.parametrize("script", [tiny.INIT, tiny.POWER], ids=["init", "power"])
def test_scripts_parse(script: str) -> None:
    assert subprocess.run(["sh", "-n"], input=script.encode()).returncode == 0


@dataclass
class Disk:
    """A file with a slot every 32 KiB, and its checker."""

    checker: Path
    file: Path
    options: tuple[str, ...] = ()

    def command(self, *options: str) -> list[str]:
        """The checker's arguments, for half of its slots in each MiB."""
        where = [str(self.file), "0", str(STEP), str(MIB), str(STEP)]
        return [str(self.checker), *self.options, *options, *where]

    def check(self, writes: int, *options: str) -> list[str]:
        """The checker's output for this many writes, without its name and the progress lines."""
        argv = self.command("-r", "0", "-n", str(writes), *options)
        done = subprocess.run(argv, capture_output=True, text=True, timeout=30)
        *lines, last = done.stdout.splitlines()
        wrong = sum("WRONG" in line for line in lines)
        assert last.endswith(f" wrong={wrong}")
        assert done.returncode == (1 if wrong else 0), done.stderr
        assert all(line.startswith("tiny: vda ") for line in lines)
        reports = [line.removeprefix("tiny: vda ") for line in lines]
        return [line for line in reports if not line.startswith("seq=")]

    def slot(self, index: int) -> bytes:
        with self.file.open("rb") as file:
            file.seek(index * STEP)
            return file.read(PAGE)

    def put(self, index: int, data: bytes, at: int = 0) -> None:
        with self.file.open("r+b") as file:
            file.seek(index * STEP + at)
            file.write(data)


@pytest.fixture(scope="module")
def checker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("checker") / "checker"
    tiny.compile_checker(out)
    return out


@pytest.fixture
def vda(checker: Path, tmp_path: Path) -> Disk:
    file = tmp_path / "vda"
    with file.open("wb") as opened:
        opened.truncate(SIZE)
    try:
        os.close(os.open(file, os.O_RDWR | os.O_DIRECT))
    except OSError:  # a tmpfs of an older kernel
        return Disk(checker, file, ("-b",))
    return Disk(checker, file)


@needs_gcc
def test_fresh_then_found(vda: Disk) -> None:
    assert vda.check(0) == ["fresh"]
    assert vda.check(10) == ["fresh"]
    assert vda.check(100) == ["found seq=10"]
    assert vda.check(1) == ["found seq=110"]
    assert vda.check(0) == ["found seq=111"]


@needs_gcc
def test_corruption_is_told_once_and_overwritten(vda: Disk) -> None:
    vda.check(100)
    vda.put(5, b"\xff", at=2000)
    # Of numbers 37 to 100, slot 5 has 70, because numbers begin at 1 and slots at 0.
    assert vda.check(0) == ["WRONG slot=5 want=70 got=torn", "found seq=100"]
    vda.put(5, b"\xff", at=0)
    assert vda.check(64) == ["WRONG slot=5 want=70 got=foreign", "found seq=100"]
    assert vda.check(0) == ["found seq=164"]


@needs_gcc
def test_lost_write_is_told(vda: Disk) -> None:
    vda.check(100)
    older, empty = vda.slot(7), bytes(PAGE)
    vda.check(64)
    vda.put(7, older)
    vda.put(63, empty)
    assert vda.check(0) == [
        "WRONG slot=7 want=136 got=72",
        "WRONG slot=63 want=128 got=empty",
        "found seq=164",
    ]


@needs_gcc
def test_lost_tail_shows_as_an_older_number(vda: Disk) -> None:
    vda.check(100)
    before = vda.slot(36)
    assert vda.check(1) == ["found seq=100"]
    vda.put(36, before)
    assert vda.check(0) == ["found seq=100"]


@needs_gcc
def test_records_in_the_wrong_place_are_told(vda: Disk, checker: Path, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    other = Disk(checker, tmp_path / "other/vda", vda.options)
    shutil.copy(vda.file, other.file)
    vda.check(100)
    other.check(100)
    vda.put(3, other.slot(3))
    vda.put(4, vda.slot(9))
    assert vda.check(0) == [
        "WRONG slot=3 want=68 got=foreign",
        "WRONG slot=4 want=69 got=foreign",
        "found seq=100",
    ]


@needs_gcc
def test_image_bytes_are_known(vda: Disk) -> None:
    fill = subprocess.run([vda.checker, "fill", "0", str(MIB)], capture_output=True, check=True)
    assert len(fill.stdout) == MIB
    vda.put(0, fill.stdout)
    assert vda.check(0) == ["fresh"]
    assert vda.check(0, "-f") == ["fresh"]
    vda.put(2, bytes(PAGE))
    assert vda.check(0) == ["fresh"], "a new disk is of zeroes"
    assert vda.check(0, "-f") == ["WRONG slot=2 want=empty got=foreign"]
    vda.put(32, fill.stdout[:PAGE])
    assert vda.check(0) == ["WRONG slot=32 want=empty got=foreign"], "beyond the image"


@needs_gcc
def test_disk_that_grew(vda: Disk) -> None:
    os.truncate(vda.file, MIB)
    vda.check(50)
    os.truncate(vda.file, SIZE)
    assert vda.check(5) == ["found seq=50"]
    assert vda.check(200) == ["found seq=55"]
    assert vda.check(0) == ["found seq=255"]
    vda.put(40, vda.slot(41))
    assert len(vda.check(0)) == 2


@needs_gcc
def test_it_tells_of_itself_every_second_and_ends_when_asked(vda: Disk) -> None:
    with subprocess.Popen(vda.command(), stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        lines = [process.stdout.readline() for _ in range(3)]
        process.send_signal(signal.SIGTERM)
        last = process.stdout.read()
    assert process.returncode == 0
    assert lines[0] == "tiny: vda fresh\n"
    pattern = r"tiny: vda seq=(\d+) writes=\d+ reads=\d+ longest=\d+ stall_now=\d+ wrong=(\d+)\n"
    found = [re.fullmatch(pattern, line) for line in [*lines[1:], last]]
    numbers = [int(match[1]) for match in found if match]
    assert 0 < numbers[0] < numbers[1] <= numbers[2] <= 110, "50 a second at most"
    assert vda.check(0) == [f"found seq={numbers[2]}"]


@needs_gcc
def test_unusable_device(vda: Disk) -> None:
    vda.file.unlink()
    done = subprocess.run(vda.command(), capture_output=True, text=True)
    assert done.returncode == 3
    assert done.stdout == "tiny: vda ERROR cannot open it: No such file or directory\n"
