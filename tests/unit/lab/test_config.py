"""The services know every option of the configuration that the lab writes."""

from __future__ import annotations

import configparser
from pathlib import Path

import pytest
from oslo_config import cfg

import os_brick_thunder.common.conf
from cinder_thunder import conf as cinder_conf
from lab import pace
from lab.cloud import config, control, nova
from lab.nodes.topology import NodeSpec, Topology

_STORAGE, _COMPUTE = Topology.standard(storage=1, compute=1).nodes
_LIMITS = ("attach_budget", "attach_deadline", "parent_wait", "rpc_timeout", "drain_timeout")
_DRIVER = "cinder_thunder.driver.ThunderDriver"


def _parsed(text: str) -> configparser.ConfigParser:
    parser = configparser.ConfigParser(interpolation=None, default_section="")
    parser.read_string(text)
    return parser


def test_the_agent_knows_its_options(tmp_path: Path) -> None:
    path = tmp_path / "thunder.conf"
    path.write_text(config.agent(_COMPUTE))
    options = cfg.ConfigOpts()
    os_brick_thunder.common.conf.register(options, agent=True)
    options(["--config-file", str(path)])
    read = options.thunder
    assert (read.host, read.address, read.rack, read.zone) == ("cmp1", "10.77.0.12", "r1", "z1")
    assert read.pool_device == "/dev/ubdb"
    known = {option.dest for option in os_brick_thunder.common.conf.list_opts()[0][1]}
    assert set(_parsed(config.agent(_COMPUTE))["thunder"]) <= known


def test_an_option_instead_of_the_labs() -> None:
    written = _parsed(config.agent(_COMPUTE, attach_deadline=3))["thunder"]
    assert written["attach_deadline"] == "3"


def test_time_limits_are_the_products_own_stretched(monkeypatch: pytest.MonkeyPatch) -> None:
    usual = _parsed(config.agent(_COMPUTE))["thunder"]
    assert [usual[name] for name in _LIMITS] == ["2.0", "10.0", "5.0", "8.0", "30.0"]

    monkeypatch.setattr(pace, "_factor", 2.5)

    slow = _parsed(config.agent(_COMPUTE))["thunder"]
    assert [slow[name] for name in _LIMITS] == ["5.0", "25.0", "12.5", "20.0", "75.0"]
    assert config.agent_limits()["rpc_timeout"] == 20
    backend = config.storage_backend(_STORAGE, _DRIVER)["thunder"]
    assert backend["thunder_heartbeat_timeout"] == 50
    assert backend["thunder_creating_timeout"] == 300
    cinder = _parsed(config.cinder(Path("/state"), "10.77.0.1"))["DEFAULT"]
    assert (cinder["service_down_time"], cinder["rpc_response_timeout"]) == ("75", "150")
    server = _parsed(nova.compute_conf(_COMPUTE))["DEFAULT"]
    assert (server["service_down_time"], server["rpc_response_timeout"]) == ("150", "750")


def test_the_operators_command_knows_when_hosts_are_dead(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pace, "_factor", 2.5)
    path = tmp_path / "cinder.conf"
    path.write_text(config.operator(tmp_path))
    options = cfg.ConfigOpts()
    options(["--config-file", str(path)])
    assert cinder_conf.heartbeat_timeout(options) == 50


def test_the_backend_is_thunder_or_any_other() -> None:
    ours = config.storage_backend(_STORAGE, _DRIVER)
    assert ours["DEFAULT"]["host"] == "stor1"
    known = {option.dest for option in cinder_conf.backend_opts}
    assert {key for key in ours["thunder"] if key.startswith("thunder_")} <= known
    assert ours["thunder"]["thunder_rack"] == "r0"

    other = config.storage_backend(_STORAGE, "cinder.volume.drivers.lvm.LVMVolumeDriver")

    assert not [key for key in other["thunder"] if key.startswith("thunder_")]


def test_a_backend_adds_to_the_common_sections() -> None:
    common = _parsed(config.cinder(Path("/state"), "10.77.0.1"))
    with_backend = _parsed(
        config.cinder(Path("/state"), "10.77.0.11", config.storage_backend(_STORAGE, _DRIVER))
    )
    assert set(with_backend.sections()) - set(common.sections()) == {"thunder"}
    assert with_backend["DEFAULT"]["enabled_backends"] == "thunder"
    assert with_backend["DEFAULT"]["transport_url"] == common["DEFAULT"]["transport_url"]


def test_daemons_are_given_files_that_they_are_told_of() -> None:
    for service in (control.cinder_volume(_STORAGE, _DRIVER), control.thunder_agent(_COMPUTE)):
        (path,) = service.files
        assert path in service.argv


def test_a_rack_with_an_odd_name_reaches_the_agent() -> None:
    node = NodeSpec("cmp1", "compute", 0, "row 1 = left")
    assert _parsed(config.agent(node))["thunder"]["rack"] == "row 1 = left"
