"""ThunderDriver on Cinder's real base class, with volumes as files."""

from __future__ import annotations

import json
import uuid
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import oslo_messaging
import pytest
from cinder import exception
from cinder.image import image_utils
from cinder.volume import configuration, manager
from cinder.volume.drivers import lvm
from oslo_concurrency import processutils
from oslo_config import cfg
from oslo_db import exception as db_exc

from cinder_thunder import backend, volumes
from cinder_thunder.cli.doctor import upgrade
from cinder_thunder.db import migration
from cinder_thunder.db.api import Database
from cinder_thunder.db.values import ClonedVolume, Image
from cinder_thunder.driver import ThunderDriver
from cinder_thunder.masters.clones import MASTER
from cinder_thunder.masters.masters import Masters
from cinder_thunder.masters.peers import Peers
from os_brick_thunder.common import errors, wire
from os_brick_thunder.common.periodic import Task
from os_brick_thunder.common.policy.extents import Extents
from tests.fake_storage import FileVolumes
from tests.unit.cinder_thunder.conftest import (
    STORAGE,
    Glance,
    cinder_volume,
    qcow2,
)
from tests.unit.cinder_thunder.test_master import damaged

GIB = 1 << 30


class CinderDb:
    """Cinder's database: the one call of it that the driver makes."""

    def __init__(self) -> None:
        self.metadata: dict[str, dict[str, Any]] = {}

    def volume_glance_metadata_bulk_create(
        self, context: Any, volume_id: str, metadata: dict[str, Any]
    ) -> None:
        self.metadata[volume_id] = metadata


def make_driver(conf: cfg.ConfigOpts, **options: Any) -> ThunderDriver:
    for name, value in {"target_helper": "fake", "lvm_type": "thin", **options}.items():
        conf.set_override(name, value, group=configuration.SHARED_CONF_GROUP)
    config = configuration.Configuration(manager.volume_backend_opts, config_group="thunder")
    return ThunderDriver(configuration=config, host=STORAGE)


@pytest.fixture
def driver(
    cinder_conf: cfg.ConfigOpts, database: Database, volumes: FileVolumes, peers: Peers
) -> Any:
    """A driver after a successful start, with files instead of LVM."""
    driver: Any = make_driver(cinder_conf)
    driver.db = CinderDb()
    driver._database = database
    driver._masters = Masters(STORAGE, database, volumes, volumes, "1M", peers)  # type: ignore[arg-type]
    driver._volumes = volumes
    driver.announced = []
    driver._announce = lambda *told: driver.announced.append(told)
    return driver


def clone(driver: Any, admin: Any, glance: Glance, meta: dict[str, Any], volume: Any) -> Any:
    return driver.clone_image(admin, volume, None, meta, glance.per_request())


def test_clones_have_the_requested_size_and_one_download(
    driver: Any, admin: Any, raw_image: Path, volumes: FileVolumes, database: Database
) -> None:
    glance = Glance()
    meta = glance.add(raw_image, "raw")
    made = [cinder_volume(size) for size in (1, 2, 1)]
    for volume in made:
        assert clone(driver, admin, glance, meta, volume) == ({}, True)
        path = volumes.folder / volume.name
        assert path.stat().st_size == volume.size * GIB
        with path.open("rb") as content:
            assert content.read(raw_image.stat().st_size) == raw_image.read_bytes()
        assert database.volumes.get(volume.id) == ClonedVolume(volume.id, meta["id"], STORAGE)
        assert driver.db.metadata[volume.id] == {"signature_verified": False}
    assert glance.downloads == [meta["id"]]


def test_an_image_as_large_as_the_volume_is_not_extended(
    driver: Any, admin: Any, volumes: FileVolumes, tmp_path: Path
) -> None:
    """LVM refuses to extend a volume to its present size, which may be a rounded one."""
    full = tmp_path / "full.raw"
    with full.open("wb") as file:
        file.truncate(GIB - 512)
    glance = Glance()
    meta = glance.add(qcow2(full), "qcow2")
    volume = cinder_volume(1)
    assert clone(driver, admin, glance, meta, volume)[1] is True
    assert (volumes.folder / volume.name).stat().st_size == GIB


@pytest.mark.parametrize("verb", ["snapshot", "extend"])
def test_a_failing_clone_leaves_no_volume(
    driver: Any, admin: Any, raw_image: Path, volumes: FileVolumes, database: Database, verb: str
) -> None:
    glance = Glance()
    meta = glance.add(raw_image, "raw")
    volume = cinder_volume(1)
    volumes.fail = verb
    with pytest.raises(exception.VolumeBackendAPIException, match=f"{verb} refused"):
        clone(driver, admin, glance, meta, volume)
    assert volumes.names() == {MASTER + meta["id"]}
    assert database.volumes.get(volume.id) is None


def test_a_master_whose_volume_is_missing_is_made_again(
    driver: Any, admin: Any, raw_image: Path, volumes: FileVolumes
) -> None:
    glance = Glance()
    meta = glance.add(raw_image, "raw")
    clone(driver, admin, glance, meta, cinder_volume(1))
    volumes.remove(MASTER + meta["id"])
    assert clone(driver, admin, glance, meta, cinder_volume(1))[1] is True
    assert len(glance.downloads) == 2


def test_a_master_that_another_request_has_made_again_is_used(
    driver: Any, admin: Any, raw_image: Path, volumes: FileVolumes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When its volume is missing, all that are made at that moment meet the same error."""
    glance = Glance()
    meta = glance.add(raw_image, "raw")
    clone(driver, admin, glance, meta, cinder_volume(1))
    volumes.remove(MASTER + meta["id"])
    make = driver._masters.clones.make

    def meanwhile(*args: Any) -> None:
        monkeypatch.setattr(driver._masters.clones, "make", make)
        try:
            make(*args)
        finally:
            assert clone(driver, admin, glance, meta, cinder_volume(1))[1] is True

    monkeypatch.setattr(driver._masters.clones, "make", meanwhile)
    assert clone(driver, admin, glance, meta, cinder_volume(1))[1] is True
    assert len(glance.downloads) == 2


def test_cinder_makes_a_volume_whose_master_cannot_be_read_back(
    driver: Any, admin: Any, raw_image: Path, volumes: FileVolumes, database: Database
) -> None:
    damaged(volumes, 70000)
    glance = Glance()
    volume = cinder_volume(1)
    assert clone(driver, admin, glance, glance.add(raw_image, "raw"), volume) == (None, False)
    assert volumes.names() == set()
    assert database.volumes.get(volume.id) is None


def test_a_clone_is_made_even_without_its_record(
    driver: Any, admin: Any, raw_image: Path, volumes: FileVolumes, database: Database
) -> None:
    glance = Glance()
    meta = glance.add(raw_image, "raw")
    clone(driver, admin, glance, meta, cinder_volume(1))
    with database.engine.begin() as connection:
        connection.exec_driver_sql("DROP TABLE thunder_volumes")
    volume = cinder_volume(1)
    assert clone(driver, admin, glance, meta, volume)[1] is True
    assert volume.name in volumes.names()


def connector(**changes: Any) -> dict[str, Any]:
    topology = wire.Topology("c1", "10.0.0.2", "r1", "z1", "iqn.x:c1")
    return {"host": "c1", "initiator": "iqn.x:c1", "thunder": {**topology.to_wire(), **changes}}


@pytest.fixture
def attached(driver: Any, database: Database, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A volume that shares an image, and a target that answers like Cinder's."""
    monkeypatch.setattr(
        driver.target_driver,
        "initialize_connection",
        lambda volume, connector: {"driver_volume_type": "iscsi", "data": {"target_lun": 0}},
    )
    monkeypatch.setattr(driver.target_driver, "terminate_connection", lambda *a, **k: None)
    volume = cinder_volume(1)
    database.volumes.put(ClonedVolume(volume.id, "image", STORAGE))
    return volume


def test_the_payload_is_small_and_carries_neither_map_nor_secret(
    driver: Any, attached: Any
) -> None:
    attached.id = str(uuid.uuid4())
    driver._database.volumes.put(ClonedVolume(attached.id, str(uuid.uuid4()), STORAGE))
    info = driver.initialize_connection(attached, connector())
    payload = wire.parse(wire.Payload, info["data"]["thunder"])
    assert (payload.volume_id, payload.tracker) == (attached.id, STORAGE)
    assert len(json.dumps(info["data"]["thunder"])) < 200


@pytest.mark.parametrize(
    "asked",
    [
        {"host": "c1", "initiator": "iqn.x:c1"},
        connector(version=2),
        connector(rack=None),
        {**connector(), "thunder": "nonsense"},
    ],
)
def test_hosts_that_did_not_announce_themselves_get_plain_iscsi(
    driver: Any, attached: Any, asked: dict[str, Any]
) -> None:
    info = driver.initialize_connection(attached, asked)
    assert info == {"driver_volume_type": "iscsi", "data": {"target_lun": 0}}
    assert driver.terminate_connection(attached, asked) is False


def test_the_agent_is_told_of_the_image_before_the_volume_is_exported(
    driver: Any, attached: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[Any] = []

    def export(volume: Any, connector: dict[str, Any]) -> dict[str, Any]:
        told.extend(driver.announced)
        return {"driver_volume_type": "iscsi", "data": {}}

    monkeypatch.setattr(driver.target_driver, "initialize_connection", export)
    driver.initialize_connection(attached, connector())
    assert told == [("c1", "image")]


def test_an_attach_is_the_same_if_its_agent_cannot_be_told(driver: Any, attached: Any) -> None:
    def fail(host: str, image_id: str) -> None:
        raise RuntimeError("can't start new thread")

    driver._announce = fail
    assert "thunder" in driver.initialize_connection(attached, connector())["data"]


def test_volumes_without_an_image_or_attached_twice_get_plain_iscsi(
    driver: Any, attached: Any
) -> None:
    assert "thunder" not in driver.initialize_connection(cinder_volume(1), connector())["data"]
    attached.multiattach = True
    assert "thunder" not in driver.initialize_connection(attached, connector())["data"]
    assert driver.announced == []


def test_a_broken_database_does_not_fail_an_attach(
    driver: Any, attached: Any, database: Database
) -> None:
    with database.engine.begin() as connection:
        connection.exec_driver_sql("DROP TABLE thunder_volumes")
        connection.exec_driver_sql("DROP TABLE thunder_stacks")
    assert "thunder" not in driver.initialize_connection(attached, connector())["data"]
    assert driver.terminate_connection(attached, connector()) is False


def test_terminate_releases_and_says_whether_the_export_is_shared(
    driver: Any, attached: Any, database: Database
) -> None:
    database.volumes.put_stack(attached.id, "c1", "cached")
    database.volumes.put_stack(attached.id, "c2", "direct")
    attached.volume_attachment = [SimpleNamespace(connector=None) for _ in range(2)]
    assert driver.terminate_connection(attached, connector()) is True
    assert [stack.host for stack in database.volumes.stacks(attached.id)] == ["c2"]
    # Its agent may be down: it is ordered to remove what is left there.
    assert [stack.unlisted is None for stack in database.volumes.stacks_on("c1")] == [False]
    attached.volume_attachment.pop()
    assert driver.terminate_connection(attached, connector()) is False


def test_copies_and_snapshots_inherit_the_image(
    driver: Any, database: Database, volumes: FileVolumes, monkeypatch: pytest.MonkeyPatch
) -> None:
    for method in ("create_volume_from_snapshot", "create_cloned_volume", "delete_volume"):
        monkeypatch.setattr(lvm.LVMVolumeDriver, method, lambda *a: None)
    database.volumes.put(ClonedVolume("v", "i", STORAGE))
    one, other = cinder_volume(1), cinder_volume(1)
    driver.create_cloned_volume(one, {"id": "v", "name": "volume-v", "size": 1})
    driver.create_volume_from_snapshot(other, SimpleNamespace(id="s", volume_id="v"))
    for volume in (one, other):
        assert database.volumes.get(volume.id) == ClonedVolume(volume.id, "i", STORAGE)
        driver.delete_volume(volume)
        assert database.volumes.get(volume.id) is None


def test_a_migrated_volume_shares_nothing(
    driver: Any, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lvm.LVMVolumeDriver, "update_migrated_volume", lambda *a: {"x": None})
    monkeypatch.setattr(lvm.LVMVolumeDriver, "migrate_volume", lambda *a: (a[3]["moves"], None))
    old, new = cinder_volume(1), cinder_volume(1)
    database.volumes.put(ClonedVolume(old.id, "i", "stor2@thunder"))
    assert driver.update_migrated_volume(None, old, new, "available") == {"x": None}
    assert database.volumes.get(old.id) is None
    database.volumes.put(ClonedVolume(new.id, "i", STORAGE))
    assert driver.migrate_volume(None, new, {"moves": False}) == (False, None)
    assert database.volumes.get(new.id) is not None
    assert driver.migrate_volume(None, new, {"moves": True}) == (True, None)
    assert database.volumes.get(new.id) is None


def test_a_revert_also_restores_zeros(driver: Any, volumes: FileVolumes) -> None:
    """By a new snapshot: Cinder's copy for drivers that cannot revert skips zeros."""
    volume, snapshot = cinder_volume(1), SimpleNamespace(name="snapshot-s")
    taken, current = volumes.folder / "_snapshot-s", volumes.folder / volume.name
    taken.write_bytes(bytes(4) + b"then")
    current.write_bytes(b"now, now")
    left = volumes.folder / f"{volume.name}-reverted"
    left.write_bytes(b"of a process that was killed")
    driver.revert_to_snapshot(None, volume, snapshot)
    assert current.read_bytes() == taken.read_bytes() == bytes(4) + b"then"
    current.unlink()  # killed after the removal
    driver.revert_to_snapshot(None, volume, snapshot)
    assert current.read_bytes() == taken.read_bytes()
    assert volumes.names() == {"_snapshot-s", volume.name}


def test_a_revert_that_lvm_refuses_changes_nothing(driver: Any, volumes: FileVolumes) -> None:
    volume, snapshot = cinder_volume(1), SimpleNamespace(name="snapshot-s")
    (volumes.folder / "_snapshot-s").write_bytes(b"then")
    (volumes.folder / volume.name).write_bytes(b"now!")
    remove = volumes.remove

    def in_use(name: str) -> None:
        if name == volume.name:
            raise errors.ProcessError(("lvremove",), 5, "in use")
        remove(name)

    volumes.remove = in_use  # type: ignore[method-assign]
    with pytest.raises(errors.ProcessError):
        driver.revert_to_snapshot(None, volume, snapshot)
    assert (volumes.folder / volume.name).read_bytes() == b"now!"
    assert volumes.names() == {"_snapshot-s", volume.name}


def test_masters_cannot_be_managed(
    driver: Any, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    database.images.add_master(Image("i", 1, Extents()), STORAGE)
    lvs = [MASTER + "i", "thunder-filling-j", "thunder-tree-i", "mine", "other"]
    for kind in ("volumes", "snapshots"):
        monkeypatch.setattr(
            lvm.LVMVolumeDriver,
            f"get_manageable_{kind}",
            lambda *a: [{"reference": {"source-name": name}, "size": 1} for name in lvs],
        )
        ask = getattr(driver, f"get_manageable_{kind}")
        listed = ask([], None, 1, 1, ["reference"], ["asc"])
        assert [entry["reference"]["source-name"] for entry in listed] == ["other"]
    driver.vg = SimpleNamespace(get_volume=lambda name: {"name": name, "size": "1.00"})
    for ask in (driver.manage_existing_get_size, driver.manage_existing_snapshot_get_size):
        assert ask(cinder_volume(1), {"source-name": "mine"}) == 1
        for name in (MASTER + "i", "thunder-filling-j", "thunder-tree-i"):
            with pytest.raises(exception.ManageExistingInvalidReference, match="is the master of"):
                ask(cinder_volume(1), {"source-name": name})
    with pytest.raises(exception.ManageExistingInvalidReference, match="is the master of"):
        driver.manage_existing_snapshot_get_size(SimpleNamespace(), MASTER + "i")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_helper": "fake"}, "target_helper is fake: set it to lioadm"),
        ({"lvm_type": "default"}, "lvm_type is default: set it to thin"),
    ],
)
def test_wrong_options_are_refused_at_start(
    cinder_conf: cfg.ConfigOpts, options: dict[str, Any], message: str
) -> None:
    driver: Any = make_driver(cinder_conf)
    settings = {"target_helper": "lioadm", "lvm_type": "thin", **options}
    driver.configuration = SimpleNamespace(**settings)
    with pytest.raises(exception.VolumeBackendAPIException, match=message):
        driver.check_for_setup_error()


def test_missing_tables(database: Database, tmp_path: Path) -> None:
    backend.check_tables(database)
    with pytest.raises(
        exception.VolumeBackendAPIException,
        match=f"at revision None, this code needs {migration.head()}: run thunder db upgrade",
    ):
        backend.check_tables(Database(f"sqlite:///{tmp_path / 'empty.sqlite'}"))


@pytest.mark.parametrize("what", ["database", "create", "conversion"])
def test_cinder_makes_a_volume_itself_if_no_master_can_be_made(
    driver: Any,
    admin: Any,
    raw_image: Path,
    volumes: FileVolumes,
    database: Database,
    monkeypatch: pytest.MonkeyPatch,
    what: str,
) -> None:
    """As its LVM driver would have done in the first place."""

    def refuse(*_: Any, **__: Any) -> None:
        if what == "database":
            raise db_exc.DBConnectionError("it is down")
        raise processutils.ProcessExecutionError("No space left on device")

    if what == "database":
        monkeypatch.setattr(database.images, "master", refuse)
    elif what == "create":
        volumes.fail = "create"
    else:
        monkeypatch.setattr(image_utils, "fetch_to_raw", refuse)
    glance = Glance()
    meta = glance.add(raw_image, "raw")
    assert clone(driver, admin, glance, meta, cinder_volume(1)) == (None, False)
    assert volumes.names() == set()


def test_what_has_no_data_is_not_provisioned(
    driver: Any, admin: Any, raw_image: Path, volumes: FileVolumes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sized snapshots stay when the volumes that were made from them are deleted."""
    glance = Glance()
    meta = glance.add(raw_image, "raw")
    made = [cinder_volume(size) for size in (10, 10, 20, 20)]
    for volume in made:
        assert clone(driver, admin, glance, meta, volume) == ({}, True)
    for volume in made[1:]:
        volumes.remove(volume.name)

    def listed() -> list[dict[str, str]]:  # as os_brick.local_dev.lvm.LVM does
        sizes = {name: (volumes.folder / name).stat().st_size for name in volumes.names()}
        return [{"name": name, "size": f"{size / GIB:.2f}"} for name, size in sizes.items()]

    group = SimpleNamespace(
        vg_name="vg",
        vg_thin_pool_size=3.0,
        vg_thin_pool_free_space=2.0,
        update_volume_group_info=lambda: None,
        get_volumes=listed,
    )
    group.vg_provisioned_capacity = round(sum(float(each["size"]) for each in listed()), 2)
    assert group.vg_provisioned_capacity > 40  # two sized snapshots and a volume
    monkeypatch.setattr(driver, "vg", group)
    driver._update_volume_stats()
    (pool,) = driver._stats["pools"]
    assert 10 <= pool["provisioned_capacity_gb"] < 10.1


def test_background_work_waits_for_cinders_start(
    cinder_conf: cfg.ConfigOpts, database: Database
) -> None:
    driver: Any = make_driver(cinder_conf, thunder_clean_interval=7.0, thunder_min_replicas=2)

    def tasks() -> list[Task]:
        masters: Any = SimpleNamespace(
            replicate=lambda image_id: None, activate=lambda: None, sweep=lambda: None
        )
        exporter: Any = SimpleNamespace(evict=lambda image_id: None)
        options, ready = driver.configuration, lambda: bool(driver.initialized)
        return list(backend.tasks(STORAGE, options, database, masters, exporter, ready))

    try:
        found = tasks()
        assert [(task.name, task.interval) for task in found] == [
            ("thunder-activate", 30.0),
            ("thunder-clean", 7.0),
            ("thunder-sweep", 7.0),
            ("thunder-reap", 600.0),
            ("thunder-replicas", 30.0),
        ]
        assert not any(task.ready() for task in found)
        driver.set_initialized()
        assert all(task.ready() for task in found)
        for task in found:
            task.run()
    finally:
        for option in ("thunder_clean_interval", "thunder_min_replicas"):
            cinder_conf.clear_override(option, group=configuration.SHARED_CONF_GROUP)
    names = [task.name for task in tasks()]
    assert names == ["thunder-activate", "thunder-clean", "thunder-sweep", "thunder-reap"]


@pytest.fixture
def built(
    cinder_conf: cfg.ConfigOpts, database: Database, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Any:
    """A backend as the driver builds it, on a fake broker and without a volume group."""
    transport = oslo_messaging.get_rpc_transport(cinder_conf, url="fake://")
    monkeypatch.setattr("cinder.rpc.TRANSPORT", transport)
    cinder_conf.set_override("state_path", str(tmp_path))
    options = make_driver(cinder_conf).configuration
    group = SimpleNamespace(
        vg_name="vg", vg_thin_pool="vg-pool", LVM_CMD_PREFIX=["env", "LC_ALL=C"]
    )
    built = backend.build(STORAGE, options, database, group, lambda: True)
    yield built
    built.stop()
    cinder_conf.clear_override("state_path")


def test_a_backend_starts_and_forgets_foreign_volumes(
    built: Any, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    on = {"here": f"{STORAGE}#pool", "moved": "stor2@thunder#pool"}

    def get_by_id(context: Any, volume_id: str) -> Any:
        if volume_id not in on:
            raise exception.VolumeNotFound(volume_id=volume_id)
        return SimpleNamespace(host=on[volume_id])

    monkeypatch.setattr("cinder.objects.Volume.get_by_id", get_by_id)
    monkeypatch.setattr(built.masters, "reconcile", lambda: None)
    monkeypatch.setattr(built.exporter, "reconcile", lambda: None)
    for volume_id in ("here", "moved", "deleted"):
        database.volumes.put(ClonedVolume(volume_id, "i", STORAGE))
    database.volumes.put(ClonedVolume("elsewhere", "i", "stor2@thunder"))
    built.start()
    assert database.volumes.ids_on(STORAGE) == {"here"}
    assert database.volumes.ids_on("stor2@thunder") == {"elsewhere"}


@pytest.mark.timeout(60)
def test_a_backend_that_failed_to_start_can_be_stopped(
    built: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cinder repeats the start of a driver that failed."""
    for part in (built.masters, built.exporter):
        monkeypatch.setattr(part, "reconcile", lambda: None)
    monkeypatch.setattr("cinder_thunder.volumes.is_on", lambda *arguments: True)

    def fail(*arguments: Any) -> None:
        raise RuntimeError("the database is away")

    monkeypatch.setattr(built.database.hosts, "heartbeat", fail)
    with pytest.raises(RuntimeError, match="the database is away"):
        built.start()
    built.stop()


def test_hosts_of_a_volume(monkeypatch: pytest.MonkeyPatch) -> None:
    attachments = [
        SimpleNamespace(connector=connector(host="agent-name"), attached_host="nova-name"),
        SimpleNamespace(
            connector={"host": "plain", "initiator": "iqn.x:plain"}, attached_host=None
        ),
        SimpleNamespace(connector=None, attached_host="old-style"),
        SimpleNamespace(connector=None, attached_host=None),  # reserved, no host yet
    ]
    found = SimpleNamespace(name="volume-x", multiattach=False, volume_attachment=attachments)
    monkeypatch.setattr("cinder.objects.Volume.get_by_id", lambda context, id: found)
    volume = volumes.find_volume("x")
    assert volume is not None
    assert volume.attachments == {
        volumes.Attachment("agent-name", "iqn.x:c1"),
        volumes.Attachment("plain", "iqn.x:plain"),
        volumes.Attachment("old-style"),
    }


def test_same_signatures_as_cinders() -> None:
    """Cinder's own compliance test compares nothing on Python 3."""
    assert upgrade.differences(ThunderDriver, lvm.LVMVolumeDriver) == []
    compared = upgrade.overridden(ThunderDriver, lvm.LVMVolumeDriver)
    assert {"clone_image", "initialize_connection", "delete_volume"} <= set(compared)


def test_options_are_documented() -> None:
    names = {option.name for option in ThunderDriver.get_driver_options()}
    assert {"volume_group", "thunder_rack", "thunder_fanout"} <= names
