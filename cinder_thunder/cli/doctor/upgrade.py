"""The checks of ``thunder-status upgrade check``: can the services be started with this code?

They are made after ``thunder db upgrade`` and before the restart of the services, so they need
nothing but the database. ``thunder doctor`` checks a running cloud.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from importlib import metadata
from typing import Any

from oslo_config import cfg
from oslo_upgradecheck import upgradecheck
from oslo_upgradecheck.upgradecheck import Code, Result
from packaging.requirements import Requirement

from cinder_thunder.cli.base import DISTRIBUTION, EXTRA, INSTALL_EXTRA, nothing_checked
from cinder_thunder.cli.doctor import storage
from cinder_thunder.cli.doctor.checks import Fault, NotApplicable, Warn, check_thin_tools
from cinder_thunder.cli.doctor.cinder import CinderConf, Configured
from cinder_thunder.mechanism import thintools
from os_brick_thunder import register

_INSTALL = "install a version that this Thunder supports, or a newer Thunder"


class Checks(upgradecheck.UpgradeCommands):
    """The command, over a configuration that is read before :meth:`check` is called."""

    def __init__(self, config: cfg.ConfigOpts) -> None:
        """:param config: has the options of :func:`cinder_thunder.cli.cloud.register`"""
        super().__init__()
        self._config = config

    def check(self) -> Any:
        """Run all checks and print what they found; returns the exit code."""
        try:
            checks = upgrade_checks(CinderConf(self._config))
        except cfg.Error as error:
            return nothing_checked(str(error))
        self._upgrade_checks = tuple(
            (name, lambda _, check=check: result(check)) for name, check in checks.items()
        )
        return super().check()


def result(check: Callable[[], str]) -> Result:
    """A check of the doctor, as a result of oslo.upgradecheck."""
    try:
        return Result(Code.SUCCESS, check())
    except NotApplicable as reason:
        return Result(Code.SUCCESS, str(reason))
    except Fault as fault:
        code = Code.WARNING if isinstance(fault, Warn) else Code.FAILURE
        return Result(code, f"{' '.join(fault.found.split())}. Remedy: {fault.remedy}")


def upgrade_checks(found: Configured) -> Mapping[str, Callable[[], str]]:
    """By name; each is a check as in :mod:`cinder_thunder.cli.doctor.checks`."""
    backends = found.backends()
    checks: dict[str, Callable[[], str]] = {
        "Thunder's tables": lambda: storage.check_tables(*storage.revisions(found)),
        "Versions": lambda: check_versions(required()),
        "Cinder's driver interface": check_driver,
        "os-brick's connectors": check_connectors,
    }
    for backend in backends:
        checks[f"Backend {backend.name}"] = partial(storage.check_options, backend)
    if backends:
        checks["thin_delta"] = lambda: check_thin_tools(thintools.flaw())
    if not backends:
        checks["Backends"] = lambda: storage.NO_BACKEND
    return checks


def required() -> list[Requirement]:
    """The requirements that Thunder declares for a host with Cinder.

    :raises NotApplicable: it runs from a source tree, which declares none
    """
    try:
        lines = metadata.requires(DISTRIBUTION) or []
    except metadata.PackageNotFoundError as error:
        raise NotApplicable(
            "Thunder runs from a source tree, which declares no requirements"
        ) from error
    found = [Requirement(line) for line in lines]
    return [r for r in found if r.marker is None or r.marker.evaluate({"extra": EXTRA})]


def check_versions(
    requirements: Iterable[Requirement], version: Callable[[str], str] = metadata.version
) -> str:
    """Check installed versions: another package may have replaced what pip installed for Thunder.

    :raises Warn: a version is outside of the range that Thunder declares
    :raises Fault: a requirement is not installed
    """
    missing, others = [], []
    for requirement in requirements:
        try:
            installed = version(requirement.name)
        except metadata.PackageNotFoundError:
            missing.append(requirement.name)
            continue
        # Linux distributions package what pip calls pre-releases.
        if not requirement.specifier.contains(installed, prereleases=True):
            others.append(f"{requirement.name} is {installed}, not {requirement.specifier}")
    if missing:
        raise Fault(f"not installed: {', '.join(missing)}", INSTALL_EXTRA)
    if others:
        raise Warn("; ".join(others), _INSTALL)
    return "all within their ranges"


def check_driver() -> str:
    """Check that the driver can be loaded, and that Cinder's LVM driver has the same signatures.

    :raises Fault: the driver would not start, or would fail when it is used
    """
    cinder = f"cinder {metadata.version('cinder')}"
    try:
        from cinder import objects

        objects.register_all()  # before any driver is imported, as in cinder-volume
        from cinder.volume.drivers.lvm import LVMVolumeDriver

        from cinder_thunder.driver import ThunderDriver
    except (ImportError, AttributeError) as error:
        raise Fault(f"the driver cannot be loaded with {cinder}: {error}", _INSTALL) from error
    changed = differences(ThunderDriver, LVMVolumeDriver)
    if changed:
        raise Fault(f"{cinder} has other signatures of {', '.join(changed)}", _INSTALL)
    return cinder


def differences(ours: type, theirs: type) -> list[str]:
    """Methods that ``ours`` overrides with another signature."""

    def arguments(method: Any) -> list[tuple[Any, ...]]:
        return [(p.name, p.kind, p.default) for p in inspect.signature(method).parameters.values()]

    return [
        name
        for name in overridden(ours, theirs)
        if arguments(getattr(ours, name)) != arguments(getattr(theirs, name))
    ]


def overridden(ours: type, theirs: type) -> list[str]:
    """Methods of ``theirs`` that ``ours`` overrides, except the constructor."""
    return sorted(
        name
        for name, method in vars(ours).items()
        if inspect.isfunction(method) and hasattr(theirs, name) and name != "__init__"
    )


def check_connectors() -> str:
    """:raises Fault: our connector could not be registered"""
    try:
        register.maps()
    except RuntimeError as error:
        raise Fault(str(error), _INSTALL) from error
    return f"os-brick {metadata.version('os-brick')}"
