"""Waiting that no unit test needs."""

from __future__ import annotations

import pytest

from os_brick_thunder.agent.stack import devices


@pytest.fixture(autouse=True)
def _no_patience_with_open_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "PROBE", 0.0)
