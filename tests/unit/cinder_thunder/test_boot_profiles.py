"""The tracker and boots: who is asked to record one, and what plans say of earlier ones."""

from __future__ import annotations

import dataclasses
import itertools

import pytest

from cinder_thunder.db.api import Database
from cinder_thunder.db.profiles import ProfileTable
from cinder_thunder.db.values import ClonedVolume, Image
from cinder_thunder.masters.clones import MASTER
from cinder_thunder.policy import profiles
from cinder_thunder.policy.ranking import Limits
from cinder_thunder.tracker import profiles as profiles_module
from cinder_thunder.tracker.profiles import BootProfiles
from cinder_thunder.tracker.service import TrackerService
from cinder_thunder.volumes import Attachment, CinderVolume
from os_brick_thunder.common import errors, wire
from os_brick_thunder.common.policy.extents import Extents
from os_brick_thunder.common.policy.profile import Profile, chunk_size
from tests.fake_storage import FileVolumes
from tests.unit.cinder_thunder.conftest import STORAGE

SIZE = 1 << 20
CONTENT = "sha512:0f"
BOOT = Profile.of(chunk_size(SIZE), (9, 10, 3))
BLOCK = 65536


def host(name: str) -> wire.Topology:
    return wire.Topology(name, "10.0.0.9", "r1", "z1", f"iqn.2026-11.org.example:{name}")


@dataclasses.dataclass
class Cloud:
    """Volumes are clones of image ``i``; ``v-c1`` is attached to ``c1``, and so on."""

    tracker: TrackerService
    database: Database
    volumes: FileVolumes

    def attach(self, name: str) -> wire.Plan:
        return self.tracker.plan_attach(f"v-{name}", host(name))

    def boots(self, name: str, read: Profile = BOOT) -> None:
        plan = self.attach(name)
        assert plan.record
        self.tracker.profile_report(recording(plan, name, read))


def recording(
    plan: wire.Plan, name: str, read: Profile = BOOT, last: bool = True
) -> wire.Recording:
    assert plan.image is not None
    return wire.Recording(plan.image.id, plan.image.content, plan.record, name, read.encode(), last)


@pytest.fixture
def cloud(database: Database, volumes: FileVolumes) -> Cloud:
    volumes.create(MASTER + "i", SIZE)
    (volumes.folder / (MASTER + "i")).write_bytes(b"i" * SIZE)
    database.images.add_master(Image("i", SIZE, Extents.of([(0, SIZE)]), content=CONTENT), STORAGE)
    cinder: dict[str, CinderVolume] = {}
    for name in ("c1", "c2", "c3", "c4"):
        volumes.snapshot(f"volume-{name}", MASTER + "i")
        database.volumes.put(ClonedVolume(f"v-{name}", "i", STORAGE))
        attached = frozenset({Attachment(name, host(name).initiator)})
        cinder[f"v-{name}"] = CinderVolume(f"volume-{name}", False, attached)
    boots = BootProfiles(database.profiles, draw=lambda: 0.5)
    tracker = TrackerService(STORAGE, database, volumes, Limits(), cinder.get, boots)
    return Cloud(tracker, database, volumes)


def test_the_first_boots_are_recorded_and_others_profit_at_once(cloud: Cloud) -> None:
    first = cloud.attach("c1")
    assert (first.profile, bool(first.record)) == ("", True)
    part = Profile(BOOT.chunk, BOOT.runs[:1])
    cloud.tracker.profile_report(recording(first, "c1", part, last=False))
    second, third = cloud.attach("c2"), cloud.attach("c3")
    assert Profile.decode(second.profile, SIZE) == part
    assert len({first.record, second.record, third.record}) == 3
    # Three boots of an image are recorded at a time.
    fourth = cloud.attach("c4")
    assert (fourth.profile, fourth.record, fourth.mode) == (part.encode(), "", "cached")
    cloud.tracker.profile_report(recording(first, "c1"))
    again = cloud.attach("c4")
    assert (again.profile, bool(again.record)) == (BOOT.encode(), True)
    assert wire.parse(wire.Plan, again.to_wire()) == again


def test_bases_without_a_volume_get_the_profile_and_record_nothing(cloud: Cloud) -> None:
    cloud.boots("c1")
    plan = cloud.tracker.plan_sources("i", host("c2"))
    assert (plan.profile, plan.record) == (BOOT.encode(), "")


def test_a_settled_image_is_only_sampled(cloud: Cloud) -> None:
    for name in ("c1", "c2", "c3"):
        cloud.boots(name)
    known = cloud.database.profiles.of("i")
    assert known is not None
    assert known.state == profiles.SETTLED
    assert cloud.attach("c4").record == ""
    cloud.tracker._profiles = BootProfiles(cloud.database.profiles, draw=lambda: 0.01)
    assert cloud.attach("c4").record != ""


def test_a_volume_that_was_written_shows_no_boot(cloud: Cloud) -> None:
    with (cloud.volumes.folder / "volume-c1").open("r+b") as volume:
        volume.seek(3 * BLOCK)
        volume.write(b"x")
    plan = cloud.attach("c1")
    assert (plan.mode, plan.record) == ("cached", "")


def test_a_direct_volume_is_not_recorded(cloud: Cloud) -> None:
    cloud.database.volumes.drop("v-c1")
    plan = cloud.attach("c1")
    assert (plan.mode, plan.profile, plan.record) == ("direct", "", "")


def test_hosts_are_told_which_images_most_volumes_are_of(
    cloud: Cloud, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of those whose boots are known; they are not counted for every heartbeat."""

    def heard() -> tuple[str, ...]:
        return cloud.tracker.heartbeat(host("c1")).popular

    def known(image: str, volumes: int) -> None:
        content = Image(image, SIZE, Extents.of([(0, SIZE)]), content=CONTENT)
        cloud.database.images.add_master(content, STORAGE)
        info = wire.ImageInfo(image, SIZE, ((0, SIZE),), CONTENT)
        assert cloud.database.profiles.start(f"r-{image}", info, "c1", 60)
        said = wire.Recording(image, CONTENT, f"r-{image}", "c1", BOOT.encode(), True)
        assert cloud.database.profiles.report(said, BOOT, SIZE, 60)
        for n in range(volumes):
            cloud.database.volumes.put(ClonedVolume(f"{image}-{n}", image, STORAGE))

    now = 0.0
    told = BootProfiles(cloud.database.profiles, clock=lambda: now)
    monkeypatch.setattr(cloud.tracker, "_profiles", told)
    assert heard() == ()  # there is an image with volumes, but no boot of it
    for image, volumes in (("a", 1), ("b", 3), ("c", 2), ("unused", 0)):
        known(image, volumes)
    assert heard() == ()
    now = 61.0
    assert heard() == ("b", "c", "a")
    with monkeypatch.context() as broken:
        broken.setattr(ProfileTable, "popular", lambda *_: 1 / 0)
        now = 125.0
        assert heard() == ("b", "c", "a")  # as before
    cloud.database.images.set_deleted("b", True)
    now = 190.0
    assert heard() == ("c", "a")
    storage = wire.Topology(STORAGE, "10.0.0.1", "r0", "z1", "", "storage")
    assert cloud.tracker.heartbeat(storage).popular == ()


def test_hosts_that_fill_an_image_are_told_what_is_learned(
    cloud: Cloud, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While boots go on: in its first storm, all bases are planned before one has ended."""

    clock = itertools.count()  # by more than CHANGES_FOR with each heartbeat
    profiles_of = BootProfiles(
        cloud.database.profiles, draw=lambda: 0.5, clock=lambda: 2.0 * next(clock)
    )

    def told(name: str) -> tuple[wire.BootProfile, ...]:
        return cloud.tracker.heartbeat(host(name)).profiles

    monkeypatch.setattr(cloud.tracker, "_profiles", profiles_of)
    plans = {name: cloud.attach(name) for name in ("c1", "c2", "c3")}
    cloud.tracker.heartbeat(host("c4"))
    assert told("c2") == ()
    part = Profile(BOOT.chunk, BOOT.runs[:1])
    cloud.tracker.profile_report(recording(plans["c1"], "c1", part, last=False))
    assert told("c2") == (wire.BootProfile("i", CONTENT, part.encode()),)
    cloud.tracker.profile_report(recording(plans["c1"], "c1"))
    assert told("c2") == (wire.BootProfile("i", CONTENT, BOOT.encode()),)
    assert told("c4") == ()  # it has no base
    complete = wire.LocationReport(
        plans["c3"].location_id or "", "i", "c3", "complete", SIZE, "10.0.0.9:3260", "iqn", 0
    )
    cloud.tracker.report(complete)
    assert told("c3") == ()
    with monkeypatch.context() as broken:
        broken.setattr(ProfileTable, "changed", lambda *_: 1 / 0)
        assert told("c2") == ()
    assert told("c2") != ()
    monkeypatch.setattr(profiles_module, "TOLD_FOR", 0.0)
    assert told("c2") == ()  # who is planned from now on is told by the plan


def test_switched_off(cloud: Cloud) -> None:
    cloud.boots("c1")
    cloud.tracker._profiles = None
    for plan in (cloud.attach("c2"), cloud.tracker.plan_sources("i", host("c2"))):
        assert (plan.mode, plan.profile, plan.record) == ("cached", "", "")
    cloud.tracker.profile_report(wire.Recording("i", "", "r", "c1", "", last=True))


def test_a_plan_does_without_tables_that_fail(
    cloud: Cloud, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(image_id: str) -> None:
        raise RuntimeError("the database says no")

    monkeypatch.setattr(cloud.database.profiles, "of", fails)
    plan = cloud.attach("c1")
    assert (plan.mode, plan.profile, plan.record) == ("cached", "", "")


def test_the_profile_of_other_content_is_not_used(cloud: Cloud) -> None:
    cloud.boots("c1")
    late = cloud.attach("c1")
    cloud.database.images.add_master(
        Image("i", SIZE, Extents.of([(0, SIZE)]), content="sha512:ff"), STORAGE
    )
    plan = cloud.attach("c2")
    assert (plan.profile, bool(plan.record)) == ("", True)
    cloud.tracker.profile_report(recording(late, "c1"))  # of the former image
    assert cloud.attach("c3").profile == ""


def test_hostile_reports(cloud: Cloud) -> None:
    plan = cloud.attach("c1")
    good = recording(plan, "c1")
    for wrong, message in (
        ("%", "not base64"),
        (Profile(BOOT.chunk, ((15, 2),)).encode(), "not within an image"),
    ):
        with pytest.raises(errors.InvalidRequest, match=message):
            cloud.tracker.profile_report(dataclasses.replace(good, part=wrong))
    for foreign in (  # nobody asked for it
        dataclasses.replace(good, record="r"),
        dataclasses.replace(good, host="c2"),
        dataclasses.replace(good, image_id="j"),
        dataclasses.replace(good, content="sha512:ff"),
    ):
        cloud.tracker.profile_report(foreign)
    assert cloud.attach("c2").profile == ""
    cloud.tracker.profile_report(good)
    assert cloud.attach("c2").profile == BOOT.encode()


def test_recordings_in_larger_chunks_are_cut(cloud: Cloud) -> None:
    """As those of older agents; smaller ones cannot be merged."""
    plan = cloud.attach("c1")
    part = Profile(2 * BOOT.chunk, ((3, 2), (0, 1))).encode()
    cloud.tracker.profile_report(dataclasses.replace(recording(plan, "c1"), part=part))
    assert cloud.attach("c2").profile == Profile(BOOT.chunk, ((6, 4), (0, 2))).encode()


def test_recordings_in_smaller_chunks_are_refused(
    cloud: Cloud, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = cloud.attach("c1")
    monkeypatch.setattr(profiles_module, "chunk_size", lambda size: 2 * BOOT.chunk)
    with pytest.raises(errors.InvalidRequest, match="chunks of 65536 bytes"):
        cloud.tracker.profile_report(recording(plan, "c1"))
