"""Every operation of Cinder on a volume, on a cached volume with modified blocks: bytes compared.

Each test writes through the device on a compute host, in the image and past it, before and after
the operation, and compares what that device and the LV on the storage host contain. Copies are
written to as well: neither side may see the other's writes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from lab.cloud import config, control
from lab.inside import blocks
from lab.nodes.node import Node
from lab.play.journey import Journey
from lab.play.lifecycle import GIB, MIB, Contents, LifeCycle, Volume
from tests.lab import images


@pytest.fixture(scope="module")
def image(journey: Journey, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """Data, holes and a partial last block, uploaded as qcow2: its id, and the raw file."""
    raw, qcow2 = images.with_holes(tmp_path_factory.mktemp("image"), seed=3)
    found = journey.upload(qcow2, "lifecycle")
    yield found, raw
    journey.cluster.openstack("image", "delete", found)


@pytest.fixture
def life(journey: Journey) -> Iterator[LifeCycle]:
    with LifeCycle(journey) as life:
        yield life


@pytest.fixture
def nodes(journey: Journey) -> list[Node]:
    return journey.cluster.of_kind("compute")


@pytest.fixture
def volume(life: LifeCycle, nodes: list[Node], image: tuple[str, Path]) -> Volume:
    """A volume of the image, attached to the first host with its cache, some blocks modified."""
    made = life.create(Contents(image[1]), imageRef=image[0])
    life.attach(made, nodes[0])
    life.write(made, "before")
    assert life.wrong(made) == []
    return made


@pytest.mark.long
def test_snapshots_and_clones(life: LifeCycle, nodes: list[Node], volume: Volume) -> None:
    """A volume from a snapshot, a clone, and a clone of that, all made while it is in use."""
    snapshot = life.snapshot(volume)
    then = volume.contents.copy()
    life.write(volume, "after")
    from_snapshot = life.create(then, snapshot_id=snapshot)
    clone = life.create(volume.contents, source_volid=volume.id)
    life.attach(clone, nodes[1])
    life.write(clone, "clone")
    second = life.create(clone.contents, source_volid=clone.id)
    life.attach(second, nodes[0])
    life.attach(from_snapshot, nodes[1])
    everything = [volume, from_snapshot, clone, second]
    assert life.wrong(*everything) == []
    for number, each in enumerate(everything):
        life.write(each, f"own-{number}")
    assert life.wrong(*everything) == []
    again = life.create(then, snapshot_id=snapshot)  # nothing has reached the snapshot
    assert life.wrong(again) == []


@pytest.mark.long
def test_revert_to_a_snapshot(life: LifeCycle, nodes: list[Node], volume: Volume) -> None:
    """Also where the snapshot has zeros, and the volume has been written to since."""
    snapshot = life.snapshot(volume)
    then = volume.contents.copy()
    life.write(volume, "discarded", 300 * MIB)
    life.detach(volume)
    life.act(volume, "revert", {"snapshot_id": snapshot})
    volume.contents = then.copy()
    assert life.wrong(volume, whole=True) == []
    life.attach(volume, nodes[1])
    assert life.wrong(volume) == []
    life.write(volume, "reverted")
    assert life.wrong(volume) == []
    life.detach(volume)
    life.act(volume, "revert", {"snapshot_id": snapshot})  # once more, from the same snapshot
    volume.contents = then.copy()
    life.attach(volume, nodes[0])
    assert life.wrong(volume) == []


@pytest.mark.long
def test_extend(life: LifeCycle, nodes: list[Node], volume: Volume) -> None:
    """Attached, also without the agent, then detached, with zeros where the volume has grown."""
    life.act(volume, "os-extend", {"new_size": 2}, "in-use")
    volume.gib = 2
    assert life.journey.extend(nodes[0], volume.id) == 2 * GIB
    assert life.wrong(volume) == []
    life.write(volume, "grown", 2 * GIB - MIB)
    nodes[0].service_stop("thunder-agent")
    try:
        life.act(volume, "os-extend", {"new_size": 3}, "in-use")
        volume.gib = 3
        assert life.journey.extend(nodes[0], volume.id) == 3 * GIB
        life.write(volume, "without", 3 * GIB - MIB)
    finally:
        nodes[0].service_start("thunder-agent")
    assert life.wrong(volume) == []
    life.detach(volume)
    life.act(volume, "os-extend", {"new_size": 4})
    volume.gib = 4
    life.attach(volume, nodes[1])
    assert life.wrong(volume) == []
    life.write(volume, "again")
    assert life.wrong(volume) == []


@pytest.mark.long
def test_transfer(life: LifeCycle, nodes: list[Node], volume: Volume) -> None:
    life.detach(volume)
    life.transfer_there_and_back(volume)
    life.attach(volume, nodes[1])
    life.write(volume, "given")
    assert life.wrong(volume) == []


@pytest.mark.long
def test_unmanage_and_manage(life: LifeCycle, nodes: list[Node], volume: Volume) -> None:
    """A volume and its snapshot. Without its record a volume is plain iSCSI, as are its copies."""
    snapshot = life.snapshot(volume)
    then = volume.contents.copy()
    life.write(volume, "after")
    life.detach(volume)
    host, (_, lv) = life.show(volume)["os-vol-host-attr:host"], life.lv(volume)
    life.post(f"/snapshots/{snapshot}/action", {"os-unmanage": None})
    life.await_absent(f"/snapshots/{snapshot}")
    life.post(f"/volumes/{volume.id}/action", {"os-unmanage": None})
    life.await_absent(f"/volumes/{volume.id}")
    offered = life.get(f"/manageable_volumes?host={host}")["manageable-volumes"]
    names = {entry["reference"]["source-name"] for entry in offered}
    assert Path(lv).name in names
    assert not [name for name in names if name.startswith("thunder-")], "masters are offered"
    body = {"host": host, "ref": {"source-name": Path(lv).name}, "volume_type": "thunder"}
    made = life.post("/manageable_volumes", {"volume": body})["volume"]["id"]
    managed = life.adopt(made, volume.contents)
    body = {"volume_id": managed.id, "ref": {"source-name": f"_snapshot-{snapshot}"}}
    made = life.post("/manageable_snapshots", {"snapshot": body})["snapshot"]["id"]
    life.delete_at_end("snapshots", made)
    life.await_status("snapshots", made)
    copy = life.create(then, snapshot_id=made)
    for number, each in enumerate((managed, copy)):
        life.attach(each, nodes[number], "plain")
        life.write(each, f"own-{number}")
    assert life.wrong(managed, copy) == []
    assert life.wrong(life.create(then, snapshot_id=made)) == []


@pytest.mark.long
def test_group_snapshot(life: LifeCycle, nodes: list[Node], image: tuple[str, Path]) -> None:
    """Two attached volumes at once, and a group made of their snapshots."""
    kind = life.post("/group_types", {"group_type": {"name": "life"}})["group_type"]["id"]
    life.finally_(life.delete, f"/group_types/{kind}")
    types = life.get("/types")["volume_types"]
    (thunder,) = [each["id"] for each in types if each["name"] == life.journey.volume_type]
    body = {"name": "life", "group_type": kind, "volume_types": [thunder]}
    group = life.group("/groups", {"group": body})
    made = [life.create(Contents(image[1]), imageRef=image[0], group_id=group) for _ in range(2)]
    for number, each in enumerate(made):
        life.attach(each, nodes[number])
        life.write(each, f"before-{number}")
    body = {"name": "life", "group_id": group}
    snapshots = life.post("/group_snapshots", {"group_snapshot": body})["group_snapshot"]["id"]
    life.delete_at_end("group_snapshots", snapshots)
    life.await_status("group_snapshots", snapshots)
    then = {each.id: each.contents.copy() for each in made}
    for number, each in enumerate(made):
        life.write(each, f"after-{number}")
    body = {"name": "copies", "group_snapshot_id": snapshots}
    copied = life.group("/groups/action", {"create-from-src": body})
    sources = {s["id"]: s["volume_id"] for s in life.get("/snapshots/detail")["snapshots"]}
    copies = [
        life.adopt(v["id"], then[sources[v["snapshot_id"]]], delete=False)
        for v in life.get(f"/volumes/detail?group_id={copied}")["volumes"]
    ]
    assert len(copies) == 2
    for number, each in enumerate(copies):
        life.attach(each, nodes[1 - number])
        life.write(each, f"own-{number}")
    assert life.wrong(*made, *copies) == []


@pytest.mark.long
def test_upload_to_image(life: LifeCycle, nodes: list[Node], volume: Volume) -> None:
    """While it is in use (force), then detached; a volume of the new image."""
    upload = {"image_name": "life", "disk_format": "raw", "container_format": "bare"}
    for force, status in ((True, "in-use"), (False, "available")):
        if not force:
            life.write(volume, "after")
            life.detach(volume)
        body = {**upload, "force": force}
        answer = life.act(volume, "os-volume_upload_image", body, status)
        found = answer["os-volume_upload_image"]["image_id"]
        life.finally_(life.journey.cluster.openstack, "image", "delete", found)
        raw = life.journey.cluster.controller.images / found
        assert blocks.expected_digest(raw, ()) == volume.contents.digest(0, GIB)
    other = life.create(volume.contents, imageRef=found)
    life.attach(other, nodes[1])
    life.attach(volume, nodes[0])
    for number, each in enumerate((volume, other)):
        life.write(each, f"own-{number}")
    assert life.wrong(volume, other) == []


@pytest.fixture
def backups(journey: Journey) -> Iterator[None]:
    """cinder-backup with the posix driver, on a storage host."""
    node = journey.cluster.of_kind("storage")[-1]
    node.catalog["cinder-backup"] = control.cinder_backup()
    node.service_start("cinder-backup")
    yield
    node.service_stop("cinder-backup")


@pytest.mark.long
@pytest.mark.usefixtures("backups")
def test_backup_and_restore(life: LifeCycle, nodes: list[Node], volume: Volume) -> None:
    """A full backup in use, an incremental one detached; each restored, one of them in place."""
    full = life.backup(volume, force=True)
    then = volume.contents.copy()
    life.write(volume, "after")
    life.detach(volume)
    increment = life.backup(volume, incremental=True)
    answer = life.post(f"/backups/{increment}/restore", {"restore": {"name": "restored"}})
    restored = life.adopt(answer["restore"]["volume_id"], volume.contents)
    assert life.wrong(restored, whole=True) == []
    life.post(f"/backups/{full}/restore", {"restore": {"volume_id": volume.id}})
    life.await_status("backups", full)
    life.journey.await_volume(volume.id)
    volume.contents = then
    assert life.wrong(volume, whole=True) == []
    life.attach(restored, nodes[0], "plain")
    life.attach(volume, nodes[1])
    for number, each in enumerate((volume, restored)):
        life.write(each, f"own-{number}")
    assert life.wrong(volume, restored) == []


def on_other(life: LifeCycle, volume: Volume) -> str:
    """The other storage host's name."""
    here = life.lv(volume)[0]
    return next(n.name for n in life.journey.cluster.of_kind("storage") if n is not here)


def check_moved(life: LifeCycle, volume: Volume, node: Node, seed: str) -> None:
    """A detached volume that was copied elsewhere has all of its bytes, and takes new ones."""
    assert life.wrong(volume, whole=True) == []
    life.attach(volume, node, "plain")
    life.write(volume, seed)
    assert life.wrong(volume) == []
    life.detach(volume)


@pytest.mark.long
def test_migration_there_and_back(life: LifeCycle, nodes: list[Node], volume: Volume) -> None:
    """To another storage host and back. A copy shares nothing with its image: plain iSCSI."""
    life.detach(volume)
    for number in range(2):
        host = f"{on_other(life, volume)}@thunder"
        life.move(volume, "os-migrate_volume", {"host": f"{host}#thunder"}, host)
        check_moved(life, volume, nodes[number], f"moved-{number}")


@pytest.mark.long
def test_retype(life: LifeCycle, nodes: list[Node], volume: Volume) -> None:
    """On its host while it is attached: it stays cached. Then to another storage host."""
    backend = {"volume_backend_name": "thunder"}
    same = life.type("life-same", {**backend, "lab:kind": "same"})
    body = {"new_type": same, "migration_policy": "never"}
    life.act(volume, "os-retype", body, "in-use")
    assert life.show(volume)["volume_type"] == "life-same"
    life.write(volume, "retyped")
    assert life.wrong(volume) == []
    life.detach(volume)
    life.attach(volume, nodes[1])
    assert life.wrong(volume) == []
    life.detach(volume)
    host = on_other(life, volume)
    place = {"location_info": f"LVMVolumeDriver:{host}:cinder-volumes:thin:0"}
    other = life.type("life-other", {**backend, **place})
    body = {"new_type": other, "migration_policy": "on-demand"}
    life.move(volume, "os-retype", body, f"{host}@thunder")
    assert life.show(volume)["volume_type"] == "life-other"
    assert life.wrong(volume, whole=True) == []
    life.attach(volume, nodes[0], "plain")
    life.write(volume, "moved")
    assert life.wrong(volume) == []


@contextlib.contextmanager
def plain_backend(node: Node) -> Iterator[None]:
    """Cinder's LVM driver in another volume group of a storage host."""
    node.catalog["cinder-volume-plain"] = control.plain_volume(node.spec)
    node.service_start("cinder-volume-plain")
    try:
        yield
    finally:
        node.service_stop("cinder-volume-plain")


@pytest.mark.long
def test_retype_to_cinders_lvm_driver_and_back(
    life: LifeCycle, nodes: list[Node], volume: Volume
) -> None:
    """Within a storage host, from one volume group to the other, without iSCSI."""
    life.detach(volume)
    here = life.lv(volume)[0]
    with plain_backend(here):
        for number, backend in enumerate((config.PLAIN, config.BACKEND)):
            group = config.VOLUME_GROUP if number else config.PLAIN_GROUP
            place = {"location_info": f"LVMVolumeDriver:{here.name}:{group}:thin:0"}
            made = life.type(f"life-{backend}", {"volume_backend_name": backend, **place})
            body = {"new_type": made, "migration_policy": "on-demand"}
            life.move(volume, "os-retype", body, f"{here.name}@{backend}")
            check_moved(life, volume, nodes[number], f"moved-{number}")


@pytest.mark.long
def test_multiattach(life: LifeCycle, nodes: list[Node], volume: Volume) -> None:
    """Retyped, on two hosts at once: plain iSCSI on both. Retyped again, it has its cache back."""
    backend = {"volume_backend_name": "thunder"}
    many = life.type("life-many", {**backend, "multiattach": "<is> True"})
    life.detach(volume)
    life.act(volume, "os-retype", {"new_type": many, "migration_policy": "never"})
    assert life.show(volume)["multiattach"]
    twin = Volume(volume.id, volume.contents)
    life.attach(volume, nodes[0], "plain")
    life.attach(twin, nodes[1], "plain")
    for each, seed in ((volume, "first"), (twin, "second")):
        life.write(each, seed)
        assert life.wrong(volume, twin) == []
    life.detach(volume)
    life.detach(twin)
    body = {"new_type": life.journey.volume_type, "migration_policy": "never"}
    life.act(volume, "os-retype", body)
    life.attach(volume, nodes[1])
    life.write(volume, "alone")
    assert life.wrong(volume) == []


@pytest.mark.long
def test_encrypted(life: LifeCycle, nodes: list[Node], image: tuple[str, Path]) -> None:
    """A volume of an encrypted type, and one from its snapshot: plain iSCSI below dm-crypt."""
    kind = life.type("life-secret", {"volume_backend_name": "thunder"})
    luks = {"provider": "luks", "cipher": "aes-xts-plain64", "key_size": 256}
    body = {"encryption": {**luks, "control_location": "front-end"}}
    life.post(f"/types/{kind}/encryption", body)
    volume = life.create(Contents(image[1]), imageRef=image[0], volume_type=kind)
    life.attach(volume, nodes[0], "plain")
    with opened(volume) as device:
        write(life, volume, device, "before")
        assert wrong(life, volume, device) == []
        snapshot, then = life.snapshot(volume), volume.contents.copy()
        write(life, volume, device, "after")
        copy = life.create(then, snapshot_id=snapshot, volume_type=kind)
        life.attach(copy, nodes[1], "plain")
        with opened(copy) as other:
            write(life, copy, other, "copy")
            assert wrong(life, volume, device) + wrong(life, copy, other) == []
    storage, lv = life.lv(volume)
    header = storage.run(f"head -c 4 {lv}").stdout
    assert header == "LUKS"


@contextlib.contextmanager
def opened(volume: Volume) -> Iterator[str]:
    """The decrypted device of an attached volume, as Nova has os-brick open it."""
    assert volume.node is not None
    node, name = volume.node, f"secret-{volume.id[:8]}"
    opening = f"cryptsetup luksOpen --key-file=- {volume.path} {name}"
    node.run(opening, input=config.FIXED_KEY)
    try:
        yield f"/dev/mapper/{name}"
    finally:
        node.run(f"cryptsetup luksClose {name}")


def write(life: LifeCycle, volume: Volume, device: str, seed: str) -> None:
    """Write through the decrypted device, in the image, past it, and far from it."""
    assert volume.node is not None
    offsets = [0, 17 * MIB, 39 * MIB, 44 * MIB, 900 * MIB + len(seed) * 4096]
    life.journey.write(volume.node, device, seed, offsets)
    volume.contents.pages.update(dict.fromkeys(offsets, seed))


def wrong(life: LifeCycle, volume: Volume, device: str) -> list[str]:
    """What differs on the decrypted device: of the image, and of what was written past it.

    What was never written there is not compared: zeros on the LUN are not zeros when decrypted.
    """
    assert volume.node is not None
    found = life.differing(volume.node, device, volume.contents, [(0, 40 * MIB)])
    for seed in set(volume.contents.pages.values()):
        offsets = [at for at, by in volume.contents.pages.items() if by == seed and at >= 40 * MIB]
        if offsets:
            found += life.journey.differing(volume.node, device, seed, offsets).split()
    return found
