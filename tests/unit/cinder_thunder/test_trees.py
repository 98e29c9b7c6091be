"""Hash trees of masters: made with them, exported in their place, removed with them."""

from __future__ import annotations

import base64
import errno
import os
from pathlib import Path
from typing import Any

import pytest

from cinder_thunder import privileged
from cinder_thunder.db.values import Image
from cinder_thunder.masters.clones import FILLING, MASTER, TREE
from cinder_thunder.masters.masters import Masters
from cinder_thunder.masters.templates import Templates
from os_brick_thunder.common import errors
from os_brick_thunder.common.policy import hashtree, manifest
from os_brick_thunder.common.policy.extents import Extents
from os_brick_thunder.common.policy.manifest import Manifest
from os_brick_thunder.common.treewriter import TreeWriter
from tests.fake_storage import FileVolumes
from tests.unit.cinder_thunder.test_replicas import HERE, NEAR, Cloud, cloud
from tests.unit.os_brick_thunder.test_hashtree import tree_of

__all__ = ["cloud"]

MIB = 1 << 20
CHUNK = 256 << 10
SIZE = 8 * MIB
LENGTH = hashtree.length(SIZE)
LV = "volume-v"


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """Data, a hole, zeroes, data: a whole number of chunks."""
    path = tmp_path / "whole.raw"
    with path.open("wb") as file:
        file.write(os.urandom(3 * CHUNK))
        file.seek(5 * MIB)
        file.write(bytes(CHUNK) + b"late" * 1000)
        file.truncate(SIZE)
    return path


@pytest.fixture
def meta(cloud: Cloud, image: Path) -> dict[str, Any]:
    return cloud.glance.add(image, "raw")


def lvs(cloud: Cloud, host: str) -> FileVolumes:
    return cloud.network.backends[host]


def content(cloud: Cloud, host: str, name: str) -> bytes:
    return (lvs(cloud, host).folder / name).read_bytes()


def recorded(cloud: Cloud, image_id: str) -> Image:
    found = cloud.database.images.get(image_id)
    assert found is not None
    return found


def without_trees(masters: Masters) -> Masters:
    masters.trees._enabled = False
    return masters


@pytest.mark.parametrize("size", [SIZE, SIZE - CHUNK])
def test_masters_have_trees(cloud: Cloud, image: Path, size: int) -> None:
    """Of an image that fills its extents, so that the tree needs another, and of one with room."""
    os.truncate(image, size)
    meta = cloud.glance.add(image, "raw")
    root, tree = tree_of(image.read_bytes())
    master, whole = MASTER + meta["id"], TREE + meta["id"]
    for host in (NEAR, HERE):
        cloud.ensure(host, meta)
        assert lvs(cloud, host).names() == lvs(cloud, host).protected == {master, whole}
        assert content(cloud, host, master) == image.read_bytes().ljust(SIZE, b"\0")
        exported = content(cloud, host, whole)
        assert exported.rstrip(b"\0") == (image.read_bytes() + tree).rstrip(b"\0")
        path, length = cloud.masters(host).trees.exported(meta["id"], size)
        assert (path, length) == (lvs(cloud, host).path(whole), size + len(tree))
        found = recorded(cloud, meta["id"])
        assert found.root == root
        assert found.manifest is not None
        raw = found.manifest
        digests = base64.b64decode(raw.digests) + base64.b64decode(raw.tail)
        manifest = Manifest(length, raw.chunk, digests)
        for at in range(0, length, raw.chunk):
            assert manifest.fits(at, exported[at : min(at + raw.chunk, length)])
    assert cloud.glance.downloads == [meta["id"]]


def test_a_further_master_of_an_image_with_longer_chunks(
    cloud: Cloud, meta: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As older versions have made its first one."""
    with monkeypatch.context() as older:
        older.setattr(manifest, "CHUNK", CHUNK)
        cloud.ensure(NEAR, meta)
    first = recorded(cloud, meta["id"])
    cloud.ensure(HERE, meta)
    assert lvs(cloud, HERE).names() == {MASTER + meta["id"], TREE + meta["id"]}
    assert recorded(cloud, meta["id"]) == first
    assert first.manifest is not None
    assert first.manifest.chunk == CHUNK
    assert cloud.glance.downloads == [meta["id"]]


def test_images_without_trees(cloud: Cloud, meta: Any, raw_image: Path) -> None:
    near = cloud.masters(NEAR)
    odd = cloud.glance.add(raw_image, "raw")
    near.ensure(cloud.admin, cloud.glance.per_request(), odd, 1)
    service = cloud.glance.per_request()
    without_trees(near).ensure(cloud.admin, service, meta, 1)
    assert lvs(cloud, NEAR).names() == {MASTER + odd["id"], MASTER + meta["id"]}
    for image_id, size in ((odd["id"], raw_image.stat().st_size), (meta["id"], SIZE)):
        found = recorded(cloud, image_id)
        assert found.root == ""
        assert found.manifest is not None
        assert found.manifest.tail == ""
        path = lvs(cloud, NEAR).path(MASTER + image_id)
        assert near.trees.exported(image_id, size) == (path, size)


@pytest.mark.parametrize("step", ["snapshot", "extend", "write", "open"])
def test_a_master_whose_tree_cannot_be_made_has_none(
    cloud: Cloud, meta: Any, image: Path, step: str, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    near = cloud.masters(NEAR)

    def full(*args: Any) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    if step == "write":
        monkeypatch.setattr(TreeWriter, "write", full)
    elif step == "open":
        monkeypatch.setattr(TreeWriter, "__init__", full)
    else:
        lvs(cloud, NEAR).fail = step
    near.ensure(cloud.admin, cloud.glance.per_request(), meta, 1)
    assert lvs(cloud, NEAR).names() == {MASTER + meta["id"]}
    assert content(cloud, NEAR, MASTER + meta["id"]) == image.read_bytes()
    assert recorded(cloud, meta["id"]).root == ""
    assert recorded(cloud, meta["id"]).manifest is not None
    assert f"The master of image {meta['id']} gets no hash tree" in caplog.text
    assert near.trees.of({meta["id"]}) == set()
    assert privileged._copies == {}


def test_a_tree_that_can_be_neither_made_nor_removed_fails_the_master(
    cloud: Cloud, meta: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is exported in a master's place is whole."""
    near = cloud.masters(NEAR)
    remove = FileVolumes.remove
    stuck = [TREE + meta["id"]]

    def refuse(volumes: FileVolumes, name: str) -> None:
        if name in stuck:
            stuck.remove(name)
            raise errors.ProcessError(("lvremove", name), 5, "in use")
        remove(volumes, name)

    monkeypatch.setattr(FileVolumes, "remove", refuse)
    lvs(cloud, NEAR).fail = "extend"
    with pytest.raises(errors.ProcessError, match="in use"):
        near.ensure(cloud.admin, cloud.glance.per_request(), meta, 1)
    assert lvs(cloud, NEAR).names() == set()
    assert cloud.database.images.mastered_on(NEAR) == set()


def test_wrong_bytes_on_disk_fail_the_master(
    cloud: Cloud, meta: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    near = cloud.masters(NEAR)
    protect = FileVolumes.protect

    def spoil(volumes: FileVolumes, name: str) -> None:
        with (volumes.folder / name).open("r+b") as file:
            file.seek(CHUNK)
            file.write(b"spoilt")
        protect(volumes, name)

    monkeypatch.setattr(FileVolumes, "protect", spoil)
    with pytest.raises(errors.TransferError, match="does not return what was written to it"):
        near.ensure(cloud.admin, cloud.glance.per_request(), meta, 1)
    assert lvs(cloud, NEAR).names() == set()
    assert cloud.database.images.all() == []


def test_an_image_of_an_older_version_gets_no_tree(
    cloud: Cloud, meta: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_trees(cloud.masters(NEAR)).ensure(cloud.admin, cloud.glance.per_request(), meta, 1)

    def unexpected(volumes: FileVolumes, name: str, origin: str) -> None:
        raise AssertionError("a tree is begun")

    monkeypatch.setattr(FileVolumes, "snapshot", unexpected)
    here = cloud.masters(HERE)
    here.replicate(meta["id"])
    assert lvs(cloud, HERE).names() == {MASTER + meta["id"]}
    assert recorded(cloud, meta["id"]).root == ""
    # All masters are made anew.
    monkeypatch.undo()
    for host in (NEAR, HERE):
        cloud.masters(host).remove(meta["id"])
    cloud.ensure(HERE, meta)
    assert recorded(cloud, meta["id"]).root != ""


def test_a_tree_with_another_root_is_removed(cloud: Cloud, meta: Any, caplog: Any) -> None:
    cloud.ensure(NEAR, meta)
    before = recorded(cloud, meta["id"])
    with cloud.database.engine.begin() as connection:
        connection.exec_driver_sql("UPDATE thunder_images SET root = ?", ("0" * 64,))
    cloud.masters(HERE).replicate(meta["id"])
    assert lvs(cloud, HERE).names() == {MASTER + meta["id"]}
    assert recorded(cloud, meta["id"]).root == "0" * 64
    assert recorded(cloud, meta["id"]).manifest == before.manifest
    assert f"has the root {before.root}, not {'0' * 64}" in caplog.text


def test_a_tree_is_not_exported_before_its_master_is_whole(cloud: Cloud, meta: Any) -> None:
    """The row may be that of what had the image's id before."""
    cloud.ensure(NEAR, meta)
    trees, volumes = cloud.masters(NEAR).trees, lvs(cloud, NEAR)
    master = MASTER + meta["id"]
    volumes.rename(master, FILLING + meta["id"])
    assert trees.exported(meta["id"], SIZE) == (volumes.path(master), SIZE)
    volumes.rename(FILLING + meta["id"], master)
    volumes.inactive = {TREE + meta["id"]}
    assert trees.exported(meta["id"], SIZE) == (volumes.path(master), SIZE)
    volumes.inactive = set()
    assert trees.exported(meta["id"], SIZE)[1] == SIZE + LENGTH


def test_a_tree_goes_with_its_master(cloud: Cloud, meta: Any) -> None:
    near = cloud.masters(NEAR)
    lvs(cloud, NEAR).create(TREE + meta["id"], 1)  # an earlier attempt has left it
    unexported: list[str] = []
    near._unexport = unexported.append
    near.ensure(cloud.admin, cloud.glance.per_request(), meta, 1)
    assert unexported == [meta["id"]]
    assert len(content(cloud, NEAR, TREE + meta["id"])) == SIZE + (4 * MIB)
    near.remove(meta["id"])
    assert lvs(cloud, NEAR).names() == set()
    without_trees(near).ensure(cloud.admin, cloud.glance.per_request(), meta, 1)
    assert near.trees.of({meta["id"]}) == set()  # nobody looks for it any more


def test_a_failure_after_the_tree_leaves_nothing(cloud: Cloud, meta: Any) -> None:
    near = cloud.masters(NEAR)
    lvs(cloud, NEAR).fail = "rename"
    with pytest.raises(errors.ProcessError):
        near.ensure(cloud.admin, cloud.glance.per_request(), meta, 1)
    assert lvs(cloud, NEAR).names() == set()


def test_reconcile_and_reboots(cloud: Cloud, meta: Any) -> None:
    near, volumes = cloud.masters(NEAR), lvs(cloud, NEAR)
    near.ensure(cloud.admin, cloud.glance.per_request(), meta, 1)
    for name in (TREE + "unknown", MASTER + "old", TREE + "gone"):
        volumes.create(name, 1)
    for image_id in ("old", "gone"):  # one without a tree, one without a master
        cloud.database.images.add_master(Image(image_id, SIZE, Extents()), NEAR)
    volumes.inactive = set(volumes.names())
    cloud.masters(NEAR).reconcile()
    assert volumes.names() == {MASTER + meta["id"], TREE + meta["id"], MASTER + "old"}
    assert cloud.database.images.mastered_on(NEAR) == {meta["id"], "old"}
    assert volumes.inactive == set()
    volumes.inactive = set(volumes.names())
    near.activate()  # in the process that made it
    assert volumes.inactive == set()


def test_templates_have_trees(cloud: Cloud) -> None:
    near, volumes = cloud.masters(NEAR), lvs(cloud, NEAR)
    templates = Templates(cloud.database, volumes, near, {"v": (LV, SIZE)}.get)  # type: ignore[arg-type]
    volumes.create(LV, SIZE)

    def write(data: bytes) -> str:
        path = volumes.folder / LV
        with path.open("r+b") as file:
            file.write(data)
        return tree_of(path.read_bytes())[0]

    near.trees._enabled = False  # as an older version
    write(b"golden")
    templates.make("v")
    assert recorded(cloud, "v").root == ""
    near.trees._enabled = True
    # Made again of the same data while the row is kept: its first master had no tree.
    cloud.database.images.set_deleted("v", True)
    templates.make("v")
    assert recorded(cloud, "v").root == ""
    assert volumes.names() == {LV, MASTER + "v"}
    # It is another one with other data.
    for data in (b"newer", b"newest"):
        root = write(data)
        cloud.database.images.set_deleted("v", True)
        made = templates.make("v")
        assert recorded(cloud, "v").root == root
        assert volumes.names() == {LV, MASTER + "v", TREE + "v"}
        assert made.size == SIZE
        tail = recorded(cloud, "v").manifest
        assert tail is not None
        assert len(base64.b64decode(tail.tail)) == -(-LENGTH // tail.chunk) * 16
