"""Exports of volumes after a restart: each comes back, whatever else is exported."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from cinder import exception
from cinder.volume import configuration, manager
from oslo_config import cfg

from cinder_thunder import privileged, volumes
from cinder_thunder.mechanism import volumetargets
from cinder_thunder.target import VolumeTargetDriver
from tests.unit.cinder_thunder.test_driver import make_driver

IQN = "iqn.2010-10.org.openstack:volume-v"
OTHERS = "iqn.2026-11.org.thunder:cmp1:img"


class Lio:
    """LIO as cinder-rtstool sees it: targets with their initiators."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.targets: dict[str, list[str]] = {OTHERS: ["iqn.x:cmp2"]}
        self.saved: dict[str, list[str]] = {}
        self.broken: set[str] = set()  # cannot be restored
        monkeypatch.setattr(privileged, "rtstool", self.rtstool)
        monkeypatch.setattr(privileged, "restore_target", self.restore)

    def rtstool(self, arguments: list[str]) -> str:
        verb, *rest = arguments
        if verb == "get-targets":
            return "".join(f"{iqn}\n" for iqn in self.targets)
        if verb == "create":
            self.targets[rest[1]] = []
            self.created = rest
        elif verb == "add-initiator":
            self.targets[rest[0]].append(rest[3])
        elif verb == "save":
            self.saved = {iqn: list(names) for iqn, names in self.targets.items()}
        elif verb == "restore":
            self.targets = dict(self.saved)
        return ""

    def restore(self, iqn: str) -> bool:
        if iqn not in self.targets and iqn in self.saved and iqn not in self.broken:
            self.targets[iqn] = self.saved[iqn]
        return iqn in self.targets


@pytest.fixture
def lio(monkeypatch: pytest.MonkeyPatch) -> Lio:
    return Lio(monkeypatch)


@pytest.fixture
def target(cinder_conf: cfg.ConfigOpts, lio: Lio, monkeypatch: pytest.MonkeyPatch) -> Any:
    make_driver(cinder_conf)
    options = configuration.Configuration(manager.volume_backend_opts, config_group="thunder")
    monkeypatch.setattr(VolumeTargetDriver, "_verify_rtstool", lambda self: None)
    found = VolumeTargetDriver(configuration=options)
    found.db = SimpleNamespace(
        volume_get=lambda context, volume_id: {"provider_auth": "CHAP user secret"}
    )
    return found


class Volume(SimpleNamespace):
    """Of Cinder's: its attributes are its items, too."""

    def __getitem__(self, name: str) -> Any:
        return getattr(self, name)


def volume(*initiators: str | None, **changes: Any) -> Any:
    found = {
        "id": "v",
        "name": "volume-v",
        "status": "in-use",
        "provider_location": f"10.0.0.1:3260,0 {IQN} 0",
        "volume_attachment": [
            SimpleNamespace(connector=None if name is None else {"initiator": name})
            for name in initiators
        ],
        **changes,
    }
    return Volume(**found)


def test_exports_of_an_agent_do_not_keep_a_volume_from_being_exported(
    target: Any, lio: Lio
) -> None:
    """Cinder restores nothing while there is any target, and removes all when it does."""
    lio.saved = {IQN: ["iqn.x:cmp1"]}
    target.ensure_export(None, volume("iqn.x:cmp1"), "/dev/vg/volume-v")
    assert lio.targets == {IQN: ["iqn.x:cmp1"], OTHERS: ["iqn.x:cmp2"]}


@pytest.mark.parametrize("broken", [False, True])
def test_an_export_that_was_not_saved_is_made_of_what_cinder_knows(
    target: Any, lio: Lio, broken: bool
) -> None:
    if broken:
        lio.saved, lio.broken = {IQN: ["iqn.x:cmp1"]}, {IQN}
    attached = volume("iqn.x:cmp1", None, "iqn.x:cmp2", "iqn.x:cmp1")
    target.ensure_export(None, attached, "/dev/vg/volume-v")
    assert lio.created[:4] == ["/dev/vg/volume-v", IQN, "user", "secret"]
    assert lio.targets[IQN] == ["iqn.x:cmp1", "iqn.x:cmp2"]
    assert lio.targets[OTHERS] == ["iqn.x:cmp2"]
    assert lio.saved == lio.targets


def test_an_export_without_a_secret_cannot_be_made(
    target: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    nothing = SimpleNamespace(volume_get=lambda context, volume_id: {"provider_auth": None})
    monkeypatch.setattr(target, "db", nothing)
    with pytest.raises(exception.VolumeBackendAPIException, match="has no record of its secret"):
        target.ensure_export(None, volume("iqn.x:cmp1"), "/dev/vg/volume-v")


def test_a_restart_without_a_reboot_changes_nothing(target: Any, lio: Lio) -> None:
    lio.targets[IQN] = ["iqn.x:cmp1"]
    target.ensure_export(None, volume("iqn.x:cmp1"), "/dev/vg/volume-v")
    assert lio.targets == {IQN: ["iqn.x:cmp1"], OTHERS: ["iqn.x:cmp2"]}
    assert lio.saved == {}


def test_a_volume_that_is_backed_up_while_attached_is_exported_again(
    cinder_conf: cfg.ConfigOpts, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cinder's start goes on with those "in-use" alone; one that fails stops no other."""
    known = [
        volume("iqn.x:cmp1", id="in-use"),
        volume("iqn.x:cmp1", id="broken", status="backing-up"),
        volume("iqn.x:cmp1", id="backed-up", status="backing-up"),
        volume(id="uploaded", status="uploading"),
        volume("iqn.x:cmp1", id="never exported", status="attaching", provider_location=None),
    ]
    monkeypatch.setattr("cinder.objects.VolumeList.get_all_by_host", lambda context, host: known)
    assert [v.id for v in volumes.attached_in_passing_states("stor1@thunder")] == [
        "broken",
        "backed-up",
    ]
    driver: Any = make_driver(cinder_conf)
    exported: list[str] = []

    def ensure(context: Any, found: Any) -> None:
        if found.id == "broken":
            raise RuntimeError("its disk is away")
        exported.append(found.id)

    monkeypatch.setattr(driver, "ensure_export", ensure)
    driver._restore_exports()
    assert exported == ["backed-up"]


def test_the_saved_configuration_in_parts(tmp_path: Path) -> None:
    file = tmp_path / "saveconfig.json"
    assert list(volumetargets._parts(file)) == []
    file.write_text("{")
    assert list(volumetargets._parts(file)) == []
    store, other = {"name": IQN, "dev": "/dev/a"}, {"name": "thunder.cmp1.img", "dev": "/dev/b"}
    target, others = {"wwn": IQN, "tpgs": []}, {"wwn": OTHERS, "tpgs": []}
    file.write_text(json.dumps({"storage_objects": [other, store], "targets": [others, target]}))
    assert list(volumetargets._parts(file)) == [{"storage_objects": [store], "targets": [target]}]
