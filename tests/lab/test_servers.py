"""Servers through the public APIs of an unpatched Nova: every operation that attaches, keeps or
detaches volumes.

The guests are tiny ones that write to their disk all the time, and verify its contents. All tests
take about 20 minutes: `make server-tests`.
"""

from __future__ import annotations

import contextlib
import os
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from lab.cloud import config, control, nova
from lab.cluster import SERVER_MEMORY, Options, existing_or_new
from lab.errors import ConditionError, LabError
from lab.guests import tiny
from lab.guests.checked import Checked, boots, found
from lab.nodes.node import Node
from lab.nodes.topology import Link, Topology
from lab.play.journey import Journey
from lab.play.lifecycle import Contents, LifeCycle
from lab.play.servers import Servers, from_image, from_snapshot, from_volume
from lab.shell import wait_for

PROMPT = "tiny login:"
#: Seconds for a guest to reach its prompt, and for the next output of its checker. Limits, not
#: expectations: guests are emulated, on a core that others use too.
BOOT, HEARD = 600, 60


@pytest.fixture(scope="module")
def cloud(tiny_image: Path) -> Iterator[Servers]:
    """A cloud of one storage and three compute hosts, with a Nova that boots tiny guests.

    ``THUNDER_TEST_CLOUD=name`` uses one that is up.
    """
    existing = os.environ.get("THUNDER_TEST_CLOUD", "")
    topology = Topology.standard(storage=1, compute=3, compute_memory=SERVER_MEMORY)
    with existing_or_new(existing, "servers", topology, Options(nova=True)) as cluster:
        yield Servers(cluster, ram=128)


@pytest.fixture(scope="module")
def tiny_image() -> Path:
    return tiny.build()


@pytest.fixture(scope="module")
def journey(cloud: Servers) -> Journey:
    return Journey(cloud.cluster)


@pytest.fixture(scope="module")
def image(cloud: Servers, journey: Journey, tiny_image: Path) -> str:
    return journey.upload(tiny_image, "tiny")


@pytest.fixture(autouse=True)
def clean(cloud: Servers, journey: Journey) -> Iterator[None]:
    """After every test there are no servers, and no host has anything left of theirs."""
    yield
    cloud.delete(cloud.named(""))
    wait_for("volumes and snapshots to go", lambda: _delete_all(cloud), timeout=120)
    for node in cloud.cluster.of_kind("compute"):
        await_clean(journey, node, 30)


def _delete_all(cloud: Servers) -> bool:
    """Delete the snapshots and volumes that can be deleted now; returns whether none are left."""

    def ask(api: Any) -> bool:
        snapshots, volumes = list(api.block_storage.snapshots()), list(api.block_storage.volumes())
        for snapshot in snapshots:
            if snapshot.status in ("available", "error"):
                api.block_storage.delete_snapshot(snapshot)
        for volume in volumes:
            if volume.status in ("available", "error") and not snapshots:
                api.block_storage.delete_volume(volume)
        return not snapshots and not volumes

    return cloud.cluster.ask(ask)


def await_clean(journey: Journey, node: Node, timeout: float = 60) -> None:
    """Wait until nothing of any volume is left on a node."""
    left: list[str] = []

    def look() -> bool:
        left[:] = journey.leftovers(node)
        return not left

    with contextlib.suppress(ConditionError):
        wait_for(f"{node.name} to be clean", look, timeout=timeout)
    assert left == []


def compute(cloud: Servers, index: int) -> Node:
    return cloud.cluster.of_kind("compute")[index]


def boot(cloud: Servers, name: str, *mapping: dict[str, object], host: str = "") -> str:
    """Create a server and wait for its first boot, from a disk with the image."""
    (server,) = cloud.create(name, *mapping, host=host)
    await_boot(cloud, server)
    return server


def await_boot(cloud: Servers, server: str, number: int = 1) -> None:
    """Wait until its prompt appears and its disk has been booted ``number`` times."""
    cloud.await_console(server, PROMPT, BOOT)
    cloud.await_console(server, r"tiny: boot \d+", BOOT)
    assert boots(cloud.console(server)) == number


def heard(cloud: Servers, server: str, after: int = -1, disk: str = "vda") -> Checked:
    """The checker's next output after a record (0: after its first acknowledged write); it must not
    have found an error.
    """
    counters = cloud.await_checked(server, after, disk, HEARD)
    assert counters.wrong == 0, cloud.console(server)[-2000:]
    return counters


def stacks(cloud: Servers, journey: Journey, server: str) -> list[str]:
    """The modes of a server's volumes on its host."""
    node = cloud.cluster.node(cloud.host(server))
    return [journey.stack(node, volume).get("mode", "plain") for volume in cloud.volumes(server)]


def await_cached(cloud: Servers, journey: Journey, server: str, volumes: int = 1) -> None:
    """Wait until all of a server's volumes have caches."""
    node, found = cloud.cluster.node(cloud.host(server)), cloud.volumes(server)
    assert len(found) == volumes
    journey.await_caches(dict.fromkeys(found, node))


def same_disk(cloud: Servers, server: str, before: Checked, boot_number: int) -> Checked:
    """Check that the server has rebooted from the same disk, and no acknowledged write is lost."""
    wait_for(
        f"{server} to boot for the {boot_number}. time",
        lambda: (
            boots(cloud.console(server)) == boot_number and found(cloud.console(server)) is not None
        ),
        timeout=BOOT,
    )
    console = cloud.console(server)
    last = found(console)
    assert last is not None
    assert last >= before.seq, console[-2000:]
    return heard(cloud, server, last)


def after_failure(cloud: Servers, server: str) -> None:
    """Wait for the end of a failed migration, and reset the server.

    After the rollback, Nova sets the running server to ERROR, for an operator to look at it; not
    always, and a while after its task has ended.
    """
    ends = {f"live-migration {end}" for end in ("cancelled", "error", "failed")}
    wait_for("the end of the migration", lambda: cloud.migrations(server)[0] in ends, timeout=120)
    wait_for("the end of Nova's task", lambda: not cloud.show(server).task_state, timeout=60)
    with contextlib.suppress(ConditionError):
        wait_for("ERROR", lambda: cloud.show(server).status == "ERROR", timeout=15)
    if cloud.show(server).status == "ERROR":
        cloud.action(server, "os-resetState", {"state": "active"})
    cloud.await_status(server)


# -- ways to get a volume --------------------------------------------------------------------


def test_four_kinds_of_root(cloud: Servers, journey: Journey, image: str) -> None:
    """The client's --boot-from-volume, and mappings from volume, image and snapshot."""
    flavor = cloud.flavor("lab-128", 128)
    made = cloud.cluster.openstack_json(
        "server", "create", "root-client", "--image", image, "--boot-from-volume", "1",
        "--flavor", flavor, "--nic", "none",
    )  # fmt: skip
    volume = journey.create_volume("root", 1, "--image", image)
    other = journey.create_volume("other", 1, "--image", image)
    snapshot = journey.create_snapshot(other, "snapshot")
    servers = [str(made["id"])]
    for name, mapping in (
        ("root-volume", from_volume(volume)),
        ("root-image", from_image(image)),
        ("root-snapshot", from_snapshot(snapshot)),
    ):
        servers += cloud.create(name, mapping, wait=False)
    for server in servers:
        cloud.await_status(server)
        await_boot(cloud, server)
        heard(cloud, server, 0)
        await_cached(cloud, journey, server)
    assert cloud.volumes(servers[1]) == [volume]


@pytest.mark.long
def test_a_second_volume_comes_and_goes(cloud: Servers, journey: Journey, image: str) -> None:
    server = boot(cloud, "two", from_image(image))
    volume = journey.create_volume("second", 1, "--image", image)
    cloud.attach(server, volume)
    cloud.await_console(server, "tiny: vdb appeared", BOOT)
    heard(cloud, server, 0, disk="vdb")
    await_cached(cloud, journey, server, 2)
    cloud.detach(server, volume)
    journey.await_volume(volume, "available", 120)
    cloud.await_console(server, "tiny: vdb gone", BOOT)
    node = cloud.cluster.node(cloud.host(server))
    assert journey.stack(node, volume) == {}
    heard(cloud, server, heard(cloud, server).seq)


@pytest.mark.long
def test_a_volume_moves_to_another_backend_under_its_guest(
    cloud: Servers, journey: Journey, image: str, tiny_image: Path
) -> None:
    """A retype in use to Cinder's LVM driver and back: Nova copies the disk, then swaps it."""
    (storage,) = cloud.cluster.of_kind("storage")
    storage.catalog["cinder-volume-plain"] = control.plain_volume(storage.spec)
    storage.service_start("cinder-volume-plain")
    server = boot(cloud, "swap", from_image(image))
    try:
        with LifeCycle(journey) as life:
            volume = life.create(Contents(tiny_image), imageRef=image)
            cloud.attach(server, volume.id)
            cloud.await_console(server, "tiny: vdb appeared", BOOT)
            await_cached(cloud, journey, server, 2)
            last = heard(cloud, server, 0, disk="vdb")
            for backend in (config.PLAIN, config.BACKEND):
                kind = life.type(f"swap-{backend}", {"volume_backend_name": backend})
                body = {"new_type": kind, "migration_policy": "on-demand"}
                life.move(volume, "os-retype", body, f"{storage.name}@{backend}", "in-use")
                last = heard(cloud, server, last.seq, disk="vdb")
                last = heard(cloud, server, last.seq, disk="vdb")
                assert stacks(cloud, journey, server) == ["cached", "plain"]
            cloud.detach(server, volume.id)
            journey.await_volume(volume.id, "available", 120)
    finally:
        storage.service_stop("cinder-volume-plain")


# -- a server's life -------------------------------------------------------------------------


@pytest.mark.long
def test_reboot_stop_start_shelve(cloud: Servers, journey: Journey, image: str) -> None:
    server = boot(cloud, "life", from_image(image))
    number, last = 1, heard(cloud, server)

    def again(act: Callable[[], object]) -> None:
        nonlocal number, last
        act()
        number += 1
        last = same_disk(cloud, server, last, number)
        await_cached(cloud, journey, server)

    def stop_and_start() -> None:
        cloud.action(server, "os-stop")
        cloud.await_status(server, "SHUTOFF")
        cloud.action(server, "os-start")
        cloud.await_status(server)

    def shelve_and_unshelve() -> None:
        cloud.action(server, "shelve")
        cloud.await_status(server, "SHELVED_OFFLOADED")
        for node in cloud.cluster.of_kind("compute"):
            assert journey.leftovers(node) == []
        cloud.action(server, "unshelve")
        cloud.await_status(server)

    again(lambda: cloud.action(server, "reboot", {"type": "SOFT"}))
    again(lambda: cloud.action(server, "reboot", {"type": "HARD"}))
    again(stop_and_start)
    again(shelve_and_unshelve)


@pytest.mark.long
def test_rebuild(cloud: Servers, journey: Journey, image: str) -> None:
    """The volume gets the image's bytes again, and its old cache is not used.

    Data past the image's end is kept: Cinder overwrites only as much as the image.
    """
    server = boot(cloud, "rebuilt", from_image(image))
    heard(cloud, server)
    cloud.action(server, "rebuild", {"imageRef": image})
    time.sleep(2)
    cloud.await_status(server)
    await_boot(cloud, server)
    cloud.await_console(server, r"tiny: vda seq=", BOOT)
    differing = re.findall(r"tiny: vda WRONG slot=(\d+) want=\d+ got=(\w+)", cloud.console(server))
    in_image = {str(slot) for slot in range(32)}
    assert {slot for slot, _ in differing} == in_image, cloud.console(server)
    assert {got for _, got in differing} == {"empty"}  # as in the image
    await_cached(cloud, journey, server)


@pytest.mark.long
def test_resize(cloud: Servers, journey: Journey, image: str) -> None:
    """To another host, and confirmed; then once more, and reverted."""
    server = boot(cloud, "resized", from_image(image))
    first, last = cloud.host(server), heard(cloud, server)
    cloud.action(server, "resize", {"flavorRef": cloud.flavor("lab-160", 160)})
    cloud.await_status(server, "VERIFY_RESIZE")
    assert cloud.host(server) != first
    last = same_disk(cloud, server, last, 2)
    cloud.action(server, "confirmResize")
    cloud.await_status(server)
    assert journey.leftovers(cloud.cluster.node(first)) == []
    second = cloud.host(server)
    cloud.action(server, "resize", {"flavorRef": cloud.flavor("lab-128", 128)})
    cloud.await_status(server, "VERIFY_RESIZE")
    last = same_disk(cloud, server, last, 3)
    cloud.action(server, "revertResize")
    cloud.await_status(server)
    assert cloud.host(server) == second
    same_disk(cloud, server, last, 4)
    await_cached(cloud, journey, server)


# -- moving ----------------------------------------------------------------------------------


def test_live_migration_there_and_back(cloud: Servers, journey: Journey, image: str) -> None:
    """Of a guest that writes: no errors, and it is cached again at its destination."""
    server = boot(cloud, "moving", from_image(image))
    for _ in range(2):
        origin, last = cloud.host(server), heard(cloud, server)
        cloud.live_migrate(server, _other(cloud, server))
        last = heard(cloud, server, last.seq)
        assert journey.leftovers(cloud.cluster.node(origin)) == []
        await_cached(cloud, journey, server)
        heard(cloud, server, last.seq)
    # All writes from both hosts, with and without a cache, are there.
    cloud.action(server, "reboot", {"type": "HARD"})
    same_disk(cloud, server, last, 2)


@pytest.mark.long
def test_a_migration_that_is_given_up(cloud: Servers, journey: Journey, image: str) -> None:
    """While memory is copied; the server keeps running on its host, and the other host is clean."""
    server = boot(cloud, "staying", from_image(image))
    origin, target = cloud.host(server), _other(cloud, server)
    last = heard(cloud, server)
    with _slow(cloud, origin):
        cloud.action(server, "os-migrateLive", {"host": target, "block_migration": "auto"})
        migration = _running_migration(cloud, server)
        # By now the volume is attached to the other host, too.
        assert journey.leftovers(cloud.cluster.node(target)) != []
        (volume,) = cloud.volumes(server)
        assert journey.stack(cloud.cluster.node(target), volume)["mode"] == "direct"
        cloud.abort_migration(server, migration)
        after_failure(cloud, server)
    assert cloud.host(server) == origin
    last = heard(cloud, server, last.seq)
    await_clean(journey, cloud.cluster.node(target))
    cloud.live_migrate(server, target)
    heard(cloud, server, last.seq)


@pytest.mark.long
def test_a_migration_whose_destination_fails(cloud: Servers, journey: Journey, image: str) -> None:
    """libvirt there fails after the volume was connected: the rollback leaves nothing behind."""
    server = boot(cloud, "refused", from_image(image))
    origin, target = cloud.host(server), cloud.cluster.node(_other(cloud, server))
    last = heard(cloud, server)
    # Occupy all ports on which QEMU could receive a guest.
    blocked = target.run(
        "setsid python -c 'import socket, time\n"
        'held = [socket.create_server(("", p)) for p in range(49152, 49216)]\n'
        "time.sleep(600)' > /dev/null 2>&1 < /dev/null & echo $!"
    ).stdout.strip()
    try:
        cloud.action(server, "os-migrateLive", {"host": target.name, "block_migration": "auto"})
        after_failure(cloud, server)
    finally:
        target.run(f"kill {blocked}")
    assert cloud.host(server) == origin
    heard(cloud, server, last.seq)
    await_clean(journey, target)
    await_cached(cloud, journey, server)


@pytest.mark.long
def test_evacuation_after_a_node_is_lost(cloud: Servers, journey: Journey, image: str) -> None:
    server = boot(cloud, "evacuee", from_image(image))
    lost = cloud.cluster.node(cloud.host(server))
    last = heard(cloud, server)
    lost.kill()
    try:
        cloud.force_down(lost.name, True)
        cloud.action(server, "evacuate", {})
        # Since 2.95 Nova does not start an evacuated server: its owner does.
        wait_for("another host", lambda: cloud.host(server) != lost.name, timeout=120)
        cloud.await_status(server, "SHUTOFF")
        cloud.action(server, "os-start")
        cloud.await_status(server)
        same_disk(cloud, server, last, 2)
    finally:
        _start(lost)
        cloud.force_down(lost.name, False)
    await_clean(journey, lost)


# -- what else happens to hosts ----------------------------------------------------------------


@pytest.mark.long
def test_nova_compute_is_restarted_under_guests(
    cloud: Servers, journey: Journey, image: str
) -> None:
    server = boot(cloud, "undisturbed", from_image(image))
    node, last = cloud.cluster.node(cloud.host(server)), heard(cloud, server)
    node.service_stop("nova-compute", timeout=60)
    node.service_stop("thunder-agent")
    node.service_start("thunder-agent")
    node.service_start("nova-compute")
    last = heard(cloud, server, last.seq)
    assert boots(cloud.console(server)) == 1
    await_cached(cloud, journey, server)
    cloud.action(server, "reboot", {"type": "HARD"})
    same_disk(cloud, server, last, 2)


@pytest.mark.long
def test_a_node_reboots_and_resumes_its_guests(
    cloud: Servers, journey: Journey, image: str
) -> None:
    server = boot(cloud, "resumed", from_image(image))
    node, last = cloud.cluster.node(cloud.host(server)), heard(cloud, server)
    node.kill()
    _start(node)
    cloud.await_status(server)
    same_disk(cloud, server, last, 2)
    await_cached(cloud, journey, server)


@pytest.mark.long
def test_a_compute_host_without_our_connector(cloud: Servers, journey: Journey, image: str) -> None:
    """Volumes are plain iSCSI there, and servers migrate between it and the others."""
    plain = compute(cloud, 2)
    ours = plain.catalog["nova-compute"]
    plain.service_stop("nova-compute", timeout=60)
    plain.catalog.update({s.name: s for s in nova.compute_services(plain.spec, thunder=False)})
    plain.service_start("nova-compute")
    try:
        server = boot(cloud, "plain", from_image(image), host=plain.name)
        last = heard(cloud, server)
        assert stacks(cloud, journey, server) == ["plain"]
        cloud.live_migrate(server, compute(cloud, 0).name)
        last = heard(cloud, server, last.seq)
        await_cached(cloud, journey, server)
        cloud.live_migrate(server, plain.name)
        last = heard(cloud, server, last.seq)
        assert stacks(cloud, journey, server) == ["plain"]
        cloud.action(server, "reboot", {"type": "HARD"})
        same_disk(cloud, server, last, 2)
        cloud.delete([server])
    finally:
        plain.service_stop("nova-compute", timeout=60)
        plain.catalog["nova-compute"] = ours
        plain.service_start("nova-compute")


# -- failures of the cloud itself ---------------------------------------------------------------


def test_servers_that_cannot_be(cloud: Servers, journey: Journey, image: str) -> None:
    """No host is large enough; the volume quota is exhausted. Neither leaves anything behind."""
    (server,) = cloud.create(
        "huge", from_image(image), flavor=cloud.flavor("too-large", 40000), wait=False
    )
    cloud.await_status(server, "ERROR")
    assert "No valid host" in cloud.fault(server)
    cloud.delete([server])
    project = cloud.cluster.ask(lambda c: c.current_project_id)
    with _volumes_allowed(cloud, project, 1):
        servers = cloud.create("many", from_image(image), count=2, wait=False)
        ended = []
        for server in servers:
            with contextlib.suppress(LabError):
                cloud.await_status(server)
            ended.append(cloud.show(server).status)
        assert sorted(ended) == ["ACTIVE", "ERROR"]
        cloud.delete(servers)
    journey.await_no_volumes(60)


# -- parts --------------------------------------------------------------------------------------


def _other(cloud: Servers, server: str) -> str:
    """Another compute node than the server's."""
    here = cloud.host(server)
    return next(n.name for n in cloud.cluster.of_kind("compute") if n.name != here)


@contextlib.contextmanager
def _slow(cloud: Servers, name: str) -> Iterator[None]:
    """A link so slow that copying a guest's memory takes half a minute."""
    before = cloud.cluster.node(name).spec.link
    cloud.cluster.set_link(name, Link("20mbit", before.delay))
    try:
        yield
    finally:
        cloud.cluster.set_link(name, before)


def _running_migration(cloud: Servers, server: str) -> int:
    """The id of the migration that is copying memory."""
    numbers: list[int] = []

    def ask() -> bool:
        numbers[:] = cloud.running_migrations(server)
        return bool(numbers)

    wait_for(f"a migration of {server} to run", ask, timeout=120)
    return numbers[0]


def _start(node: Node) -> None:
    """Boot a node again, and start its daemons."""
    node.start()
    for name in node.catalog:
        node.service_start(name)


@contextlib.contextmanager
def _volumes_allowed(cloud: Servers, project: str, count: int) -> Iterator[None]:
    cloud.cluster.openstack("quota", "set", "--volumes", str(count), project)
    try:
        yield
    finally:
        cloud.cluster.openstack("quota", "set", "--volumes", "100", project)
