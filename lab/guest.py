"""A small, real guest: Debian 12 that boots to a login prompt on its serial console.

The lab boots instances from it and its benchmarks compare the bytes a boot reads with the bytes
the image holds, so its file system is tight: little more than what is in it.

Nothing is mounted and no loop device is used: the file system is filled by ``mkfs.ext4 -d`` and
GRUB is put in place by writing its two images where the BIOS and GRUB expect them. So it can be
built inside a container.

``python -m lab.guest OUT.qcow2`` writes the image to a file (``OUT.raw`` for a raw one), and
``python -m lab.guest --check`` boots it once.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import hashlib
import io
import json
import os
import select
import shutil
import stat
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

#: What the build host needs (``qemu-system-x86`` only for :func:`boots`).
GUEST_PACKAGES = (
    "debian-archive-keyring",
    "e2fsprogs",
    "fdisk",
    "grub-common",
    "grub-pc-bin",
    "mmdebstrap",
    "qemu-system-x86",
    "qemu-utils",
)

SUITE = "bookworm"
MIRRORS = (
    f"deb http://deb.debian.org/debian {SUITE} main",
    f"deb http://deb.debian.org/debian-security {SUITE}-security main",
)
INCLUDE = (
    "initramfs-tools",
    "iproute2",
    "linux-image-cloud-amd64",
    "login",
    "systemd-sysv",
    "udev",
    "usr-is-merged",  # else apt takes usrmerge, and with it 45 MB of Perl
)
EXCLUDE = ("doc", "info", "lintian", "locale", "man")  # of /usr/share

HOSTNAME = "thunder-guest"
ROOT_UUID = "7468756e-6465-4272-8067-756573740001"

# Files of the guest. They are there before the kernel is installed, because its installation
# makes the initramfs, which depends on some of them. None may belong to a package.
FILES = {
    "/etc/hostname": f"{HOSTNAME}\n",
    "/etc/hosts": f"127.0.0.1 localhost\n127.0.1.1 {HOSTNAME}\n",
    "/etc/fstab": f"UUID={ROOT_UUID} / ext4 errors=remount-ro 0 1\n",
    # Only what a virtual machine's disk needs: a third of the size, and of the time to make it.
    "/etc/initramfs-tools/conf.d/guest": "MODULES=list\n",
    "/usr/share/initramfs-tools/modules.d/guest": "virtio_pci\nvirtio_blk\nvirtio_scsi\nsd_mod\n",
    # There is no room for a journal on a tight file system.
    "/etc/systemd/journald.conf.d/guest.conf": "[Journal]\nStorage=volatile\n",
    "/etc/systemd/system/first-boot-marker.service": """\
[Unit]
Description=Record when this disk was first booted
ConditionPathExists=!/var/lib/first-boot

[Service]
Type=oneshot
ExecStart=/bin/sh -c 'date --utc --iso-8601=seconds >/var/lib/first-boot && sync'

[Install]
WantedBy=multi-user.target
""",
}
FINISH = """\
chroot "$1" systemctl enable first-boot-marker.service serial-getty@ttyS0.service
: >"$1/etc/machine-id"  # every guest makes its own
rm -f "$1/etc/resolv.conf"  # the build host's
rm -rf "$1"/var/log/apt "$1"/var/cache/debconf/*-old "$1"/var/cache/ldconfig/*
"""

GRUB = Path("/usr/lib/grub/i386-pc")
GRUB_MODULES = ("biosdisk", "part_msdos", "ext2", "linux")
# Run by GRUB's core itself, with the root of GRUB_PREFIX: the first partition of the boot disk.
# Debian keeps the two links current, so a new kernel needs no new GRUB.
GRUB_PREFIX = "(,msdos1)/boot/grub"
GRUB_CONFIG = f"""\
linux /vmlinuz root=UUID={ROOT_UUID} ro console=tty0 console=ttyS0,115200
initrd /initrd.img
boot
"""

SECTOR = 512
BLOCK = 4096
MIB = 1 << 20
PARTITION = 1 * MIB  # where it starts; GRUB lives in the gap before it
BOOT_CODE = 440  # bytes of sector 0 before the disk's signature and the partition table
FREE = 14 * MIB  # left to the guest
JOURNAL = 4 * MIB  # the least ext4 takes
INODE = 256  # bytes
FREE_INODES = 1500

_TOOLS = ("mmdebstrap", "mkfs.ext4", "sfdisk", "grub-mkimage", "qemu-img")


class GuestError(RuntimeError):
    """The image cannot be built or checked; the message is one line and says what to do."""


def _say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def default_cache() -> Path:
    """Return the directory for things the lab builds once."""
    return Path(os.environ.get("THUNDER_LAB_CACHE") or "/var/cache/thunder-lab")


def image_path(cache: Path | None = None) -> Path:
    """Return where :func:`build` keeps the image, built or not.

    The name carries a hash of this file: it holds everything that goes into the image but the
    archive's packages. A rebuild too many costs a minute, a stale image a wrong result.
    """
    key = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:12]
    return (cache or default_cache()) / f"guest-{key}.qcow2"


def build(cache: Path | None = None, progress: Callable[[str], None] = _say) -> Path:
    """Return the image, building it if it is not in the cache.

    :param cache: directory to keep it in; default :func:`default_cache`
    :param progress: told what is being done, a line at a time
    :raises GuestError: not root, a tool is missing, or a tool failed
    """
    image = image_path(cache)
    if image.exists():
        return image
    _require_tools()
    if os.geteuid() != 0:
        raise GuestError("building the guest image needs root: run it with sudo")
    try:
        image.parent.mkdir(parents=True, exist_ok=True)
        with _locked(image.parent / "guest.lock"):
            if not image.exists():  # nobody built it while we waited
                _build(image, progress)
    except OSError as error:
        raise GuestError(f"cannot build {image}: {error}; set THUNDER_LAB_CACHE?") from error
    return image


def export(image: Path, out: Path) -> None:
    """Copy the image to ``out``: raw if its name ends in ``.raw``, else qcow2."""
    _run(["qemu-img", "convert", "-f", _format(image), "-O", _format(out), str(image), str(out)])


def sizes(image: Path) -> tuple[int, int]:
    """Return the image's virtual size and the bytes allocated in it."""
    extents = json.loads(
        _run(["qemu-img", "map", "--output=json", "-f", _format(image), str(image)])
    )
    end = max(extent["start"] + extent["length"] for extent in extents)
    return end, sum(extent["length"] for extent in extents if extent["data"])


def boots(
    image: Path, timeout: float = 120.0, console: Callable[[str], None] = lambda _line: None
) -> bool:
    """Boot the image in QEMU, without changing it, and return whether it asks for a login.

    :param timeout: seconds; without KVM a boot takes about ten times as long
    :param console: given the lines of the serial console, and QEMU's own messages
    :raises GuestError: QEMU is missing
    """
    drive = str(image).replace(",", ",,")
    argv = ["qemu-system-x86_64", "-accel", "kvm" if _hardware_kvm() else "tcg", "-m", "512"]
    argv += ["-display", "none", "-monitor", "none", "-nic", "none", "-no-reboot", "-snapshot"]
    argv += ["-serial", "stdio", "-drive", f"file={drive},format={_format(image)},if=virtio"]
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
            # The prompt ends no line, so lines cannot be waited for.
            while f"{HOSTNAME} login:".encode() not in rest:
                left = deadline - time.monotonic()
                if left <= 0 or not select.select([qemu.stdout], [], [], left)[0]:
                    return False
                data = os.read(qemu.stdout.fileno(), 65536)
                if not data:
                    return False
                *lines, rest = (rest + data).split(b"\n")
                for line in lines:
                    console(line.decode(errors="replace").rstrip())
            return True
        finally:
            qemu.kill()
            if rest:
                console(rest.decode(errors="replace").rstrip())


def _build(image: Path, progress: Callable[[str], None]) -> None:
    started = time.monotonic()
    # In the cache, so that the last step is a rename.
    with tempfile.TemporaryDirectory(prefix="guest-", dir=image.parent) as name:
        work = Path(name)
        work.chmod(0o755)  # apt fetches as another user
        progress(f"guest: installing Debian {SUITE}")
        install(work / "tree")
        progress("guest: making the disk")
        disk(work / "tree", work / "disk.raw")
        export(work / "disk.raw", work / "disk.qcow2")
        os.rename(work / "disk.qcow2", image)
    virtual, allocated = sizes(image)
    progress(
        f"guest: {image}: {virtual // MIB} MiB, {allocated // MIB} MiB of them allocated,"
        f" in {time.monotonic() - started:.0f} s"
    )


def install(tree: Path) -> None:
    """Install the guest's system into a new directory."""
    files = tree.with_name("files.tar")
    _pack(FILES, files)
    argv = ["mmdebstrap", "--quiet", "--mode=root", "--variant=minbase"]
    argv += [f"--include={','.join(INCLUDE)}", "--hook-dir=/usr/share/mmdebstrap/hooks/merged-usr"]
    argv += ["--aptopt=APT::Install-Recommends false"]
    argv += [f"--dpkgopt=path-exclude=/usr/share/{name}/*" for name in EXCLUDE]
    argv += [f"--essential-hook=tar-in {files} /", f"--customize-hook={FINISH}"]
    _run([*argv, SUITE, str(tree), *MIRRORS])


def disk(tree: Path, raw: Path) -> None:
    """Make a bootable raw disk of one partition that holds ``tree``, with little room besides."""
    blocks, inodes = _needed(tree)
    # The partition ends at a whole MiB, as do volumes.
    size = -(-(PARTITION + blocks * BLOCK) // MIB) * MIB
    with raw.open("xb") as file:
        file.truncate(size)
    _run(
        ["sfdisk", "--quiet", str(raw)],
        f"label: dos\nstart={PARTITION // SECTOR}, type=83, bootable\n",
    )
    argv = ["mkfs.ext4", "-q", "-F", "-U", ROOT_UUID, "-L", HOSTNAME, "-b", str(BLOCK), "-m", "0"]
    argv += ["-I", str(INODE), "-N", str(inodes), "-J", f"size={JOURNAL // MIB}"]
    # Newer e2fsprogs turn these on, and GRUB reads neither.
    argv += ["-O", "^metadata_csum_seed,^orphan_file"]
    argv += ["-E", f"offset={PARTITION}", "-d", str(tree)]
    _run([*argv, str(raw), str((size - PARTITION) // BLOCK)])
    _write_grub(raw)


def _write_grub(raw: Path) -> None:
    """Put GRUB before the partition.

    Its boot sector loads the core's first sector from sector 1, and that the rest from sector 2
    on, unless told otherwise: so no installer is needed.
    """
    with tempfile.TemporaryDirectory() as name:
        config, core = Path(name, "grub.cfg"), Path(name, "core.img")
        config.write_text(GRUB_CONFIG)
        argv = ["grub-mkimage", "-O", "i386-pc", "-d", str(GRUB), "-p", GRUB_PREFIX]
        _run([*argv, "-c", str(config), "-o", str(core), *GRUB_MODULES])
        code = core.read_bytes()
    if len(code) > PARTITION - SECTOR:
        raise GuestError(f"GRUB's core of {len(code)} bytes does not fit: use fewer GRUB_MODULES")
    with raw.open("r+b") as file:
        file.write((GRUB / "boot.img").read_bytes()[:BOOT_CODE])
        file.seek(SECTOR)
        file.write(code)


def _needed(tree: Path) -> tuple[int, int]:
    """Return the blocks and inodes of a file system that holds ``tree``, :data:`FREE` included."""
    inodes = 16 + FREE_INODES  # ext4 keeps the first few for itself
    blocks = 0
    seen = set()
    for top, dirs, files in os.walk(tree):
        inodes += 1
        # Entries of a directory: 8 bytes and a padded name each, in blocks that are not all full.
        blocks += 1 + sum(12 + len(os.fsencode(name)) for name in dirs + files) // 3000
        for name in dirs + files:
            status = os.lstat(os.path.join(top, name))
            if stat.S_ISDIR(status.st_mode) or (status.st_dev, status.st_ino) in seen:
                continue
            seen.add((status.st_dev, status.st_ino))  # a hard link is stored once
            inodes += 1
            if stat.S_ISREG(status.st_mode):
                blocks += -(-status.st_size // BLOCK)
    blocks += (inodes * INODE + JOURNAL + FREE) // BLOCK
    return blocks + blocks // 200, inodes  # superblocks, bitmaps, extent trees


def _pack(files: Mapping[str, str], out: Path) -> None:
    """Write a tar of the files, root's whoever packs them."""
    with tarfile.open(out, "w") as tar:
        for path, text in files.items():
            member = tarfile.TarInfo(path.lstrip("/"))
            data = text.encode()
            member.size, member.mode, member.mtime = len(data), 0o644, int(time.time())
            tar.addfile(member, io.BytesIO(data))


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _hardware_kvm() -> bool:
    """Return whether QEMU can run a BIOS in KVM.

    Inside some clouds /dev/kvm is there without the processor's virtualization: QEMU starts in
    it, and then hangs.
    """
    modules = [Path("/sys/module", name) for name in ("kvm_intel", "kvm_amd")]
    return os.access("/dev/kvm", os.R_OK | os.W_OK) and any(module.exists() for module in modules)


def _format(path: Path) -> str:
    return "raw" if path.suffix == ".raw" else "qcow2"


def _missing(what: Sequence[str]) -> str:
    return f"missing {', '.join(what)}: run apt-get install {' '.join(GUEST_PACKAGES)}"


def _require_tools() -> None:
    missing = [tool for tool in _TOOLS if shutil.which(tool) is None]
    missing += [str(path) for path in [GRUB / "boot.img"] if not path.exists()]
    if missing:
        raise GuestError(_missing(missing))


def _run(argv: Sequence[str], stdin: str = "") -> str:
    """Run a tool and return its output.

    :raises GuestError: it is missing or fails; carries the last line it wrote
    """
    try:
        # With a strict umask the guest's own users could not read its directories.
        done = subprocess.run(
            argv, input=stdin, capture_output=True, text=True, check=False, umask=0o022
        )
    except FileNotFoundError as error:
        raise GuestError(_missing([argv[0]])) from error
    if done.returncode != 0:
        lines = (done.stderr or done.stdout).strip().splitlines() or ["no message"]
        raise GuestError(f"{argv[0]} failed with status {done.returncode}: {lines[-1]}")
    return done.stdout


def main(argv: Sequence[str] | None = None) -> int:
    """Build, export, check, as asked on the command line."""
    parser = argparse.ArgumentParser(prog="python -m lab.guest", description="Build the lab guest.")
    parser.add_argument("out", nargs="?", type=Path, help="file to write: *.qcow2 or *.raw")
    parser.add_argument("--check", action="store_true", help="boot it and wait for the login")
    parser.add_argument("--timeout", type=float, default=300.0, help="of the boot, in seconds")
    arguments = parser.parse_args(argv)
    try:
        image = build()
        if arguments.check:
            started = time.monotonic()
            if not boots(image, arguments.timeout, print):
                raise GuestError(f"{image} shows no login prompt: see its console above")
            _say(f"guest: boots to a login prompt in {time.monotonic() - started:.1f} s")
        if arguments.out is not None:
            export(image, arguments.out)
    except GuestError as error:
        _say(f"guest: {error}")
        return 1
    print(arguments.out or image)
    return 0


if __name__ == "__main__":
    sys.exit(main())
