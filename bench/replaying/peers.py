"""What operators use without Thunder to boot many servers from one image: NBD and multicast.

Nothing is left on the nodes, also after a failure.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

from lab import pace
from lab.errors import LabError
from lab.nodes.node import Node
from lab.nodes.services import Service, listens

_NBD_PORT = 10809
_NBD = "/dev/nbd0"
_OVERLAY = "/run/replay.qcow2"
#: Seconds for all that is sent by multicast, and for its receivers to be there or to hear of it.
_SENDING, _STARTING = 300, 20
#: Of a link's rate: udpcast sends no slower when packets are lost, so a full queue costs more.
_SHARE = 0.95


@contextlib.contextmanager
def exported(storage: Node, device: str) -> Iterator[str]:
    """Export a device of a storage host over NBD, read-only; yields the URL.

    :raises LabError: qemu-nbd could not
    """
    options = ("--read-only", "--format=raw", "--persistent", "--shared=0", f"--port={_NBD_PORT}")
    server = Service("replay-nbd", ("qemu-nbd", *options, device), ready=listens(_NBD_PORT))
    storage.catalog[server.name] = server
    try:
        storage.service_start(server.name)
        yield f"nbd://{storage.address}:{_NBD_PORT}"
    finally:
        storage.service_stop(server.name)
        del storage.catalog[server.name]


@contextlib.contextmanager
def overlaid(node: Node, url: str) -> Iterator[str]:
    """Attach a new qcow2 file above an export, as a server's disk; yields the device.

    :raises LabError: qemu-img or qemu-nbd could not
    """
    try:
        node.run(
            f"qemu-img create -q -f qcow2 -F raw -b {url} {_OVERLAY} &&"
            f" qemu-nbd --connect={_NBD} --format=qcow2 {_OVERLAY}"
        )
        yield _NBD
    finally:
        # The process ends some time after that command. In brackets, so that the shell, in whose
        # command line the pattern is, does not match it.
        node.run(
            f"qemu-nbd --disconnect {_NBD} > /dev/null\n"
            f"while pgrep -f '[q]emu-nbd --connect={_NBD}' > /dev/null; do sleep 0.1; done\n"
            f"rm -f {_OVERLAY}"
        )


@contextlib.contextmanager
def nbd_module(nodes: Sequence[Node]) -> Iterator[None]:
    """Have the kernel's NBD devices on these nodes.

    :raises LabError: a kernel has none
    """
    try:
        for node in nodes:
            node.run("modprobe nbd nbds_max=1 && udevadm settle")
        yield
    finally:
        for node in nodes:
            node.run("modprobe --remove nbd", check=False)


def multicast(
    storage: Node, nodes: Sequence[Node], device: str, size: int, rate: int
) -> list[float]:
    """Send the first bytes of a device to all nodes at once with udpcast; they drop them.

    :param rate: of the slowest link in bits per second; 0: no limit
    :returns: seconds until each node has had all of them
    :raises LabError: one has not
    """
    limit, start = pace.whole(_SENDING), pace.whole(_STARTING)
    # Not to the broadcast address, which a node's interface does not have.
    common = (
        "--interface vec0 --mcast-rdv-address 224.0.0.1"
        f" --nokbd --no-progress --start-timeout {start}"
    )
    bitrate = f"--max-bitrate {int(_SHARE * rate)}" if rate else ""
    send = (
        f"head -c {size} {device} |"
        f" timeout {limit} udp-sender {common} --min-receivers {len(nodes)} {bitrate}"
    )
    receive = (
        f"timeout {limit} udp-receiver {common} --receive-timeout {start} --exit-wait 100 | wc -c"
    )
    began = time.monotonic()

    def receiving(node: Node) -> float:
        done = node.run(receive, timeout=_SENDING + _STARTING)
        seconds = time.monotonic() - began
        if int(done.stdout) != size:
            raise LabError(f"{node.name} got {int(done.stdout)} of {size} bytes: {done.stderr}")
        return seconds

    with ThreadPoolExecutor(len(nodes) + 1) as threads:
        sent = threads.submit(storage.run, send, timeout=_SENDING + _STARTING)
        received = [threads.submit(receiving, node) for node in nodes]
    sent.result()
    return [each.result() for each in received]
