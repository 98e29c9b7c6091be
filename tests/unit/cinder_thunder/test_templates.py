"""Templates: snapshots and volumes with masters, and volumes that are made from them."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from cinder import exception, objects
from cinder.volume.drivers import lvm

from cinder_thunder import volumes as cinder_volumes
from cinder_thunder.cli import thunder
from cinder_thunder.cli.commands import template
from cinder_thunder.db.api import Database
from cinder_thunder.db.values import ClonedVolume, Image, Master
from cinder_thunder.driver import ThunderDriver
from cinder_thunder.masters.cleaning import Cleaner
from cinder_thunder.masters.clones import MASTER, TREE
from cinder_thunder.masters.masters import Masters
from cinder_thunder.masters.peers import Peers
from cinder_thunder.masters.templates import Templates
from os_brick_thunder.common import errors
from os_brick_thunder.common.policy.extents import Extents
from os_brick_thunder.common.wire import Topology
from tests.fake_storage import FileVolumes
from tests.unit.cinder_thunder.conftest import STORAGE, cinder_volume

MIB = 1 << 20
SIZE = 8 * MIB
LV = "volume-v"


class World:
    """A storage host with one volume, "v"."""

    def __init__(self, database: Database, volumes: FileVolumes, peers: Peers) -> None:
        self.database = database
        self.volumes = volumes
        self.masters = Masters(STORAGE, database, volumes, volumes, "1M", peers)  # type: ignore[arg-type]
        self.templates = Templates(database, volumes, self.masters, {"v": (LV, SIZE)}.get)  # type: ignore[arg-type]
        volumes.create(LV, SIZE)
        self.write(b"golden", 3 * MIB)

    def write(self, data: bytes, at: int) -> None:
        with (self.volumes.folder / LV).open("r+b") as file:
            file.seek(at)
            file.write(data)

    def master(self) -> bytes:
        return (self.volumes.folder / f"{MASTER}v").read_bytes()


@pytest.fixture
def world(cinder_conf: Any, database: Database, volumes: FileVolumes, peers: Peers) -> World:
    return World(database, volumes, peers)


def test_a_template_has_what_its_volume_has(world: World) -> None:
    made = world.templates.make("v")
    assert made.size == SIZE
    assert world.master() == (world.volumes.folder / LV).read_bytes()
    assert world.volumes.protected == {f"{MASTER}v", f"{TREE}v"}
    image = world.database.images.get("v")
    assert image is not None
    assert image.template
    assert image.allocated == Extents.of([(3 * MIB, 3 * MIB + 65536)])
    assert image.manifest is not None
    assert made == Master(SIZE, None, image.content)
    assert world.database.images.mastered_on(STORAGE) == {"v"}


def test_one_that_cannot_be_made_again_leaves_no_row_of_what_it_was(world: World) -> None:
    """A tracker would name a master that is not there, and all volumes of it would be direct."""
    world.templates.make("v")
    world.database.volumes.put(ClonedVolume("w", "v", STORAGE))
    world.database.images.set_deleted("v", True)
    world.volumes.fail = "protect"
    with pytest.raises(errors.ProcessError):
        world.templates.make("v")
    assert f"{MASTER}v" not in world.volumes.names()
    assert world.database.images.master("v", STORAGE) is None


def test_it_is_made_again_only_after_it_was_given_up(world: World) -> None:
    before = world.templates.make("v")
    world.write(b"newer", 5 * MIB)
    with pytest.raises(errors.InvalidRequest, match="v is a template already"):
        world.templates.make("v")
    assert b"newer" not in world.master()
    world.database.images.set_deleted("v", True)
    after = world.templates.make("v")
    assert b"newer" in world.master()
    assert after.content != before.content  # hosts that have the old data do not keep it
    assert [image.deleted for image in world.database.images.all()] == [False]


@pytest.mark.parametrize("verb", ["snapshot", "protect", "rename"])
def test_what_fails_leaves_nothing(world: World, verb: str) -> None:
    world.volumes.fail = verb
    with pytest.raises(errors.ProcessError):
        world.templates.make("v")
    assert world.volumes.names() == {LV}
    assert world.database.images.all() == []
    world.volumes.fail = None
    world.templates.make("v")


def test_a_master_that_was_evicted_is_made_again(world: World) -> None:
    world.templates.make("v")
    world.database.images.add_master(Image("v", SIZE, Extents(), template=True), "stor2@thunder")
    world.masters.remove("v")
    world.templates.make("v")
    assert world.database.images.mastered_on(STORAGE) == {"v"}


def test_what_is_elsewhere_is_no_template_here(world: World) -> None:
    with pytest.raises(errors.NoReplica, match=f"{STORAGE} has no volume or snapshot w"):
        world.templates.make("w")


def _template(database: Database, template_id: str, host: str = STORAGE) -> None:
    database.images.add_master(Image(template_id, SIZE, Extents(), template=True), host)


@pytest.mark.parametrize(
    ("templates", "snapshot_of", "clone_of"),
    [
        ((), "i", "i"),
        (("s",), "s", "i"),
        (("v",), "v", "v"),
        (("s", "v"), "s", "v"),
    ],
)
def test_volumes_share_the_template_that_they_are_made_from(
    database: Database,
    monkeypatch: pytest.MonkeyPatch,
    templates: tuple[str, ...],
    snapshot_of: str,
    clone_of: str,
) -> None:
    for method in ("create_volume_from_snapshot", "create_cloned_volume"):
        monkeypatch.setattr(lvm.LVMVolumeDriver, method, lambda *a: None)
    driver: Any = ThunderDriver.__new__(ThunderDriver)
    driver.host, driver._database = STORAGE, database
    database.volumes.put(ClonedVolume("v", "i", STORAGE))
    for each in templates:
        _template(database, each)
    one, other = cinder_volume(1), cinder_volume(1)
    driver.create_volume_from_snapshot(one, SimpleNamespace(id="s", volume_id="v"))
    driver.create_cloned_volume(other, {"id": "v"})
    assert database.volumes.get(one.id) == ClonedVolume(one.id, snapshot_of, STORAGE)
    assert database.volumes.get(other.id) == ClonedVolume(other.id, clone_of, STORAGE)


def test_what_is_no_template_any_longer_or_has_no_master_here_is_not_shared(
    database: Database,
) -> None:
    database.hosts.heartbeat(Topology("stor2@thunder", "10.0.0.2", "r0", "z1", "", "storage"))
    _template(database, "s")
    _template(database, "elsewhere", "stor2@thunder")
    database.images.add_master(Image("image", SIZE, Extents()), STORAGE)
    for number, source in enumerate(("elsewhere", "image", "unknown")):
        database.volumes.inherit(str(number), [source], STORAGE)
        assert database.volumes.get(str(number)) is None
    database.volumes.inherit("3", ["s", "v"], STORAGE)
    database.images.set_deleted("s", True)
    database.volumes.inherit("4", ["s", "v"], STORAGE)
    assert database.volumes.ids_on(STORAGE) == {"3"}


def test_templates_go_when_cinder_has_them_no_longer(database: Database) -> None:
    there, broken = {"used", "kept", "given-up"}, ["unclear"]
    removed: list[str] = []

    def in_cinder(source_id: str) -> bool:
        if source_id in broken:
            raise RuntimeError("the database is away")
        return source_id in there

    for each in ("gone", "given-up", "kept", "unclear", "used"):
        _template(database, each)
    database.images.set_deleted("given-up", True)
    database.volumes.put(ClonedVolume("v", "used", STORAGE))
    asked: list[str] = []

    def present(ids: Any) -> dict[str, bool]:
        asked.extend(ids)
        return {}

    cleaner = Cleaner(STORAGE, database, present, removed.append, in_cinder)
    cleaner.run()
    assert asked == []  # Glance knows none of them
    assert removed == ["given-up", "gone"]
    there.clear()
    broken.clear()
    cleaner.run()
    assert removed[2:] == ["given-up", "gone", "kept", "unclear"]  # one is used


def _cinder(monkeypatch: pytest.MonkeyPatch, **states: str) -> None:
    """Cinder's database with volume v and its snapshot s."""
    volume = SimpleNamespace(
        name="volume-v", size=2, host=f"{STORAGE}#pool", status=states.get("volume", "in-use")
    )
    snapshot = SimpleNamespace(
        name="snapshot-s", volume_size=1, volume=volume, status=states.get("snapshot", "available")
    )

    def get(kind: str, found: Any, missing: type[Exception]) -> Any:
        def by_id(context: Any, wanted: str) -> Any:
            if wanted != kind:
                raise missing()
            return found

        return by_id

    monkeypatch.setattr(objects.Volume, "get_by_id", get("v", volume, exception.VolumeNotFound))
    monkeypatch.setattr(
        objects.Snapshot, "get_by_id", get("s", snapshot, exception.SnapshotNotFound)
    )


def test_the_volume_of_a_template(monkeypatch: pytest.MonkeyPatch) -> None:
    _cinder(monkeypatch)
    assert cinder_volumes.origin("v", STORAGE) == ("volume-v", 2 << 30)
    assert cinder_volumes.origin("s", STORAGE) == ("_snapshot-s", 1 << 30)
    assert cinder_volumes.origin("s", "stor2@thunder") is None
    assert cinder_volumes.origin("x", STORAGE) is None
    assert [cinder_volumes.is_in_cinder(each) for each in "vsx"] == [True, True, False]
    _cinder(monkeypatch, snapshot="creating", volume="error")
    for each, state in (("s", "creating"), ("v", "error")):
        with pytest.raises(errors.InvalidRequest, match=f"{each} is {state}, not available or"):
            cinder_volumes.origin(each, STORAGE)


class Rpc:
    """Storage hosts, one of which has the volume."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.has = "stor2@thunder"
        self.older = self.hung = ""
        self.ends = threading.Event()

    def make_template(self, host: str, source_id: str, wait: float) -> None:
        self.asked.append(host)
        if host == self.hung:
            self.ends.wait(30)
        if host == self.older:
            raise errors.ThunderError(f"{host}: an older version")
        if host != self.has:
            raise errors.NoReplica(f"{host} has no volume or snapshot {source_id}")


@pytest.fixture
def option(
    tmp_path: Path, database: Database, monkeypatch: pytest.MonkeyPatch
) -> tuple[list[str], Rpc]:
    for number in (2, 3):
        backend = f"stor{number}@thunder"
        database.hosts.heartbeat(Topology(backend, f"10.0.0.{number}", "r0", "z1", "", "storage"))
    database.hosts.heartbeat(Topology("cmp1", "10.0.0.9", "r0", "z1", "iqn.x:cmp1"))
    file, rpc = tmp_path / "cinder.conf", Rpc()
    file.write_text(f"[database]\nconnection = sqlite:///{tmp_path / 'thunder.sqlite'}\n")
    monkeypatch.setattr(template, "hosts_rpc", lambda path: rpc)
    return ["--config-file", str(file)], rpc


def test_the_host_that_has_it_makes_the_template(
    option: tuple[list[str], Rpc], capsys: pytest.CaptureFixture[str]
) -> None:
    arguments, rpc = option
    assert thunder.main(["template", "create", "v", *arguments]) == 0
    assert "v is a template: volumes that are made from it on stor2@thunder" in (
        capsys.readouterr().out
    )
    assert sorted(rpc.asked) == ["stor1@thunder", "stor2@thunder", "stor3@thunder"]


def test_other_hosts_neither_delay_nor_prevent_a_template(
    option: tuple[list[str], Rpc], capsys: pytest.CaptureFixture[str]
) -> None:
    arguments, rpc = option
    rpc.older, rpc.hung = "stor1@thunder", "stor3@thunder"
    began = time.monotonic()
    assert thunder.main(["template", "create", "v", *arguments]) == 0
    assert time.monotonic() - began < 25
    rpc.ends.set()
    rpc.has = "nobody"
    assert thunder.main(["template", "create", "v", *arguments]) == 1
    assert "stor1@thunder: an older version" in capsys.readouterr().err


def test_no_host_has_it(
    option: tuple[list[str], Rpc], capsys: pytest.CaptureFixture[str], caplog: Any
) -> None:
    arguments, rpc = option
    rpc.has = "nobody"
    assert thunder.main(["template", "create", "v", *arguments]) == 2
    assert "no storage host has a snapshot or volume v: give its id" in capsys.readouterr().err
    assert sorted(rpc.asked) == ["stor1@thunder", "stor2@thunder", "stor3@thunder"]


@pytest.mark.parametrize("seconds", ["-5", "0", "nan", "inf", "1e9", "soon"])
def test_how_long_nobody_can_wait(
    option: tuple[list[str], Rpc], seconds: str, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments, rpc = option
    for command in (["template", "create", "v"], ["image", "precache", "i", "--all", "--wait"]):
        with pytest.raises(SystemExit) as ended:
            thunder.main([*command, f"--timeout={seconds}", *arguments])
        assert ended.value.code == 2
        assert f"{seconds}: give seconds, more than 0 and at most 604800" in capsys.readouterr().err
    assert rpc.asked == []


def test_a_template_is_given_up(
    option: tuple[list[str], Rpc], database: Database, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments, _rpc = option
    _template(database, "v")
    database.images.add_master(Image("image", SIZE, Extents()), STORAGE)
    assert thunder.main(["template", "delete", "v", *arguments]) == 0
    assert capsys.readouterr().out == "v is no longer a template\n"
    assert [image.id for image in database.images.all() if image.deleted] == ["v"]
    assert thunder.main(["template", "delete", "image", *arguments]) == 2
    assert "image is not a template: thunder image list shows all of them" in (
        capsys.readouterr().err
    )
