"""The state file: what an older agent wrote is read, and what is put is written and read again."""

from __future__ import annotations

import dataclasses
import errno
import json
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from os_brick_thunder.common import errors, files
from os_brick_thunder.common.state import (
    OPEN,
    READY,
    REMOVING,
    STALE,
    Base,
    ReplicaPath,
    Stack,
    StateFile,
)

BASE = Base("img-1", 1 << 20, ((0, 4096),), "l1", 3, READY)


def test_a_file_of_an_agent_that_knew_no_last_use_is_read(tmp_path: Path) -> None:
    file = tmp_path / "state.json"
    entry = dataclasses.asdict(BASE)
    del entry["used"]
    old = {"version": 1, "bases": [entry], "stacks": [], "next_thin_id": 4, "releases": {}}
    file.write_text(json.dumps(old))
    assert StateFile(file).bases == {"img-1": BASE}


def test_a_new_base_is_used_now_and_stays_so_whatever_else_changes(tmp_path: Path) -> None:
    store = StateFile(tmp_path / "state.json")
    before = time.time()
    store.put(BASE)
    made = store.bases["img-1"].used
    assert before <= made <= time.time()
    store.touch("img-1")
    touched = store.bases["img-1"].used
    assert touched > made
    store.put(dataclasses.replace(BASE, complete=True, used=made))  # read before the touch
    assert store.bases["img-1"] == dataclasses.replace(BASE, complete=True, used=touched)
    assert StateFile(tmp_path / "state.json").bases == store.bases
    store.touch("img-2")
    assert "img-2" not in store.bases


def test_the_keys_of_a_stack_in_the_file_stay_as_they_were(tmp_path: Path) -> None:
    """An older agent wrote these, and the status that commands of older hosts read has them."""
    entry = {
        "volume_id": "v", "tracker": "stor1@thunder", "device": "/dev/sdb", "mode": "cached",
        "image_id": "img-1", "local_id": 1, "meta_id": 2, "cached": 4096, "reason": "",
        "source": "cmp2", "phase": "ready", "image": "img-2", "wanted": True,
        "attached_at": 1.0, "cached_at": 2.0, "stack_id": "s",
    }  # fmt: skip
    file = tmp_path / "state.json"
    document = {"version": 1, "bases": [], "stacks": [entry], "next_thin_id": 3, "releases": {}}
    file.write_text(json.dumps(document))
    store = StateFile(file)
    stack = store.stacks["v"]
    assert (stack.base_image_id, stack.origin_image_id) == ("img-1", "img-2")
    assert stack.recache_pending
    store.put(Stack("w", "t", "/dev/sdc", "direct"))
    # An older agent would have the volume read too much from its cache when it extends it.
    written = entry | {"cached": 0, "covered": 4096}
    assert json.loads(file.read_text())["stacks"][0] == written
    assert StateFile(file).stacks["v"] == stack


def test_paths_of_an_older_agent_have_a_state(tmp_path: Path) -> None:
    file = tmp_path / "state.json"
    path = {"host": "stor1", "location_id": "l", "exporter": "e", "iqn": "iqn.x", "portal": "p"}
    entry = BASE.to_json() | {"paths": [path, {**path, "iqn": "", "portal": ""}]}
    document = {"version": 1, "bases": [entry], "stacks": [], "next_thin_id": 4, "releases": {}}
    file.write_text(json.dumps(document))
    used, stale = StateFile(file).bases["img-1"].paths
    assert (used.state, stale.state) == (OPEN, STALE)
    assert used == ReplicaPath("stor1", "l", "e", "iqn.x", "p")


def test_the_file_always_has_the_newest_of_every_entry(tmp_path: Path) -> None:
    file = tmp_path / "state.json"
    store = StateFile(file)
    path = ReplicaPath("stor1", "l0", "stor1@thunder", "iqn.x", "10.0.0.1:3260")
    for entry in (
        BASE,
        Stack("vol-1", "stor1@thunder", "/dev/sdb", "direct", reason='it is "here" — é'),
        dataclasses.replace(BASE, image_id="img-2", paths=(path,)),
        Stack("vol-1", "stor1@thunder", "/dev/sdb", "cached", "img-1"),
        dataclasses.replace(BASE, complete=True),
    ):
        store.put(entry)
        written = json.loads(file.read_text())
        assert written["bases"] == json.loads(
            json.dumps([dataclasses.asdict(base) for base in store.bases.values()])
        )
        assert written["stacks"] == [stack.to_json() for stack in store.stacks.values()]
        assert (StateFile(file).bases, StateFile(file).stacks) == (store.bases, store.stacks)
    store.drop_base("img-1")
    store.drop_stack("vol-1")
    written = json.loads(file.read_text())
    assert [base["image_id"] for base in written["bases"]] == ["img-2"]
    assert (written["stacks"], written["releases"]) == ([], {"vol-1": "stor1@thunder"})
    assert StateFile(file).stacks_to_release == store.stacks_to_release == [("vol-1", "")]
    assert written["withdrawals"] == {"img-1": "l1"}


def test_what_a_newer_agent_wrote_is_read_without_the_keys_that_are_unknown(
    tmp_path: Path,
) -> None:
    """After a downgrade."""
    path = ReplicaPath("stor1", "l0", "stor1@thunder", "iqn.x", "10.0.0.1:3260")
    base = dataclasses.replace(BASE, paths=(path,))
    entry = {**base.to_json(), "paths": [{**vars(path), "colour": 1}], "colour": 1}
    stack = Stack("vol-1", "stor1@thunder", "/dev/sdb", "direct")
    document = {
        "version": 1, "bases": [entry], "stacks": [{**stack.to_json(), "colour": 1}],
        "next_thin_id": 4, "releases": {}, "colour": 1,
    }  # fmt: skip
    file = tmp_path / "state.json"
    file.write_text(json.dumps(document))
    assert StateFile(file).bases == {"img-1": base}
    assert StateFile(file).stacks == {"vol-1": stack}


def full(path: Path, text: str) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize(
    "change",
    [
        lambda store: store.put(dataclasses.replace(BASE, complete=True)),
        lambda store: store.put(Stack("vol-2", "stor1@thunder", "/dev/sdc", "direct")),
        lambda store: store.new_thin_id(),
        lambda store: store.adopt_pool("p", 9),
    ],
)
def test_what_cannot_be_written_was_not_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[[StateFile], None]
) -> None:
    store = StateFile(tmp_path / "state.json")
    store.put(BASE)
    before = store.bases, store.stacks, store.pool
    with monkeypatch.context() as patched:
        patched.setattr(files, "replace", full)
        with pytest.raises(errors.StateError, match=r"cannot be written: .* No space left"):
            change(store)
    assert (store.bases, store.stacks, store.pool) == before
    assert store.new_thin_id() == 1
    assert StateFile(tmp_path / "state.json").bases == store.bases


def test_what_was_removed_is_forgotten_although_that_cannot_be_written_yet(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "state.json"
    store, stack = StateFile(file), Stack("vol-1", "stor1@thunder", "/dev/sdb", "direct")
    store.put(BASE)
    store.put(stack)
    with monkeypatch.context() as patched:
        patched.setattr(files, "replace", full)
        store.put_removing(BASE)
        assert store.bases["img-1"].phase == REMOVING
        store.drop_base("img-1")
        store.drop_stack("vol-1")
        store.released("vol-1")
    assert (store.bases, store.stacks, store.releases) == ({}, {}, {})
    assert StateFile(file).stacks == {"vol-1": stack}  # a restart finds that its devices have gone
    store.withdrawn("img-unknown")  # changes nothing, and writes what is due
    assert (StateFile(file).bases, StateFile(file).stacks) == ({}, {})
    assert StateFile(file).withdrawals == {"img-1": "l1"}


def test_a_thin_id_is_given_out_once(tmp_path: Path) -> None:
    """Not again after what it was for has gone, nor after a restart."""
    file = tmp_path / "state.json"
    given: list[int] = []
    for _ in range(3):
        store = StateFile(file)
        given += [store.new_thin_id() for _ in range(2)]
        store.put(dataclasses.replace(BASE, thin_id=given[-1]))
        store.drop_base("img-1")
    assert given == sorted(set(given))
    assert len(given) == 6


def test_each_removed_stack_of_a_volume_is_released(tmp_path: Path) -> None:
    """The tracker's row may be of any of them."""
    file = tmp_path / "state.json"
    old = {
        "version": 1, "bases": [], "stacks": [], "next_thin_id": 4,
        "releases": {"vol-1": "stor1@thunder"},
    }  # fmt: skip
    file.write_text(json.dumps(old))
    store, stack = StateFile(file), Stack("vol-1", "stor1@thunder", "/dev/sdb", "direct")
    for stack_id in ("s1", "s2"):
        store.put(dataclasses.replace(stack, stack_id=stack_id))
        store.drop_stack("vol-1")
    expected = [("vol-1", ""), ("vol-1", "s1"), ("vol-1", "s2")]
    for volume_id, stack_id in expected:
        store = StateFile(file)
        assert store.stacks_to_release[0] == (volume_id, stack_id)
        assert store.releases == {"vol-1": "stor1@thunder"}
        store.released(volume_id, stack_id)
    assert (store.stacks_to_release, store.releases) == ([], {})
