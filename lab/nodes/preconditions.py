"""What a machine needs to run a lab: one line with a remedy for whatever is missing."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import psutil

from lab.errors import PreconditionError
from lab.nodes.topology import Topology

#: A program that must be installed, and its Debian package.
PROGRAMS = {
    "linux.uml": "user-mode-linux",
    "bwrap": "bubblewrap",
    "mmdebstrap": "mmdebstrap",
    "mkfs.ext4": "e2fsprogs",
    "ip": "iproute2",
    "tc": "iproute2",
    "ss": "iproute2",
    "nsenter": "util-linux",
    "setpriv": "util-linux",
    "taskset": "util-linux",
    "ssh": "openssh-client",
    "pkill": "procps",
}
CONTROL_PLANE_PROGRAMS = {
    "mariadbd": "mariadb-server",
    "rabbitmqctl": "rabbitmq-server",
    "qemu-img": "qemu-utils",
}
TUN = Path("/dev/net/tun")


def check(*, control_plane: bool) -> None:
    """Check that a lab can run on this machine.

    :raises PreconditionError: names the first thing that is missing, and the remedy
    """
    if os.geteuid() != 0:
        raise PreconditionError("the lab makes network namespaces and taps: run it as root")
    if not TUN.is_char_device():
        raise PreconditionError(
            f"there is no {TUN}: run `modprobe tun` (in a container, pass the device in)"
        )
    programs = PROGRAMS | (CONTROL_PLANE_PROGRAMS if control_plane else {})
    missing = sorted({package for name, package in programs.items() if not shutil.which(name)})
    if missing:
        raise PreconditionError(
            f"packages are missing: run lab/bootstrap, or `apt-get install {' '.join(missing)}`"
        )


def check_memory(topology: Topology) -> None:
    """Check that there is enough memory for all nodes.

    :raises PreconditionError: there is not; says what to do
    """
    needed = sum(node.memory for node in topology.nodes)
    free = psutil.virtual_memory().available // 2**20
    if free < needed:
        raise PreconditionError(
            f"{free} MiB of memory are free and the nodes take up to {needed} MiB:"
            " bring up fewer of them (--compute) or smaller ones (--memory)"
        )
