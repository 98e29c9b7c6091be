"""What of cinder-volume's work needs root: tools, device-mapper, iSCSI from both ends, copies.

When cinder-volume runs as root, everything here is called directly. Otherwise oslo.privsep runs it
in a helper process that it starts through Cinder's root helper (see
``etc/cinder/rootwrap.d/thunder.filters``).
"""

from __future__ import annotations

import contextlib
import io
import itertools
import logging
import os
import threading
import time
from collections.abc import Callable
from typing import Any

from cinder import monkey_patch
from cinder.cmd import rtstool as cinder_rtstool
from oslo_privsep import capabilities, priv_context

from os_brick_thunder.common import errors, transfer, wire
from os_brick_thunder.common import run as gate
from os_brick_thunder.common.mechanism import dmioctl, thinmeta
from os_brick_thunder.common.policy.extents import Extents
from os_brick_thunder.common.policy.manifest import Manifest
from os_brick_thunder.common.transport import iscsi, lio

LOG = logging.getLogger(__name__)

context = priv_context.PrivContext(
    "cinder_thunder",
    cfg_section="thunder_privileged",
    pypath=__name__ + ".context",
    capabilities=[
        capabilities.CAP_DAC_OVERRIDE,
        capabilities.CAP_DAC_READ_SEARCH,
        capabilities.CAP_SYS_ADMIN,
        capabilities.CAP_SYS_MODULE,  # rtslib loads LIO's modules
        capabilities.CAP_IPC_LOCK,  # LVM and thin_delta lock their memory
        capabilities.CAP_SYS_NICE,  # LVM raises its priority while devices are suspended
    ],
)
if os.geteuid() == 0:
    context.set_client_mode(False)
# At DEBUG it logs what the calls return, and here some return secrets.
logging.getLogger("oslo_privsep.daemon").setLevel(logging.INFO)

#: The only programs that :func:`run` starts.
TOOLS = frozenset(
    {"lvchange", "lvcreate", "lvextend", "lvremove", "lvrename", "lvs", "vgs"}
    | {"thin_delta", "thin_dump"}
)


#: What env(1) may set for them: how Cinder tells LVM its locale and its configuration.
VARIABLES = frozenset({"LC_ALL", "LVM_SYSTEM_DIR", "LVM_SUPPRESS_FD_WARNINGS"})


def run(*argv: str, stdin: str | None = None, timeout: float = gate.DEFAULT_TIMEOUT) -> str:
    """:func:`os_brick_thunder.common.run.run`, as root, for :data:`TOOLS` alone."""
    code: int
    out: str
    code, out, err = _run(list(argv), stdin, timeout)
    if code:
        raise errors.ProcessError(argv, code, err)
    return out


@context.entrypoint
def _run(argv: list[str], stdin: str | None, timeout: float) -> tuple[int, str, str]:
    tool = _tool(argv)
    if tool not in TOOLS:
        raise errors.InvalidRequest(f"{tool!r} is no tool that thunder runs as root")
    try:
        return 0, gate.run(*argv, stdin=stdin, timeout=timeout), ""
    except errors.ProcessError as error:  # its fields do not survive privsep's pipe
        return error.rc, "", error.err


def _tool(argv: list[str]) -> str:
    """The program that ``[env [VARIABLE=…]…] PROGRAM …`` runs."""
    words = iter(argv)
    word = next(words, "")
    if word == "env":
        word = next(words, "")
        while word.partition("=")[0] in VARIABLES:
            word = next(words, "")
    return word


# -- device-mapper -------------------------------------------------------------------------------

#: The only messages that are sent to a device.
MESSAGES = frozenset({thinmeta.RESERVE, thinmeta.RELEASE})
_VERBS: dict[str, Callable[..., str]] = {
    "status": dmioctl.status,
    "table": dmioctl.table,
    "message": dmioctl.message,
}


class DeviceMapper:
    """Device-mapper's ioctl interface, as root; of messages :data:`MESSAGES` alone."""

    def status(self, name: str) -> str:
        return _ask(name, "status")

    def table(self, name: str) -> str:
        return _ask(name, "table")

    def message(self, name: str, text: str) -> str:
        return _ask(name, "message", text)


def _ask(name: str, verb: str, *words: str) -> str:
    code: int
    out: str
    code, out, err = _device_mapper(name, verb, list(words))
    if code:
        raise errors.ProcessError(["dm", name, verb, *words], code, err)
    return out


@context.entrypoint
def _device_mapper(name: str, verb: str, words: list[str]) -> tuple[int, str, str]:
    if verb == "message" and not MESSAGES.issuperset(words):
        raise errors.InvalidRequest(f"{' '.join(words)!r} is no message that thunder sends as root")
    try:
        return 0, _VERBS[verb](name, *words), ""
    except errors.ProcessError as error:  # as in _run
        return error.rc, "", error.err


# -- exports -------------------------------------------------------------------------------------


@context.entrypoint
def export(device: str, iqn: str, portal: str) -> None:
    lio.export(device, iqn, portal)


@context.entrypoint
def _admit(iqn: str, initiator: str) -> tuple[str, str]:
    credentials = lio.admit(iqn, initiator)
    return credentials.username, credentials.password


def admit(iqn: str, initiator: str) -> lio.Credentials:
    return lio.Credentials(*_admit(iqn, initiator))


@context.entrypoint
def revoke(iqn: str, initiator: str) -> None:
    lio.revoke(iqn, initiator)


@context.entrypoint
def unexport(iqn: str) -> None:
    lio.unexport(iqn)


@context.entrypoint
def exports(prefix: str) -> list[str]:
    """Names of the targets that start with ``prefix``."""
    return [target.iqn for target in lio.targets(prefix)]


@context.entrypoint
def rtstool(arguments: list[str]) -> str:
    """What ``cinder-rtstool ARGUMENTS`` prints. Raises what rtslib and configfs raise."""
    lio.forget_cached()
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        cinder_rtstool.main(["cinder-rtstool", *arguments])
    return printed.getvalue()


# -- the initiator -------------------------------------------------------------------------------


@context.entrypoint
def initiator_name() -> str:
    return iscsi.initiator_name()


@context.entrypoint
def _login(export: dict[str, Any]) -> str:
    return iscsi.IscsiAdm().login(wire.parse(wire.Export, export))


def login(export: wire.Export) -> str:
    """:meth:`os_brick_thunder.common.transport.iscsi.IscsiAdm.login`"""
    device: str = _login(export.to_wire())
    return device


@context.entrypoint
def logout(iqn: str, portal: str) -> None:
    iscsi.IscsiAdm().logout(iqn, portal)


@context.entrypoint
def _sessions() -> list[tuple[str, str, str | None]]:
    return [(s.iqn, s.portal, s.device) for s in iscsi.IscsiAdm().sessions()]


def sessions() -> list[iscsi.Session]:
    """Sessions to replicas."""
    return [iscsi.Session(*fields) for fields in _sessions()]


# -- copies --------------------------------------------------------------------------------------

#: Seconds between looks at a copy.
LOOK = 0.2
#: Seconds between lines about it in the log.
TELL = 15.0
#: What is being copied in this process.
_copies: dict[int, transfer.Transfer] = {}
_numbers = itertools.count()


def copy(
    source: str,
    device: str,
    size: int,
    allocated: Extents | None = None,
    manifest: Manifest | None = None,
) -> Manifest | None:
    """Write an image onto an empty thin volume, its holes and zeros left out, flushed.

    It is copied by a native thread; other green threads go on meanwhile.

    :param source: path of a raw file, or of a block device if ``allocated`` is given
    :param size: of the image in bytes
    :param manifest: what every byte is checked against before it is written
    :returns: the image's manifest: the given one, or, of a file, the one that was made on the way
    :raises errors.TransferError: it failed; what was written stays
    """
    extents = None if allocated is None else allocated.to_wire()
    expected = None if manifest is None else (manifest.chunk, manifest.digests)
    number = _begin(source, device, size, extents, expected)
    try:
        began = told = time.monotonic()
        while True:
            done, total, finished = _progress(number)
            if finished:
                break
            if time.monotonic() - told >= TELL:
                told = time.monotonic()
                LOG.info("%s to %s: %d of %d MiB", source, device, done >> 20, total >> 20)
            time.sleep(LOOK)
        made: tuple[int, bytes] | None = _result(number)
    finally:
        _end(number)
    seconds = time.monotonic() - began
    LOG.info("Copied %d MiB of %s to %s in %.1f s", total >> 20, source, device, seconds)
    return manifest if made is None else Manifest(size, *made)


@context.entrypoint
def _begin(
    source: str,
    device: str,
    size: int,
    extents: list[list[int]] | None,
    expected: tuple[int, bytes] | None,
) -> int:
    target = transfer.Device(device, size, write=True, sparse=True)
    opened: transfer.Source
    try:
        if extents is None:
            opened = transfer.File(source, size)
        else:
            opened = transfer.Device(source, size, Extents.from_wire(extents))
    except BaseException:
        target.close()
        raise
    number = next(_numbers)
    _copies[number] = transfer.copy(
        opened,
        target,
        manifest=Manifest(size, *expected) if expected else None,
        digest=extents is None and expected is None,
        spawn=_in_a_native_thread,
    )
    return number


def _in_a_native_thread(work: Callable[[], None]) -> None:
    threads: Any = threading
    if monkey_patch.is_patched():  # its threads are green: a read would stop all of them
        from eventlet import patcher

        threads = patcher.original("threading")
    threads.Thread(target=work, name="transfer", daemon=True).start()


@context.entrypoint
def _progress(number: int) -> tuple[int, int, bool]:
    found = _copies[number]
    return found.done, found.total, found.finished


@context.entrypoint
def _result(number: int) -> tuple[int, bytes] | None:
    """What a finished copy has made: chunk and digests of a manifest. Raises what ended it."""
    found = _copies[number]
    found.wait()
    return None if found.manifest is None else (found.manifest.chunk, found.manifest.digests)


@context.entrypoint
def _end(number: int) -> None:
    """Cancel a copy that goes on still, and let go of both of its ends."""
    _copies.pop(number).close()
