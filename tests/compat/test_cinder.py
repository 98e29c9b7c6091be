"""The driver on the Cinder that is installed: it loads, and has Cinder's interface and options.

``make unit`` runs this on the newest supported Cinder, ``make compat`` on all of them.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from importlib import metadata
from typing import Any

import pytest
from cinder import interface, objects
from cinder.interface import volume_driver
from oslo_config import cfg

objects.register_all()  # before any driver is imported, as in cinder-volume

from cinder.volume import configuration, driver, manager  # noqa: E402
from cinder.volume.drivers.lvm import LVMVolumeDriver  # noqa: E402

import cinder_thunder  # noqa: E402
from cinder_thunder import conf  # noqa: E402
from cinder_thunder.cli.doctor import upgrade  # noqa: E402
from cinder_thunder.driver import ThunderDriver  # noqa: E402

#: Options of Cinder and oslo.db that the driver reads from a backend's section.
READ = (
    "lvm_type",
    "reserved_percentage",
    "target_helper",
    "target_ip_address",
    "target_port",
    "volume_dd_blocksize",
    "volume_group",
)


def test_the_version_is_one_that_setup_cfg_allows() -> None:
    assert 26 <= int(metadata.version("cinder").partition(".")[0]) < 30


def test_the_driver_loads_and_overrides_with_cinders_signatures() -> None:
    assert upgrade.check_driver() == f"cinder {metadata.version('cinder')}"


def test_os_brick_has_the_maps_that_the_connector_is_registered_in() -> None:
    assert upgrade.check_connectors() == f"os-brick {metadata.version('os-brick')}"


def test_every_module_can_be_imported() -> None:
    for module in pkgutil.walk_packages(cinder_thunder.__path__, "cinder_thunder."):
        importlib.import_module(module.name)


def test_cinder_knows_the_driver() -> None:
    assert ThunderDriver in interface._volume_register
    assert issubclass(ThunderDriver, volume_driver.VolumeDriverCore)


def methods(of: type) -> dict[str, inspect.Signature]:
    return {
        name: inspect.signature(method)
        for name, method in inspect.getmembers(of, inspect.isfunction)
        if not name.startswith("_")
    }


def test_the_driver_has_the_whole_interface() -> None:
    """Each method of it can be called with the arguments that Cinder passes."""
    expected = methods(volume_driver.VolumeDriverCore)
    assert expected
    for name, signature in expected.items():
        ours = getattr(ThunderDriver, name)
        if isinstance(ours, property):
            continue
        positional = [
            object()
            for parameter in signature.parameters.values()
            if parameter.default is parameter.empty
            and parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD)
        ]
        inspect.signature(ours).bind(*positional)


def test_nothing_that_the_lvm_driver_offers_is_lost() -> None:
    for kind in vars(driver).values():
        if inspect.isclass(kind) and issubclass(LVMVolumeDriver, kind):
            assert issubclass(ThunderDriver, kind)


def names(options: list[Any]) -> set[str]:
    return {option.name for option in options}


def test_the_options_are_those_of_lvm_and_ours() -> None:
    options = ThunderDriver.get_driver_options()
    assert names(options) == names(LVMVolumeDriver.get_driver_options()) | names(conf.backend_opts)
    config = cfg.ConfigOpts()
    # In one section with all options of a backend; a name with two meanings is an error.
    config.register_opts(manager.volume_backend_opts, group="thunder")
    config.register_opts(driver.volume_opts, group="thunder")
    config.register_opts(options, group="thunder")


@pytest.fixture
def made() -> Any:
    """The driver as cinder-volume makes it; nothing is started."""
    cfg.CONF([], project="cinder", default_config_files=[])
    cfg.CONF.set_override("target_helper", "fake", group=configuration.SHARED_CONF_GROUP)
    config = configuration.Configuration(manager.volume_backend_opts, config_group="thunder")
    yield ThunderDriver(configuration=config, host="stor1@thunder")
    cfg.CONF.reset()
    cfg.CONF.clear_override("target_helper", group=configuration.SHARED_CONF_GROUP)


@pytest.mark.parametrize("name", READ)
def test_options_that_the_driver_reads(made: Any, name: str) -> None:
    getattr(made.configuration, name)


def test_defaults_of_our_options(made: Any) -> None:
    for option in conf.backend_opts:
        assert getattr(made.configuration, option.name) == option.default
