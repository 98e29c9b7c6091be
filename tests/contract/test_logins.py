"""Logins to replicas: only a kernel can tell, so not collected without one."""

from __future__ import annotations

import dataclasses
import secrets
from pathlib import Path

import pytest

from os_brick_thunder.common import errors, wire
from os_brick_thunder.common.policy.iscsinames import LUN, iqn_of
from os_brick_thunder.common.transport.base import Endpoint
from os_brick_thunder.common.transport.iscsi import initiator_name
from tests.contract.conftest import MIB, World

PORTAL = "127.0.0.1:3260"


def test_who_is_admitted_anew_needs_the_new_credentials(world: World) -> None:
    targets, initiator = world.kit.targets, world.kit.initiator
    Path(world.disk).write_bytes(b"D" * MIB)
    iqn, name = iqn_of("here", "image"), initiator_name()
    targets.export(world.disk, iqn, PORTAL)
    old = targets.admit(iqn, name)
    targets.revoke(iqn, name)
    new = targets.admit(iqn, name)
    export = wire.Export(PORTAL, iqn, LUN, old.username, old.password)
    with pytest.raises(errors.LoginRefused):
        initiator.login(export)
    assert initiator.sessions() == []
    anew = dataclasses.replace(export, username=new.username, password=new.password)
    with open(initiator.login(anew), "rb") as device:
        assert device.read(MIB) == b"D" * MIB
    initiator.logout(Endpoint(iqn, PORTAL))
    assert initiator.sessions() == []


def test_whatever_is_drawn_as_its_credentials_admits_a_host(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    targets, initiator = world.kit.targets, world.kit.initiator
    Path(world.disk).write_bytes(b"D" * MIB)
    iqn, name = iqn_of("here", "image"), initiator_name()
    monkeypatch.setattr(secrets, "token_hex", lambda length: "0b".ljust(2 * length, "1"))
    targets.export(world.disk, iqn, PORTAL)
    found = targets.admit(iqn, name)
    export = wire.Export(PORTAL, iqn, LUN, found.username, found.password)
    with open(initiator.login(export), "rb") as device:
        assert device.read(MIB) == b"D" * MIB
    assert targets.admit(iqn, name) == found  # a session keeps its credentials
    initiator.logout(Endpoint(iqn, PORTAL))
