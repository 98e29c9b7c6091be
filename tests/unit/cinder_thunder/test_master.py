"""Masters: Cinder's real checks of downloads, real qemu-img, volumes as sparse files."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from cinder import exception

from cinder_thunder.backend import StorageBackend
from cinder_thunder.db.api import Database
from cinder_thunder.db.values import Image, Master
from cinder_thunder.masters.clones import FILLING, MASTER, SIZED, TREE
from cinder_thunder.masters.download import content_of
from cinder_thunder.masters.exporter import MasterExporter
from cinder_thunder.masters.masters import Masters
from cinder_thunder.masters.peers import Peers
from os_brick_thunder.common import errors
from os_brick_thunder.common.policy.extents import Extents
from os_brick_thunder.common.policy.iscsinames import iqn_of
from os_brick_thunder.common.transport.base import Credentials
from os_brick_thunder.common.wire import Topology
from tests.fake_storage import FileVolumes, Targets
from tests.unit.cinder_thunder.conftest import STORAGE, Glance, qcow2

GIB = 1 << 30


@pytest.fixture
def masters(cinder_conf: Any, database: Database, volumes: FileVolumes, peers: Peers) -> Masters:
    return Masters(STORAGE, database, volumes, volumes, "1M", peers)  # type: ignore[arg-type]


def leftovers(volumes: FileVolumes, database: Database, conf: Any) -> list[str]:
    """All that a failure may leave."""
    files = Path(conf.image_conversion_dir)
    return [
        *sorted(volumes.names()),
        *sorted(database.images.mastered_on(STORAGE)),
        *(path.name for path in (files.iterdir() if files.exists() else ())),
    ]


@pytest.mark.parametrize("disk_format", ["raw", "qcow2"])
def test_a_master_equals_the_image(
    masters: Masters,
    volumes: FileVolumes,
    database: Database,
    admin: Any,
    raw_image: Path,
    disk_format: str,
    cinder_conf: Any,
) -> None:
    glance = Glance()
    meta = glance.add(raw_image if disk_format == "raw" else qcow2(raw_image), disk_format)
    size = raw_image.stat().st_size
    found = masters.ensure(admin, glance.per_request(), meta, 1)
    assert found == Master(size, False, f"sha512:{meta['os_hash_value']}")
    name = MASTER + meta["id"]
    content = (volumes.folder / name).read_bytes()
    assert content[:size] == raw_image.read_bytes()
    assert not any(content[size:])
    assert len(content) == 12 << 20
    assert volumes.protected == {name}
    # Only data was written: the hole is not on disk.
    assert (volumes.folder / name).stat().st_blocks * 512 <= 400 << 10
    assert leftovers(volumes, database, cinder_conf) == [name, meta["id"]]


def test_one_download_for_many(raw_image: Path, tmp_path: Path) -> None:
    """In a process of its own, with green threads like those of cinder-volume."""
    script = [sys.executable, "-m", "tests.unit.cinder_thunder.many_at_once"]
    done = subprocess.run(
        [*script, str(tmp_path), str(raw_image)],
        check=True,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert json.loads(done.stdout) == {
        "masters": 1,
        "downloads": 1,
        "asked": 4,
        "green": True,
    }


def test_image_larger_than_the_volume(
    masters: Masters,
    volumes: FileVolumes,
    database: Database,
    admin: Any,
    tmp_path: Path,
    cinder_conf: Any,
) -> None:
    big = tmp_path / "big.qcow2"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", big, "3G"], check=True)
    glance = Glance()
    meta = glance.add(big, "qcow2")
    with pytest.raises(exception.ImageUnacceptable) as error:
        masters.ensure(admin, glance.per_request(), meta, 2)
    assert str(error.value) == (
        f"Image {meta['id']} is unacceptable: "
        "Image virtual size is 3GB and doesn't fit in a volume of size 2GB."
    )
    assert leftovers(volumes, database, cinder_conf) == []


def test_image_larger_than_a_later_volume(masters: Masters, database: Database, admin: Any) -> None:
    database.images.add_master(Image("i", 3 << 30, Extents(), False), STORAGE)
    with pytest.raises(exception.ImageUnacceptable, match="3GB and doesn't fit in a volume of"):
        masters.ensure(admin, Glance(), {"id": "i"}, 2)


def test_qcow2_with_a_backing_file(
    masters: Masters,
    volumes: FileVolumes,
    database: Database,
    admin: Any,
    tmp_path: Path,
    cinder_conf: Any,
) -> None:
    evil = tmp_path / "evil.qcow2"
    subprocess.run(
        ["qemu-img", "create", "-q", "-f", "qcow2", "-F", "raw", "-b", "/etc/passwd", evil],
        check=True,
    )
    glance = Glance()
    meta = glance.add(evil, "qcow2")
    with pytest.raises(exception.ImageUnacceptable) as error:
        masters.ensure(admin, glance.per_request(), meta, 1)
    assert str(error.value) == (
        f"Image {meta['id']} is unacceptable: Cinder's safety check refused its format. "
        "An image must be one file: a qcow2 with a backing file or an external data file is not. "
        "Flatten it (qemu-img convert) and upload it again"
    )
    assert leftovers(volumes, database, cinder_conf) == []


def test_qcow2_with_a_data_file(
    masters: Masters,
    volumes: FileVolumes,
    database: Database,
    admin: Any,
    tmp_path: Path,
    cinder_conf: Any,
) -> None:
    evil = tmp_path / "evil.qcow2"
    options = f"data_file={tmp_path / 'data'},data_file_raw=on"
    subprocess.run(
        ["qemu-img", "create", "-q", "-f", "qcow2", "-o", options, evil, "1M"], check=True
    )
    glance = Glance()
    meta = glance.add(evil, "qcow2")
    with pytest.raises(exception.ImageUnacceptable) as error:
        masters.ensure(admin, glance.per_request(), meta, 1)
    assert "Cinder's safety check refused its format" in str(error.value)
    assert leftovers(volumes, database, cinder_conf) == []


def test_data_that_does_not_match_its_hash(
    masters: Masters,
    volumes: FileVolumes,
    database: Database,
    admin: Any,
    raw_image: Path,
    cinder_conf: Any,
) -> None:
    glance = Glance()
    meta = glance.add(raw_image, "raw")
    right = meta["os_hash_value"]
    damaged = raw_image.read_bytes().replace(b"late", b"Late", 1)
    raw_image.write_bytes(damaged)
    with pytest.raises(exception.ImageUnacceptable) as error:
        masters.ensure(admin, glance.per_request(), meta, 1)
    assert f"its data does not match its hash: sha512 should be {right}, is " in str(error.value)
    assert "upload it again" in str(error.value)
    assert leftovers(volumes, database, cinder_conf) == []


def test_incomplete_signature_is_refused(
    masters: Masters,
    volumes: FileVolumes,
    database: Database,
    admin: Any,
    raw_image: Path,
    cinder_conf: Any,
) -> None:
    cinder_conf.set_override("verify_glance_signatures", "enabled")
    try:
        glance = Glance()
        meta = glance.add(raw_image, "raw", properties={"img_signature": "c2ln"})
        with pytest.raises(exception.InvalidSignatureImage):
            masters.ensure(admin, glance.per_request(), meta, 1)
        assert leftovers(volumes, database, cinder_conf) == []
        plain = glance.add(raw_image, "raw")
        assert masters.ensure(admin, glance.per_request(), plain, 1).signature_verified is False
    finally:
        cinder_conf.clear_override("verify_glance_signatures")


@pytest.fixture
def verifying(cinder_conf: Any) -> Any:
    """Switches the verification of signatures on."""

    def switch_on() -> None:
        cinder_conf.set_override("verify_glance_signatures", "enabled")

    cinder_conf.set_override("verify_glance_signatures", "disabled")
    yield switch_on
    cinder_conf.clear_override("verify_glance_signatures")


def test_signatures_are_verified_once_that_is_switched_on(
    masters: Masters, database: Database, admin: Any, raw_image: Path, verifying: Any
) -> None:
    glance = Glance()
    plain = glance.add(raw_image, "raw")
    bad = glance.add(raw_image, "raw", properties={"img_signature": "c2ln"})
    for meta in (plain, bad):
        assert masters.ensure(admin, glance.per_request(), meta, 1).signature_verified is None
    verifying()
    for _ in range(2):  # it is verified once, without another master
        found = masters.ensure(admin, glance.per_request(), plain, 1)
        assert found.signature_verified is False
    assert glance.downloads.count(plain["id"]) == 2
    for _ in range(2):
        with pytest.raises(exception.InvalidSignatureImage):
            masters.ensure(admin, glance.per_request(), bad, 1)
    assert database.images.master(bad["id"], STORAGE).signature_verified is None  # type: ignore[union-attr]


@pytest.mark.parametrize("where", ["elsewhere", "here"])
def test_masters_of_older_versions_are_verified(
    masters: Masters,
    database: Database,
    admin: Any,
    raw_image: Path,
    verifying: Any,
    where: str,
) -> None:
    """They are not copied, and one whose hash was not recorded is made again."""
    verifying()
    glance = Glance()
    meta = glance.add(raw_image, "raw")
    size = raw_image.stat().st_size
    other = "stor2@thunder"
    database.hosts.heartbeat(Topology(other, "10.0.0.2", "r0", "z1", "", "storage"))
    holder = STORAGE if where == "here" else other
    database.images.add_master(Image(meta["id"], size, Extents()), holder)
    found = masters.ensure(admin, glance.per_request(), meta, 1)
    assert (found.signature_verified, glance.downloads) == (False, [meta["id"]])
    assert masters.ensure(admin, glance.per_request(), meta, 1) == found


@pytest.mark.parametrize("verb", ["create", "protect", "rename"])
def test_a_failing_step_leaves_nothing(
    masters: Masters,
    volumes: FileVolumes,
    database: Database,
    admin: Any,
    raw_image: Path,
    cinder_conf: Any,
    verb: str,
) -> None:
    glance = Glance()
    meta = glance.add(raw_image, "raw")
    volumes.fail = verb
    with pytest.raises(errors.ProcessError, match=f"{verb} refused"):
        masters.ensure(admin, glance.per_request(), meta, 1)
    assert leftovers(volumes, database, cinder_conf) == []
    volumes.fail = None
    masters.ensure(admin, glance.per_request(), meta, 1)


def again(glance: Glance, meta: dict[str, Any], path: Path) -> dict[str, Any]:
    """Upload other data under the same id, as is possible after a purge of Glance's database."""
    new = {**glance.add(path, "raw"), "id": meta["id"]}
    glance.images[meta["id"]] = (new, path)
    return new


def test_an_id_that_is_used_again(
    masters: Masters,
    volumes: FileVolumes,
    database: Database,
    admin: Any,
    raw_image: Path,
    other_image: Path,
) -> None:
    """OSSN-0075: whoever uploads an image under the id of a purged one gets what is uploaded."""
    unexported: list[str] = []
    masters._unexport = unexported.append
    glance = Glance()
    meta = glance.add(raw_image, "raw")
    first = masters.ensure(admin, glance.per_request(), meta, 1)
    assert unexported == []
    for name in "ab":  # there is a sized snapshot of what goes
        masters.clones.make(meta["id"], first.size, name, GIB)
    new = again(glance, meta, other_image)
    found = masters.ensure(admin, glance.per_request(), new, 1)
    assert found == masters.ensure(admin, glance.per_request(), new, 1)
    assert found.content == f"sha512:{new['os_hash_value']}"
    assert unexported == [meta["id"]]  # its export keeps the volume open
    content = Path(volumes.path(MASTER + meta["id"])).read_bytes()
    assert content.rstrip(b"\0") == other_image.read_bytes()
    image = database.images.get(meta["id"])
    assert image is not None
    assert (image.content, image.size) == (found.content, found.size)
    assert len(glance.downloads) == 2
    masters.clones.make(meta["id"], found.size, "c", GIB)
    assert Path(volumes.path("c")).read_bytes().rstrip(b"\0") == other_image.read_bytes()


def test_a_master_that_is_being_made_is_not_missing(
    masters: Masters,
    volumes: FileVolumes,
    database: Database,
    admin: Any,
    raw_image: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A request that met the one before it must not drop the row of this one."""
    glance = Glance()
    meta = glance.add(raw_image, "raw")
    dropped: list[bool] = []
    check = threading.Thread(
        target=lambda: dropped.append(masters.forget_if_missing(meta["id"])), daemon=True
    )
    rename = volumes.rename

    def slow(name: str, new: str) -> None:
        check.start()
        check.join(0.5)
        rename(name, new)

    monkeypatch.setattr(volumes, "rename", slow)
    masters.ensure(admin, glance.per_request(), meta, 1)
    check.join(30)
    assert dropped == [False]
    assert database.images.mastered_on(STORAGE) == {meta["id"]}


def test_a_signature_of_what_had_the_id_before_says_nothing(database: Database) -> None:
    """Verifying takes minutes, in which another host may have made the master of what is new."""
    new = Image("i", 9 << 20, Extents(), content="sha512:2b")
    database.images.add_master(replace(new, content="sha512:1a"), STORAGE)
    database.images.add_master(new, "stor2@thunder")
    database.images.set_verified("i", True, "sha512:1a")
    assert database.images.get("i") == new
    database.images.set_verified("i", True, "sha512:2b")
    assert database.images.get("i") == replace(new, signature_verified=True)


def test_a_master_of_what_had_the_id_before_is_not_copied(
    masters: Masters, database: Database, admin: Any, raw_image: Path, other_image: Path
) -> None:
    glance = Glance()
    meta = glance.add(raw_image, "raw")
    other = "stor2@thunder"
    database.hosts.heartbeat(Topology(other, "10.0.0.2", "r0", "z1", "", "storage"))
    old = Image(meta["id"], 9 << 20, Extents(), content=content_of(meta))
    database.images.add_master(old, other)
    masters.ensure(admin, glance.per_request(), again(glance, meta, other_image), 1)
    assert [location.host for location in database.locations.of(meta["id"])] == [STORAGE]


@pytest.mark.parametrize("recorded", ["", "sha512:ab"])
def test_a_hash_that_is_not_known_fits(
    masters: Masters, database: Database, admin: Any, recorded: str
) -> None:
    """Masters of older versions have none recorded, and Glance may have none."""
    database.images.add_master(Image("i", 1 << 20, Extents(), False, content=recorded), STORAGE)
    meta = {"id": "i", "os_hash_algo": "sha512", "os_hash_value": "ab" if recorded else "cd"}
    for known in (meta, {"id": "i"}, {"id": "i", "os_hash_algo": None, "os_hash_value": None}):
        assert masters.ensure(admin, Glance(), known, 1).size == 1 << 20


def damaged(volumes: FileVolumes, offset: int) -> None:
    """A disk that returns other bytes than were written to it, from now on."""
    protect = volumes.protect

    def damage(name: str) -> None:
        with (volumes.folder / name).open("r+b") as file:
            file.seek(offset)
            file.write(b"?")
        protect(name)

    volumes.protect = damage  # type: ignore[method-assign]


@pytest.mark.parametrize("offset", [70000, 3 << 20], ids=["in data", "in a hole"])
def test_a_master_that_is_not_on_disk_as_written_is_not_announced(
    masters: Masters,
    volumes: FileVolumes,
    database: Database,
    admin: Any,
    raw_image: Path,
    cinder_conf: Any,
    offset: int,
) -> None:
    damaged(volumes, offset)
    glance = Glance()
    with pytest.raises(errors.TransferError, match="does not return what was written to it"):
        masters.ensure(admin, glance.per_request(), glance.add(raw_image, "raw"), 1)
    assert leftovers(volumes, database, cinder_conf) == []


def test_volumes_of_an_earlier_attempt_are_replaced(
    masters: Masters, volumes: FileVolumes, admin: Any, raw_image: Path
) -> None:
    glance = Glance()
    meta = glance.add(raw_image, "raw")
    volumes.create(FILLING + meta["id"], 1)
    masters.ensure(admin, glance.per_request(), meta, 1)
    assert volumes.names() == {MASTER + meta["id"]}


def test_reconcile_after_a_crash(
    masters: Masters, volumes: FileVolumes, database: Database
) -> None:
    sized, half = f"{SIZED}c-4096", f"{FILLING}{SIZED}c-8192"
    for name in (FILLING + "a", MASTER + "b", MASTER + "c", "volume-1"):
        volumes.create(name, 1)
    for name in (sized, half, f"{SIZED}b-4096", f"{SIZED}d-4096"):
        volumes.create(name, 1)
    for image_id in ("c", "d"):
        database.images.add_master(Image(image_id, 1, Extents()), STORAGE)
    masters.reconcile()
    assert volumes.names() == {MASTER + "c", sized, "volume-1"}
    assert database.images.mastered_on(STORAGE) == {"c"}
    masters.remove("c")
    assert volumes.names() == {"volume-1"}


def test_masters_are_activated_after_a_reboot(
    masters: Masters, volumes: FileVolumes, admin: Any, raw_image: Path
) -> None:
    """LVM need not have been told to, and does not activate what has the skip flag."""
    glance = Glance()
    meta = glance.add(raw_image, "raw")
    masters.ensure(admin, glance.per_request(), meta, 1)
    volumes.inactive = set(volumes.names())
    masters.reconcile()
    assert volumes.inactive == set()


def test_a_master_that_could_not_be_activated_is_tried_again(
    masters: Masters, volumes: FileVolumes, admin: Any, raw_image: Path
) -> None:
    glance = Glance()
    names = []
    for _ in range(2):
        meta = glance.add(raw_image, "raw")
        masters.ensure(admin, glance.per_request(), meta, 1)
        names.append(MASTER + meta["id"])
    volumes.inactive = set(names)
    volumes.stuck = {names[0]}
    masters.reconcile()  # a start that succeeds all the same
    assert volumes.inactive == {names[0]}
    volumes.stuck = set()
    masters.activate()
    assert volumes.inactive == set()


@pytest.fixture
def exporter(
    masters: Masters, volumes: FileVolumes, database: Database, monkeypatch: pytest.MonkeyPatch
) -> MasterExporter:
    """It has a master of image "i"."""
    targets, remove, iqn = Targets(), volumes.remove, iqn_of(STORAGE, "i")

    def unless_exported(name: str) -> None:
        if iqn in targets.devices and name == f"{MASTER}i":
            raise errors.ProcessError(("lvremove", name), 5, "is used by another device")
        remove(name)

    monkeypatch.setattr(volumes, "remove", unless_exported)
    masters._unexport = lambda image_id: targets.unexport(iqn)
    volumes.create(f"{MASTER}i", 4 << 20)
    database.images.add_master(Image("i", 4 << 20, Extents()), STORAGE)
    exported, portal = masters.trees.exported, "10.0.0.1:3260"
    return MasterExporter(
        STORAGE, portal, database, targets, exported, masters.remove, lambda: True
    )


def test_a_reader_that_comes_during_an_eviction(
    exporter: MasterExporter,
    volumes: FileVolumes,
    database: Database,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    targets: Any = exporter._targets
    unexport = targets.unexport

    def then_a_reader(iqn: str) -> None:
        unexport(iqn)
        monkeypatch.setattr(targets, "unexport", unexport)
        exporter.open_export("i", "iqn.x:c1", 0)

    monkeypatch.setattr(targets, "unexport", then_a_reader)
    exporter.evict("i")
    assert database.images.master("i", STORAGE) is None
    assert (volumes.names(), targets.devices) == (set(), {})


def test_a_reader_that_comes_when_the_row_is_gone(
    exporter: MasterExporter,
    volumes: FileVolumes,
    database: Database,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It has seen the row before."""
    targets: Any = exporter._targets
    admit = targets.admit

    def evicted_meanwhile(iqn: str, initiator: str) -> Credentials:
        database.images.drop_master("i", STORAGE)
        credentials: Credentials = admit(iqn, initiator)
        return credentials

    monkeypatch.setattr(targets, "admit", evicted_meanwhile)
    with pytest.raises(errors.NoReplica, match="has no master of image i any longer"):
        exporter.open_export("i", "iqn.x:c1", 0)
    assert targets.devices == {}


def test_a_start_removes_an_export_and_then_its_volume(
    exporter: MasterExporter, masters: Masters, volumes: FileVolumes, database: Database
) -> None:
    exporter.open_export("i", "iqn.x:c1", 0)
    database.images.drop_master("i", STORAGE)
    masters._unexport = lambda image_id: None
    started: Any = SimpleNamespace(
        thin_tools=lambda: None,
        pool=SimpleNamespace(release_stale=lambda: None),
        masters=masters,
        exporter=exporter,
        server=SimpleNamespace(start=lambda: None),
        _check_zeroing=lambda: None,
        _forget_foreign_volumes=lambda: None,
    )
    StorageBackend.start(started)
    assert volumes.names() == set()


def test_one_volume_that_stays_keeps_no_other(
    exporter: MasterExporter, masters: Masters, volumes: FileVolumes
) -> None:
    volumes.create(f"{TREE}i", 4 << 20)
    exporter.open_export("i", "iqn.x:c1", 0)
    masters._unexport = lambda image_id: None  # LIO fails, say
    with pytest.raises(errors.ProcessError, match="is used by another device"):
        masters.remove("i")
    assert volumes.names() == {f"{MASTER}i"}
