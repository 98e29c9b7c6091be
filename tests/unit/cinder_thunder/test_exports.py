"""Exports of volumes after a restart: each comes back, whatever else is exported."""

from __future__ import annotations

import functools
from types import SimpleNamespace
from typing import Any

import pytest
from cinder import exception
from cinder.volume import configuration, manager
from oslo_concurrency import processutils
from oslo_config import cfg
from rtslib_fb.utils import RTSLibError

from cinder_thunder import privileged, target, volumes
from cinder_thunder.target import VolumeTargetDriver
from tests.unit.cinder_thunder.test_driver import make_driver

IQN = "iqn.2010-10.org.openstack:volume-v"
OTHERS = "iqn.2026-11.org.thunder:cmp1:img"


class Lio:
    """LIO as Cinder's target driver uses it: targets with their initiators."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.targets: dict[str, list[str]] = {OTHERS: ["iqn.x:cmp2"]}
        self.saved: dict[str, list[str]] = {}
        self.broken: set[str] = set()  # cannot be restored
        self.calls: list[tuple[str, tuple[Any, ...]]] = []
        self.full = False  # the disk with the file is full
        for name in ("create_target", "remove_target", "add_initiator", "delete_initiator"):
            monkeypatch.setattr(privileged, name, functools.partial(self.change, name))
        monkeypatch.setattr(privileged, "target_exists", lambda iqn: iqn in self.targets)
        monkeypatch.setattr(privileged, "save_targets", self.save)
        monkeypatch.setattr(privileged, "restore_target", self.restore)
        monkeypatch.setattr(target, "_saving", target.Saving(self.save))

    def change(self, name: str, *arguments: Any) -> None:
        self.calls.append((name, arguments))
        if name == "create_target":
            self.targets.setdefault(arguments[1], [])
        elif name == "remove_target":
            self.targets.pop(arguments[0], None)
        elif name == "add_initiator":
            self.targets[arguments[0]].append(arguments[1])
        else:
            self.targets[arguments[0]].remove(arguments[1])

    def save(self, changed: list[str] | None) -> None:
        if self.full:
            raise OSError(28, "No space left on device")
        self.calls.append(("save", (changed,)))
        for iqn in {*self.saved, *self.targets} if changed is None else changed:
            self.saved.pop(iqn, None)
            if iqn in self.targets:
                self.saved[iqn] = list(self.targets[iqn])

    def restore(self, iqn: str) -> bool:
        if iqn not in self.targets and iqn in self.saved and iqn not in self.broken:
            self.targets[iqn] = self.saved[iqn]
        return iqn in self.targets


@pytest.fixture
def lio(monkeypatch: pytest.MonkeyPatch) -> Lio:
    return Lio(monkeypatch)


@pytest.fixture
def driver(cinder_conf: cfg.ConfigOpts, lio: Lio, monkeypatch: pytest.MonkeyPatch) -> Any:
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

    def get(self, name: str, default: Any) -> Any:
        return getattr(self, name, default)


def volume(*initiators: str | None, **changes: Any) -> Any:
    found = {
        "id": "v",
        "name": "volume-v",
        "status": "in-use",
        "provider_location": f"10.0.0.1:3260,0 {IQN} 0",
        "encryption_key_id": None,
        "volume_attachment": [
            SimpleNamespace(connector=None if name is None else {"initiator": name})
            for name in initiators
        ],
        **changes,
    }
    return Volume(**found)


def test_exports_of_an_agent_do_not_keep_a_volume_from_being_exported(
    driver: Any, lio: Lio
) -> None:
    """Cinder restores nothing while there is any target, and removes all when it does."""
    lio.saved = {IQN: ["iqn.x:cmp1"]}
    driver.ensure_export(None, volume("iqn.x:cmp1"), "/dev/vg/volume-v")
    assert lio.targets == {IQN: ["iqn.x:cmp1"], OTHERS: ["iqn.x:cmp2"]}


@pytest.mark.parametrize("broken", [False, True])
def test_an_export_that_was_not_saved_is_made_of_what_cinder_knows(
    driver: Any, lio: Lio, broken: bool
) -> None:
    if broken:
        lio.saved, lio.broken = {IQN: ["iqn.x:cmp1"]}, {IQN}
    attached = volume("iqn.x:cmp1", None, "iqn.x:cmp2", "iqn.x:cmp1")
    driver.ensure_export(None, attached, "/dev/vg/volume-v")
    assert [call for call in lio.calls if call[0] != "save"] == [
        (
            "create_target",
            ("/dev/vg/volume-v", IQN, [driver.configuration.target_ip_address], 3260, False),
        ),
        ("add_initiator", (IQN, "iqn.x:cmp1", "user", "secret")),
        ("add_initiator", (IQN, "iqn.x:cmp2", "user", "secret")),
    ]
    assert lio.targets[IQN] == ["iqn.x:cmp1", "iqn.x:cmp2"]
    assert lio.targets[OTHERS] == ["iqn.x:cmp2"]
    assert lio.saved == lio.targets


def test_an_export_without_a_secret_cannot_be_made(
    driver: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    nothing = SimpleNamespace(volume_get=lambda context, volume_id: {"provider_auth": None})
    monkeypatch.setattr(driver, "db", nothing)
    with pytest.raises(exception.VolumeBackendAPIException, match="has no record of its secret"):
        driver.ensure_export(None, volume("iqn.x:cmp1"), "/dev/vg/volume-v")


def test_a_restart_without_a_reboot_changes_nothing(driver: Any, lio: Lio) -> None:
    lio.targets[IQN] = ["iqn.x:cmp1"]
    driver.ensure_export(None, volume("iqn.x:cmp1"), "/dev/vg/volume-v")
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


def test_an_attach_looks_at_its_own_target_and_saves_it(driver: Any, lio: Lio) -> None:
    new = volume("iqn.x:cmp1", provider_location=None)
    for number in range(2):  # the first save is of everything
        lio.calls.clear()
        made = driver.create_export(None, new, "/dev/vg/volume-v")
        attached = volume(provider_location=made["location"], provider_auth=made["auth"])
        driver.initialize_connection(attached, {"initiator": f"iqn.x:cmp{number}"})
    assert made["location"].split()[1:] == [IQN, "0"]
    addresses = [driver.configuration.target_ip_address]
    assert [(name, *arguments) for name, arguments in lio.calls] == [
        ("create_target", "/dev/vg/volume-v", IQN, addresses, 3260, False),
        ("save", [IQN]),
        ("add_initiator", IQN, "iqn.x:cmp1", "user", "secret"),
        ("save", [IQN]),
    ]
    driver.terminate_connection(attached, {"initiator": "iqn.x:cmp0"})
    assert lio.saved == {OTHERS: ["iqn.x:cmp2"], IQN: ["iqn.x:cmp1"]}
    driver.remove_export(None, attached)
    assert lio.saved == lio.targets == {OTHERS: ["iqn.x:cmp2"]}


def test_what_could_not_be_saved_is_saved_by_the_next_save(
    driver: Any, lio: Lio, caplog: pytest.LogCaptureFixture
) -> None:
    """A full disk fails no attach, as with Cinder alone."""
    driver.create_export(None, volume(provider_location=None), "/dev/vg/volume-v")
    lio.full = True
    attached = volume(provider_auth="CHAP user secret")
    driver.initialize_connection(attached, {"initiator": "iqn.x:cmp1"})
    assert "Failed to save iscsi LIO configuration" in caplog.text
    lio.full = False
    assert lio.saved[IQN] == []
    driver.create_export(
        None, volume(id="w", name="volume-w", provider_location=None), "/dev/vg/volume-w"
    )
    assert lio.saved == lio.targets
    assert lio.saved[IQN] == ["iqn.x:cmp1"]


def test_the_secret_is_in_no_error(driver: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: Any) -> None:
        raise RTSLibError("no such target")

    monkeypatch.setattr(privileged, "add_initiator", refuse)
    with pytest.raises(processutils.ProcessExecutionError) as error:
        driver._execute("cinder-rtstool", "add-initiator", IQN, "user", "secret", "iqn.x:cmp1")
    assert "RTSLibError: no such target" in str(error.value)
    assert "secret" not in str(error.value)
