"""The root image of the nodes: built once, cached under a hash of its inputs."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from lab.shell import run

#: Installed in every node, beside the packages of priority "required".
PACKAGES = (
    "cryptsetup-bin",
    "dbus",
    "dmsetup",
    "e2fsprogs",
    "iproute2",
    "iputils-ping",
    "kmod",
    "libvirt-clients",
    "libvirt-daemon",
    "lsscsi",
    "lvm2",
    "netbase",
    "open-iscsi",
    "openssh-server",
    "procps",
    "python3",
    "qemu-system-x86",
    "qemu-utils",
    "sg3-utils",
    "strace",
    "sudo",
    "thin-provisioning-tools",
    "tini",
    "udev",
    "udpcast",
)
SUITE = "bookworm"
#: Taken from backports: without KVM, QEMU 7.2 loses writes to the memory of a guest during live
#: migration, and about every tenth guest crashed. Fixed in 9.0 by 03bfc2188f07, "physmem: Fix
#: migration dirty bitmap coherency with TCG memory access".
BACKPORTED = ("qemu-*", "seabios")
_MIRROR = "http://deb.debian.org/debian"
SIZE_GIB = 10
_ROOTFS = Path(__file__).parent / "rootfs"
_LEFT_OUT = ("/usr/share/man/*", "/usr/share/doc/*", "/usr/share/locale/*")


def root_image(cache: Path) -> Path:
    """The path of the root image, which is built if it is missing (a minute or two).

    Of the start-up code only ``entry`` is part of the image; the rest, ``lab/nodes/rootfs/init``,
    is passed to the node at every boot.
    """
    entry = _ROOTFS / "entry"
    mirror = os.environ.get("THUNDER_LAB_MIRROR", "")
    recipe = "\n".join(
        [*PACKAGES, SUITE, mirror, *BACKPORTED, str(SIZE_GIB), *_LEFT_OUT, entry.read_text()]
    )
    image = cache / f"root-{hashlib.sha256(recipe.encode()).hexdigest()[:16]}.img"
    if image.exists():
        return image
    with only_one(cache / "root.lock"):
        if not image.exists():
            _build(image, entry, mirror)
    return image


def _build(image: Path, entry: Path, mirror: str) -> None:
    work = image.parent / "root.part"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    left_out = [f"--dpkgopt=path-exclude={path}" for path in _LEFT_OUT]
    backports = f"{SUITE}-backports"
    (work / "backports.list").write_text(f"deb {mirror or _MIRROR} {backports} main\n")
    (work / "backports").write_text(
        f"Package: {' '.join(BACKPORTED)}\nPin: release n={backports}\nPin-Priority: 500\n"
    )
    run(
        contained(
            "mmdebstrap", "--mode=root", "--variant=minbase", "--quiet", *left_out,
            f"--setup-hook=copy-in {work}/backports.list /etc/apt/sources.list.d",
            f"--setup-hook=copy-in {work}/backports /etc/apt/preferences.d",
            f"--include={','.join(PACKAGES)}",
            f"--customize-hook=copy-in {entry} /sbin",
            SUITE, str(work / "root"), *([mirror] if mirror else []),
        )
    )  # fmt: skip
    raw = work / "root.img"
    run(["truncate", "--size", f"{SIZE_GIB}G", str(raw)])
    run(contained("mkfs.ext4", "-q", "-d", str(work / "root"), str(raw)))
    raw.rename(image)
    shutil.rmtree(work)


def xstate_library(cache: Path) -> Path:
    """The path of the library made of ``lab/nodes/xstate.c``, compiled if it is missing."""
    source = Path(__file__).parent / "xstate.c"
    library = cache / f"xstate-{hashlib.sha256(source.read_bytes()).hexdigest()[:16]}.so"
    if not library.exists():
        with only_one(cache / "xstate.lock"):
            part = library.with_suffix(".part")
            run(
                ["gcc", "-O2", "-Wall", "-Werror", "-shared", "-fPIC", "-o", str(part), str(source)]
            )
            part.rename(library)
    return library


def contained(*argv: str) -> list[str]:
    """Wrap ``argv`` so that it ends, with its children and mounts, when the lab's process ends."""
    return [
        "setpriv", "--pdeathsig", "KILL",
        "unshare", "--pid", "--mount", "--fork", "--kill-child", "--mount-proc", "--", *argv,
    ]  # fmt: skip


@contextlib.contextmanager
def only_one(lock: Path) -> Iterator[None]:
    """Hold ``lock`` against other processes; the kernel releases it if this one is killed."""
    lock.parent.mkdir(parents=True, exist_ok=True)
    with lock.open("a") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        yield
