"""Errors survive the way through privsep, which passes on a class and arguments."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

from os_brick_thunder.common import errors

COMPOSED: list[errors.ThunderError] = [
    errors.ProcessError(["dmsetup", "remove", "a b"], 1, "Device busy\n"),
    errors.ProcessTimeout(["lvs"], -9, "killed after 60 s"),
    errors.UnknownVersion("2", 1),
    errors.HostConflict("cmp1 at 192.0.2.1", "cmp1 at 192.0.2.2"),
    errors.DeviceNotFound("/dev/sdx"),
    errors.DeviceNotFound("/dev/sdx", "it is a file of another kind"),
    errors.DeviceBusy("/dev/sdx", "a mount", "Give thunder a device of its own"),
    errors.ForeignData("/dev/sdx", "ext4"),
    errors.TableMismatch("thunder-vol-v", "0 8 zero", "0 8 error"),
    errors.UndoFailed("removal of base i", [errors.DeviceBusy("a", "b"), OSError("no")]),
]


def _all(kind: type[errors.ThunderError]) -> Iterator[type[errors.ThunderError]]:
    yield kind
    for below in kind.__subclasses__():
        yield from _all(below)


SIMPLE = {kind("why") for kind in _all(errors.ThunderError) if "__init__" not in vars(kind)
          and not issubclass(kind, errors.ProcessError)}  # fmt: skip


@pytest.mark.parametrize("error", [*COMPOSED, *SIMPLE], ids=lambda error: type(error).__name__)
def test_an_error_is_built_again_from_its_arguments(error: errors.ThunderError) -> None:
    again = type(error)(*json.loads(json.dumps(error.args)))
    assert str(again) == str(error)
    assert vars(again) == vars(error)


def test_every_error_is_tried() -> None:
    assert {type(error) for error in [*COMPOSED, *SIMPLE]} == set(_all(errors.ThunderError))


def test_the_fields_of_an_error_cross_privsep() -> None:
    error = errors.ProcessError(["lvs", "vg"], 5, "not found")
    again = errors.ProcessError(*error.args)
    assert (again.argv, again.rc, again.err) == (("lvs", "vg"), 5, "not found")
    assert str(again) == "lvs vg: exit code 5: not found"
