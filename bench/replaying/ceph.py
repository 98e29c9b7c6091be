"""Ceph RBD: clones of one image, which the kernels of compute hosts map.

The cluster is one monitor and one OSD on a storage host, in a folder of that host's root file
system. The programs are those that are installed on the machine that the lab runs on, so that the
root image of all labs does without them. Nothing is left on the nodes, also after a failure.
"""

from __future__ import annotations

import contextlib
import shlex
import time
import uuid
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from lab import pace
from lab.errors import LabError
from lab.nodes.node import Node
from lab.nodes.services import Service, listens, logged

#: Debian's; the nodes get /usr of this machine, and nothing is installed in them.
PACKAGES = ("ceph-mon", "ceph-osd", "ceph-common")
_PROGRAMS = ("ceph", "ceph-mon", "ceph-osd", "monmaptool", "rbd")
_FOLDER = "/var/tmp/replay-ceph"
_ENVIRONMENT = {"CEPH_CONF": f"{_FOLDER}/ceph.conf"}
_MON, _OSD = "replay-ceph-mon", "replay-ceph-osd"
_PORT = 6789
_POOL, _IMAGE = "rbd", "image"
#: Seconds for all that is run at once to set the cluster up, and for one request of a client.
_SETTING_UP, _REQUEST = 300, 20

# The rest is as it comes. Without a manager, as clients do without. The caches are for a node of
# 1 GiB; by default the OSD would take 4 GiB of memory.
_CONFIGURATION = """\
[global]
fsid = {cluster}
mon_host = v1:{address}:{port}
ms_bind_msgr2 = false
auth_cluster_required = none
auth_service_required = none
auth_client_required = none
mon_allow_pool_size_one = true
osd_pool_default_size = 1
osd_crush_chooseleaf_type = 0
osd_crush_update_on_start = false
osd_class_update_on_start = false
mon_data = {folder}/mon
osd_data = {folder}/osd
osd_objectstore = bluestore
bluestore_block_size = {block_size}
bluestore_cache_autotune = false
bluestore_cache_size = 134217728
admin_socket =
log_file =
log_to_stderr = true
debug_rocksdb = 0/0
"""

_MAKE_MONITOR = """\
mkdir -p {folder}/mon {folder}/osd
monmaptool --create --clobber --fsid {cluster} --addv a [v1:{address}:{port}] {folder}/monmap
ceph-mon -i a --mkfs --monmap {folder}/monmap
"""

# An OSD without cephx cannot say where it is: its attempt is refused ("wrong fsid").
# A monitor that listens may still refuse all commands.
_MAKE_OSD = """\
until ceph mon stat > /dev/null; do sleep 1; done
ceph osd new {osd}
ceph-osd -i 0 --mkfs --osd-uuid {osd}
ceph osd crush add osd.0 1.0 root=default host=storage
"""

_IMPORT = f"""\
ceph osd pool create {_POOL} 8 8
rbd pool init {_POOL}
rbd import --no-progress {{device}} {_POOL}/{_IMAGE}
rbd snap create --no-progress {_POOL}/{_IMAGE}@clones
rbd snap protect {_POOL}/{_IMAGE}@clones
"""

_MAP = """\
echo {line} > /sys/bus/rbd/add_single_major || {{ dmesg | tail -n 5 >&2; exit 1; }}
basename $(dirname $(grep -lx {clone} /sys/bus/rbd/devices/*/name))
"""

# What still reads is not waited for: it would keep the device, and thereby the node, for ever.
_UNMAP = """\
udevadm settle
for name in $(grep -lx {clone} /sys/bus/rbd/devices/*/name 2> /dev/null); do
  echo "$(basename $(dirname $name)) force" > /sys/bus/rbd/remove_single_major
done
modprobe --remove --quiet rbd
"""


@dataclass(frozen=True)
class Mapped:
    """A clone as a device of a node, and the seconds that it took."""

    device: str
    seconds: float


@dataclass(frozen=True)
class Settings:
    """What one cluster has of its own; ``cluster`` and ``osd`` are UUIDs."""

    cluster: str
    osd: str
    address: str
    block_size: int

    @classmethod
    def fresh(cls, address: str, image_size: int) -> Settings:
        """:param image_size: bytes; the OSD's sparse file has 4 GiB beside them"""
        return cls(str(uuid.uuid4()), str(uuid.uuid4()), address, image_size + (4 << 30))

    def fill(self, template: str) -> str:
        """Put the values into a configuration or a script."""
        values = {
            "cluster": self.cluster,
            "osd": self.osd,
            "address": self.address,
            "port": _PORT,
            "folder": _FOLDER,
            "block_size": self.block_size,
        }
        return template.format(**values)

    def map_line(self, clone: str) -> str:
        """What is written to the kernel, so that compute hosts need none of Ceph's programs.

        Requests that are not answered fail, for a kernel would wait for them for ever.
        """
        options = f"name=admin,osd_request_timeout={pace.whole(_REQUEST)}"
        return f"{self.address}:{_PORT} {options} {_POOL} {clone} -"


def require(programs: Path = Path("/usr/bin")) -> None:
    """:raises LabError: this machine does not have Ceph's programs"""
    if missing := [name for name in _PROGRAMS if not (programs / name).exists()]:
        raise LabError(
            f"{', '.join(missing)} not installed here; run: lab/bootstrap {' '.join(PACKAGES)}"
        )


@contextlib.contextmanager
def imported(storage: Node, device: str) -> Iterator[Settings]:
    """Run a cluster on a storage host that has the bytes of a device as an image to clone.

    :raises LabError: it could not, or this machine does not have Ceph's programs
    """
    require()
    size = int(storage.run(["blockdev", "--getsize64", device]).stdout)
    settings = Settings.fresh(storage.address, size)
    daemons = _daemons(settings)
    storage.catalog.update(daemons)
    try:
        storage.service_start(_MON)
        _run(storage, settings.fill(_MAKE_OSD))
        storage.service_start(_OSD)
        _run(storage, _IMPORT.format(device=shlex.quote(device)))
        yield settings
    finally:
        for name in reversed(daemons):
            storage.service_stop(name)
            del storage.catalog[name]
        storage.run(["rm", "-rf", _FOLDER])


@contextlib.contextmanager
def mapped(storage: Node, nodes: Sequence[Node], settings: Settings) -> Iterator[list[Mapped]]:
    """Clone the image for each of these nodes, and map all clones at once.

    Clones have Ceph's default features: with "layering" alone the kernel would ask for each block
    of the clone before it asks for the image's, which takes twice as long.

    :raises LabError: a clone could not be made or mapped
    """
    clones = {node: f"clone-{node.name}" for node in nodes}
    source = f"{_POOL}/{_IMAGE}@clones"
    _run(storage, "".join(f"rbd clone {source} {_POOL}/{each}\n" for each in clones.values()))

    def attach(node: Node) -> Mapped:
        line = shlex.quote(settings.map_line(clones[node]))
        began = time.monotonic()
        number = node.run(_MAP.format(line=line, clone=clones[node])).stdout.strip()
        return Mapped(f"/dev/rbd{number}", time.monotonic() - began)

    def detach(node: Node) -> None:
        # Without an OSD each of its few requests has to fail first.
        node.run(_UNMAP.format(clone=clones[node]), timeout=10 * _REQUEST)

    with ThreadPoolExecutor(len(nodes)) as threads:
        try:
            for node in nodes:
                node.run("modprobe rbd single_major=1")
            yield list(threads.map(attach, nodes))
        finally:
            list(threads.map(detach, nodes))


def _daemons(settings: Settings) -> dict[str, Service]:
    """In the order in which they start."""
    monitor = Service(
        _MON,
        _command("ceph-mon", "-f", "-i", "a"),
        ready=listens(_PORT),
        env=_ENVIRONMENT,
        files={_ENVIRONMENT["CEPH_CONF"]: settings.fill(_CONFIGURATION)},
        before=_script(settings.fill(_MAKE_MONITOR)),
    )
    osd = Service(
        _OSD,
        _command("ceph-osd", "-f", "-i", "0"),
        ready=logged("state: booting -> active"),
        env=_ENVIRONMENT,
    )
    return {service.name: service for service in (monitor, osd)}


def _run(storage: Node, script: str) -> None:
    storage.run(_script(script), timeout=_SETTING_UP + 30)


def _script(script: str) -> str:
    """A command that runs a script with Ceph's programs, up to its first command that fails.

    It ends by itself where clients would wait for a cluster for ever.
    """
    limit = str(pace.whole(_SETTING_UP))
    setting = [f"{name}={value}" for name, value in _ENVIRONMENT.items()]
    return shlex.join(["timeout", limit, "env", *setting, *_command("sh", "-ec", script)])


def _command(*argv: str) -> tuple[str, ...]:
    """A command that has this machine's /usr: it alone, as the mount ends with it."""
    mount = 'mount -t hostfs -o ro,/usr usr /usr && exec "$@"'
    return ("unshare", "--mount", "sh", "-c", mount, "sh", *argv)
