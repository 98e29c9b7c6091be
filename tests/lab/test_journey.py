"""A small version of the main journey, and its guarantees when parts of it fail."""

from __future__ import annotations

import os
import shutil
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

from lab.cloud import config
from lab.inside import blocks
from lab.nodes.node import Node
from lab.pace import stretch
from lab.play.journey import Attached, Journey
from lab.shell import wait_for
from tests.lab import images
from tests.lab.images import MIB, SIZE

GIB = 1 << 30
#: A page in the image, one at its very end, and one beyond it, on the LUN only.
OFFSETS = (0, 17 * MIB, 39 * MIB, 700 * MIB)


@dataclass(frozen=True)
class Image:
    id: str
    raw: Path
    digest: str


@pytest.fixture(scope="module")
def image(journey: Journey, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Image]:
    """Data, holes and a partial last block, uploaded as qcow2."""
    raw, qcow2 = images.with_holes(tmp_path_factory.mktemp("image"), seed=1)
    found = journey.upload(qcow2, "journey")
    yield Image(found, raw, blocks.expected_digest(raw, ()))
    journey.cluster.openstack("image", "delete", found)


@pytest.fixture
def volume(journey: Journey, image: Image) -> Iterator[str]:
    made = journey.create_volume("one", 1, "--image", image.id)
    yield made
    journey.delete_volumes([made])


def compute(journey: Journey, index: int) -> Node:
    return journey.cluster.of_kind("compute")[index]


def test_six_volumes_on_three_hosts_at_once(journey: Journey, image: Image) -> None:
    """Correct contents, one base per host, one host reading from another, a storage host last."""
    source = ("--image", image.id)
    with ThreadPoolExecutor(6) as threads:  # still only one download
        names = [f"six-{i}" for i in range(6)]
        volumes = list(threads.map(lambda n: journey.create_volume(n, 1, *source), names))
    hosts = [node for node in journey.cluster.of_kind("compute") for _ in range(2)]
    with ThreadPoolExecutor(6) as threads:
        attached = list(threads.map(journey.attach, hosts, volumes))
        # When two volumes on a host wait for one base, the second may be cached a little later.
        cached = journey.await_caches(dict(zip(volumes, hosts, strict=True)), print)
        digests = list(threads.map(lambda n, a: journey.digest(n, a.path, SIZE), hosts, attached))
        assert digests == [image.digest] * 6
        statuses = list(threads.map(journey.agent, hosts[::2]))
        list(threads.map(lambda n, a: journey.write(n, a.path, n.name, OFFSETS), hosts, attached))
        list(threads.map(journey.detach, hosts, volumes))
    allocated = journey.allocated(image.id)
    sources = {stack["source"] for stack in cached.values()}
    assert sources & {node.name for node in hosts}, f"no host reads from another one: {sources}"
    for status in statuses:
        (base,) = [base for base in status["bases"] if base["image_id"] == image.id]
        # Two volumes have read all of the image, which crossed the network once.
        assert base["from_network"] <= allocated * 1.2
    assert [journey.leftovers(node) for node in hosts[::2]] == [[], [], []]
    moved = journey.attach(hosts[-1], volumes[0])
    assert journey.differing(hosts[-1], moved.path, hosts[0].name, OFFSETS) == ""
    patches = [(hosts[0].name, offset) for offset in OFFSETS if offset < SIZE]
    expected = blocks.expected_digest(image.raw, patches)
    assert journey.digest(hosts[-1], moved.path, SIZE) == expected
    journey.detach(hosts[-1], volumes[0])
    journey.delete_volumes(volumes)


def test_the_cache_answers_and_the_lun_is_current(
    journey: Journey, image: Image, volume: str
) -> None:
    """Unmodified blocks are read locally; every write reaches the LUN."""
    node = compute(journey, 0)
    attached = journey.attach_cached(node, volume)
    lun = journey.stack(node, volume)["device"].removeprefix("/dev/")

    def read_from_lun() -> int:
        return int(node.run(f"cat /sys/block/{lun}/stat").stdout.split()[2]) * 512

    before = read_from_lun()
    whole = SIZE // MIB * MIB
    expected = blocks.expected_digest(image.raw, (), whole)
    assert journey.digest(node, attached.path, whole) == expected
    assert read_from_lun() - before < MIB
    journey.write(node, attached.path, "w", OFFSETS)
    assert journey.differing(node, f"/dev/{lun}", "w", OFFSETS) == ""
    assert journey.differing(node, attached.path, "w", OFFSETS) == ""
    # Buffered reads, too: readahead over holes must not cost the volume its cache.
    node.run(f"dd if={attached.path} of=/dev/null bs=1M count=40")
    status = node.run(f"dmsetup status {Path(attached.path).name}").stdout
    assert " F " not in status, status
    journey.detach(node, volume)


def test_an_agent_that_does_not_do_its_work_costs_no_attach(
    journey: Journey, image: Image, volume: str
) -> None:
    """Plain iSCSI within the deadline plus 2 s, with a warning; detach works; correct contents.

    The agent hangs (SIGSTOP), then it is stopped, then another program answers on its socket.
    """
    node, deadline = compute(journey, 1), stretch(5)
    plain = journey.attach(node, volume, plain=True)
    journey.detach(node, volume, plain=True)
    hasty = config.agent(node.spec, attach_deadline=deadline)
    node.write("/etc/thunder/thunder.conf", hasty)
    patches: list[tuple[str, int]] = []
    try:
        for trouble, message in _TROUBLES.items():
            _make_trouble(node, trouble)
            attached = journey.attach(node, volume)
            if trouble == "hung":
                node.service_signal("thunder-agent", signal.SIGCONT)
            assert attached.path.startswith("/dev/sd"), trouble
            print(f"{trouble}: {attached.connect_s:.1f} s, plain {plain.connect_s:.1f} s")
            assert attached.connect_s - plain.connect_s <= deadline + stretch(2), trouble
            (warning,) = [w for w in attached.warnings if "as plain iSCSI" in w]
            assert message in warning
            expected = blocks.expected_digest(image.raw, patches)
            assert journey.digest(node, attached.path, SIZE) == expected, trouble
            journey.write(node, attached.path, trouble, OFFSETS)
            patches = [(trouble, offset) for offset in OFFSETS]
            journey.detach(node, volume)
            assert journey.leftovers(node) == []
    finally:
        node.run("pkill -f [g]arbage.py; rm -f /run/thunder/agent.sock", check=False)
        node.service_start("thunder-agent")  # with the lab's own settings
    again = journey.attach_cached(node, volume)  # what was written without the agent is there
    assert journey.differing(node, again.path, trouble, OFFSETS) == ""
    journey.detach(node, volume)


_TROUBLES = {
    "hung": "thunder-agent did not answer in",
    "stopped": "thunder-agent is not running",
    "garbage": "invalid reply from thunder-agent",
}
_GARBAGE = """\
import os, socket
os.path.exists('/run/thunder/agent.sock') and os.unlink('/run/thunder/agent.sock')
server = socket.socket(socket.AF_UNIX)
server.bind('/run/thunder/agent.sock')
server.listen()
while True:
    client, _ = server.accept()
    client.recv(65536)
    client.sendall(b'\\x00garbage' * 100)
    client.close()
"""


def _make_trouble(node: Node, trouble: str) -> None:
    if trouble == "hung":
        node.service_signal("thunder-agent", signal.SIGSTOP)
    elif trouble == "stopped":
        node.service_stop("thunder-agent")
    else:
        node.write("/run/garbage.py", _GARBAGE)
        node.run("setsid python /run/garbage.py > /dev/null 2>&1 < /dev/null &")
        node.run("until ss -Hxl | grep -q agent.sock; do sleep 0.1; done", timeout=30)


#: A guest reads the image and a part beyond it, and writes to the second half.
_WRITTEN, _CHURNED = 20 * MIB, 48 * MIB
#: Seconds for which the tracker is silent; limit for the cache after that.
_SILENT, _CACHED = 40.0, 60.0


@pytest.mark.long
def test_a_tracker_that_says_nothing_costs_the_cache_for_a_while(
    journey: Journey, image: Image, volume: str, tmp_path: Path
) -> None:
    """Attached in time over its LUN, then cached under a writing guest once the tracker answers.

    cinder-volume of the volume's host is stopped (SIGSTOP) after it has exported the volume.
    """
    node, storage = compute(journey, 0), journey.storage_of(volume)
    limit = config.agent_limits()["attach_deadline"]
    plain = journey.attach(node, volume, plain=True)
    journey.detach(node, volume, plain=True)
    journey.attach(node, volume)
    stored = journey.stored(node, volume)
    journey.host_only(node, "disconnect", volume)
    raw = tmp_path / "raw"
    shutil.copyfile(image.raw, raw)
    os.truncate(raw, _CHURNED)
    began = time.monotonic()
    storage.service_signal("cinder-volume", signal.SIGSTOP)
    try:
        attached = journey.reconnect(node, volume, stored)
        stack = journey.stack(node, volume)
        assert attached.path.startswith("/dev/mapper/thunder-vol-"), attached
        assert (stack["mode"], stack["wanted"]) == ("direct", True)
        assert "its plan and base were not there within" in stack["reason"]
        assert attached.connect_s - plain.connect_s <= limit, (attached, plain)
        with journey.churning(
            node, attached.path, "late", _WRITTEN, _CHURNED, stretch(_SILENT + 2 * _CACHED)
        ) as guest:
            time.sleep(max(0.0, began + stretch(_SILENT) - time.monotonic()))
            assert journey.stack(node, volume)["mode"] == "direct"
            storage.service_signal("cinder-volume", signal.SIGCONT)
            answered = time.monotonic()
            journey.await_cached(node, volume, _CACHED)
            seconds = time.monotonic() - answered
            time.sleep(1)
            assert not guest.done(), "the guest ended too early"
    finally:
        storage.service_signal("cinder-volume", signal.SIGCONT)
    report = guest.result()
    print(
        f"connected in {attached.connect_s:.1f} s (plain iSCSI: {plain.connect_s:.1f} s, the agent "
        f"may take {limit:.1f} s), direct; cached {seconds:.1f} s after the "
        f"tracker was back; the guest: {report}"
    )
    assert (report["failed"], report["wrong"]) == (0, 0)
    written = blocks.churned("late", int(report["calls"]), _WRITTEN, _CHURNED)
    assert len(written) > 50
    expected = blocks.expected_digest(raw, [("late", at) for at in written])
    assert journey.digest(node, attached.path, _CHURNED) == expected
    stack = journey.stack(node, volume)
    assert journey.digest(node, stack["device"], _CHURNED) == expected
    assert (stack["mode"], stack["failed"], stack["wanted"]) == ("cached", 0, False)
    assert stack["cache"]["mapped"] >= _WRITTEN
    journey.detach(node, volume)
    assert journey.leftovers(node) == []


def test_stored_connection_data_never_brings_old_blocks_back(
    journey: Journey, image: Image, volume: str
) -> None:
    """Nova reconnects with stored data, in which a map would be stale: no write may be lost."""
    first, second = compute(journey, 0), compute(journey, 2)
    attached = journey.attach_cached(first, volume)
    journey.write(first, attached.path, "before", OFFSETS[:2])
    stored = journey.stored(first, volume)
    journey.write(first, attached.path, "after", OFFSETS[2:])
    first.kill()
    try:
        journey.host_only(second, "admit", volume)
        moved = journey.reconnect(second, volume, stored)
        assert journey.differing(second, moved.path, "before", OFFSETS[:2]) == ""
        assert journey.differing(second, moved.path, "after", OFFSETS[2:]) == ""
        journey.write(second, moved.path, "elsewhere", OFFSETS[1:3])
        journey.detach(second, volume)
    finally:
        first.start()
        first.service_start("thunder-agent")
    # Back on the first host: its earlier cache must not be used.
    back = journey.reconnect(first, volume, stored)
    patches = [("before", OFFSETS[0]), ("elsewhere", OFFSETS[1]), ("elsewhere", OFFSETS[2])]
    assert journey.digest(first, back.path, SIZE) == blocks.expected_digest(image.raw, patches)
    journey.detach(first, volume)
    assert journey.leftovers(first) == []


def test_an_agent_that_is_killed_finds_everything_again(journey: Journey, volume: str) -> None:
    node = compute(journey, 1)
    attached = journey.attach_cached(node, volume)
    before = journey.agent(node)
    node.service_signal("thunder-agent", signal.SIGKILL)
    journey.write(node, attached.path, "alone", OFFSETS)  # guests work without the agent
    node.service_start("thunder-agent")
    after = journey.agent(node)
    for stack in (*before["stacks"], *after["stacks"]):
        del stack["cache"]  # its counters continue
    assert after["stacks"] == before["stacks"]
    assert [base["image_id"] for base in after["bases"]] == [
        base["image_id"] for base in before["bases"]
    ]
    assert journey.differing(node, attached.path, "alone", OFFSETS) == ""
    journey.detach(node, volume)
    assert journey.leftovers(node) == []


@pytest.mark.long
def test_a_second_attachment_is_direct(journey: Journey, volume: str) -> None:
    """As in a live migration: while two hosts have a volume attached, the second has no cache."""
    first, second = compute(journey, 0), compute(journey, 1)
    one: Attached = journey.attach_cached(first, volume)
    two: Attached = journey.attach(second, volume)
    wait_for(  # at once, unless the plan was late
        "the tracker's reason",
        lambda: "attached to cmp1 too" in journey.stack(second, volume)["reason"],
        timeout=60,
    )
    assert journey.stack(second, volume)["mode"] == "direct"
    journey.write(first, one.path, "source", OFFSETS)
    assert journey.differing(second, two.path, "source", OFFSETS) == ""
    journey.detach(first, volume)
    journey.write(second, two.path, "target", OFFSETS)
    journey.detach(second, volume)
    third = journey.attach_cached(first, volume)
    assert journey.differing(first, third.path, "target", OFFSETS) == ""
    journey.detach(first, volume)


#: Seconds until a volume with a single attachment has its cache: about 10 in a lab that has two
#: processors to itself, of which up to 5 pass until the next heartbeat.
_SOON = 30.0


def test_a_second_attachment_is_cached_when_it_is_alone(
    journey: Journey, image: Image, volume: str, tmp_path: Path
) -> None:
    """There and back, like a live-migrated guest that writes all the time."""
    raw = tmp_path / "raw"
    shutil.copyfile(image.raw, raw)
    os.truncate(raw, _CHURNED)
    patches: dict[int, str] = {}
    source, target = compute(journey, 0), compute(journey, 1)
    journey.attach_cached(source, volume)
    for seed in ("there", "back"):
        path = journey.attach(target, volume).path
        assert journey.stack(target, volume)["mode"] == "direct"
        with journey.churning(target, path, seed, _WRITTEN, _CHURNED) as guest:
            journey.detach(source, volume)
            began = time.monotonic()
            while (stack := journey.stack(target, volume))["mode"] != "cached":
                assert time.monotonic() - began < stretch(_SOON), stack
                time.sleep(0.5)
            seconds = time.monotonic() - began
            time.sleep(1)
            assert not guest.done(), "the guest ended too early"
        report = guest.result()
        print(f"{seed}: cached {seconds:.1f} s after the detach; the guest: {report}")
        assert (report["failed"], report["wrong"]) == (0, 0)
        written = blocks.churned(seed, int(report["calls"]), _WRITTEN, _CHURNED)
        assert len(written) > 50
        patches |= dict.fromkeys(written, seed)
        expected = blocks.expected_digest(raw, [(seed, at) for at, seed in patches.items()])
        assert journey.digest(target, path, _CHURNED) == expected
        assert journey.digest(target, stack["device"], _CHURNED) == expected
        status = journey.stack(target, volume)
        assert (status["mode"], status["failed"]) == ("cached", 0)
        assert status["cache"]["mapped"] >= _WRITTEN
        assert status["cache"]["read_hits"] > 0
        assert journey.leftovers(source) == []
        source, target = target, source
    journey.detach(source, volume)
    assert journey.leftovers(source) == []


def test_a_volume_grows_under_its_guest(journey: Journey, image: Image, volume: str) -> None:
    node = compute(journey, 0)
    attached = journey.attach(node, volume)
    assert os.fspath(attached.path).startswith("/dev/mapper/thunder-vol-")
    journey.cluster.openstack("volume", "set", "--size", "2", volume)
    journey.await_volume(volume, "in-use")
    assert journey.extend(node, volume) == 2 * GIB
    assert int(node.run(["blockdev", "--getsize64", attached.path]).stdout) == 2 * GIB
    journey.write(node, attached.path, "grown", [GIB + 5 * MIB])
    assert journey.differing(node, attached.path, "grown", [GIB + 5 * MIB]) == ""
    assert journey.digest(node, attached.path, SIZE) == image.digest
    journey.detach(node, volume)
