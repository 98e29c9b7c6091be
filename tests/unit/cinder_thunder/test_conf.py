"""Options of cinder.conf that are read outside the driver."""

from __future__ import annotations

from pathlib import Path

import pytest
from oslo_config import cfg

from cinder_thunder import conf


@pytest.mark.parametrize(
    ("sections", "seconds"),
    [
        ("", 20),
        ("[backend_defaults]\nthunder_heartbeat_timeout = 60\n", 60),
        ("[b]\nthunder_heartbeat_timeout = 45\n", 45),
        (
            "[backend_defaults]\nthunder_heartbeat_timeout = 60\n"
            "[b]\nthunder_heartbeat_timeout = 45\n",
            45,
        ),
        # As for the driver: what a section says counts, also where that is the default.
        (
            "[backend_defaults]\nthunder_heartbeat_timeout = 60\n"
            "[a]\nthunder_heartbeat_timeout = 20\n",
            20,
        ),
        ("[other]\nthunder_heartbeat_timeout = 45\n", 20),
    ],
)
def test_the_heartbeat_timeout(tmp_path: Path, sections: str, seconds: float) -> None:
    path = tmp_path / "cinder.conf"
    path.write_text(f"[DEFAULT]\nenabled_backends = a, b\n{sections}")
    config = cfg.ConfigOpts()
    config(["--config-file", str(path)], project="cinder")
    assert conf.heartbeat_timeout(config) == seconds
    assert conf.heartbeat_timeout(config) == seconds  # asked twice, it registers nothing twice
