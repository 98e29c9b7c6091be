"""The framework of the doctor: what a check is, how checks are run, and the checks that compute and
storage hosts share.

A check is a function that returns what it found, or raises :class:`Fault`, :class:`Warn` or
:class:`NotApplicable`. It asks a :class:`HostProbe` about the host; unit tests have a fake one.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from cinder_thunder.mechanism import thintools
from os_brick_thunder.common.policy import dmstatus

LOG = logging.getLogger(__name__)

OK, WARN, FAIL, SKIP = "ok", "warn", "FAIL", "skip"
#: Seconds to wait for an answer of the agent or of a tracker.
TIMEOUT = 5.0
#: Seconds by which clocks may differ: a quarter of the silence after which a host is dead.
SKEW = 5.0
#: Kernel modules of the iSCSI target, each with its purpose.
TARGET_MODULES = {
    "target_core_mod": "LIO",
    "target_core_iblock": "its block devices",
    "iscsi_target_mod": "its iSCSI target",
}


@dataclass(frozen=True)
class Check:
    """One line of the report.

    :ivar found: the state that was found
    :ivar remedy: what to do about it; empty if there is nothing to do
    """

    name: str
    result: str
    found: str
    remedy: str = ""


class Fault(Exception):
    """Something is not as it must be."""

    def __init__(self, found: str, remedy: str) -> None:
        self.found = found
        self.remedy = remedy
        super().__init__(found)


class Warn(Fault):
    """Something may be wrong; an operator should check it."""


class NotApplicable(Exception):
    """There is nothing to check here; its text is the reason."""


class HostProbe(Protocol):
    """What checks ask about the host."""

    def is_root(self) -> bool: ...
    def has_tool(self, name: str) -> bool: ...
    def has_module(self, name: str) -> bool: ...
    def has_configfs(self) -> bool: ...
    def has_iscsid(self) -> bool: ...
    def has_address(self, address: str) -> bool: ...
    def thin_tools_flaw(self) -> str: ...
    def initiator_name(self) -> str: ...
    def device_size(self, device: str) -> int: ...
    def pool(self) -> dmstatus.PoolStatus | None: ...
    def suspended(self) -> list[str]: ...
    def pool_io_failed(self) -> list[str]: ...
    def udev_rules(self) -> list[str]: ...
    def watcher(self) -> int: ...
    def socket_mode(self, path: str) -> int | None: ...
    def agent(self, path: str) -> Mapping[str, Any]: ...
    def tracker_clock(self) -> float: ...
    def clock(self) -> float: ...


def examine(checks: Mapping[str, Callable[[], str]]) -> list[Check]:
    """Run all checks; the result of one does not stop the others."""
    return [_examine(name, check) for name, check in checks.items()]


def _examine(name: str, check: Callable[[], str]) -> Check:
    try:
        return Check(name, OK, check())
    except NotApplicable as reason:
        return Check(name, SKIP, one_line(reason))
    except Fault as fault:
        result = WARN if isinstance(fault, Warn) else FAIL
        return Check(name, result, " ".join(fault.found.split()), fault.remedy)
    except Exception as error:  # a check that could not run was not passed
        LOG.debug("Could not check %s", name, exc_info=True)
        found = f"could not be checked: {type(error).__name__}: {one_line(error)}"
        return Check(name, FAIL, found, "run it with --verbose to see where this comes from")


def one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def skipped(names: Iterable[str], reason: str) -> list[Check]:
    """These checks as skipped, for one reason."""
    return [Check(name, SKIP, reason) for name in names]


def difference(there: float, before: float, after: float) -> float:
    """Seconds by which another clock is ahead of ours.

    :param there: the other clock's time
    :param before: our time just before it was read; ``after``: just after
    :returns: 0 if the other clock was within that interval
    """
    if there > after:
        return there - after
    return min(0.0, there - before)


def check_skew(skew: float, whose: str) -> str:
    """:raises Fault: our clock and another one differ too much"""
    if abs(skew) > SKEW:
        way = "behind" if skew > 0 else "ahead of"
        raise Fault(
            f"this host's clock is {abs(skew):.1f} s {way} {whose}",
            "synchronise the clocks of all hosts (chrony): with a wrong clock a live host is taken "
            "for dead",
        )
    return f"within {SKEW:g} s of {whose}"


def check_rights(host: HostProbe) -> str:
    if not host.is_root():
        raise Fault("not root: devices and the agent's socket are out of reach", "run it as root")
    return "root"


def check_tools(host: HostProbe, tools: Mapping[str, str]) -> str:
    """:param tools: each with the Debian package that contains it"""
    missing = [name for name in tools if not host.has_tool(name)]
    if missing:
        packages = " ".join(sorted({tools[name] for name in missing}))
        raise Fault(f"not installed: {', '.join(missing)}", f"apt install {packages}")
    return f"all {len(tools)} are installed"


def check_thin_tools(flaw: str) -> str:
    """:param flaw: as :func:`cinder_thunder.mechanism.thintools.flaw` returns it
    :raises Fault: the tools' answers cannot be used
    """
    if flaw:
        raise Fault(f"{flaw}: volumes are attached without caches", thintools.REMEDY)
    return "thin_delta is right about a known file"


def check_modules(host: HostProbe, modules: Mapping[str, str]) -> str:
    """:param modules: each with its purpose"""
    missing = {name: what for name, what in modules.items() if not host.has_module(name)}
    if missing:
        message = ", ".join(f"{name} ({what})" for name, what in missing.items())
        raise Fault(
            f"the kernel has no {message}",
            f"modprobe -a {' '.join(missing)}; if they do not exist, install the full kernel "
            "package (linux-image-amd64; Ubuntu: linux-modules-extra)",
        )
    return ", ".join(modules)


def check_target(host: HostProbe) -> str:
    found = check_modules(host, TARGET_MODULES)
    if not host.has_configfs():
        raise Fault(
            "configfs is not mounted: LIO cannot be set up",
            "mount -t configfs configfs /sys/kernel/config",
        )
    return found
