"""Invalid input ends in one clear message, and leaves nothing behind."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from lab.cloud import config
from lab.cluster import Cluster
from lab.errors import CommandError, LabError
from lab.nodes.node import Node
from lab.play.journey import Journey

MIB = 1 << 20


@pytest.fixture
def storage(journey: Journey) -> Node:
    return journey.cluster.of_kind("storage")[0]


def volumes(cluster: Cluster) -> list[set[str]]:
    """Names of the LVs on each storage host."""
    command = f"lvs --noheadings -o lv_name {config.VOLUME_GROUP}"
    return [set(node.run(command).stdout.split()) for node in cluster.of_kind("storage")]


def _since(before: list[set[str]], cluster: Cluster) -> set[str]:
    """LVs that are new; what an earlier test has deleted may go meanwhile."""
    after = volumes(cluster)
    return {name for new, old in zip(after, before, strict=True) for name in new - old}


@pytest.fixture
def qcow2(tmp_path: Path) -> Path:
    """An image of 8 MiB with 2 MiB of data."""
    raw, image = tmp_path / "raw", tmp_path / "image.qcow2"
    raw.write_bytes(b"thunder" * (2 * MIB // 7) + bytes(6 * MIB))
    subprocess.run(["qemu-img", "convert", "-f", "raw", "-O", "qcow2", raw, image], check=True)
    return image


def logs(cluster: Cluster) -> str:
    """The logs of cinder-volume on all storage hosts."""
    files = [node.logs / "cinder-volume.log" for node in cluster.of_kind("storage")]
    return "".join(file.read_text(errors="replace") for file in files)


def test_an_image_that_is_larger_than_the_volume(journey: Journey, tmp_path: Path) -> None:
    image = tmp_path / "large.qcow2"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", image, "3G"], check=True)
    found = journey.upload(image, "large")
    before, by_client = volumes(journey.cluster), Journey(journey.cluster, client=True)
    try:
        with pytest.raises(
            (LabError, CommandError), match=r"(?s)3.*(larger|greater|bigger|too small|size)"
        ) as caught:
            by_client.create_volume("small", 1, "--image", found)
        print(caught.value)
    finally:
        _delete_all(journey, "small")
        journey.cluster.openstack("image", "delete", found)
    assert _since(before, journey.cluster) == set()


def test_a_qcow2_with_a_backing_file(journey: Journey, tmp_path: Path) -> None:
    """Glance itself refuses it; tests/unit has the driver's message for a Glance that does not."""
    base, image = tmp_path / "base.raw", tmp_path / "backed.qcow2"
    base.write_bytes(bytes(MIB))
    subprocess.run(
        ["qemu-img", "create", "-q", "-f", "qcow2", "-b", base, "-F", "raw", image], check=True
    )
    before = volumes(journey.cluster)
    with pytest.raises(CommandError, match=r"415|Unsupported|Media") as caught:
        journey.upload(image, "backed")
    print(caught.value)
    assert _since(before, journey.cluster) == set()


def test_an_image_whose_data_does_not_match_its_hash(journey: Journey, qcow2: Path) -> None:
    found = journey.upload(qcow2, "tampered")
    file = journey.cluster.controller.images / found
    data = bytearray(file.read_bytes())
    data[-100] ^= 0xFF
    file.write_bytes(data)
    before = volumes(journey.cluster)
    try:
        with pytest.raises(LabError, match="is error"):
            journey.create_volume("tampered", 1, "--image", found)
        output = logs(journey.cluster)
        assert f"Image {found} is unacceptable" in output or "Corrupt image download" in output
    finally:
        _delete_all(journey, "tampered")
        journey.cluster.openstack("image", "delete", found)
    assert _since(before, journey.cluster) == set()
    assert found not in json.dumps(journey.rows())
    find = "find / -xdev -name 'image_download*' -o -xdev -name 'thunder_*_'"
    assert [node.run(find).stdout for node in journey.cluster.of_kind("storage")] == ["", ""]


def _delete_all(journey: Journey, name: str) -> None:
    left = journey.cluster.ask(
        lambda cloud: [v.id for v in cloud.block_storage.volumes() if v.name == name]
    )
    journey.delete_volumes(left)


@pytest.fixture
def disk(storage: Node) -> Iterator[str]:
    """A loop device of 256 MiB on a node that runs no agent."""
    device = storage.run(
        "truncate -s 256M /var/tmp/disk && losetup --find --show /var/tmp/disk"
    ).stdout.strip()
    yield device
    storage.run(f"umount {device}; losetup -d {device}; rm /var/tmp/disk", check=False)


def _agent(storage: Node, option: str) -> str:
    """Start an agent with another pool; it must report why it refuses, and exit with 1."""
    settings, replaced = re.subn("^pool_.*$", option, config.agent(storage.spec), flags=re.M)
    assert replaced == 1
    storage.write("/run/bad.conf", f"{settings}state_file = /run/bad-state.json\n", 0o600)
    done = storage.run(
        "python -m os_brick_thunder.agent.main --config-file /run/bad.conf 2>&1 >/dev/null",
        check=False,
    )
    assert done.returncode == 1
    assert storage.run("dmsetup ls").stdout.count("thunder-pool") == 0
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("thunder-agent: ")]
    return line.removeprefix("thunder-agent: ")


def test_a_pool_device_that_is_not_there(storage: Node) -> None:
    assert _agent(storage, "pool_device = /dev/nothing") == (
        "there is no block device /dev/nothing: check the path"
    )


def test_a_volume_group_that_is_not_there(storage: Node) -> None:
    assert _agent(storage, "pool_volume_group = nothing") == (
        "there is no volume group nothing for the local pool: create it (vgcreate nothing DEVICE) "
        "or set pool_device instead"
    )


def test_a_pool_device_with_a_file_system_is_never_overwritten(storage: Node, disk: str) -> None:
    storage.run(f"mkfs.ext4 -q {disk}")
    before = storage.run(f"sha256sum {disk}").stdout
    assert _agent(storage, f"pool_device = {disk}") == (
        f"{disk} carries ext4, which is not thunder's: it was not touched. "
        f"If nothing needs it any longer, run: wipefs --all {disk}"
    )
    storage.run(f"mount {disk} /mnt")
    output = _agent(storage, f"pool_device = {disk}")
    storage.run(f"umount {disk}")
    assert output == (
        f"{disk} is in use by a mount or another claim: it was not touched. "
        "Give thunder a device for its exclusive use (option pool_device)"
    )
    storage.run(f"e2fsck -fn {disk}")
    storage.run(
        f"mkfs.ext4 -q -F {disk}; wipefs -qa {disk}; echo data | dd of={disk} bs=512 seek=3"
    )
    assert _agent(storage, f"pool_device = {disk}").startswith(f"{disk} carries unknown data")
    assert before


def test_a_pool_device_that_lvm_uses(storage: Node) -> None:
    output = _agent(storage, "pool_device = /dev/ubdb  ")
    assert output.startswith("/dev/ubdb is in use by dm-")
    assert output.endswith("Give thunder a device for its exclusive use (option pool_device)")


def test_a_payload_of_an_unknown_version(journey: Journey, qcow2: Path) -> None:
    node = journey.cluster.of_kind("compute")[0]
    image = journey.upload(qcow2, "versions")
    volume = journey.create_volume("versions", 1, "--image", image)
    journey.attach(node, volume)
    stored = json.loads(journey.stored(node, volume))
    journey.host_only(node, "disconnect", volume)
    stored["connection_info"]["thunder"]["version"] = 9
    attached = journey.reconnect(node, volume, json.dumps(stored))
    assert attached.path.startswith("/dev/sd")
    assert (
        "Attaching as plain iSCSI: the volume's thunder payload has version 9, this host supports "
        "1: upgrade thunder on this host; until then its volumes attach as plain iSCSI"
    ) in attached.warnings
    journey.detach(node, volume)
    journey.delete_volumes([volume])
    journey.cluster.thunder("image", "evict", image)
    journey.cluster.openstack("image", "delete", image)
