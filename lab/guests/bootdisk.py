"""Bootable Debian disk images, built without mounting anything: the common part of all guests.

No loop device is used: ``mkfs.ext4 -d`` fills the file system, and GRUB's two images are written
where the BIOS and GRUB expect them. So it works inside a container.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import hashlib
import json
import os
import select
import shutil
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

#: What the build host needs (``qemu-system-x86`` only for :func:`boots`).
PACKAGES = (
    "debian-archive-keyring",
    "e2fsprogs",
    "fdisk",
    "gcc",
    "grub-common",
    "grub-pc-bin",
    "kmod",
    "libc6-dev",
    "mmdebstrap",
    "qemu-system-x86",
    "qemu-utils",
)
_TOOLS = ("mmdebstrap", "mkfs.ext4", "sfdisk", "grub-mkimage", "qemu-img")

SUITE = "bookworm"
MIRRORS = (
    f"deb http://deb.debian.org/debian {SUITE} main",
    f"deb http://deb.debian.org/debian-security {SUITE}-security main",
)

GRUB = Path("/usr/lib/grub/i386-pc")
# GRUB's core finds its files here, on the first partition of the boot disk.
GRUB_PREFIX = "(,msdos1)/boot/grub"

SECTOR = 512
BLOCK = 4096
MIB = 1 << 20
GAP = 1 * MIB  # no partition starts before it: the space is GRUB's
BOOT_CODE = 440  # bytes of sector 0 before the disk's signature and the partition table
JOURNAL = 4 * MIB  # the smallest that ext4 accepts
INODE = 256  # bytes


class GuestError(RuntimeError):
    """An image cannot be built or checked; the message is one line with a remedy."""


@dataclass(frozen=True)
class Layout:
    """The properties of a disk beside its files; sizes in bytes."""

    label: str
    uuid: str  #: of the file system
    grub_config: str
    free: int  #: space left for the guest
    free_inodes: int
    start: int = GAP  #: where the partition starts, a multiple of 1 MiB
    grub_modules: tuple[str, ...] = ("biosdisk", "part_msdos", "ext2", "linux")


def say(message: str) -> None:
    """Print a progress message for the user."""
    print(message, file=sys.stderr, flush=True)


def default_cache() -> Path:
    """Return the directory for things the lab builds once."""
    return Path(os.environ.get("THUNDER_LAB_CACHE") or "/var/cache/thunder-lab")


def keyed(cache: Path | None, name: str, *sources: Path) -> Path:
    """Return the cache path of an image, whether it has been built or not.

    The name contains a hash of its sources and of this file, which determine everything in the
    image except the versions of packages. An unnecessary rebuild costs a minute, a stale image a
    wrong result.
    """
    digest = hashlib.sha256()
    for source in (Path(__file__), *sources):
        digest.update(source.read_bytes())
    return (cache or default_cache()) / f"{name}-{digest.hexdigest()[:12]}.qcow2"


def once(image: Path, make: Callable[[], None]) -> Path:
    """Return ``image``, calling ``make`` first if it is missing; one process builds it at a time.

    :raises GuestError: not root, a tool is missing, or a tool failed
    """
    name = _name(image)
    if image.exists():
        return image
    require_tools()
    if os.geteuid() != 0:
        raise GuestError(f"building the {name} image needs root: run it with sudo")
    try:
        image.parent.mkdir(parents=True, exist_ok=True)
        with _locked(image.parent / f"{name}.lock"):
            if not image.exists():  # it was not built during the wait
                make()
    except OSError as error:
        raise GuestError(f"cannot build {image}: {error}; set THUNDER_LAB_CACHE?") from error
    return image


def make(
    image: Path,
    install: Callable[[Path], None],
    disk: Callable[[Path, Path], None],
    progress: Callable[[str], None],
) -> None:
    """Build an image: ``install`` creates the tree, ``disk`` the raw disk that contains it."""
    started = time.monotonic()
    name = _name(image)
    # In the cache's file system, so that the last step is an atomic rename.
    with tempfile.TemporaryDirectory(prefix=f"{name}-", dir=image.parent) as folder:
        work = Path(folder)
        work.chmod(0o755)  # apt fetches as another user
        progress(f"{name}: installing packages")
        install(work / "tree")
        progress(f"{name}: making the disk")
        disk(work / "tree", work / "disk.raw")
        export(work / "disk.raw", work / "disk.qcow2")
        os.rename(work / "disk.qcow2", image)
    virtual, allocated = sizes(image)
    progress(
        f"{name}: {image}: {virtual // MIB} MiB, {allocated // MIB} MiB of them allocated,"
        f" in {time.monotonic() - started:.0f} s"
    )


def disk(tree: Path, raw: Path, layout: Layout) -> None:
    """Make a bootable raw disk with one partition, just large enough for ``tree``."""
    blocks, inodes = _needed(tree, layout)
    # The partition ends at a multiple of 1 MiB, as volumes do.
    size = -(-(layout.start + blocks * BLOCK) // MIB) * MIB
    with raw.open("xb") as file:
        file.truncate(size)
    run(
        ["sfdisk", "--quiet", str(raw)],
        f"label: dos\nstart={layout.start // SECTOR}, type=83, bootable\n",
    )
    argv = ["mkfs.ext4", "-q", "-F", "-U", layout.uuid, "-L", layout.label]
    argv += ["-b", str(BLOCK), "-m", "0"]
    argv += ["-I", str(INODE), "-N", str(inodes), "-J", f"size={JOURNAL // MIB}"]
    # Newer e2fsprogs turn these on, and GRUB reads neither.
    argv += ["-O", "^metadata_csum_seed,^orphan_file"]
    argv += ["-E", f"offset={layout.start}", "-d", str(tree)]
    run([*argv, str(raw), str((size - layout.start) // BLOCK)])
    write_grub(raw, layout)


def write_grub(raw: Path, layout: Layout) -> None:
    """Write GRUB into the space before the partition.

    By default its boot sector loads the core's first sector from sector 1, and that sector loads
    the rest from sector 2 on: so no installer is needed.
    """
    with tempfile.TemporaryDirectory() as name:
        file, core = Path(name, "grub.cfg"), Path(name, "core.img")
        file.write_text(layout.grub_config)
        argv = ["grub-mkimage", "-O", "i386-pc", "-d", str(GRUB), "-p", GRUB_PREFIX]
        run([*argv, "-c", str(file), "-o", str(core), *layout.grub_modules])
        code = core.read_bytes()
    if len(code) > GAP - SECTOR:
        raise GuestError(f"GRUB's core of {len(code)} bytes does not fit: use fewer modules")
    with raw.open("r+b") as opened:
        opened.write((GRUB / "boot.img").read_bytes()[:BOOT_CODE])
        opened.seek(SECTOR)
        opened.write(code)


def _needed(tree: Path, layout: Layout) -> tuple[int, int]:
    """Return the blocks and inodes of a file system for ``tree`` and the free space."""
    inodes = 16 + layout.free_inodes  # ext4 reserves the first few
    blocks = 0
    seen = set()
    for top, dirs, files in os.walk(tree):
        inodes += 1
        # A directory entry takes 8 bytes and a padded name, in blocks that are not all full.
        blocks += 1 + sum(12 + len(os.fsencode(name)) for name in dirs + files) // 3000
        for name in dirs + files:
            status = os.lstat(os.path.join(top, name))
            if stat.S_ISDIR(status.st_mode) or (status.st_dev, status.st_ino) in seen:
                continue
            seen.add((status.st_dev, status.st_ino))  # a hard link is stored once
            inodes += 1
            if stat.S_ISREG(status.st_mode):
                blocks += -(-status.st_size // BLOCK)
    blocks += (inodes * INODE + JOURNAL + layout.free) // BLOCK
    return blocks + blocks // 200, inodes  # superblocks, bitmaps, extent trees


def export(image: Path, out: Path) -> None:
    """Copy the image to ``out``: raw if its name ends in ``.raw``, else qcow2."""
    run(["qemu-img", "convert", "-f", _format(image), "-O", _format(out), str(image), str(out)])


def sizes(image: Path) -> tuple[int, int]:
    """Return the image's virtual size and the bytes allocated in it."""
    extents = json.loads(
        run(["qemu-img", "map", "--output=json", "-f", _format(image), str(image)])
    )
    end = max(extent["start"] + extent["length"] for extent in extents)
    return end, sum(extent["length"] for extent in extents if extent["data"])


def boots(
    image: Path,
    prompt: str,
    memory: int,
    timeout: float,
    console: Callable[[str], None] = lambda _line: None,
    options: Sequence[str] = (),
) -> bool:
    """Boot the image in QEMU, without changing it, and return whether it shows its prompt.

    :param memory: of the guest, in MiB
    :param timeout: seconds; without KVM a boot takes about ten times as long
    :param console: called with each line of the serial console, and QEMU's own messages
    :param options: further ones of QEMU
    :raises GuestError: QEMU is missing
    """
    drive = str(image).replace(",", ",,")
    argv = ["qemu-system-x86_64", "-accel", "kvm" if _hardware_kvm() else "tcg", "-m", str(memory)]
    argv += ["-display", "none", "-monitor", "none", "-nic", "none", "-no-reboot", "-snapshot"]
    argv += [*options, "-serial", "stdio"]
    argv += ["-drive", f"file={drive},format={_format(image)},if=virtio"]
    try:
        qemu = subprocess.Popen(
            argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
    except FileNotFoundError as error:
        raise GuestError(_missing(["qemu-system-x86_64"])) from error
    with qemu:
        assert qemu.stdout is not None
        deadline = time.monotonic() + timeout
        rest = b""
        try:
            shown = False
            # The prompt does not end with a newline, so reading by lines would block.
            while not shown:
                left = deadline - time.monotonic()
                if left <= 0 or not select.select([qemu.stdout], [], [], left)[0]:
                    return False
                data = os.read(qemu.stdout.fileno(), 65536)
                if not data:
                    return False
                *lines, rest = (rest + data).split(b"\n")
                for line in lines:
                    console(line.decode(errors="replace").rstrip())
                shown = any(prompt.encode() in line for line in [*lines, rest])
            return True
        finally:
            qemu.kill()
            if rest:
                console(rest.decode(errors="replace").rstrip())


def command(
    name: str,
    argv: Sequence[str] | None,
    build: Callable[[], Path],
    boots: Callable[[Path, float, Callable[[str], None]], bool],
) -> int:
    """The command line of ``python -m lab.guests.NAME``: build, export and check."""
    parser = argparse.ArgumentParser(
        prog=f"python -m lab.guests.{name}", description=f"Build the lab's {name} image."
    )
    parser.add_argument("out", nargs="?", type=Path, help="file to write: *.qcow2 or *.raw")
    parser.add_argument(
        "--check", action="store_true", help="boot it and wait for the login prompt"
    )
    parser.add_argument(
        "--timeout", type=float, default=300.0, help="limit of the boot, in seconds"
    )
    arguments = parser.parse_args(argv)
    try:
        image = build()
        if arguments.check:
            started = time.monotonic()
            if not boots(image, arguments.timeout, print):
                raise GuestError(f"{image} shows no login prompt: see its console above")
            say(f"{name}: boots to a login prompt in {time.monotonic() - started:.1f} s")
        if arguments.out is not None:
            export(image, arguments.out)
    except GuestError as error:
        say(f"{name}: {error}")
        return 1
    print(arguments.out or image)
    return 0


def require_tools() -> None:
    """Check that this host can build images.

    :raises GuestError: a tool is missing; names the packages to install
    """
    missing = [tool for tool in _TOOLS if shutil.which(tool) is None]
    missing += [str(path) for path in [GRUB / "boot.img"] if not path.exists()]
    if missing:
        raise GuestError(_missing(missing))


def run(argv: Sequence[str], stdin: str = "") -> str:
    """Run a tool and return its output.

    :raises GuestError: it is missing or fails; has the last line of its output
    """
    return run_bytes(argv, stdin).decode()


def run_bytes(argv: Sequence[str], stdin: str = "") -> bytes:
    """Like :func:`run`, for output that is not text."""
    try:
        # Under a strict umask the guest's users could not read its directories.
        done = subprocess.run(
            argv, input=stdin.encode(), capture_output=True, check=False, umask=0o022
        )
    except FileNotFoundError as error:
        raise GuestError(_missing([argv[0]])) from error
    if done.returncode != 0:
        output = (done.stderr or done.stdout).decode(errors="replace")
        lines = output.strip().splitlines() or ["no message"]
        raise GuestError(f"{argv[0]} failed with status {done.returncode}: {lines[-1]}")
    return done.stdout


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _hardware_kvm() -> bool:
    """Return whether QEMU can run a BIOS in KVM.

    In some clouds /dev/kvm exists without the processor's virtualization: QEMU starts, and then
    hangs.
    """
    modules = [Path("/sys/module", name) for name in ("kvm_intel", "kvm_amd")]
    return os.access("/dev/kvm", os.R_OK | os.W_OK) and any(module.exists() for module in modules)


def _name(image: Path) -> str:
    return image.name.split("-")[0]


def _format(path: Path) -> str:
    return "raw" if path.suffix == ".raw" else "qcow2"


def _missing(what: Sequence[str]) -> str:
    return f"missing {', '.join(what)}: run apt-get install {' '.join(PACKAGES)}"
