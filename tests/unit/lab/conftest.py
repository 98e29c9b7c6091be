"""Time limits in unit tests are not stretched, whatever the machine."""

from __future__ import annotations

import pytest

from lab import pace


@pytest.fixture(autouse=True)
def _not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(pace.VARIABLE, raising=False)
    monkeypatch.setattr(pace, "_factor", None)
