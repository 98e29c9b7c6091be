"""Recordings of boots, on fakes and with a clock of their own."""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from os_brick_thunder.agent import ports
from os_brick_thunder.agent.policy import recording
from os_brick_thunder.agent.policy.recording import Reads
from os_brick_thunder.agent.stack import recorder as module
from os_brick_thunder.agent.stack.recorder import LIMIT, LONGEST_SLOT, MISSED, QUIET, SLOT, Recorder
from os_brick_thunder.common import wire
from os_brick_thunder.common.mechanism import readmap
from os_brick_thunder.common.mechanism.readmap import ReadMap
from os_brick_thunder.common.policy import devnames, dmstats, dmtable
from os_brick_thunder.common.policy.devnames import VolumeNames
from os_brick_thunder.common.policy.dmstats import Area, Touched
from os_brick_thunder.common.policy.dmtable import Table
from os_brick_thunder.common.policy.extents import Extents
from os_brick_thunder.common.policy.profile import Profile, chunk_size
from os_brick_thunder.common.state import CREATING, READY, Base, Stack, StateFile
from tests import fakes
from tests.unit.os_brick_thunder.test_agent import IMAGE, LUN, PLAN, TOPOLOGY, VOLUME
from tests.unit.os_brick_thunder.test_agent import Host as AgentHost

MIB = 1 << 20
CHUNK = 64 << 10
SIZE = 16 * MIB + 4096
WHOLE = Extents.of([(0, SIZE)])
NAME = VolumeNames(VOLUME).vol
TABLE = Table.of((128 * MIB // 512, dmtable.Linear(LUN)))
STACK = Stack(VOLUME, "stor1@thunder", LUN, "cached", phase=READY, stack_id="s1")
ASKED = wire.Plan(
    VOLUME, "cached", "", image=wire.ImageInfo(IMAGE, SIZE, ((0, SIZE),), "c1"), record="r1"
)


class World:
    """A host whose volume reads as ``script`` says: at each time (seconds), what happens then."""

    def __init__(self, folder: Path) -> None:
        self.now = 0.0
        self.script: list[tuple[float, Callable[[], object]]] = []
        self.kit = fakes.fake_kit()
        self.dm: fakes.FakeDeviceMapper = self.kit.dm  # type: ignore[assignment]
        self.tracker = fakes.FakeTracker()
        self.store = StateFile(folder / "state.json")
        self.store.put(STACK)
        self.dm.create(NAME, TABLE)
        host = ports.Host(self.kit, self.store, self.tracker, TOPOLOGY)
        self.stopped = False
        self.recorder = Recorder(host, lambda: self.now, self.wait)

    def wait(self, seconds: float) -> bool:
        self.recorder._reports.join(30)
        self.now += seconds
        while self.script and self.script[0][0] <= self.now:
            self.script.pop(0)[1]()
        return self.stopped

    def at(self, when: float, call: Callable[[], object]) -> None:
        self.script.append((when, call))
        self.script.sort(key=lambda each: each[0])

    def read(self, when: float, *chunks: int) -> None:
        for chunk in chunks:
            self.at(when, partial(self.dm.read, NAME, chunk * CHUNK + 512, 4096))

    def write(self, when: float, chunk: int) -> None:
        self.at(when, partial(self.dm.write, NAME, chunk * CHUNK, 4096))

    def record(self, plan: wire.Plan = ASKED, stack: Stack = STACK) -> None:
        """Until it has ended."""
        self.recorder.planned(stack, plan)
        self.recorder._jobs.join(30)
        assert not self.recorder._jobs.is_busy(stack.volume_id)

    def parts(self) -> list[list[int]]:
        """The chunks of each report."""
        found = [Profile.decode(each.part, SIZE) for each in self.tracker.recordings]
        assert all(each.chunk == CHUNK for each in found)
        return [list(each.chunks()) for each in found]


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    monkeypatch.setattr(recording, "PROBED", 4)  # a boot of these tests reads little
    return World(tmp_path)


def test_a_boot_is_reported_in_parts_and_as_a_whole(world: World) -> None:
    world.read(1.0, 9, 3)
    world.read(1.4, 256, 2, 9, 7)  # the last chunk of the image, and beyond it
    world.read(1.4, 300)
    world.read(3.0, 5)
    world.read(6.0, 4)
    world.read(20.0, 1)
    world.record()
    # The boot has begun with its fifth area, at 1.4 s.
    first = [3, 9, 2, 7, 256]
    assert world.parts() == [first, [*first, 5], [*first, 5, 4], [*first, 5, 4, 1]]
    assert [each.last for each in world.tracker.recordings] == [False, False, False, True]
    last = world.tracker.recordings[-1]
    assert last == wire.Recording(IMAGE, "c1", "r1", "cmp1", last.part, last=True)
    assert world.now == pytest.approx(20.0 + QUIET, abs=2 * SLOT)
    assert world.dm.regions[NAME] == {}


def test_what_is_in_flight_while_somebody_looks_is_not_missed(world: World) -> None:
    """The device counts a request when it begins, the region when it ends."""
    blocks: fakes.FakeBlocks = world.kit.blocks  # type: ignore[assignment]
    path, before = devnames.path(NAME), 1 << 10

    def begin() -> None:
        world.dm.requests[NAME] = before
        blocks.reading[path] = 1

    def end() -> None:
        world.dm.read(NAME, 50 * CHUNK, 4096)
        world.dm.requests[NAME] = before
        blocks.reading[path] = 0

    world.at(1.0, begin)
    world.at(3.05, end)
    world.read(5.0, *range(6))
    world.record()
    assert world.parts()[-1] == [50, 0, 1, 2, 3, 4, 5]


def test_what_was_written_first_is_not_the_images(world: World) -> None:
    world.write(1.0, 8)
    world.read(2.0, 8, 1, 2, 3, 4, 5)
    world.write(3.0, 2)
    world.write(4.0, 6)
    world.read(4.0, 6)  # read and written between two looks
    world.record()
    assert world.parts()[-1] == [1, 2, 3, 4, 5, 6]


def test_it_ends_after_its_time_although_the_guest_reads_on(world: World) -> None:
    for second in range(200):
        world.read(float(second + 1), second)
    world.record()
    assert world.now == pytest.approx(LIMIT, abs=2 * SLOT)
    assert len(world.parts()[-1]) in (119, 120)
    assert world.dm.regions[NAME] == {}


def test_a_disk_that_nobody_boots_from_is_no_boot(world: World) -> None:
    """Whoever opens it looks for a partition table."""
    world.read(1.0, 0, 1, 255, 256)
    world.record()
    assert world.parts() == [[]]
    assert world.tracker.recordings[0].last
    assert world.now == pytest.approx(LIMIT, abs=2 * SLOT)


def test_after_a_detach_what_is_known_is_reported(world: World) -> None:
    world.read(1.0, *range(6))
    world.at(1.5, lambda: world.dm.remove(NAME))
    world.record()
    assert world.parts() == [[0, 1, 2, 3, 4, 5]]
    assert world.tracker.recordings[0].last
    assert world.now < 2.0


def test_a_volume_that_is_attached_anew_is_not_recorded_on(world: World) -> None:
    """Its device has the same name, and there may be another region of the same number."""

    def attach_anew() -> None:
        world.dm.remove(NAME)
        world.dm.create(NAME, TABLE)
        others.append(ReadMap(world.dm, NAME, WHOLE, CHUNK))
        world.dm.read(NAME, 50 * CHUNK, 4096)

    others: list[ReadMap] = []
    world.read(1.0, *range(6))
    world.at(1.5, attach_anew)
    world.record()
    assert world.parts() == [[0, 1, 2, 3, 4, 5]]
    assert others[0].touched().read == {(50 * CHUNK, 51 * CHUNK)}
    others[0].remove()


def test_a_plan_that_is_asked_for_again_ends_no_recording(world: World) -> None:
    """A volume whose cache was late gets another plan, which may ask for a recording, too: each
    would take the other's counters for left over, and a part of a boot be told as a whole one.
    """
    world.read(1.0, *range(6))
    world.at(1.5, lambda: world.recorder.planned(STACK, dataclasses.replace(ASKED, record="r2")))
    world.read(2.0, 9)
    world.record()
    assert world.parts()[-1] == [0, 1, 2, 3, 4, 5, 9]
    assert {each.record for each in world.tracker.recordings} == {"r1"}


def test_a_boot_that_goes_on_already_is_left_to_another_host(world: World) -> None:
    for _ in range(MISSED + 1):
        world.dm.read(NAME, 0, 4096)
    world.record()
    assert world.parts() == [[]]
    assert world.tracker.recordings[0].last
    assert world.dm.regions.get(NAME, {}) == {}


def test_it_begins_when_the_volume_is_attached(world: World) -> None:
    world.store.put(dataclasses.replace(STACK, phase=CREATING))
    world.dm.remove(NAME)

    def attached() -> None:
        world.dm.create(NAME, TABLE)
        world.store.put(STACK)

    world.at(3.0, attached)
    world.read(4.0, *range(6))
    world.record()
    assert world.parts()[-1] == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("how", ["failed", "anew", "stuck"])
def test_an_attach_that_does_not_end_well_is_not_recorded(world: World, how: str) -> None:
    world.store.put(dataclasses.replace(STACK, phase=CREATING))
    if how == "failed":
        world.at(1.0, lambda: world.store.drop_stack(VOLUME))
    elif how == "anew":
        world.at(1.0, lambda: world.store.put(dataclasses.replace(STACK, stack_id="s2")))
    world.record()
    assert world.tracker.recordings == []
    assert world.now <= LIMIT + SLOT


def test_a_tracker_that_is_away_costs_its_reports_alone(world: World) -> None:
    world.tracker.down = True
    world.read(1.0, *range(6))
    world.at(6.0, lambda: setattr(world.tracker, "down", False))
    world.record()
    assert [each.last for each in world.tracker.recordings] == [False, True]
    assert world.dm.regions[NAME] == {}


def test_a_tracker_that_takes_its_time_changes_no_order(world: World) -> None:
    """Nor does what it is told last overtake what it was told before."""
    answered, told = threading.Event(), world.tracker.profile_report

    def slow(recording: wire.Recording) -> None:
        assert recording.last or answered.wait(30)
        told(recording)

    world.tracker.profile_report = slow  # type: ignore[method-assign]
    join = world.recorder._reports.join
    world.recorder._reports.join = lambda timeout: None  # type: ignore[method-assign]

    def answer() -> None:
        answered.set()
        join(30)

    world.read(1.0, *range(6))
    for second in range(2, 30):  # past all parts
        world.read(float(second), 100 - second)
    world.at(30.0, lambda: world.dm.remove(NAME))
    world.at(40.0, answer)
    world.record()
    assert world.parts()[-1] == [*range(6), *(100 - second for second in range(2, 30))]
    assert [each.last for each in world.tracker.recordings] == [False, True]


@pytest.mark.parametrize(("cost", "slot"), [(0.001, SLOT), (0.02, 0.4), (1.0, LONGEST_SLOT)])
def test_looks_that_are_expensive_are_rare(
    world: World, monkeypatch: pytest.MonkeyPatch, cost: float, slot: float
) -> None:
    looks: list[float] = []
    touched, used = ReadMap.touched, [0.0]

    def expensive(self: ReadMap) -> Touched:
        looks.append(world.now)
        used[0] += cost
        return touched(self)

    monkeypatch.setattr(ReadMap, "touched", expensive)
    monkeypatch.setattr(time, "thread_time", lambda: used[0])
    for tenth in range(1, 120):
        world.read(tenth / 10, tenth)
    world.record()
    assert looks[1] - looks[0] == pytest.approx(slot)
    assert len(world.parts()[-1]) == 119


def test_it_tells_what_was_prefetched_and_never_read(world: World) -> None:
    profile = Profile.of(CHUNK, [2, 3, 9, 256]).encode()
    allocated = ((0, 9 * CHUNK), (9 * CHUNK + 4096, SIZE))
    world.store.put(Base(IMAGE, SIZE, allocated, "l", 7, phase=READY, profile=profile))
    metadata: fakes.FakeMetadata = world.kit.metadata  # type: ignore[assignment]
    metadata.filled[7] = Extents.of([(0, 3 * CHUNK), (9 * CHUNK, SIZE)])
    world.read(1.0, 1, 2, 4, 5, 6, 7)
    world.record()
    # Chunk 2, of chunk 9 what is allocated, and the last one, which ends with the image.
    figures = [(each.prefetched, each.wasted) for each in world.tracker.recordings]
    assert figures == [(0, 0)] * 3 + [(2 * CHUNK, CHUNK)]


@pytest.mark.parametrize("profile", ["", "AAAA"])
def test_without_a_profile_nothing_was_prefetched(world: World, profile: str) -> None:
    world.store.put(Base(IMAGE, SIZE, ((0, SIZE),), "l", 7, phase=READY, profile=profile))
    world.read(1.0, *range(6))
    world.record()
    last = world.tracker.recordings[-1]
    assert (last.prefetched, last.wasted) == (0, 0)


def test_what_a_killed_agent_has_left_is_removed(world: World) -> None:
    ReadMap(world.dm, NAME, WHOLE, CHUNK)
    world.store.put(dataclasses.replace(STACK, volume_id="without-device"))
    world.recorder.start()
    world.recorder._jobs.join(30)
    assert world.dm.regions[NAME] == {}


def test_a_recording_that_began_meanwhile_is_not_taken_for_one_that_was_left(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    removed: list[str] = []
    monkeypatch.setattr(readmap, "forget_left", lambda _, name: removed.append(name))
    started: list[Callable[[], None]] = []
    monkeypatch.setattr(world.recorder._jobs, "start", lambda _, job: started.append(job))
    world.store.put(STACK)
    world.recorder.start()
    world.store.put(dataclasses.replace(STACK, volume_id="soon"))
    for job in started:
        job()
    assert removed == [NAME]


def test_a_host_records_a_few_boots_and_each_by_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the real clock; also, the end of the agent ends them."""
    monkeypatch.setattr(module, "SLOT", 0.01)
    world = World(tmp_path)
    host = ports.Host(world.kit, world.store, world.tracker, TOPOLOGY)
    recorder = Recorder(host)
    for number in range(5):
        stack = dataclasses.replace(STACK, volume_id=f"v{number}")
        world.dm.create(VolumeNames(stack.volume_id).vol, TABLE)
        world.store.put(stack)
        recorder.planned(stack, dataclasses.replace(ASKED, record=f"r{number}"))

    def watched() -> int:
        return sum(len(each) for each in list(world.dm.regions.values()))

    until = time.monotonic() + 30
    while watched() < module.MOST:
        assert time.monotonic() < until
        time.sleep(0.01)
    recorder.stop()
    assert watched() == 0
    assert world.tracker.recordings == []


def test_a_plan_that_asks_for_none_has_none(world: World) -> None:
    before = threading.active_count()
    world.recorder.planned(STACK, dataclasses.replace(ASKED, record=""))
    world.recorder.planned(STACK, dataclasses.replace(ASKED, image=None))
    assert threading.active_count() == before
    assert world.dm.regions.get(NAME, {}) == {}


def test_no_thread_for_it_fails_nothing(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", fail)
        for _ in range(module.MOST):
            world.recorder.planned(STACK, ASKED)
    assert world.tracker.recordings == []
    world.record()  # nor does it count as one that goes on
    assert len(world.tracker.recordings) == 1


def test_an_attach_begins_a_recording(tmp_path: Path) -> None:
    host = AgentHost(tmp_path)
    host.tracker.plan = dataclasses.replace(PLAN, record="r1")
    _, stacks, _, _ = host.agent()
    payload = wire.Payload(VOLUME, IMAGE, "stor1@thunder")
    assert stacks.attach(payload, LUN, time.monotonic() + 30).mode == "cached"
    until = time.monotonic() + 30
    while not host.dm.regions.get(NAME):
        assert time.monotonic() < until
        time.sleep(0.01)
    assert {region.program for region in host.dm.regions[NAME].values()} == {dmstats.READS}
    stacks.detach(VOLUME)
    until = time.monotonic() + 30
    while not host.tracker.recordings:
        assert time.monotonic() < until
        time.sleep(0.01)
    assert [each.record for each in host.tracker.recordings] == ["r1"]


areas = st.frozensets(st.integers(0, 20).map(lambda number: (number * CHUNK, (number + 1) * CHUNK)))


@given(st.lists(st.tuples(areas, areas), max_size=8))
def test_each_area_is_there_once_where_it_was_first_read(
    changes: list[tuple[frozenset[Area], frozenset[Area]]],
) -> None:
    reads, touched = Reads(), Touched()
    model: list[Area] = []
    for read, written in changes:
        new = read - touched.read
        model += sorted(new - touched.written)
        touched = Touched(touched.read | read, touched.written | written)
        reads = reads.after(touched)
    assert list(reads.order) == model
    assert reads.begun == (len(model) > recording.PROBED)


@given(st.integers(1, 1 << 40), st.integers(1, 4), st.data())
def test_larger_areas_are_reported_in_the_chunks_of_all_boots(
    size: int, ratio: int, data: st.DataObject
) -> None:
    chunk = chunk_size(size)
    area = ratio * chunk
    number = st.integers(0, -(-size // area) - 1)
    order = data.draw(st.lists(number, unique=True, max_size=20))
    reads = Reads(tuple((each * area, min((each + 1) * area, size)) for each in order))
    found = Profile.decode(reads.profile(size).encode(), size)
    assert found.chunk == chunk
    rounded = -(-size // chunk) * chunk
    expected = reads.extents.touched_blocks(chunk, rounded) if reads.begun else Extents()
    assert Extents.of(found.ordered()) == expected


def test_holes_of_an_image_are_in_no_profile(world: World) -> None:
    """Of an image with many, what is data is recorded in small areas all the same."""
    size = 64 << 30
    ranges = ((0, MIB), (8 << 30, MIB), ((32 << 30) - MIB, MIB))
    world.dm.remove(NAME)
    world.dm.create(NAME, Table.of((size // 512, dmtable.Linear(LUN))))
    chunk = chunk_size(size)
    read = [0, 1, (8 << 30) // chunk, (8 << 30) // chunk + 1, (32 << 30) // chunk - 1]
    for number in (*read, (4 << 30) // chunk):
        world.at(1.0, partial(world.dm.read, NAME, number * chunk, 4096))
    image = wire.ImageInfo(IMAGE, size, ranges, "c1")
    world.record(dataclasses.replace(ASKED, image=image))
    found = Profile.decode(world.tracker.recordings[-1].part, size)
    assert (found.chunk, list(found.chunks())) == (chunk, read)
