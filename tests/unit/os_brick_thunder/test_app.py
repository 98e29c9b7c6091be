"""The agent as a whole: its options, and what starts and stops with it."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
from oslo_config import cfg

from os_brick_thunder.agent import app, ports
from os_brick_thunder.agent.app import Settings
from os_brick_thunder.common import conf, errors, wire
from os_brick_thunder.common.state import StateFile
from tests import fakes

TOPOLOGY = wire.Topology("cmp1", "10.0.0.1", "r1", "z1", "iqn.x:cmp1")


def built(folder: Path, settings: Settings) -> app.App:
    store = StateFile(folder / "state.json")
    return app.build(ports.Host(fakes.fake_kit(), store, fakes.FakeTracker(), TOPOLOGY), settings)


def test_settings_come_from_the_options(tmp_path: Path) -> None:
    file = tmp_path / "thunder.conf"
    file.write_text(
        "[thunder]\naddress = fd00::1\nexport_port = 3261\nfill_rate_mib = 3\nrpc_timeout = 10\n"
        "fill_link_rate_mib = 2\npool_low_percent = 95\npool_high_percent = 90\n"
    )
    options = cfg.ConfigOpts()
    conf.register(options, agent=True)
    options([], default_config_files=[str(file)], project="thunder")
    settings = Settings.of(options.thunder)
    assert settings.portal == "[fd00::1]:3261"
    assert (settings.fill_rate, settings.fill_link_rate) == (3 << 20, 2 << 20)
    with pytest.raises(errors.InvalidRequest, match="pool_low_percent 95 is not below"):
        built(tmp_path, settings)


def test_what_was_started_is_stopped(tmp_path: Path) -> None:
    before = set(threading.enumerate())
    agent = built(tmp_path, fakes.SETTINGS).agent
    agent.start()
    started = {thread.name for thread in set(threading.enumerate()) - before}
    assert started == {
        "failover",
        "heartbeat",
        "left-caches",
        "pool-poll",
        "pool-space",
        "reaper",
        "recache",
        "reports",
        "watch",
    }
    agent.stop()
    for thread in set(threading.enumerate()) - before:
        thread.join(10)
        assert not thread.is_alive(), thread.name
