"""The cost of exporting a volume and letting a host in, by the number of targets of a storage host.

An attach is Cinder's create_export and initialize_connection. Three target drivers do the same in
one node, on the kernel's LIO, with the saved configuration on a disk: Thunder's; Cinder's with
``cinder-rtstool`` as a library, which saves the starts of its processes; and Cinder's as it is.
Attaches are made in one process, as in a cinder-volume. Cinder's take minutes where a host has
hundreds of targets, so only few are made.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from cinder import objects

objects.register_all()  # before any driver is imported, as in cinder-volume

from cinder import privsep  # noqa: E402
from cinder.cmd import rtstool  # noqa: E402
from cinder.volume import configuration, manager  # noqa: E402
from cinder.volume import driver as cinder_driver  # noqa: E402
from cinder.volume.targets import lio as cinder_lio  # noqa: E402
from oslo_concurrency import processutils  # noqa: E402
from oslo_config import cfg  # noqa: E402

from cinder_thunder import target  # noqa: E402
from lab.cluster import Cluster, Options  # noqa: E402
from lab.nodes.node import TREE  # noqa: E402
from lab.nodes.topology import Topology  # noqa: E402
from os_brick_thunder.common.mechanism.devicemapper import KernelDeviceMapper  # noqa: E402
from os_brick_thunder.common.policy.dmtable import Table, Zero  # noqa: E402
from os_brick_thunder.common.transport import lio  # noqa: E402

HOST = "iqn.1993-08.org.debian:01:cmp1"
#: Sectors of a volume.
SIZE = 2048
THUNDER, LIBRARY, CINDER = "Thunder", "rtstool", "Cinder"


class Library(cinder_lio.LioAdm):
    """Cinder's driver, with ``cinder-rtstool`` called instead of started."""

    def _verify_rtstool(self) -> None:
        pass

    @staticmethod
    @target.locked
    def _execute(*args: Any, **kwargs: Any) -> tuple[str, str]:
        arguments = [str(argument) for argument in args]
        if arguments[1] == "get-targets":  # it prints, and threads share their output
            with lio.exclusive():
                return "\n".join(found.wwn for found in rtstool.rtslib_fb.RTSRoot().targets), ""
        with lio.exclusive():
            rtstool.main(arguments)
        return "", ""


class Processes(cinder_lio.LioAdm):
    """Cinder's driver, without sudo and rootwrap."""

    @staticmethod
    @target.locked
    def _execute(*args: Any, **kwargs: Any) -> tuple[str, str]:
        found: tuple[str, str] = processutils.execute(*args)
        return found

    def _verify_rtstool(self) -> None:
        pass


class Volume(SimpleNamespace):
    """Of Cinder's: its attributes are its items, too."""

    def __getitem__(self, name: str) -> Any:
        return getattr(self, name)

    def get(self, name: str, default: Any = None) -> Any:
        return getattr(self, name, default)


@dataclass(frozen=True)
class Result:
    """Seconds of each attach, and of all together."""

    driver: str
    targets: int  # that were there before
    at_once: int
    each: tuple[float, ...]
    seconds: float

    @property
    def apiece(self) -> float:
        return self.seconds / len(self.each)


class Scene:
    """A storage host with volumes, each attached to a host."""

    def __init__(self, folder: Path) -> None:
        cfg.CONF([], project="cinder", default_config_files=[])
        privsep.sys_admin_pctxt.set_client_mode(False)
        cfg.CONF.set_override("lock_path", str(folder / "locks"), group="oslo_concurrency")
        options = configuration.Configuration(manager.volume_backend_opts, config_group="bench")
        options.append_config_values(cinder_driver.volume_opts)
        cfg.CONF.set_override("target_ip_address", "127.0.0.1", group="bench")
        nobody = SimpleNamespace(volume_get=lambda context, volume_id: {"provider_auth": None})
        self.drivers: dict[str, Any] = {}
        for name, kind in (
            (THUNDER, target.VolumeTargetDriver),
            (LIBRARY, Library),
            (CINDER, Processes),
        ):
            self.drivers[name] = kind(configuration=options)
            self.drivers[name].db = nobody
        self._dm = KernelDeviceMapper()
        self._numbers = itertools.count()
        self._attached: list[Volume] = []

    def fill(self, count: int) -> None:
        """Have that many targets."""
        volumes = self._volumes(count - len(self._attached))
        with ThreadPoolExecutor(24) as threads:
            list(threads.map(lambda volume: self._attach(THUNDER, volume), volumes))
        self._attached += volumes

    def measure(self, driver: str, at_once: int, count: int) -> Result:
        """Attach ``count`` volumes, ``at_once`` at a time, and detach them again."""
        before = len(lio.names())
        volumes = self._volumes(count)

        def timed(volume: Volume) -> float:
            began = time.monotonic()
            self._attach(driver, volume)
            return time.monotonic() - began

        with ThreadPoolExecutor(at_once) as threads:
            began = time.monotonic()
            each = tuple(threads.map(timed, volumes))
            seconds = time.monotonic() - began
        self._check(volumes)
        for volume in volumes:
            self.drivers[THUNDER].remove_export(None, volume)
            self._dm.remove(volume.name)
        return Result(driver, before, at_once, each, seconds)

    def _attach(self, driver: str, volume: Volume) -> None:
        made = self.drivers[driver].create_export(None, volume, f"/dev/mapper/{volume.name}")
        volume.provider_location, volume.provider_auth = made["location"], made["auth"]
        self.drivers[driver].initialize_connection(volume, {"initiator": HOST})

    def _check(self, volumes: Sequence[Volume]) -> None:
        """Whether the file has every target with its host: it was answered for."""
        config = json.loads(Path("/etc/target/saveconfig.json").read_text())
        saved = {entry["wwn"]: entry["tpgs"][0]["node_acls"] for entry in config["targets"]}
        for volume in (*self._attached, *volumes):
            (acl,) = saved[volume.provider_location.split()[1]]
            assert acl["node_wwn"] == HOST

    def _volumes(self, count: int) -> list[Volume]:
        made = []
        for number in itertools.islice(self._numbers, count):
            name = f"volume-{number}"
            self._dm.create(name, Table.of((SIZE, Zero())))
            made.append(Volume(id=str(number), name=name, encryption_key_id=None))
        return made


def measure(
    levels: Sequence[int], at_once: int, turns: int, slow: int, folder: Path
) -> Iterator[Result]:
    scene = Scene(folder)
    for level in levels:
        scene.fill(level)
        yield scene.measure(THUNDER, 1, turns)
        yield scene.measure(THUNDER, at_once, 2 * at_once)
        yield scene.measure(LIBRARY, 1, slow)
        if level == levels[0]:  # at once the others take as long apiece: they have one lock
            yield scene.measure(LIBRARY, at_once, at_once)
        yield scene.measure(CINDER, 1, slow)


def show(results: Iterator[Result]) -> None:
    """A line for each result, as soon as it is there, and then what they are to each other."""
    apiece: dict[tuple[str, int, int], float] = {}
    print(
        f"{'':8}{'targets':>8}{'at once':>8}{'s/attach':>9}{'median s':>9}{'max s':>7}", flush=True
    )
    for r in results:
        apiece[r.driver, r.at_once, r.targets] = r.apiece
        line = f"{r.driver:8}{r.targets:8}{r.at_once:8}{r.apiece:9.3f}"
        print(f"{line}{statistics.median(r.each):9.2f}{max(r.each):7.2f}", flush=True)
    fewest = min(targets for _, _, targets in apiece)
    for (driver, at_once, targets), seconds in sorted(apiece.items()):
        line = f"{driver:8} {at_once:3} at once, {targets} targets: "
        line += f"{seconds / apiece[driver, at_once, fewest]:.1f} times {fewest} targets"
        for other in (LIBRARY, CINDER):
            line += f"; {other} takes {apiece[other, 1, targets] / seconds:.1f} times as long"
        print(line)


def main() -> int:
    parser = argparse.ArgumentParser(prog="bench.lio", description=__doc__)
    parser.add_argument("--targets", type=int, nargs="+", default=[3, 100, 300])
    parser.add_argument("--at-once", type=int, default=24)
    parser.add_argument("--turns", type=int, default=6, help="attaches one after the other")
    parser.add_argument("--slow", type=int, default=2, help="attaches by each of the others")
    parser.add_argument("--name", default="bench-lio", help="name of the lab")
    parser.add_argument("--here", type=Path, help="run in this very host, with files in a folder")
    parsed = parser.parse_args()
    if parsed.here:
        show(measure(parsed.targets, parsed.at_once, parsed.turns, parsed.slow, parsed.here))
        return 0
    bare = Options(control_plane=False, services=False)
    with Cluster(parsed.name, Topology.standard(storage=0, compute=1), bare) as cluster:
        node = cluster.node("cmp1")
        # Saves are to be on a disk: on the node's root a sync may cost nothing.
        node.run("mkfs.ext4 -q /dev/ubdb && mount /dev/ubdb /mnt && mkdir -p /mnt/t /etc/target")
        node.run("mount --bind /mnt/t /etc/target")
        levels = " ".join(map(str, parsed.targets))
        command = f"cd {TREE} && python -m bench.lio --here /mnt --targets {levels}"
        command += f" --at-once {parsed.at_once} --turns {parsed.turns} --slow {parsed.slow}"
        print(node.run(command, timeout=3600).stdout)
    return 0


if __name__ == "__main__":
    sys.exit(main())
