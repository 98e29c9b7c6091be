"""The lab's network: a namespace, a bridge, and a rate-limited tap for each node.

Everything that runs in a lab runs in this namespace, so :meth:`Network.delete` can end it all: it
kills every process in the namespace, and the interfaces are removed with it.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import psutil

from lab.nodes.topology import HOST_ADDRESS, PREFIX, NodeSpec
from lab.shell import run, wait_for

BRIDGE = "br0"
_PREFIX = "thunder-"
_CLONE_NEWNET = 0x40000000  # linux/sched.h; os.setns comes with Python 3.12
_T = TypeVar("_T")


@dataclass(frozen=True)
class Counters:
    """Bytes over a node's link since the lab came up, from the node's point of view."""

    received: int
    sent: int


class Network:
    """The network namespace ``thunder-<lab>``."""

    def __init__(self, lab: str) -> None:
        self.name = f"{_PREFIX}{lab}"
        self.path = Path("/run/netns") / self.name

    def exists(self) -> bool:
        return self.path.exists()

    def is_alone(self) -> bool:
        """Whether there is no other lab on this machine."""
        return all(path == self.path for path in self.path.parent.glob(f"{_PREFIX}*"))

    def command(self, argv: Sequence[str]) -> list[str]:
        """Wrap ``argv`` to run inside the namespace.

        By nsenter, because ``ip netns exec`` creates a mount namespace for every call.
        """
        return ["nsenter", f"--net={self.path}", "--", *argv]

    def call(self, function: Callable[[], _T]) -> _T:
        """Call ``function`` in a thread inside the namespace, where its sockets are created."""
        with ThreadPoolExecutor(1, initializer=self._enter) as inside:
            return inside.submit(function).result()

    def _enter(self) -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        with self.path.open() as namespace:
            if libc.setns(namespace.fileno(), _CLONE_NEWNET) != 0:
                error = ctypes.get_errno()
                raise OSError(error, os.strerror(error), str(self.path))

    def create(self) -> None:
        """Create the namespace and its bridge; this machine is 10.77.0.1 in it."""
        run(["ip", "netns", "add", self.name])
        self._ip(
            "link set lo up",
            f"link add {BRIDGE} type bridge",
            f"addr add {HOST_ADDRESS}/{PREFIX} dev {BRIDGE}",
            f"link set {BRIDGE} up",
        )

    def add_node(self, node: NodeSpec) -> None:
        """Create a node's tap, and an ifb device for the traffic that the node sends."""
        tap, ifb = tap_name(node.name), ifb_name(node.name)
        self._ip(
            f"tuntap add dev {tap} mode tap user {os.geteuid()}",
            f"link add {ifb} type ifb",
            f"link set {ifb} up",
            f"link set {tap} master {BRIDGE} up",
        )
        self.limit(node)

    def limit(self, node: NodeSpec) -> None:
        """Limit the link to the node's rate, in both directions.

        A queue shapes only outgoing traffic: the tap's queue shapes what the node receives, and
        what it sends is redirected through the ifb device. The delay is added in the node
        (:meth:`lab.nodes.node.Node.set_link`), because not every host kernel has netem.
        """
        tap, ifb = tap_name(node.name), ifb_name(node.name)
        for device in (tap, ifb):
            run(self.command(["tc", "qdisc", "del", "dev", device, "root"]), check=False)
        run(self.command(["tc", "qdisc", "del", "dev", tap, "ingress"]), check=False)
        rate = node.link.bits_per_second
        if rate == 0:
            return
        # Two milliseconds of traffic, and at least a few full-sized segments.
        shape = f"tbf rate {rate}bit burst {max(rate // 8 // 500, 64 * 1024)} latency 50ms"
        run(
            self.command(["tc", "-batch", "-"]),
            input="\n".join(
                [
                    f"qdisc add dev {tap} root {shape}",
                    f"qdisc add dev {ifb} root {shape}",
                    f"qdisc add dev {tap} handle ffff: ingress",
                    f"filter add dev {tap} parent ffff: protocol all u32 match u32 0 0"
                    f" action mirred egress redirect dev {ifb}",
                ]
            ),
        )

    def counters(self, node: str) -> Counters:
        """The traffic over a node's link so far."""
        stats = self._link(tap_name(node))["stats64"]
        return Counters(received=stats["tx"]["bytes"], sent=stats["rx"]["bytes"])

    def plugged(self, node: str) -> bool:
        """Whether a process has the node's tap open."""
        return "LOWER_UP" in self._link(tap_name(node))["flags"]

    def pids(self) -> list[int]:
        """Every process in the namespace."""
        if not self.exists():
            return []
        namespace = os.stat(self.path)
        return [pid for pid in psutil.pids() if _is_in(pid, namespace)]

    def links(self) -> list[str]:
        """The names of the interfaces in the namespace."""
        done = run(["ip", "-n", self.name, "-j", "link", "show"])
        return [link["ifname"] for link in json.loads(done.stdout)]

    def delete(self) -> None:
        """Kill every process in the namespace, then delete it; absent is success."""
        # Repeat until none is left: a process may have forked during the scan.
        wait_for(f"processes of {self.name} to end", lambda: not self.kill(), timeout=30)
        if self.exists():
            run(["ip", "netns", "delete", self.name])

    def kill(self) -> int:
        """Kill every process in the namespace; returns how many there were."""
        # Traced processes first: they must not outlive their tracer (see lab.nodes.uml).
        pids = sorted(self.pids(), key=_is_traced, reverse=True)
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        return len(pids)

    def _ip(self, *lines: str) -> None:
        run(["ip", "-n", self.name, "-batch", "-"], input="\n".join(lines))

    def _link(self, device: str) -> dict[str, Any]:
        done = run(["ip", "-n", self.name, "-j", "-s", "link", "show", "dev", device])
        link: dict[str, Any] = json.loads(done.stdout)[0]
        return link


def tap_name(node: str) -> str:
    """The name of a node's tap in the lab's namespace."""
    return f"tap-{node}"


def ifb_name(node: str) -> str:
    """The name of the device that shapes what a node sends."""
    return f"ifb-{node}"


def _is_in(pid: int, namespace: os.stat_result) -> bool:
    try:
        seen = os.stat(f"/proc/{pid}/ns/net")
    except OSError:  # it ended, or is a zombie
        return False
    return (seen.st_ino, seen.st_dev) == (namespace.st_ino, namespace.st_dev)


def _is_traced(pid: int) -> bool:
    try:
        return "\nTracerPid:\t0\n" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False
