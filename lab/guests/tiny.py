"""A guest for quick tests: Debian's cloud kernel and busybox, at its prompt in seconds under TCG.

Everything it runs is in its initramfs, so it keeps reporting while its disk does not answer. On
its serial console, ttyS0, it prints lines that begin with ``tiny: ``:

========================================  ======================================================
``tiny: boot N``                          the root file system is mounted, and its counter of
                                          boots is now N, on stable storage
``tiny: vda WRONG root …``                it cannot be mounted or written
``tiny login: ``                          the prompt; Enter opens a root shell
``tiny: vdb appeared SIZE``               another disk, SIZE in bytes
``tiny: vdb gone``                        it was detached
``tiny: power off``                       the power button was pressed; it powers off
========================================  ======================================================

A checker (``lab/guests/checker.c``) runs on each disk, vda included:

``tiny: vda fresh``
    This disk was never written to; all slots have the image's contents, or zeros.
``tiny: vda found seq=M``
    It contains the records up to number M, which have been checked.
``tiny: vda seq=S writes=W reads=R longest=MS stall_now=MS wrong=N``
    Every second: the number of the last acknowledged write, successful calls, the longest
    completed call, the duration of the call in progress, and errors so far.
``tiny: vda WRONG slot=I want=W got=G``
    W is a sequence number, ``empty`` (the slot was never written) or ``unknown``; G is one of
    these, ``torn`` (part of a record), ``foreign`` (anything else, including a record of another
    disk) or the name of an error.

A disk that was extended is checked up to its new end from the next start or attachment on.

The last number on the console belongs to an acknowledged write, so after a crash ``found`` must
not be lower. A write that was in progress may be there or not. A disk that does not write 4 KiB
atomically shows it as ``torn``, which must not happen on the lab's hosts.

``python -m lab.guests.tiny OUT.qcow2`` writes the image to a file (``OUT.raw`` for a raw one), and
``python -m lab.guests.tiny --check`` boots it once.
"""

from __future__ import annotations

import stat
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from lab.guests import bootdisk
from lab.guests.bootdisk import MIB, SECTOR, GuestError, export, sizes

__all__ = ["GuestError", "boots", "build", "export", "image_path", "sizes"]

HOSTNAME = "tiny"
PROMPT = f"{HOSTNAME} login: "
MEMORY = 96  # MiB
CHECKER = Path(__file__).with_name("checker.c")
INCLUDE = ("busybox-static", "kmod", "linux-image-cloud-amd64")
#: Loaded in this order, after their dependencies. button and evdev handle the power button.
MODULES = ("virtio_pci", "virtio_blk", "button", "evdev")

#: Bytes of the image outside the file system: half of the checker's slots are there.
NEAR, NEAR_LENGTH = 1 * MIB, 4 * MIB
NEAR_STEP = NEAR_LENGTH // 32
#: The other half is beyond the image's data, up to 900 MiB.
FAR = 100 * MIB
FAR_STEP = 25 * MIB
SLOTS = f"{NEAR} {NEAR_STEP} {FAR} {FAR_STEP}"

#: The kernel and the initramfs follow, contiguous and outside the file system: under TCG, GRUB
#: takes a second to follow ext4's extents.
KERNEL = NEAR + NEAR_LENGTH
# Kernel messages would interrupt the checkers' lines, so only panics are printed. The self-tests
# of ciphers take half of the boot time; the check of the timer and the watchdogs fail on a slow
# host.
CMDLINE = "console=ttyS0,115200 loglevel=1 cryptomgr.notests no_timer_check nowatchdog"

INIT = f"""\
#!/bin/sh
mount -t devtmpfs dev /dev
mount -t proc proc /proc
mount -t sysfs sys /sys
for module in /modules/*; do insmod "$module"; done
acpid -c /acpi -p /acpid.pid -l /acpid.log
if mount -t ext4 /dev/vda1 /disk; then
    read -r boots < /disk/var/boots
    boots=$((boots + 1))
    # A crash must not leave an empty counter.
    if echo $boots > /disk/var/boots.new && sync && mv /disk/var/boots.new /disk/var/boots && sync
    then echo "tiny: boot $boots"
    else echo "tiny: vda WRONG root is not writable"
    fi
else
    echo "tiny: vda WRONG root is not mountable"
fi
echo "{PROMPT}"
while read -r _; do setsid -c sh; echo "{PROMPT}"; done < /dev/console &
known=" "
while :; do
    for disk in /dev/vd?; do
        name=${{disk#/dev/}}
        case $known in *" $name "*) continue ;; esac
        [ -e "$disk" ] && read -r sectors < /sys/block/$name/size || continue
        known="$known$name "
        only_new=
        if [ $name = vda ]
        then only_new=-f
        else echo "tiny: $name appeared $((sectors * 512))"
        fi
        checker $only_new $disk {SLOTS} &
    done
    for name in $known; do
        [ -e /dev/$name ] && continue
        known="${{known%% $name *}} ${{known#* $name }}"
        echo "tiny: $name gone"
    done
    sleep 0.5
done
"""
POWER = """\
#!/bin/sh
exec > /dev/console
echo "tiny: power off"
killall checker  # it prints its last number first, if its disk answers
for _ in 1 2 3 4 5 6 7 8 9 10; do pidof checker > /dev/null || break; sleep 0.1; done
umount /disk
poweroff -f
"""


@dataclass(frozen=True)
class Entry:
    """A file, a directory or a symbolic link (whose target is ``data``) of an initramfs."""

    path: str
    mode: int
    data: bytes = b""


def image_path(cache: Path | None = None) -> Path:
    """Return the cache path of the image, whether it has been built or not."""
    return bootdisk.keyed(cache, "tiny", Path(__file__), CHECKER)


def build(cache: Path | None = None, progress: Callable[[str], None] = bootdisk.say) -> Path:
    """Return the image, building it if it is not in the cache.

    :param cache: directory to keep it in; default :func:`lab.guests.bootdisk.default_cache`
    :param progress: called with each line of progress
    :raises GuestError: not root, a tool is missing, or a tool failed
    """
    image = image_path(cache)
    return bootdisk.once(image, lambda: bootdisk.make(image, _install, _disk, progress))


def boots(
    image: Path, timeout: float = 60.0, console: Callable[[str], None] = lambda _line: None
) -> bool:
    """Boot the image in QEMU, without changing it, and return whether it shows its prompt.

    :param timeout: seconds
    :param console: called with each line of the serial console, and QEMU's own messages
    :raises GuestError: QEMU is missing
    """
    return bootdisk.boots(image, PROMPT, MEMORY, timeout, console)


def compile_checker(out: Path) -> None:
    """Compile ``lab/guests/checker.c`` statically."""
    warnings = ("-Wall", "-Wextra", "-Werror")
    bootdisk.run(["gcc", "-static", "-s", "-O2", *warnings, "-o", str(out), str(CHECKER)])


def _install(tree: Path) -> None:
    """Create the tree of the root file system, and beside it the kernel and the initramfs."""
    debian = tree.with_name("debian")
    argv = ["mmdebstrap", "--quiet", "--mode=root", "--variant=extract"]
    argv += [f"--include={','.join(INCLUDE)}", "--aptopt=APT::Install-Recommends false"]
    bootdisk.run([*argv, bootdisk.SUITE, str(debian), *bootdisk.MIRRORS])
    (kernel,) = (debian / "boot").glob("vmlinuz-*")
    version = kernel.name.removeprefix("vmlinuz-")
    bootdisk.run(["depmod", "-b", str(debian), version])
    compile_checker(tree.with_name("checker"))
    kernel.rename(tree.with_name("vmlinuz"))
    entries = _initramfs(debian, version, tree.with_name("checker").read_bytes())
    tree.with_name("initrd").write_bytes(cpio(entries))
    (tree / "var").mkdir(parents=True)
    (tree / "var/boots").write_text("0\n")


def _disk(tree: Path, raw: Path) -> None:
    kernel, initrd = (tree.with_name(name).read_bytes() for name in ("vmlinuz", "initrd"))
    layout, initrd_at = layout_of(len(kernel), len(initrd))
    bootdisk.disk(tree, raw, layout)
    # These bytes must be allocated in the image, so they must not be zeros, which become holes.
    filler = bootdisk.run_bytes(
        [str(tree.with_name("checker")), "fill", str(NEAR), str(NEAR_LENGTH)]
    )
    with raw.open("r+b") as file:
        for offset, data in ((NEAR, filler), (KERNEL, kernel), (initrd_at, initrd)):
            file.seek(offset)
            file.write(data)


def layout_of(kernel: int, initrd: int) -> tuple[bootdisk.Layout, int]:
    """Return the layout of a disk, and the offset of its initramfs.

    :param kernel: size of the kernel in bytes
    :param initrd: size of the initramfs in bytes
    """
    initrd_at = KERNEL + _sectors(kernel) * SECTOR
    end = initrd_at + _sectors(initrd) * SECTOR
    # linux16 enters the kernel through its 16-bit entry point, which takes half as long as linux.
    config = (
        f"linux16 (hd0){KERNEL // SECTOR}+{_sectors(kernel)} {CMDLINE}\n"
        f"initrd16 (hd0){initrd_at // SECTOR}+{_sectors(initrd)}\n"
        "boot\n"
    )
    layout = bootdisk.Layout(
        label=HOSTNAME,
        uuid="7468756e-6465-4272-8074-696e79000001",
        grub_config=config,
        free=4 * MIB,  # mkfs.ext4 creates no journal below 8 MiB
        free_inodes=32,
        start=-(-end // MIB) * MIB,
        grub_modules=("biosdisk", "part_msdos", "linux16"),
    )
    return layout, initrd_at


def _sectors(size: int) -> int:
    return -(-size // SECTOR)


def _initramfs(debian: Path, version: str, checker: bytes) -> list[Entry]:
    busybox = debian / "bin/busybox"
    applets = bootdisk.run([str(busybox), "--list"]).split()
    folders = ("acpi", "acpi/PWRF", "bin", "dev", "disk", "etc", "modules", "proc", "sys")
    modules = debian / "lib/modules" / version
    needed = in_order(MODULES, (modules / "modules.dep").read_text())
    return [
        *(Entry(path, stat.S_IFDIR | 0o755) for path in folders),
        _file("init", INIT.encode()),
        _file("acpi/PWRF/00000080", POWER.encode()),
        _file("bin/busybox", busybox.read_bytes()),
        _file("bin/checker", checker),
        *(Entry(f"bin/{name}", stat.S_IFLNK | 0o777, b"busybox") for name in applets
          if name != "busybox"),
        *(
            _file(f"modules/{number:02}-{Path(path).name}", (modules / path).read_bytes())
            for number, path in enumerate(needed)
        ),
    ]  # fmt: skip


def _file(path: str, data: bytes) -> Entry:
    return Entry(path, stat.S_IFREG | 0o755, data)


def in_order(names: Iterable[str], dependencies: str) -> list[str]:
    """Return the files of the modules, each after its dependencies.

    :param dependencies: contents of ``modules.dep``, which lists the nearest dependency first
    :raises GuestError: a module is missing
    """
    found: dict[str, list[str]] = {}
    for line in dependencies.splitlines():
        file, needs = line.split(":")
        found[Path(file).stem] = [*reversed(needs.split()), file]
    order: dict[str, None] = {}
    for name in names:
        if name not in found:
            raise GuestError(f"the kernel has no module {name}")
        order.update(dict.fromkeys(found[name]))
    return list(order)


def cpio(entries: Iterable[Entry]) -> bytes:
    """Return an archive of the entries in the kernel's format: ``newc``, uncompressed."""
    out = bytearray()
    trailer = Entry("TRAILER!!!", 0)
    for inode, entry in enumerate([*entries, trailer], start=1):
        name = entry.path.encode() + b"\0"
        links = 2 if stat.S_ISDIR(entry.mode) else 1
        # inode, mode, user, group, links, time, size, four device numbers, name's length, unused
        fields = (inode, entry.mode, 0, 0, links, 0, len(entry.data), 0, 0, 0, 0, len(name), 0)
        out += b"070701" + b"".join(b"%08x" % field for field in fields) + name
        out += bytes(-len(out) % 4) + entry.data
        out += bytes(-len(out) % 4)
    return bytes(out)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line: build, export and check."""
    return bootdisk.command("tiny", argv, build, boots)


if __name__ == "__main__":
    sys.exit(main())
