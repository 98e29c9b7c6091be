"""Cinder, configured for these tests: real code, real qemu-img, no service."""

from __future__ import annotations

import hashlib
import subprocess
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, BinaryIO

import cinder.privsep
import pytest
from cinder import context as cinder_context
from cinder import coordination, objects
from oslo_config import cfg

objects.register_all()  # before any driver is imported, as cinder-volume does

from cinder.image import image_utils  # noqa: E402, F401 - registers its options

from cinder_thunder import privileged  # noqa: E402
from cinder_thunder.db import migration  # noqa: E402
from cinder_thunder.db.api import Database  # noqa: E402
from cinder_thunder.masters.peers import Peers  # noqa: E402
from os_brick_thunder.common.wire import Topology  # noqa: E402
from tests.fake_storage import FileVolumes, StorageNetwork  # noqa: E402

STORAGE = "stor1@thunder"


@pytest.fixture
def cinder_conf(tmp_path: Path) -> Iterator[cfg.ConfigOpts]:
    """Cinder's global configuration, with every file in the test's own folder."""
    # Otherwise Cinder's daemon would be started through sudo, which a build machine lacks.
    cinder.privsep.sys_admin_pctxt.set_client_mode(False)
    privileged.context.set_client_mode(False)
    conf = cfg.CONF
    conf([], project="cinder", default_config_files=[])
    conf.set_override("image_conversion_dir", str(tmp_path / "conversion"))
    conf.set_override("lock_path", str(tmp_path / "locks"), group="oslo_concurrency")
    conf.set_override("backend_url", f"file://{tmp_path}/coordination", group="coordination")
    coordination.COORDINATOR.start()
    yield conf
    coordination.COORDINATOR.stop()
    conf.clear_override("image_conversion_dir")
    conf.reset()


@pytest.fixture
def admin() -> Any:
    return cinder_context.get_admin_context()


@pytest.fixture
def database(tmp_path: Path) -> Database:
    database = Database(f"sqlite:///{tmp_path / 'thunder.sqlite'}")
    migration.upgrade(database.engine)
    database.hosts.heartbeat(Topology(STORAGE, "10.0.0.1", "r0", "z1", "", "storage"))
    return database


@dataclass
class Glance:
    """An image service on files: the part of Cinder's that the driver uses."""

    images: dict[str, tuple[dict[str, Any], Path]] = field(default_factory=dict)
    downloads: list[str] = field(default_factory=list)
    temp_images: Any = None

    def add(self, path: Path, disk_format: str, **changes: Any) -> dict[str, Any]:
        image_id = str(uuid.uuid4())
        meta = {
            "id": image_id,
            "size": path.stat().st_size,
            "disk_format": disk_format,
            "container_format": "bare",
            "os_hash_algo": "sha512",
            "os_hash_value": hashlib.sha512(path.read_bytes()).hexdigest(),
            "properties": {},
            **changes,
        }
        self.images[image_id] = (meta, path)
        return meta

    def show(self, context: Any, image_id: str) -> dict[str, Any]:
        return dict(self.images[image_id][0])

    def download(self, context: Any, image_id: str, data: BinaryIO) -> None:
        self.downloads.append(image_id)
        data.write(self.images[image_id][1].read_bytes())

    def per_request(self) -> Glance:
        """Cinder makes a service per request; they share what Glance has."""
        return Glance(self.images, self.downloads)


@pytest.fixture
def other_image(tmp_path: Path) -> Path:
    path = tmp_path / "other.raw"
    path.write_bytes(b"other" * 300_000)
    return path


@pytest.fixture
def volumes(tmp_path: Path) -> FileVolumes:
    return FileVolumes(tmp_path / "vg")


@pytest.fixture
def network() -> StorageNetwork:
    """The network between the storage hosts of a test."""
    return StorageNetwork()


@pytest.fixture
def peers(tmp_path: Path, network: StorageNetwork) -> Peers:
    return Peers(network, network, tmp_path / "peers", lambda device: [])


@pytest.fixture
def raw_image(tmp_path: Path) -> Path:
    """8.5 MiB: data, a long hole, data, and an end within a block."""
    path = tmp_path / "image.raw"
    with path.open("wb") as file:
        file.write(b"boot" * 65536)
        file.seek(6 << 20)
        file.write(b"late" * 16384)
        file.truncate((8 << 20) + (1 << 19) + 512)
    return path


def qcow2(source: Path, *options: str) -> Path:
    target = source.with_suffix(".qcow2")
    subprocess.run(
        ["qemu-img", "convert", "-f", "raw", "-O", "qcow2", *options, source, target], check=True
    )
    return target


def cinder_volume(gibibytes: int, **changes: Any) -> Any:
    """The part of Cinder's volume object that the driver uses."""
    volume_id = str(uuid.uuid4())
    return SimpleNamespace(
        **{
            "id": volume_id,
            "name": f"volume-{volume_id}",
            "size": gibibytes,
            "host": f"{STORAGE}#pool",
            "multiattach": False,
            "volume_attachment": [],
            **changes,
        }
    )
