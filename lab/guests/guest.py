"""A small, real guest: Debian 12 that boots to a login prompt on its serial console.

The lab boots servers from it, and benchmarks compare the bytes that a boot reads with the bytes
that the image holds, so its file system has little free space.

:mod:`lab.guests.bootdisk` builds it, so it can be built inside a container.

``python -m lab.guests.guest OUT.qcow2`` writes the image to a file (``OUT.raw`` for a raw one), and
``python -m lab.guests.guest --check`` boots it once.
"""

from __future__ import annotations

import io
import sys
import tarfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from lab.guests import bootdisk
from lab.guests.bootdisk import MIB, SUITE, GuestError, export, sizes

__all__ = ["GuestError", "boots", "build", "disk", "export", "image_path", "install", "sizes"]

INCLUDE = (
    "initramfs-tools",
    "iproute2",
    "linux-image-cloud-amd64",
    "login",
    "systemd-sysv",
    "udev",
    "usr-is-merged",  # otherwise apt installs usrmerge, which brings 45 MB of Perl
)
EXCLUDE = ("doc", "info", "lintian", "locale", "man")  # of /usr/share

HOSTNAME = "thunder-guest"
MEMORY = 512  # MiB
ROOT_UUID = "7468756e-6465-4272-8067-756573740001"

# Files of the guest. They are written before the kernel is installed, because its installation
# builds the initramfs, which depends on some of them. None may belong to a package.
FILES = {
    "/etc/hostname": f"{HOSTNAME}\n",
    "/etc/hosts": f"127.0.0.1 localhost\n127.0.1.1 {HOSTNAME}\n",
    "/etc/fstab": f"UUID={ROOT_UUID} / ext4 errors=remount-ro 0 1\n",
    # Only the modules for a virtual machine's disk: a third of the size and of the build time.
    "/etc/initramfs-tools/conf.d/guest": "MODULES=list\n",
    "/usr/share/initramfs-tools/modules.d/guest": "virtio_pci\nvirtio_blk\nvirtio_scsi\nsd_mod\n",
    # The small file system has no space for a persistent journal.
    "/etc/systemd/journald.conf.d/guest.conf": "[Journal]\nStorage=volatile\n",
    # Without KVM and with many guests per processor, the console device may take minutes to appear.
    # The login prompt does not wait longer than this.
    "/etc/systemd/system.conf.d/guest.conf": "[Manager]\nDefaultDeviceTimeoutSec=15min\n",
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
: >"$1/etc/machine-id"  # every guest generates its own
rm -f "$1/etc/resolv.conf"  # the build host's
rm -rf "$1"/var/log/apt "$1"/var/cache/debconf/*-old "$1"/var/cache/ldconfig/*
"""

# Debian keeps the two links current, so a new kernel needs no new GRUB.
GRUB_CONFIG = f"""\
linux /vmlinuz root=UUID={ROOT_UUID} ro console=tty0 console=ttyS0,115200
initrd /initrd.img
boot
"""
LAYOUT = bootdisk.Layout(
    label=HOSTNAME, uuid=ROOT_UUID, grub_config=GRUB_CONFIG, free=14 * MIB, free_inodes=1500
)


def image_path(cache: Path | None = None) -> Path:
    """Return the cache path of the image, whether it has been built or not."""
    return bootdisk.keyed(cache, "guest", Path(__file__))


def build(cache: Path | None = None, progress: Callable[[str], None] = bootdisk.say) -> Path:
    """Return the image, building it if it is not in the cache.

    :param cache: directory to keep it in; default :func:`lab.guests.bootdisk.default_cache`
    :param progress: called with each line of progress
    :raises GuestError: not root, a tool is missing, or a tool failed
    """
    image = image_path(cache)
    return bootdisk.once(image, lambda: _build(image, progress))


def _build(image: Path, progress: Callable[[str], None]) -> None:
    bootdisk.make(image, install, disk, progress)


def boots(
    image: Path, timeout: float = 120.0, console: Callable[[str], None] = lambda _line: None
) -> bool:
    """Boot the image in QEMU, without changing it, and return whether a login prompt appears.

    :param timeout: seconds; without KVM a boot takes about ten times as long
    :param console: called with each line of the serial console, and QEMU's own messages
    :raises GuestError: QEMU is missing
    """
    return bootdisk.boots(image, f"{HOSTNAME} login:", MEMORY, timeout, console)


def install(tree: Path) -> None:
    """Install the guest's system into a new directory."""
    merged = "--hook-dir=/usr/share/mmdebstrap/hooks/merged-usr"
    bootstrap(tree, SUITE, bootdisk.MIRRORS, INCLUDE, FILES, [merged])


def bootstrap(
    tree: Path,
    suite: str,
    mirrors: Iterable[str],
    include: Iterable[str],
    files: Mapping[str, str],
    options: Iterable[str] = (),
) -> None:
    """Install a system of Debian's packages, or of a derivative's, into a new directory.

    :param mirrors: lines of sources.list
    :param include: packages
    :param files: see :data:`FILES`
    :param options: further ones of mmdebstrap
    """
    packed = tree.with_name("files.tar")
    _pack(files, packed)
    argv = ["mmdebstrap", "--quiet", "--mode=root", "--variant=minbase"]
    argv += [f"--include={','.join(include)}", "--aptopt=APT::Install-Recommends false", *options]
    argv += [f"--dpkgopt=path-exclude=/usr/share/{name}/*" for name in EXCLUDE]
    argv += [f"--essential-hook=tar-in {packed} /", f"--customize-hook={FINISH}"]
    bootdisk.run([*argv, suite, str(tree), *mirrors])


def disk(tree: Path, raw: Path) -> None:
    """Make a bootable raw disk with one partition, just large enough for ``tree``."""
    bootdisk.disk(tree, raw, LAYOUT)


def _pack(files: Mapping[str, str], out: Path) -> None:
    """Write a tar archive of the files, owned by root whatever user packs them."""
    with tarfile.open(out, "w") as tar:
        for path, text in files.items():
            member = tarfile.TarInfo(path.lstrip("/"))
            data = text.encode()
            member.size, member.mode, member.mtime = len(data), 0o644, int(time.time())
            tar.addfile(member, io.BytesIO(data))


def main(argv: Sequence[str] | None = None) -> int:
    """The command line: build, export and check."""
    return bootdisk.command("guest", argv, build, boots)


if __name__ == "__main__":
    sys.exit(main())
