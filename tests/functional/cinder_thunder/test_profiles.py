"""Boot profiles in the tables, on the databases that Cinder supports."""

from __future__ import annotations

import threading
import uuid
from concurrent.futures import ThreadPoolExecutor

import pytest
import sqlalchemy as sa

from cinder_thunder.db.api import Database
from cinder_thunder.db.values import Image
from cinder_thunder.policy import profiles
from cinder_thunder.policy.ranking import Limits
from os_brick_thunder.common.policy.extents import Extents
from os_brick_thunder.common.policy.profile import Profile, chunk_size
from os_brick_thunder.common.wire import ImageInfo, Recording, Topology
from tests.functional.conftest import Clock

STORAGE = "stor1@thunder"
SIZE = 64 << 20
CHUNK = chunk_size(SIZE)
CONTENT = "sha512:0f"
BOOT = Profile.of(CHUNK, (100, 101, 7, 3))


@pytest.fixture
def database(database: Database) -> Database:
    database.hosts.heartbeat(Topology(STORAGE, "10.0.0.1", "r0", "z1", "", "storage"))
    return database


@pytest.fixture
def image(database: Database) -> ImageInfo:
    image = Image(str(uuid.uuid4()), SIZE, Extents.of([(0, SIZE)]), content=CONTENT)
    database.images.add_master(image, STORAGE)
    return ImageInfo(image.id, SIZE, ((0, SIZE),), CONTENT)


def started(database: Database, image: ImageInfo, host: str) -> str:
    record = str(uuid.uuid4())
    assert database.profiles.start(record, image, host, 60)
    return record


def report(
    database: Database, image: ImageInfo, record: str, read: Profile, last: bool = True
) -> profiles.Learned | None:
    said = Recording(image.id, image.content, record, "c1", read.encode(), last, 4096, 512)
    return database.profiles.report(said, read, SIZE, 60)


def boots(database: Database, image: ImageInfo, host: str, read: Profile, clock: Clock) -> None:
    record = started(database, image, host)
    clock.passes(30)
    report(database, image, record, read)


def body(database: Database, image: ImageInfo) -> Profile:
    found = database.profiles.of(image.id)
    assert found is not None
    return Profile.decode(found.body, SIZE)


def test_from_the_first_part_to_a_settled_profile(
    database: Database, image: ImageInfo, clock: Clock
) -> None:
    assert database.profiles.of(image.id) is None
    assert database.profiles.show(image.id) is None
    record = started(database, image, "c1")
    found = database.profiles.of(image.id)
    assert found is not None
    assert (found.state, found.body, found.recorders) == (profiles.EMPTY, "", 1)
    recorder = database.profiles.recorder(record)
    assert recorder is not None
    assert (recorder.image_id, recorder.host, recorder.size) == (image.id, "c1", SIZE)
    assert report(database, image, record, Profile.of(CHUNK, (100,)), last=False) is None
    assert body(database, image) == Profile.of(CHUNK, (100,))
    # A recorder that knows less does not take away what another one knows.
    other = started(database, image, "c2")
    report(database, image, other, Profile(CHUNK, ()), last=False)
    assert body(database, image) == Profile.of(CHUNK, (100,))
    clock.passes(30)
    assert report(database, image, record, BOOT) is not None
    assert database.profiles.recorder(record) is None
    assert report(database, image, record, Profile.of(CHUNK, (1,))) is None  # it has ended
    shown = database.profiles.show(image.id)
    assert shown is not None
    assert (shown.state, shown.recorders, len(shown.boots)) == (profiles.OPEN, 1, 1)
    (boot,) = shown.boots
    assert (boot.host, boot.coverage, boot.prefetched, boot.wasted) == ("c1", None, 4096, 512)
    # A part of a boot that goes on does not replace what whole boots have shown.
    report(database, image, other, Profile.of(CHUNK, range(50)), last=False)
    assert body(database, image) == BOOT
    clock.passes(1)
    report(database, image, other, BOOT)
    boots(database, image, "c1", BOOT, clock)
    found = database.profiles.of(image.id)
    assert found is not None
    assert (found.state, found.recorders) == (profiles.SETTLED, 0)
    shown = database.profiles.show(image.id)
    assert shown is not None
    assert [(boot.host, boot.coverage, boot.waste) for boot in shown.boots] == [
        ("c1", None, None),
        ("c2", 1.0, 0.0),
        ("c1", 1.0, 0.0),
    ]
    assert shown.version == 2  # the first part, and the first boot


def test_dead_recorders_are_forgotten(database: Database, image: ImageInfo, clock: Clock) -> None:
    records = [started(database, image, host) for host in ("c1", "c2", "c3")]
    assert not database.profiles.start("late", image, "c4", 60)
    clock.passes(40)
    report(database, image, records[0], BOOT, last=False)  # which gives it time
    clock.passes(40)
    found = database.profiles.of(image.id)
    assert found is not None
    assert found.recorders == 1
    started(database, image, "c4")
    assert database.profiles.recorder(records[1]) is None
    assert report(database, image, records[1], BOOT) is None
    assert report(database, image, records[0], BOOT) is not None


@pytest.mark.parametrize("url", ["mariadb"], indirect=True)  # SQLite has one lock
def test_as_many_recorders_as_may_be_when_many_ask_at_once(
    database: Database, image: ImageInfo
) -> None:
    barrier = threading.Barrier(8)

    def ask(number: int) -> bool:
        barrier.wait()
        return database.profiles.start(f"record-{number}", image, f"c{number}", 60)

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(ask, range(8))) == profiles.RECORDERS
    found = database.profiles.of(image.id)
    assert found is not None
    assert found.recorders == profiles.RECORDERS


@pytest.mark.parametrize("url", ["mariadb"], indirect=True)  # SQLite has one lock
def test_neither_plans_nor_recordings_wait_for_each_other(
    database: Database, image: ImageInfo
) -> None:
    """A storm of plans holds the image's row most of the time."""
    topology = Topology("c2", "10.0.0.9", "r1", "z1", "iqn.2026-11.org.example:c2")
    database.hosts.heartbeat(topology)
    with database.engine.begin() as held:
        held.execute(
            sa.text("SELECT id FROM thunder_images WHERE id = :id FOR UPDATE"), {"id": image.id}
        )
        report(database, image, started(database, image, "c1"), BOOT)
        assert body(database, image) == BOOT
    with database.engine.begin() as held:
        held.execute(
            sa.text("SELECT image_id FROM thunder_profiles WHERE image_id = :id FOR UPDATE"),
            {"id": image.id},
        )
        assert database.locations.plan(image.id, topology, Limits()) is not None
        found = database.profiles.of(image.id)
    assert found is not None
    assert found.body == BOOT.encode()


def test_other_content_is_another_image(database: Database, image: ImageInfo, clock: Clock) -> None:
    boots(database, image, "c1", BOOT, clock)
    record = started(database, image, "c1")
    other = ImageInfo(image.id, SIZE, ((0, SIZE),), "sha512:ff")
    started(database, other, "c2")
    found = database.profiles.of(image.id)
    assert found is not None
    assert (found.content, found.state, found.body) == ("sha512:ff", profiles.EMPTY, "")
    assert report(database, image, record, BOOT) is None
    # A master of the other image is made: nothing is shown of the former one's boots.
    boots(database, other, "c1", BOOT, clock)
    database.images.add_master(Image(image.id, 4096, Extents.of([]), content="sha512:00"), STORAGE)
    assert database.profiles.show(image.id) is None


def test_recordings_of_what_is_not_a_boot_are_forgotten(
    database: Database, image: ImageInfo, clock: Clock
) -> None:
    boots(database, image, "c1", Profile(CHUNK, ()), clock)
    found = database.profiles.of(image.id)
    assert found is not None
    assert (found.state, found.recorders) == (profiles.EMPTY, 0)


def test_the_newest_boots_are_kept(database: Database, image: ImageInfo, clock: Clock) -> None:
    for number in range(profiles.KEPT + 3):
        boots(database, image, "c1", Profile.of(CHUNK, range(20 + number)), clock)
    shown = database.profiles.show(image.id)
    assert shown is not None
    assert [len(list(Profile.decode(boot.body, SIZE).chunks())) for boot in shown.boots] == [
        *range(23, 31)
    ]


def test_open_and_reset(database: Database, image: ImageInfo, clock: Clock) -> None:
    assert not database.profiles.open(image.id)
    assert not database.profiles.reset(image.id)

    def state() -> str:
        found = database.profiles.of(image.id)
        return found.state if found else ""

    for host in ("c1", "c2", "c1"):
        boots(database, image, host, BOOT, clock)
    assert state() == profiles.SETTLED
    clock.passes(1)
    assert database.profiles.open(image.id)
    assert body(database, image) == BOOT
    for host, then in (("c1", profiles.OPEN), ("c2", profiles.OPEN), ("c1", profiles.SETTLED)):
        boots(database, image, host, BOOT, clock)
        assert state() == then
    boots(database, image, "c2", Profile.of(CHUNK, range(200, 210)), clock)  # a sample
    assert state() == profiles.OPEN
    assert database.profiles.reset(image.id)
    assert state() == ""
    boots(database, image, "c1", BOOT, clock)
    assert state() == profiles.OPEN


def test_a_profile_goes_with_its_image(database: Database, image: ImageInfo, clock: Clock) -> None:
    boots(database, image, "c1", BOOT, clock)
    record = started(database, image, "c1")
    database.images.drop_master(image.id, STORAGE)
    assert database.profiles.of(image.id) is None
    assert database.profiles.recorder(record) is None
    assert report(database, image, record, BOOT) is None


def test_a_profile_without_an_image_is_left(
    database: Database, image: ImageInfo, clock: Clock
) -> None:
    """An older tracker that removes an image does not know of it."""
    boots(database, image, "c1", BOOT, clock)
    assert database.profiles.left() == []
    with database.engine.begin() as connection:
        connection.execute(sa.text("DELETE FROM thunder_locations"))
        connection.execute(sa.text("DELETE FROM thunder_images"))
    assert database.profiles.left() == [image.id]
