"""What runs as root is a fixed list of tools; privsep is not started in tests."""

from __future__ import annotations

from typing import Any

import pytest

from cinder_thunder import privileged
from os_brick_thunder import errors


@pytest.fixture(autouse=True)
def direct(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(privileged.context, "client_mode", False)


def test_tools_outside_the_list_are_refused() -> None:
    for argv in (
        ["sh", "-c", "id"],
        ["env", "LC_ALL=C", "cat", "/etc/shadow"],
        ["env", "LD_PRELOAD=/tmp/x.so", "lvs"],
        ["env", "-S", "lvs"],
        ["env"],
    ):
        with pytest.raises(errors.InvalidRequest, match="no tool that thunder runs as root"):
            privileged.run(*argv)


def test_a_failing_tool_says_what_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also through privsep's pipe, which takes an exception's arguments and not its fields."""

    def fail(*argv: str, **kwargs: Any) -> str:
        raise errors.ProcessError(argv, 5, "Volume group not found")

    monkeypatch.setattr("os_brick_thunder.run.run", fail)
    with pytest.raises(errors.ProcessError) as error:
        privileged.run("env", "LC_ALL=C", "lvs", "vg")
    assert (error.value.rc, error.value.err) == (5, "Volume group not found")
    assert error.value.argv == ("env", "LC_ALL=C", "lvs", "vg")
