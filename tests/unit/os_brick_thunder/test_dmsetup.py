"""What dmsetup is run for."""

from __future__ import annotations

import pytest

from os_brick_thunder.common import errors
from os_brick_thunder.common.mechanism.dmsetup import DmSetup
from os_brick_thunder.common.policy.dmtable import Table, Zero


@pytest.mark.parametrize("cleared", [True, False])
def test_a_table_that_was_not_swapped_in_is_not_left_loaded(cleared: bool) -> None:
    """The next one to resume the device, whatever for, would swap it in."""
    calls: list[tuple[str, ...]] = []

    def run(*argv: str, stdin: str | None = None, timeout: float = 60) -> str:
        calls.append(argv)
        if argv[1] == "resume":
            raise errors.ProcessTimeout(argv, -9, "killed after 60 s")
        if argv[1] == "clear" and not cleared:
            raise errors.ProcessError(argv, 1, "No such device or address")
        return ""

    with pytest.raises(errors.ProcessTimeout):
        DmSetup(run).reload("thunder-a", Table.of((8, Zero())))
    assert [argv[1:] for argv in calls] == [
        ("load", "thunder-a"),
        ("resume", "thunder-a"),
        ("clear", "thunder-a"),
    ]
