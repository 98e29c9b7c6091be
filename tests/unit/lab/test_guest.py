"""The lab's guest image: its disk layout, its contents, and how building it fails.

Nothing is downloaded or booted here: the contents are checked on the image that a lab has built.
``python -m lab.guests.guest --check`` boots it.
"""

from __future__ import annotations

import os
import shutil
import struct
import subprocess
import threading
import time
from pathlib import Path

import pytest

from lab.guests import bootdisk, guest

TOOLS = ("mkfs.ext4", "e2fsck", "debugfs", "sfdisk", "grub-mkimage", "qemu-img")
needs_tools = pytest.mark.skipif(
    any(shutil.which(tool) is None for tool in TOOLS) or not (bootdisk.GRUB / "boot.img").exists(),
    reason=f"needs {', '.join(bootdisk.PACKAGES)}",
)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A raw disk with a tree of a few files."""
    work = tmp_path_factory.mktemp("guest")
    tree = work / "tree"
    (tree / "boot").mkdir(parents=True)
    (tree / "boot/kernel").write_bytes(os.urandom(3 * bootdisk.MIB + 1))
    os.link(tree / "boot/kernel", tree / "boot/same")
    (tree / "vmlinuz").symlink_to("boot/kernel")
    for number in range(500):
        (tree / f"file{number}").write_text(str(number))
    guest.disk(tree, work / "disk.raw")
    return work / "disk.raw"


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The real image, raw; built here if it is not in the cache yet."""
    if os.geteuid() != 0 and not guest.image_path().exists():
        pytest.skip("the guest is not built: sudo python -m lab.guests.guest")
    image = guest.build()
    raw = tmp_path_factory.mktemp("built") / "disk.raw"
    guest.export(image, raw)
    return raw


def partition(raw: Path) -> str:
    """The partition in the notation of e2fsprogs' tools."""
    return f"{raw}?offset={bootdisk.GAP}"


def debugfs(raw: Path, request: str) -> str:
    done = subprocess.run(
        ["debugfs", "-R", request, partition(raw)], capture_output=True, text=True, check=True
    )
    return done.stdout


def check_disk(raw: Path) -> None:
    """Check the common parts of all disks: partition table, GRUB's location, a clean ext4."""
    with raw.open("rb") as file:
        head = file.read(bootdisk.GAP)
    assert head[510:512] == b"\x55\xaa"
    active, kind, start, count = struct.unpack("<B3xB3xII", head[446:462])
    assert (active, kind, start) == (0x80, 0x83, bootdisk.GAP // bootdisk.SECTOR)
    assert (start + count) * bootdisk.SECTOR == raw.stat().st_size
    assert raw.stat().st_size % bootdisk.MIB == 0
    assert head[462:510] == bytes(48), "one partition only"

    assert head[440:444] != bytes(4), "sfdisk's disk signature is kept"
    assert b"GRUB" in head[:440]
    assert struct.unpack("<Q", head[0x5C:0x64]) == (1,), "the boot sector loads sector 1"
    first, sectors = struct.unpack("<QH", head[1012:1022])
    assert first == 2, "and that the sectors after it"
    code = head[1024 : 1024 + sectors * bootdisk.SECTOR]
    assert code.strip(b"\0")
    assert not head[1024 + len(code) :].strip(b"\0"), "and so all of the core"

    check = subprocess.run(["e2fsck", "-fn", partition(raw)], capture_output=True, text=True)
    assert check.returncode == 0, check.stdout


@needs_tools
def test_disk_layout(small: Path) -> None:
    check_disk(small)
    assert guest.ROOT_UUID in debugfs(small, "show_super_stats -h")


@needs_tools
def test_disk_holds_the_tree_and_little_else(small: Path) -> None:
    assert debugfs(small, "cat /file499") == "499"
    assert "Fast link dest: " in debugfs(small, "stat /vmlinuz")
    assert "Links: 2" in debugfs(small, "stat /boot/same")
    stats = debugfs(small, "show_super_stats -h")
    (free,) = (int(line.split()[-1]) for line in stats.splitlines() if "Free blocks:" in line)
    assert guest.LAYOUT.free * 0.9 <= free * bootdisk.BLOCK <= guest.LAYOUT.free * 1.2


@needs_tools
def test_core_that_does_not_fit_is_refused(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = small.read_bytes()[: bootdisk.MIB]
    monkeypatch.setattr(bootdisk, "GAP", 8 * bootdisk.SECTOR)
    with pytest.raises(guest.GuestError, match="does not fit"):
        bootdisk.write_grub(small, guest.LAYOUT)
    assert small.read_bytes()[: bootdisk.MIB] == before


@needs_tools
def test_export_and_sizes(small: Path, tmp_path: Path) -> None:
    guest.export(small, tmp_path / "disk.qcow2")
    assert (tmp_path / "disk.qcow2").read_bytes()[:4] == b"QFI\xfb"
    virtual, allocated = guest.sizes(tmp_path / "disk.qcow2")
    assert virtual == small.stat().st_size
    assert 3 * bootdisk.MIB < allocated < 3 * bootdisk.MIB + 8 * bootdisk.MIB
    guest.export(tmp_path / "disk.qcow2", tmp_path / "again.raw")
    assert (tmp_path / "again.raw").read_bytes() == small.read_bytes()


@needs_tools
def test_image_layout(built: Path) -> None:
    check_disk(built)


@needs_tools
def test_image_has_what_grub_loads(built: Path) -> None:
    for link, least in (("vmlinuz", 5 * bootdisk.MIB), ("initrd.img", 2 * bootdisk.MIB)):
        stat = debugfs(built, f"stat /{link}")
        target = stat.split('Fast link dest: "')[1].split('"')[0]
        assert target.startswith("boot/")
        size = debugfs(built, f"stat /{target}").split("Size: ")[1].split()[0]
        assert int(size) > least


@needs_tools
def test_image_is_set_up(built: Path) -> None:
    for path, text in guest.FILES.items():
        assert debugfs(built, f"cat {path}") == text
    wants = "/etc/systemd/system"
    assert "first-boot-marker.service" in debugfs(built, f"ls {wants}/multi-user.target.wants")
    assert "serial-getty@ttyS0.service" in debugfs(built, f"ls {wants}/getty.target.wants")


@needs_tools
def test_image_carries_no_waste(built: Path) -> None:
    assert debugfs(built, "cat /etc/machine-id") == ""
    assert "resolv.conf" not in debugfs(built, "ls /etc")
    for path in ("/usr/share/man", "/usr/share/locale", "/var/cache/apt/archives"):
        assert ".gz" not in debugfs(built, f"ls {path}")
        assert ".deb" not in debugfs(built, f"ls {path}")
    assert "_Packages" not in debugfs(built, "ls /var/lib/apt/lists")


@needs_tools
def test_image_is_tight(built: Path) -> None:
    virtual, allocated = guest.sizes(guest.image_path())
    assert virtual <= 500 * bootdisk.MIB
    assert virtual <= 1.1 * allocated


def test_cached_image_needs_neither_root_nor_tools(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setenv("THUNDER_LAB_CACHE", str(tmp_path))
    image = guest.image_path()
    assert image.parent == tmp_path
    image.touch()
    assert guest.build() == image


def test_missing_tools_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(guest.GuestError, match=r"mmdebstrap.*apt-get install .*e2fsprogs"):
        guest.build(tmp_path)


def test_building_needs_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bootdisk, "require_tools", lambda: None)
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(guest.GuestError, match="sudo"):
        guest.build(tmp_path)


@pytest.fixture
def root(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pretend to be a host that can build images."""
    monkeypatch.setattr(bootdisk, "require_tools", lambda: None)
    monkeypatch.setattr(os, "geteuid", lambda: 0)


@pytest.mark.usefixtures("root")
def test_failed_build_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def install(tree: Path) -> None:
        tree.mkdir()
        bootdisk.run(["sh", "-c", "echo working; echo 'E: no mirror' >&2; exit 3"])

    monkeypatch.setattr(guest, "install", install)
    with pytest.raises(guest.GuestError, match=r"^sh failed with status 3: E: no mirror$"):
        guest.build(tmp_path, lambda _line: None)
    assert [path.name for path in tmp_path.iterdir()] == ["guest.lock"]


@pytest.mark.usefixtures("root")
def test_two_builders_build_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    builds = []

    def build(image: Path, _progress: object) -> None:
        builds.append(image)
        time.sleep(0.1)
        image.touch()

    monkeypatch.setattr(guest, "_build", build)
    builders = [threading.Thread(target=guest.build, args=(tmp_path,)) for _ in range(2)]
    for builder in builders:
        builder.start()
    for builder in builders:
        builder.join()
    assert builds == [guest.image_path(tmp_path)]


@pytest.mark.usefixtures("root")
def test_unusable_cache_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("THUNDER_LAB_CACHE", str(tmp_path / "file"))
        assert guest.main([]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("guest: cannot build")
    assert "THUNDER_LAB_CACHE" in line


@pytest.mark.parametrize(
    ("script", "expected"),
    [
        (r"printf 'starting\r\nthunder-guest login: '; exec sleep 60", True),
        ("echo Kernel panic", False),
        ("exec sleep 60", False),
    ],
    ids=["prompt", "ends", "silent"],
)
def test_boots(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, expected: bool
) -> None:
    qemu = tmp_path / "qemu-system-x86_64"
    qemu.write_text(f"#!/bin/sh\n{script}\n")
    qemu.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    lines: list[str] = []
    started = time.monotonic()
    assert guest.boots(Path("disk.qcow2"), 1.0, lines.append) is expected
    assert time.monotonic() - started < 10
    if expected:
        assert lines == ["starting", "thunder-guest login:"]


def test_boots_without_qemu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(guest.GuestError, match="qemu-system-x86"):
        guest.boots(Path("disk.qcow2"))
