"""The checks of ``thunder-status upgrade check``: may the services be started with this code?

They are for after ``thunder db upgrade`` and before the restart, so nothing has to run but the
database. What is checked while all runs is ``thunder doctor``'s.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from importlib import metadata
from typing import Any

from oslo_config import cfg
from oslo_upgradecheck import upgradecheck
from oslo_upgradecheck.upgradecheck import Code, Result
from packaging.requirements import Requirement

from cinder_thunder.cli.base import DISTRIBUTION, EXTRA, INSTALL_EXTRA, nothing_checked
from cinder_thunder.cli.doctor import storage as doctor
from cinder_thunder.cli.doctor.compute import Doubt, Fault, NotHere
from os_brick_thunder import register

_INSTALL = "install a version that this thunder is for, or a newer thunder"


class Checks(upgradecheck.UpgradeCommands):
    """The command, over a configuration that is read before :meth:`check` is called."""

    def __init__(self, config: cfg.ConfigOpts) -> None:
        """:param config: has the options of :func:`cinder_thunder.cli.cloud.register`"""
        super().__init__()
        self._config = config

    def check(self) -> Any:
        """Run all checks and print what they found; returns the exit code."""
        try:
            checks = upgrade_checks(doctor.CinderConf(self._config))
        except cfg.Error as error:
            return nothing_checked(str(error))
        self._upgrade_checks = tuple(
            (name, lambda _, check=check: result(check)) for name, check in checks.items()
        )
        return super().check()


def result(check: Callable[[], str]) -> Result:
    """What OpenStack calls what a check of the doctor's found."""
    try:
        return Result(Code.SUCCESS, check())
    except NotHere as reason:
        return Result(Code.SUCCESS, str(reason))
    except Fault as fault:
        code = Code.WARNING if isinstance(fault, Doubt) else Code.FAILURE
        return Result(code, f"{' '.join(fault.found.split())}. Remedy: {fault.remedy}")


def upgrade_checks(found: doctor.Configured) -> Mapping[str, Callable[[], str]]:
    """By name; each is one of the doctor's sort."""
    backends = found.backends()
    checks: dict[str, Callable[[], str]] = {
        "Thunder's tables": lambda: doctor.check_tables(*doctor.revisions(found)),
        "Versions": lambda: check_versions(required()),
        "Cinder's driver interface": check_driver,
        "os-brick's connectors": check_connectors,
    }
    for backend in backends:
        checks[f"Backend {backend.name}"] = lambda b=backend: doctor.check_options(b)  # type: ignore[misc]
    if not backends:
        checks["Backends"] = lambda: doctor.NO_BACKEND
    return checks


def required() -> list[Requirement]:
    """What this thunder says that it needs where Cinder is.

    :raises NotHere: it runs from a source tree
    """
    try:
        lines = metadata.requires(DISTRIBUTION) or []
    except metadata.PackageNotFoundError as error:
        raise NotHere("thunder runs from a source tree, nothing says what it needs") from error
    wanted = [Requirement(line) for line in lines]
    return [w for w in wanted if w.marker is None or w.marker.evaluate({"extra": EXTRA})]


def check_versions(
    wanted: Iterable[Requirement], version: Callable[[str], str] = metadata.version
) -> str:
    """pip says nothing more once somebody else has replaced what it installed for us.

    :raises Doubt: a version is one that thunder was not made for
    :raises Fault: something is not installed
    """
    missing, others = [], []
    for requirement in wanted:
        try:
            installed = version(requirement.name)
        except metadata.PackageNotFoundError:
            missing.append(requirement.name)
            continue
        # Distributions install what pip calls pre-releases.
        if not requirement.specifier.contains(installed, prereleases=True):
            others.append(f"{requirement.name} is {installed}, not {requirement.specifier}")
    if missing:
        raise Fault(f"not installed: {', '.join(missing)}", INSTALL_EXTRA)
    if others:
        raise Doubt("; ".join(others), _INSTALL)
    return "as thunder asks for them"


def check_driver() -> str:
    """Cinder has what our driver builds on, and calls its methods as they want to be called.

    :raises Fault: the driver would not start, or fail when it is used
    """
    cinder = f"cinder {metadata.version('cinder')}"
    try:
        from cinder import objects

        objects.register_all()  # before any driver is imported, as cinder-volume does
        from cinder.volume.drivers.lvm import LVMVolumeDriver

        from cinder_thunder.driver import ThunderDriver
    except (ImportError, AttributeError) as error:
        raise Fault(f"the driver cannot be loaded with {cinder}: {error}", _INSTALL) from error
    changed = differences(ThunderDriver, LVMVolumeDriver)
    if changed:
        raise Fault(f"{cinder} has other arguments for {', '.join(changed)}", _INSTALL)
    return cinder


def differences(ours: type, theirs: type) -> list[str]:
    """Methods that ``ours`` overrides with other arguments than ``theirs`` has."""

    def arguments(method: Any) -> list[tuple[Any, ...]]:
        return [(p.name, p.kind, p.default) for p in inspect.signature(method).parameters.values()]

    return [
        name
        for name in overridden(ours, theirs)
        if arguments(getattr(ours, name)) != arguments(getattr(theirs, name))
    ]


def overridden(ours: type, theirs: type) -> list[str]:
    """Methods of ``theirs`` that ``ours`` has its own of, without its constructor."""
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
