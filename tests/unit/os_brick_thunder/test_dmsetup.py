"""What dmsetup is run for."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from os_brick_thunder.common import errors
from os_brick_thunder.common.mechanism.dmsetup import DmSetup
from os_brick_thunder.common.policy.dmtable import Table, Zero


@pytest.mark.parametrize("cleared", [True, False])
@pytest.mark.parametrize(
    ("reload", "resumed"),
    [
        (DmSetup.reload, ("resume", "thunder-a")),
        (DmSetup.reload_noflush, ("resume", "--noflush", "--nolockfs", "thunder-a")),
    ],
    ids=["reload", "reload_noflush"],
)
def test_a_table_that_was_not_swapped_in_is_not_left_loaded(
    cleared: bool, reload: Callable[[DmSetup, str, Table], None], resumed: tuple[str, ...]
) -> None:
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
        reload(DmSetup(run), "thunder-a", Table.of((8, Zero())))
    assert [argv[1:] for argv in calls] == [
        ("load", "thunder-a"),
        resumed,
        ("clear", "thunder-a"),
    ]
