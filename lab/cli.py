"""``lab``: the command line."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from types import FrameType

from rich.console import Console
from rich.table import Table

from lab import pace
from lab.cloud.control import Controller
from lab.cluster import SERVER_MEMORY, Cluster, Options
from lab.errors import LabError, PreconditionError
from lab.nodes.node import Node
from lab.nodes.topology import Link, Topology
from lab.progress import Steps

_EPILOG = """\
a first session:
  lab up                                   1 storage node, 3 compute nodes, control plane
  lab status                               what runs, and where
  lab openstack volume service list        the client, with credentials, inside the lab
  lab exec cmp1 'dmsetup ls; lsblk'        a command on a node
  lab logs stor1 cinder-volume             a daemon's log
  lab kill cmp2; lab start cmp2            a power cut, and the power back
  lab down

The nodes see the source tree live: after a change restart the daemon (`lab restart`), not
the lab.
Whatever is built is cached in $THUNDER_LAB_CACHE (/var/cache/thunder-lab); the labs' disks and
logs are in $THUNDER_LAB_STATE (/var/tmp/thunder-lab). All time limits are multiplied by a factor
that `lab up` measures: how much longer this machine takes for a fixed piece of work than the
reference machine. THUNDER_LAB_PACE=2.5 in the environment sets it instead.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    :returns: 0; 1 if it failed; 2 if this machine cannot run a lab or the command line is
        invalid; ``exec`` and ``openstack`` return the exit code of their command
    """
    signal.signal(signal.SIGTERM, _interrupt)
    parsed = _parser().parse_args(arguments)
    command: Callable[[argparse.Namespace], int] = parsed.command
    try:
        return command(parsed)
    except PreconditionError as error:
        print(f"lab: {error}", file=sys.stderr)
        return 2
    except LabError as error:
        print(f"lab: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("lab: interrupted", file=sys.stderr)
        return 130


def _interrupt(_number: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _up(parsed: argparse.Namespace) -> int:
    topology = Topology.standard(
        parsed.storage,
        parsed.compute,
        link=Link(parsed.rate, parsed.delay),
        memory=parsed.memory,
        both=parsed.both,
        compute_memory=max(parsed.memory, SERVER_MEMORY) if parsed.nova else 0,
        disk=parsed.disk,
    )
    options = Options(
        control_plane=parsed.control_plane,
        services=parsed.services,
        nova=parsed.nova,
        backend_driver=parsed.backend_driver,
    )
    cluster = Cluster(parsed.name, topology, options)
    cluster.up(Steps())
    print(f"lab {parsed.name} is up; next: lab status, lab --help")
    return 0


def _down(parsed: argparse.Namespace) -> int:
    Cluster(parsed.name).down(Steps())
    return 0


def _status(parsed: argparse.Namespace) -> int:
    cluster = Cluster.load(parsed.name)
    table = Table(
        "host", "kind", "address", "rack", "zone", "link", "state", "received", "sent", "services"
    )
    for node in cluster.nodes.values():
        spec, running = node.spec, node.running()
        counters = node.counters()
        services = [n for n in node.catalog if running and node.service_running(n)]
        table.add_row(
            spec.name,
            spec.kind,
            spec.address,
            spec.rack,
            spec.zone,
            f"{spec.link.rate} {spec.link.delay}",
            "running" if running else "off",
            f"{counters.received / 2**20:.1f} MiB",
            f"{counters.sent / 2**20:.1f} MiB",
            " ".join(services),
        )
    Console(width=None if sys.stdout.isatty() else 160).print(table)
    print(pace.describe(cluster.pace))
    return 0 if cluster.is_up() else 1


def _exec(parsed: argparse.Namespace) -> int:
    node = Cluster.load(parsed.name).node(parsed.node)
    terminal = ["-t"] if sys.stdin.isatty() and sys.stdout.isatty() else []
    return _become(node.ssh(*parsed.argv, options=terminal))


def _console(parsed: argparse.Namespace) -> int:
    node = Cluster.load(parsed.name).node(parsed.node)
    return _become(node.ssh(options=["-t"]))


def _logs(parsed: argparse.Namespace) -> int:
    # No Cluster.load: logs matter most for a lab that could not start.
    folder = Cluster(parsed.name).logs / parsed.node
    if not folder.is_dir():
        raise LabError(f"there are no logs of {parsed.node!r} in {folder.parent}")
    found = {path.stem: path for path in sorted(folder.glob("*.log"))}
    if parsed.service is not None and parsed.service not in found:
        raise LabError(f"no log of {parsed.service!r}; available: {', '.join(found)}")
    paths = [found[parsed.service]] if parsed.service else list(found.values())
    follow = ["-F"] if parsed.follow else []
    return _become(["tail", f"--lines={parsed.lines}", *follow, *map(str, paths)])


def _link(parsed: argparse.Namespace) -> int:
    cluster = Cluster.load(parsed.name)
    old = cluster.node(parsed.node).spec.link
    link = Link(parsed.rate or old.rate, parsed.delay or old.delay)
    cluster.set_link(parsed.node, link)
    print(f"{parsed.node}: {link.rate} each way, {link.delay} delay")
    return 0


def _kill(parsed: argparse.Namespace) -> int:
    Cluster.load(parsed.name).node(parsed.node).kill()
    return 0


def _start(parsed: argparse.Namespace) -> int:
    cluster = Cluster.load(parsed.name)
    node = cluster.node(parsed.node)
    with Steps() as steps, steps.step(f"{node.name}: boot"):
        node.start()
    if cluster.options.control_plane and cluster.options.services:
        for name in node.catalog:
            with Steps() as steps, steps.step(f"{node.name}: {name}"):
                node.service_start(name)
    return 0


def _restart(parsed: argparse.Namespace) -> int:
    cluster = Cluster.load(parsed.name)
    place: Node | Controller = (
        cluster.controller if parsed.node == "controller" else cluster.node(parsed.node)
    )
    if parsed.service not in place.catalog:
        available = ", ".join(place.catalog)
        raise LabError(f"{parsed.node} has no daemon {parsed.service!r}; available: {available}")
    with Steps() as steps, steps.step(f"{parsed.node}: {parsed.service}"):
        place.service_stop(parsed.service)
        place.service_start(parsed.service)
    return 0


def _thunder(parsed: argparse.Namespace) -> int:
    print(Cluster.load(parsed.name).thunder(*parsed.argv), end="")
    return 0


def _openstack(parsed: argparse.Namespace) -> int:
    cluster = Cluster.load(parsed.name)
    argv = cluster.network.command(["openstack", *parsed.argv])
    return _become(argv, cluster.controller.environment())


def _become(argv: Sequence[str], environment: Mapping[str, str] | None = None) -> int:
    sys.stdout.flush()
    os.execvpe(argv[0], list(argv), {**os.environ, **(environment or {})})  # noqa: S606  # no shell is involved


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lab",
        description="A multi-host cloud with real kernels on this machine: no KVM, no containers.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--name", default="thunder", help="name of the lab; several can be up at once (%(default)s)"
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    def add(
        name: str, command: Callable[[argparse.Namespace], int], help: str, more: str
    ) -> argparse.ArgumentParser:
        sub = commands.add_parser(
            name,
            help=help,
            description=f"{help[0].upper()}{help[1:]}.",
            epilog=more,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        sub.set_defaults(command=command)
        return sub

    up = add("up", _up, "bring a lab up; on failure everything is taken down again", _UP)
    up.add_argument(
        "--storage", type=int, default=1, metavar="N", help="storage nodes (%(default)s)"
    )
    up.add_argument(
        "--compute", type=int, default=3, metavar="N", help="compute nodes (%(default)s)"
    )
    up.add_argument(
        "--both", type=int, default=0, metavar="N",
        help="nodes that are storage and compute node at once (%(default)s)"
    )  # fmt: skip
    up.add_argument(
        "--rate", default="1gbit", help="rate of each node's link, each way (%(default)s)"
    )
    up.add_argument(
        "--delay", default="0ms", help="delay of each node's link, one way (%(default)s)"
    )
    up.add_argument(
        "--memory", type=int, default=1024, metavar="MIB", help="memory of a node (%(default)s)"
    )
    up.add_argument(
        "--disk", type=int, default=8, metavar="GIB", help="data disk of a node (%(default)s)"
    )
    up.add_argument("--nova", action="store_true",
                    help=f"with Placement, Nova, libvirt and QEMU; compute nodes then have "
                         f"at least {SERVER_MEMORY} MiB")  # fmt: skip
    up.add_argument("--no-control-plane", dest="control_plane", action="store_false",
                    help="nodes only: no MariaDB, RabbitMQ, Keystone, Glance, Cinder")  # fmt: skip
    up.add_argument("--no-services", dest="services", action="store_false",
                    help="no cinder-volume and no thunder-agent in the nodes")  # fmt: skip
    up.add_argument("--backend-driver", default=Options().backend_driver, metavar="CLASS",
                    help="volume_driver of the backend (%(default)s)")  # fmt: skip

    add("down", _down, "take a lab down; only its logs are kept", _DOWN)
    add("status", _status, "show nodes, links, traffic and daemons", "")

    run = add("exec", _exec, "run a command on a node, as root", _EXEC)
    run.add_argument("node", metavar="NODE")
    run.add_argument(
        "argv", nargs=argparse.REMAINDER, metavar="CMD", help="passed to the node's shell"
    )
    console = add(
        "console", _console, "open a shell on a node; its kernel's messages are in `lab logs`", ""
    )
    console.add_argument("node", metavar="NODE")

    logs = add("logs", _logs, "show the end of a node's logs, console or one daemon", _LOGS)
    logs.add_argument("node", metavar="NODE", help="a node, or `controller`")
    logs.add_argument("service", nargs="?", metavar="SERVICE", help="`console` or a daemon (all)")
    logs.add_argument("-f", "--follow", action="store_true", help="keep printing as the log grows")
    logs.add_argument("-n", "--lines", type=int, default=40, metavar="N", help="(%(default)s)")

    link = add("link", _link, "change a node's link while it runs", _LINK)
    link.add_argument("node", metavar="NODE")
    link.add_argument("--rate", help="each way, for example 100mbit; 0bit is no limit")
    link.add_argument("--delay", help="one way, on what the node sends, for example 5ms")

    kill = add("kill", _kill, "cut a node's power: nothing is flushed or shut down", _KILL)
    kill.add_argument("node", metavar="NODE")
    client = add(
        "openstack", _openstack, "run the openstack client in the lab, as administrator", _OS
    )
    client.add_argument("argv", nargs=argparse.REMAINDER, metavar="ARG")
    operator = add("thunder", _thunder, "run Thunder's operator command on the lab's cloud", "")
    operator.add_argument("argv", nargs=argparse.REMAINDER, metavar="ARG")
    start = add("start", _start, "boot a killed node with its disks, and start its daemons", "")
    start.add_argument("node", metavar="NODE")
    restart = add("restart", _restart, "restart a daemon: it then runs the tree as it is now", "")
    restart.add_argument("node", metavar="NODE", help="a node, or `controller`")
    restart.add_argument("service", metavar="SERVICE")
    return parser


_UP = """\
examples:
  lab up                                       the standard lab
  lab up --storage 2 --compute 4               more hosts; two compute nodes to a rack
  lab up --rate 100mbit --delay 2ms            a slow network
  lab --name kernel up --no-control-plane --storage 0 --compute 1
                                               one bare node beside another lab

The first time, the root image (a minute) and the databases (a minute) are built and cached.
"""
_DOWN = """\
Works at any time: while `lab up` runs elsewhere, after it was killed, or without a lab.
The logs are kept until the next `lab up` of this name.
"""
_EXEC = """\
examples:
  lab exec cmp1 lsblk
  lab exec stor1 'vgs; lvs | grep image'       quote what the node's shell should see
  tar c . | lab exec cmp1 tar x -C /tmp
"""
_LOGS = """\
examples:
  lab logs cmp1                      the end of every log of cmp1
  lab logs stor1 cinder-volume -f
  lab logs controller cinder-api
  lab logs cmp2 console              the kernel messages of cmp2
"""
_LINK = """\
examples:
  lab link cmp3 --rate 100mbit
  lab link stor1 --rate 0bit --delay 5ms
"""
_OS = """\
examples:
  lab openstack volume service list
  lab openstack image create --disk-format raw --file disk.img debian
  lab openstack volume create --image debian --size 2 v1
"""
_KILL = """\
The node's disks keep their contents of that instant; `lab start` boots it again from them.
"""
