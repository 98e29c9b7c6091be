"""``thunder image profile``: what it shows of boots, and what it changes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cinder_thunder.cli import thunder
from cinder_thunder.db import migration
from cinder_thunder.db.api import Database
from cinder_thunder.db.values import Image
from cinder_thunder.policy import profiles
from os_brick_thunder.common import wire
from os_brick_thunder.common.policy.extents import Extents
from os_brick_thunder.common.policy.profile import Profile, chunk_size

STORAGE = "stor1@thunder"
MIB = 1 << 20
SIZE = 4 * MIB - 512
CHUNK = chunk_size(SIZE)  # 64 chunks
BOOT = Profile.of(CHUNK, (*range(40, 48), 63, 0))


@pytest.fixture
def database(tmp_path: Path) -> Database:
    database = Database(f"sqlite:///{tmp_path}/cinder.sqlite")
    migration.upgrade(database.engine)
    database.hosts.heartbeat(wire.Topology(STORAGE, "10.0.0.1", "r0", "z1", "", "storage"))
    database.images.add_master(Image("i", SIZE, Extents.of([(0, SIZE)])), STORAGE)
    return database


@pytest.fixture
def option(tmp_path: Path) -> list[str]:
    url = f"sqlite:///{tmp_path}/cinder.sqlite"
    (tmp_path / "cinder.conf").write_text(f"[database]\nconnection = {url}\n")
    return ["--config-file", str(tmp_path / "cinder.conf")]


def boots(database: Database, host: str, read: Profile, fetched: int = 0, wasted: int = 0) -> None:
    record = f"record-{host}-{len(read.runs)}-{fetched}"
    image = wire.ImageInfo("i", SIZE, ((0, SIZE),))
    assert database.profiles.start(record, image, host, 60)
    said = wire.Recording("i", "", record, host, read.encode(), True, fetched, wasted)
    assert database.profiles.report(said, read, SIZE, 60)


def shown(option: list[str], capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    assert thunder.main(["image", "profile", "show", "i", *option, "-f", "json"]) == 0
    answer: dict[str, Any] = json.loads(capsys.readouterr().out)
    return answer


def test_before_any_boot(
    database: Database, option: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    answer = shown(option, capsys)
    assert (answer["state"], answer["boots"], answer["bytes"], answer["order"]) == (
        "empty", 0, 0, "",
    )  # fmt: skip


def test_a_profile(
    database: Database, option: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    boots(database, "c2", BOOT)
    boots(database, "c1", Profile.of(CHUNK, (*range(40, 46), 63, 0)), 8 * MIB, 2 * MIB)
    database.profiles.start("going-on", wire.ImageInfo("i", SIZE, ()), "c1", 60)
    assert shown(option, capsys) == {
        "image": "i",
        "state": "open",
        "version": 2,  # the second boot had another order
        "boots": 2,
        "hosts": "c1, c2",
        "recording": 1,
        "size": SIZE,
        "bytes": 10 * CHUNK - 512,
        "coverage": "-, 100 %",
        "waste": "-, 20 %",
        "prefetch_waste": "-, 25 %",
        "order": "9" + 39 * "." + "01234578" + 15 * "." + "6",
    }


def test_record_and_reset(
    database: Database, option: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    def state() -> str:
        known = database.profiles.of("i")
        return known.state if known else ""

    def say(verb: str) -> str:
        assert thunder.main(["image", "profile", verb, "i", *option]) == 0
        return capsys.readouterr().out

    assert say("reset") == "the boot profile of image i was not known\n"
    for host in ("c1", "c2", "c3"):
        boots(database, host, BOOT)
    assert state() == profiles.SETTLED
    assert say("record") == "boots of image i are recorded until they agree\n"
    assert state() == profiles.OPEN
    assert shown(option, capsys)["bytes"] == 10 * CHUNK - 512
    assert say("reset") == "the boot profile of image i is forgotten\n"
    assert state() == ""


@pytest.mark.parametrize("verb", ["show", "record", "reset"])
def test_an_unknown_image(
    database: Database, option: list[str], caplog: pytest.LogCaptureFixture, verb: str
) -> None:
    assert thunder.main(["image", "profile", verb, "x", *option]) == 2
    assert "there is no replica of an image x" in caplog.text
