"""How far the kernel reads ahead of what bases lack: little while what boots read is filled."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest

from os_brick_thunder.agent.base.readahead import FAR, LITTLE, Readahead
from os_brick_thunder.common import errors
from os_brick_thunder.common.policy.profile import Profile
from os_brick_thunder.common.state import READY, Base
from tests.fakes import FakeDeviceMapper, FakeLoops

BASE = Base("i", 1 << 20, ((0, 1 << 20),), "l", thin_id=1, phase=READY)
PROFILED = dataclasses.replace(BASE, profile=Profile.of(64 << 10, [3, 1]).encode())


class Loops(FakeLoops):
    def __init__(self) -> None:
        super().__init__(FakeDeviceMapper())
        self.reopened: list[int] = []
        self.meanwhile: Callable[[], None] = lambda: None

    def reopen(self, device: str, read_ahead: int) -> None:
        assert device.endswith("/thunder-paths-i")
        self.reopened.append(read_ahead)
        now, self.meanwhile = self.meanwhile, lambda: None
        now()


@pytest.fixture
def loops() -> Loops:
    return Loops()


def test_a_base_with_a_profile_begins_with_little(loops: Loops) -> None:
    """Its loop devices are not opened once more for that: they would wait for what is read."""
    readahead = Readahead(loops)
    readahead.begin(PROFILED)
    readahead.renew(PROFILED)
    readahead.set(PROFILED, little=True)
    assert loops.reopened == [LITTLE]


def test_other_sources_leave_it_as_it_is(loops: Loops) -> None:
    readahead = Readahead(loops)
    readahead.begin(BASE)
    readahead.renew(BASE)
    readahead.set(BASE, little=True)  # boots were recorded meanwhile
    readahead.renew(BASE)
    readahead.set(BASE, little=False)
    readahead.renew(BASE)
    assert loops.reopened == [FAR, LITTLE, LITTLE, FAR, FAR]


def test_another_base_with_the_same_thin_id_begins_anew(loops: Loops) -> None:
    readahead = Readahead(loops)
    readahead.set(BASE, little=False)
    readahead.begin(PROFILED)
    readahead.renew(PROFILED)
    assert loops.reopened == [FAR, LITTLE]


def test_what_is_set_while_devices_are_opened_anew_holds(loops: Loops) -> None:
    readahead = Readahead(loops)
    readahead.begin(PROFILED)
    loops.meanwhile = lambda: readahead.set(PROFILED, little=False)
    readahead.renew(PROFILED)
    assert loops.reopened == [LITTLE, FAR, FAR]


def test_devices_that_are_gone_are_no_error(loops: Loops) -> None:
    def gone() -> None:
        raise errors.DeviceNotFound("thunder-paths-i")

    readahead = Readahead(loops)
    loops.meanwhile = gone
    readahead.set(BASE, little=True)
    assert loops.reopened == [LITTLE]
