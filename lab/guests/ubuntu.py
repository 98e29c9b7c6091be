"""A guest of another distribution: Ubuntu 24.04 with cloud-init and SSH, as its cloud images have.

Benchmarks boot it beside Debian's (:mod:`lab.guests.guest`), which it resembles otherwise. Its
packages are from Ubuntu's archive, and so are the keys of that, which Debian 12 does not have.
"""

from __future__ import annotations

import hashlib
import urllib.request
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


def build() -> Path:
    """Return the image, building it if it is not in the cache; says what it does.

    :raises GuestError: not root, a tool is missing, or a tool failed
    """
    image = bootdisk.keyed(None, "ubuntu", Path(__file__), Path(guest.__file__))
    return bootdisk.once(image, lambda: bootdisk.make(image, install, _disk, bootdisk.say))


def install(tree: Path) -> None:
    """Install the guest's system into a new directory.

    :raises GuestError: the archive cannot be reached, or a tool failed
    """
    keys = _keys(tree.parent)
    source = f"deb [signed-by={keys}] {ARCHIVE}"
    mirrors = [f"{source} {suite} main" for suite in (SUITE, f"{SUITE}-updates")]
    guest.bootstrap(tree, SUITE, mirrors, INCLUDE, FILES)


def _disk(tree: Path, raw: Path) -> None:
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
