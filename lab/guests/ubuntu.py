"""A guest of another distribution: Ubuntu 24.04 with cloud-init and SSH, as its cloud images have.

Benchmarks boot it beside Debian's (:mod:`lab.guests.guest`), which it resembles otherwise. Its
packages are from Ubuntu's archive, and so are the keys of that, which Debian 12 does not have.

``python -m lab.guests.ubuntu OUT.qcow2`` writes the image to a file (``OUT.raw`` for a raw one),
and ``python -m lab.guests.ubuntu --check`` boots it once.
"""

from __future__ import annotations

import hashlib
import sys
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from lab.guests import bootdisk, guest
from lab.guests.bootdisk import MIB, GuestError

SUITE = "noble"
ARCHIVE = "http://archive.ubuntu.com/ubuntu"
KEYS = "pool/main/u/ubuntu-keyring/ubuntu-keyring_2023.11.28.1_all.deb"
KEYS_SHA256 = "36de43b15853ccae0028e9a767613770c704833f82586f28eb262f0311adb8a8"
INCLUDE = (
    "cloud-init",
    "initramfs-tools",
    "iproute2",
    "linux-image-virtual",
    "login",
    "netplan.io",
    "openssh-server",
    "systemd-sysv",
    "udev",
)
MEMORY = 1024  # MiB
FILES = {
    **guest.FILES,
    # It runs as in a cloud, and is told nothing: a benchmark's guest has no metadata service.
    "/etc/cloud/cloud.cfg.d/90_guest.cfg": "datasource_list: [None]\n",
}
LAYOUT = replace(
    guest.LAYOUT, free=64 * MIB, grub_config=guest.GRUB_CONFIG.replace(" /", " /boot/")
)


def image_path(cache: Path | None = None) -> Path:
    """Return the cache path of the image, whether it has been built or not."""
    return bootdisk.keyed(cache, "ubuntu", Path(__file__), Path(guest.__file__))


def build(cache: Path | None = None, progress: Callable[[str], None] = bootdisk.say) -> Path:
    """Return the image, building it if it is not in the cache.

    :param cache: directory to keep it in; default :func:`lab.guests.bootdisk.default_cache`
    :param progress: called with each line of progress
    :raises GuestError: not root, a tool is missing, or a tool failed
    """
    image = image_path(cache)
    return bootdisk.once(image, lambda: bootdisk.make(image, install, disk, progress))


def boots(
    image: Path, timeout: float = 300.0, console: Callable[[str], None] = lambda _line: None
) -> bool:
    """Boot the image in QEMU, without changing it, and return whether a login prompt appears.

    :param timeout: seconds; without KVM a boot takes about ten times as long
    :param console: called with each line of the serial console, and QEMU's own messages
    :raises GuestError: QEMU is missing
    """
    return bootdisk.boots(image, f"{guest.HOSTNAME} login:", MEMORY, timeout, console)


def install(tree: Path) -> None:
    """Install the guest's system into a new directory.

    :raises GuestError: the archive cannot be reached, or a tool failed
    """
    keys = _keys(tree.parent)
    source = f"deb [signed-by={keys}] {ARCHIVE}"
    mirrors = [f"{source} {suite} main" for suite in (SUITE, f"{SUITE}-updates")]
    guest.bootstrap(tree, SUITE, mirrors, INCLUDE, FILES)


def disk(tree: Path, raw: Path) -> None:
    """Make a bootable raw disk with one partition, just large enough for ``tree``."""
    bootdisk.disk(tree, raw, LAYOUT)


def _keys(folder: Path) -> Path:
    """The archive's keys, in a file that is made in ``folder``."""
    package = folder / "keys.deb"
    try:
        with urllib.request.urlopen(f"{ARCHIVE}/{KEYS}", timeout=60) as answer:  # noqa: S310
            data = answer.read()
    except OSError as error:
        raise GuestError(f"{ARCHIVE}/{KEYS}: {error}") from error
    if (digest := hashlib.sha256(data).hexdigest()) != KEYS_SHA256:
        raise GuestError(f"{ARCHIVE}/{KEYS}: its SHA-256 is {digest}, not {KEYS_SHA256}")
    package.write_bytes(data)
    bootdisk.run(["dpkg-deb", "--extract", str(package), str(folder / "keys")])
    return folder / "keys/usr/share/keyrings/ubuntu-archive-keyring.gpg"


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; see the module's documentation."""
    return bootdisk.command("ubuntu", argv, build, boots)


if __name__ == "__main__":
    sys.exit(main())
