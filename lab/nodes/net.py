"""The lab's network: a namespace, a bridge, and a tap for each node with its rate cap.

Everything that runs in a lab runs in this namespace, which gives it an end as well: whoever is
in it at :meth:`Network.delete` is killed, and the interfaces vanish with it.
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
    """Bytes over a node's cable since the lab came up, as the node sees them."""

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
        """Whether no other lab is there."""
        return all(path == self.path for path in self.path.parent.glob(f"{_PREFIX}*"))

    def command(self, argv: Sequence[str]) -> list[str]:
        """``argv``, to be run inside the namespace.

        nsenter rather than ``ip netns exec``: that one makes a mount namespace for every call.
        """
        return ["nsenter", f"--net={self.path}", "--", *argv]

    def call(self, function: Callable[[], _T]) -> _T:
        """Call ``function`` in a thread that is inside the namespace: its sockets are there."""
        with ThreadPoolExecutor(1, initializer=self._enter) as inside:
            return inside.submit(function).result()

    def _enter(self) -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        with self.path.open() as namespace:
            if libc.setns(namespace.fileno(), _CLONE_NEWNET) != 0:
                error = ctypes.get_errno()
                raise OSError(error, os.strerror(error), str(self.path))

    def create(self) -> None:
        """Make the namespace with its bridge; the lab's host side is 10.77.0.1."""
        run(["ip", "netns", "add", self.name])
        self._ip(
            "link set lo up",
            f"link add {BRIDGE} type bridge",
            f"addr add {HOST_ADDRESS}/{PREFIX} dev {BRIDGE}",
            f"link set {BRIDGE} up",
        )

    def add_node(self, node: NodeSpec) -> None:
        """Plug a node in: its tap, and an ifb through which goes what the node sends."""
        tap, ifb = tap_name(node.name), ifb_name(node.name)
        self._ip(
            f"tuntap add dev {tap} mode tap user {os.geteuid()}",
            f"link add {ifb} type ifb",
            f"link set {ifb} up",
            f"link set {tap} master {BRIDGE} up",
        )
        self.limit(node)

    def limit(self, node: NodeSpec) -> None:
        """Cap the cable at the node's rate, in both directions.

        A queue shapes only what leaves an interface: out of the tap goes what the node receives;
        what it sends is taken through the ifb. The delay is the node's own affair
        (:meth:`lab.nodes.node.Node.set_link`), because not every host kernel has netem.
        """
        tap, ifb = tap_name(node.name), ifb_name(node.name)
        for device in (tap, ifb):
            run(self.command(["tc", "qdisc", "del", "dev", device, "root"]), check=False)
        run(self.command(["tc", "qdisc", "del", "dev", tap, "ingress"]), check=False)
        rate = node.link.bits_per_second
        if rate == 0:
            return
        # Two milliseconds' worth, and never less than a few full-sized segments.
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
        """What went over a node's cable so far."""
        stats = self._link(tap_name(node))["stats64"]
        return Counters(received=stats["tx"]["bytes"], sent=stats["rx"]["bytes"])

    def plugged(self, node: str) -> bool:
        """Whether some process holds the node's tap open."""
        return "LOWER_UP" in self._link(tap_name(node))["flags"]

    def pids(self) -> list[int]:
        """Every process in the namespace."""
        if not self.exists():
            return []
        wanted = os.stat(self.path)
        return [pid for pid in psutil.pids() if _is_in(pid, wanted)]

    def links(self) -> list[str]:
        """The names of the interfaces in the namespace."""
        done = run(["ip", "-n", self.name, "-j", "link", "show"])
        return [link["ifname"] for link in json.loads(done.stdout)]

    def delete(self) -> None:
        """Kill whoever is in the namespace and take it away; absent is success."""
        # Until none is left: one that was forking while we looked is caught the next time.
        wait_for(f"processes of {self.name} to end", lambda: not self.kill(), timeout=30)
        if self.exists():
            run(["ip", "netns", "delete", self.name])

    def kill(self) -> int:
        """Kill whoever is in the namespace; returns how many were found there."""
        # Traced ones first: they must not outlive their tracer (see lab.nodes.uml).
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
