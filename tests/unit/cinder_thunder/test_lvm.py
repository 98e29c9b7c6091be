"""LVM commands: which are waited for, and that one runs at a time."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from cinder_thunder import privileged
from cinder_thunder.mechanism.lvm import ThinVolumes
from os_brick_thunder.common import errors
from os_brick_thunder.common.run import run

#: Everything that may suspend a device.
CHANGES: dict[str, Callable[[ThinVolumes], None]] = {
    "create": lambda volumes: volumes.create("a", 1),
    "snapshot": lambda volumes: volumes.snapshot("a", "b"),
    "snapshot without device": lambda volumes: volumes.snapshot_without_device("a", "b"),
    "extend": lambda volumes: volumes.extend("a", 1),
    "protect": lambda volumes: volumes.protect("a"),
    "activate": lambda volumes: volumes.activate("a", "b"),
    "rename": lambda volumes: volumes.rename("a", "b"),
    "remove": lambda volumes: volumes.remove("a"),
}


def slow(*argv: str, timeout: float | None = 0.1) -> str:
    """Takes longer than any limit."""
    return run("sleep", "0.3", timeout=None if timeout is None else 0.1)


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_command_that_may_suspend_devices_is_never_killed(
    change: Callable[[ThinVolumes], None],
) -> None:
    change(ThinVolumes("vg", "pool", slow))


def test_a_question_to_lvm_has_a_limit() -> None:
    with pytest.raises(errors.ProcessTimeout):
        ThinVolumes("vg", "pool", slow).names()


def test_a_bulk_of_volumes_takes_one_thread_of_privsep_at_a_time() -> None:
    running, most = 0, 0
    count = threading.Lock()

    def watched(*argv: str, timeout: float | None = None) -> str:
        nonlocal running, most
        with count:
            running += 1
            most = max(most, running)
        threading.Event().wait(0.02)
        with count:
            running -= 1
        return ""

    volumes = ThinVolumes("vg", "pool", watched)
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda n: volumes.snapshot(f"v{n}", "master"), range(8)))
    assert most == 1


def test_root_passes_no_limit_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(privileged.context, "client_mode", False)
    limits: list[Any] = []
    monkeypatch.setattr(
        "os_brick_thunder.common.run.run", lambda *argv, stdin, timeout: limits.append(timeout)
    )
    ThinVolumes("vg", "pool", privileged.run, ["env", "LC_ALL=C"]).remove("a")
    assert limits == [None]
