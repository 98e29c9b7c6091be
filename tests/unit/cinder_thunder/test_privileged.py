"""Only listed tools and messages are run as root. Tests do not start privsep."""

from __future__ import annotations

import errno
from typing import Any

import pytest

from cinder_thunder import concurrency, privileged
from os_brick_thunder.common import errors


@pytest.fixture(autouse=True)
def direct(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(privileged.context, "client_mode", False)


def test_a_process_without_eventlets_threads_is_not_green() -> None:
    assert not concurrency.is_green()


def test_tools_outside_the_list_are_refused() -> None:
    for argv in (
        ["sh", "-c", "id"],
        ["env", "LC_ALL=C", "cat", "/etc/shadow"],
        ["env", "LD_PRELOAD=/tmp/x.so", "lvs"],
        ["env", "-S", "lvs"],
        ["env"],
    ):
        with pytest.raises(errors.InvalidRequest, match="is not a tool that thunder runs as root"):
            privileged.run(*argv)


def test_a_failing_tool_says_what_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*argv: str, **kwargs: Any) -> str:
        raise errors.ProcessError(argv, 5, "Volume group not found")

    monkeypatch.setattr("os_brick_thunder.common.run.run", fail)
    with pytest.raises(errors.ProcessError) as error:
        privileged.run("env", "LC_ALL=C", "lvs", "vg")
    assert (error.value.rc, error.value.err) == (5, "Volume group not found")
    assert error.value.argv == ("env", "LC_ALL=C", "lvs", "vg")


def test_messages_outside_the_list_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[tuple[str, str]] = []

    def send(name: str, text: str) -> str:
        sent.append((name, text))
        return ""

    monkeypatch.setitem(privileged._VERBS, "message", send)
    dm = privileged.PrivilegedDm()
    for text in ("delete 7", "reserve_metadata_snap now", ""):
        with pytest.raises(
            errors.InvalidRequest, match="is not a message that thunder sends as root"
        ):
            dm.message("vg-pool-tpool", text)
    dm.message("vg-pool-tpool", "reserve_metadata_snap")
    dm.message("vg-pool-tpool", "release_metadata_snap")
    assert sent == [
        ("vg-pool-tpool", "reserve_metadata_snap"),
        ("vg-pool-tpool", "release_metadata_snap"),
    ]


def test_answers_and_errors_of_device_mapper_survive_the_pipe(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import msgpack  # type: ignore[import-untyped]

    def through(value: Any) -> Any:
        return msgpack.unpackb(msgpack.packb(value, use_bin_type=True), use_list=False, raw=False)

    def fail(name: str) -> str:
        raise errors.ProcessError(["dm", name, "table"], errno.ENXIO, "No such device or address")

    ask = privileged._device_mapper

    def piped(*args: str) -> Any:
        """As privsep calls it, and passes on the class and the arguments of an error."""
        try:
            return through(ask(*through(list(args))))
        except errors.ThunderError as error:
            raise type(error)(*through(error.args)) from None

    monkeypatch.setattr(privileged, "_device_mapper", piped)
    monkeypatch.setitem(privileged._VERBS, "status", lambda name: f"status of {name}")
    monkeypatch.setitem(privileged._VERBS, "table", fail)
    dm = privileged.PrivilegedDm()
    assert dm.status("a") == "status of a"
    with pytest.raises(errors.ProcessError) as error:
        dm.table("a")
    assert (error.value.rc, error.value.err) == (errno.ENXIO, "No such device or address")
    assert error.value.argv == ("dm", "a", "table")
