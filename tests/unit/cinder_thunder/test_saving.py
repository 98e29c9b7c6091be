"""LIO's configuration: one save for all who wait, no answer before it is on disk, and the file."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import pytest
import rtslib_fb
from oslo_config import cfg

from cinder_thunder import target
from cinder_thunder.mechanism import saveconfig
from os_brick_thunder.common.transport import lio

IQN, OTHER = "iqn.2010-10.org.openstack:volume-v", "iqn.2010-10.org.openstack:volume-w"
REPLICA = "iqn.2026-11.org.thunder:cmp1:img"


class Disk:
    """Counts saves; each lasts until it is let go, and fails if so told."""

    def __init__(self) -> None:
        self.saves: list[list[str] | None] = []
        self.began = threading.Semaphore(0)
        self.go = threading.Semaphore(0)
        self.error: Exception | None = None

    def save(self, changed: list[str] | None) -> None:
        self.saves.append(changed)
        self.began.release()
        assert self.go.acquire(timeout=30)
        if self.error is not None:
            raise self.error


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    cfg.CONF.set_override("lock_path", str(tmp_path), group="oslo_concurrency")
    yield Disk()
    cfg.CONF.clear_override("lock_path", group="oslo_concurrency")


@pytest.fixture
def threads() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(30) as pool:
        yield pool


def begin(saving: target.Saving, threads: ThreadPoolExecutor, *names: str) -> list[Future[None]]:
    """Have a thread for each target change it, and wait until that is saved.

    :returns: one for each thread, when all have made their changes
    """
    asking = threading.Semaphore(0)

    def change(iqn: str) -> None:
        saving.note(iqn)
        asking.release()
        saving.wait()

    futures = [threads.submit(change, name) for name in names]
    for _ in names:
        assert asking.acquire(timeout=30)
    return futures


def test_one_save_answers_all_who_asked_before_it_began(
    disk: Disk, threads: ThreadPoolExecutor
) -> None:
    saving = target.Saving(disk.save)
    (first,) = begin(saving, threads, "a")
    assert disk.began.acquire(timeout=30)
    names = [f"b{number:02}" for number in range(24)]
    others = begin(saving, threads, *names)
    assert not first.done()
    disk.go.release()
    first.result(30)
    assert disk.began.acquire(timeout=30)  # the second save
    assert not any(other.done() for other in others)  # the first one answered none of them
    disk.go.release(24)
    wait(others, 30)
    assert all(other.done() and other.exception() is None for other in others)
    assert disk.saves[0] is None  # nobody knows what changed before
    assert len(disk.saves) <= 3  # one may have come to wait() after the second began
    assert sorted(name for save in disk.saves[1:] for name in save or ()) == names


def test_an_error_reaches_all_who_waited_and_the_next_save_is_of_everything(
    disk: Disk, threads: ThreadPoolExecutor
) -> None:
    saving = target.Saving(disk.save)
    (first,) = begin(saving, threads, "a")
    assert disk.began.acquire(timeout=30)
    others = begin(saving, threads, "b", "c", "d")
    disk.error = OSError(28, "No space left on device")
    disk.go.release(30)
    for failed in (first, *others):
        assert isinstance(failed.exception(30), OSError)
    disk.error = None
    (again,) = begin(saving, threads, "a")
    again.result(30)
    assert disk.saves[-1] is None
    begin(saving, threads, "e")[0].result(30)
    assert disk.saves[-1] == ["e"]


def test_a_lock_that_cannot_be_had_fails_those_who_waited_and_nobody_later(
    disk: Disk, tmp_path: Path
) -> None:
    saving = target.Saving(disk.save)
    disk.go.release(2)
    saving.wait()
    (tmp_path / "file").touch()
    cfg.CONF.set_override("lock_path", str(tmp_path / "file"), group="oslo_concurrency")
    saving.note("a")
    with pytest.raises(OSError, match=r"Not a directory|File exists"):
        saving.wait()
    cfg.CONF.set_override("lock_path", str(tmp_path), group="oslo_concurrency")
    saving.wait()
    assert disk.saves == [None, ["a"]]


# -- the file ------------------------------------------------------------------------------------


class Dumped:
    """What rtslib reads of a target or of a storage object."""

    def __init__(self, **entry: Any) -> None:
        self.entry = entry

    def dump(self) -> dict[str, Any]:
        return self.entry


class Kernel:
    """Targets with their storage objects."""

    def __init__(self) -> None:
        self.targets: dict[str, int] = {}

    def find(self, iqn: str) -> Dumped | None:
        return Dumped(wwn=iqn, tpgs=[self.targets[iqn]]) if iqn in self.targets else None

    def find_store(self, iqn: str) -> Dumped | None:
        return Dumped(name=iqn, dev=f"/dev/{iqn}") if iqn in self.targets else None

    def dump(self) -> dict[str, Any]:
        stores = [
            {"name": lio.store_name(iqn) if iqn == REPLICA else iqn, "dev": f"/dev/{iqn}"}
            for iqn in self.targets
        ]
        targets = [{"wwn": iqn, "tpgs": [value]} for iqn, value in self.targets.items()]
        return {"storage_objects": stores, "targets": targets, "fabric_modules": []}


@pytest.fixture
def kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Kernel:
    kernel = Kernel()
    monkeypatch.setattr(lio, "DBROOT", tmp_path / "target")
    monkeypatch.setattr(lio, "find", kernel.find)
    monkeypatch.setattr(lio, "find_store", kernel.find_store)

    class Root:
        dump = staticmethod(kernel.dump)

        def invalidate_caches(self) -> None:
            pass

    monkeypatch.setattr(rtslib_fb, "RTSRoot", Root)
    return kernel


def saved(file: Path) -> dict[str, int]:
    """The targets in the file, each with its disk."""
    config = json.loads(file.read_text())
    found = {entry["wwn"]: entry["tpgs"][0] for entry in config["targets"]}
    assert sorted(found) == sorted(store["name"] for store in config["storage_objects"])
    return found


def test_what_has_changed_is_saved_and_the_rest_stays(tmp_path: Path, kernel: Kernel) -> None:
    file = tmp_path / "target" / "saveconfig.json"
    kernel.targets = {IQN: 1, OTHER: 1, REPLICA: 1}
    saveconfig.save(None, file)
    assert saved(file) == {IQN: 1, OTHER: 1}  # replicas are their owners'
    assert file.stat().st_mode & 0o777 == 0o600
    kernel.targets = {IQN: 2, OTHER: 2, "new": 2}
    saveconfig.save([IQN, "new", "gone"], file)
    assert saved(file) == {IQN: 2, OTHER: 1, "new": 2}
    del kernel.targets[IQN]
    saveconfig.save([IQN], file)
    assert saved(file) == {OTHER: 1, "new": 2}
    assert json.loads(file.read_text())["fabric_modules"] == []


def test_what_is_not_restored_yet_stays_saved(tmp_path: Path, kernel: Kernel) -> None:
    """After a reboot disks become active one by one, also those of other backends."""
    file, disk = tmp_path / "saveconfig.json", tmp_path / "disk"
    disk.touch()
    devices = {IQN: "/dev/vg/not-active", OTHER: str(disk), REPLICA: "/dev/mapper/away"}
    stores = [
        {"name": lio.store_name(iqn) if iqn == REPLICA else iqn, "dev": device}
        for iqn, device in devices.items()
    ]
    targets = [{"wwn": iqn, "tpgs": [1]} for iqn in devices]
    file.write_text(json.dumps({"storage_objects": stores, "targets": targets}))
    kernel.targets = {"new": 2}
    saveconfig.save(None, file)
    assert saved(file) == {IQN: 1, "new": 2}  # the other one was removed: its disk is there
    kernel.targets = {IQN: 2, "new": 2}
    saveconfig.save(None, file)
    assert saved(file) == {IQN: 2, "new": 2}


@pytest.mark.parametrize(
    "content", [None, "", "{", "null", "[]", "{}", '{"storage_objects": [1], "targets": []}']
)
def test_a_file_that_cannot_be_read_is_made_anew(
    tmp_path: Path, kernel: Kernel, content: str | None
) -> None:
    file = tmp_path / "saveconfig.json"
    if content is not None:
        file.write_text(content)
    kernel.targets = {IQN: 1, OTHER: 1}
    saveconfig.save([IQN], file)
    assert saved(file) == {IQN: 1, OTHER: 1}


@pytest.mark.parametrize("fails", [(Dumped, "dump"), (os, "fsync")])
def test_a_failure_leaves_the_saved_file(
    tmp_path: Path, kernel: Kernel, monkeypatch: pytest.MonkeyPatch, fails: tuple[Any, str]
) -> None:
    file = tmp_path / "saveconfig.json"
    kernel.targets = {IQN: 1}
    saveconfig.save(None, file)

    def fail(*arguments: Any) -> Any:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(*fails, fail)
    kernel.targets = {IQN: 2}
    with pytest.raises(OSError, match="Input/output error"):
        saveconfig.save([IQN], file)
    assert saved(file) == {IQN: 1}


def test_the_saved_configuration_in_parts(tmp_path: Path) -> None:
    file = tmp_path / "saveconfig.json"
    assert list(saveconfig.parts(file)) == []
    file.write_text("{")
    assert list(saveconfig.parts(file)) == []
    store, other = {"name": IQN, "dev": "/dev/a"}, {"name": "thunder.cmp1.img", "dev": "/dev/b"}
    target, others = {"wwn": IQN, "tpgs": []}, {"wwn": REPLICA, "tpgs": []}
    file.write_text(json.dumps({"storage_objects": [other, store], "targets": [others, target]}))
    assert list(saveconfig.parts(file)) == [{"storage_objects": [store], "targets": [target]}]
