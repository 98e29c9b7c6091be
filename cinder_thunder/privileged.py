"""The part of cinder-volume's work that requires root: tools, device-mapper, iSCSI, copies.

If cinder-volume runs as root, everything here is called directly. Otherwise oslo.privsep runs it in
a daemon that it starts through Cinder's root helper (see
``etc/cinder/rootwrap.d/thunder.filters``).
"""

from __future__ import annotations

import itertools
import logging
import os
import re
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from oslo_config import cfg
from oslo_privsep import capabilities, priv_context

from cinder_thunder import concurrency
from cinder_thunder.mechanism import saveconfig, thintools, volumetargets
from os_brick_thunder.common import errors, transfer, wire
from os_brick_thunder.common import run as gate
from os_brick_thunder.common.copyends import GRAIN, Destination, Disk, File, Input, Nowhere
from os_brick_thunder.common.mechanism import dmioctl, thinmeta, thinroots
from os_brick_thunder.common.policy.extents import Extents
from os_brick_thunder.common.policy.hashtree import HashTree
from os_brick_thunder.common.policy.manifest import Manifest, chunk_for
from os_brick_thunder.common.transport import iscsi, lio
from os_brick_thunder.common.transport.base import Credentials, Endpoint, Session
from os_brick_thunder.common.treewriter import TreeWriter

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
# Most calls wait for a tool, the kernel or each other: a thread each, so that a storm of one kind
# does not hold up the others.
cfg.CONF.set_default("thread_pool_size", 64, group="thunder_privileged")
if os.geteuid() == 0:
    context.set_client_mode(False)
# At DEBUG it logs what calls return, and some of these return secrets.
logging.getLogger("oslo_privsep.daemon").setLevel(logging.INFO)

#: The only programs that :func:`run` starts.
TOOLS = frozenset(
    {"lvchange", "lvcreate", "lvextend", "lvremove", "lvrename", "lvs", "vgs"}
    | {"thin_delta", "thin_dump"}
)


#: The variables that env(1) may set for them: Cinder sets LVM's locale and configuration.
VARIABLES = frozenset({"LC_ALL", "LVM_SYSTEM_DIR", "LVM_SUPPRESS_FD_WARNINGS"})


@context.entrypoint
def run(*argv: str, stdin: str | None = None, timeout: float | None = gate.DEFAULT_TIMEOUT) -> str:
    """:func:`os_brick_thunder.common.run.run`, as root, for :data:`TOOLS` alone."""
    tool = _tool(argv)
    if tool not in TOOLS:
        raise errors.InvalidRequest(f"{tool!r} is not a tool that thunder runs as root")
    return gate.run(*argv, stdin=stdin, timeout=timeout)


def _tool(argv: Sequence[str]) -> str:
    """The program that ``[env [VARIABLE=…]…] PROGRAM …`` runs."""
    words = iter(argv)
    word = next(words, "")
    if word == "env":
        word = next(words, "")
        while word.partition("=")[0] in VARIABLES:
            word = next(words, "")
    return word


@context.entrypoint
def thin_tools_flaw() -> str:
    """:func:`cinder_thunder.mechanism.thintools.flaw`, of the tools that root runs."""
    return thintools.flaw()


# -- device-mapper -------------------------------------------------------------------------------

#: The only messages that are sent to a device.
MESSAGES = frozenset({thinmeta.RESERVE, thinmeta.RELEASE})
_VERBS: dict[str, Callable[..., str]] = {
    "status": dmioctl.status,
    "table": dmioctl.table,
    "message": dmioctl.message,
}


class PrivilegedDm:
    """Device-mapper's ioctl interface, as root; of the messages, :data:`MESSAGES` alone."""

    def status(self, name: str) -> str:
        return str(_device_mapper(name, "status"))

    def table(self, name: str) -> str:
        return str(_device_mapper(name, "table"))

    def message(self, name: str, text: str) -> str:
        return str(_device_mapper(name, "message", text))


@context.entrypoint
def _device_mapper(name: str, verb: str, *words: str) -> str:
    if verb == "message" and not MESSAGES.issuperset(words):
        message = " ".join(words)
        raise errors.InvalidRequest(f"{message!r} is not a message that thunder sends as root")
    return _VERBS[verb](name, *words)


@context.entrypoint
def same_mappings(metadata: str, root: int, one: int, other: int) -> bool:
    """:func:`os_brick_thunder.common.mechanism.thinroots.same_mappings`, of a pool of LVM's"""
    if not re.fullmatch(r"/dev/mapper/[\w.+-]+_tmeta", metadata):
        raise errors.InvalidRequest(f"{metadata!r} is not the metadata device of a thin pool")
    return thinroots.same_mappings(metadata, root, one, other)


# -- exports -------------------------------------------------------------------------------------


@context.entrypoint
def export(device: str, iqn: str, portal: str) -> None:
    lio.export(device, iqn, portal)


@context.entrypoint
def _admit(iqn: str, initiator: str) -> tuple[str, str]:
    credentials = lio.admit(iqn, initiator)
    return credentials.username, credentials.password


def admit(iqn: str, initiator: str) -> Credentials:
    return Credentials(*_admit(iqn, initiator))


@context.entrypoint
def revoke(iqn: str, initiator: str) -> None:
    lio.revoke(iqn, initiator)


@context.entrypoint
def unexport(iqn: str) -> None:
    lio.unexport(iqn)


@context.entrypoint
def exports(prefix: str) -> list[str]:
    """Names of the targets that start with ``prefix``."""
    return sorted(name for name in lio.names() if name.startswith(prefix))


@context.entrypoint
def target_exists(iqn: str) -> bool:
    """:func:`cinder_thunder.mechanism.volumetargets.exists`"""
    return volumetargets.exists(iqn)


@context.entrypoint
def create_target(device: str, iqn: str, portals: list[str], port: int, iser: bool) -> None:
    """:func:`cinder_thunder.mechanism.volumetargets.create`"""
    volumetargets.create(device, iqn, portals, port, iser)


@context.entrypoint
def remove_target(iqn: str) -> None:
    """:func:`cinder_thunder.mechanism.volumetargets.remove`"""
    volumetargets.remove(iqn)


@context.entrypoint
def add_initiator(iqn: str, initiator: str, user: str, password: str) -> None:
    """:func:`cinder_thunder.mechanism.volumetargets.admit`"""
    volumetargets.admit(iqn, initiator, user, password)


@context.entrypoint
def delete_initiator(iqn: str, initiator: str) -> None:
    """:func:`cinder_thunder.mechanism.volumetargets.revoke`"""
    volumetargets.revoke(iqn, initiator)


@context.entrypoint
def save_targets(changed: list[str] | None) -> None:
    """:func:`cinder_thunder.mechanism.saveconfig.save`"""
    saveconfig.save(changed)


@context.entrypoint
def restore_target(iqn: str) -> bool:
    """:func:`cinder_thunder.mechanism.volumetargets.restore`"""
    return volumetargets.restore(iqn)


@context.entrypoint
def restore_other_targets() -> None:
    """:func:`cinder_thunder.mechanism.volumetargets.restore_others`"""
    volumetargets.restore_others()


# -- the initiator -------------------------------------------------------------------------------


@context.entrypoint
def initiator_name() -> str:
    return iscsi.initiator_name()


@context.entrypoint
def _login(export: dict[str, Any]) -> str:
    return iscsi.IscsiAdm().login(wire.parse(wire.Export, export))


def login(export: wire.Export) -> str:
    """:meth:`os_brick_thunder.common.transport.base.Initiator.login`"""
    device: str = _login(export.to_wire())
    return device


@context.entrypoint
def _logout(target: str, portal: str) -> None:
    iscsi.IscsiAdm().logout(Endpoint(target, portal))


def logout(endpoint: Endpoint) -> None:
    """:meth:`os_brick_thunder.common.transport.base.Initiator.logout`"""
    _logout(endpoint.target, endpoint.portal)


@context.entrypoint
def _sessions() -> list[tuple[str, str, str | None, bool]]:
    return [
        (s.endpoint.target, s.endpoint.portal, s.device, s.alive)
        for s in iscsi.IscsiAdm().sessions()
    ]


def sessions() -> list[Session]:
    """Sessions to replicas."""
    return [
        Session(Endpoint(target, portal), device, alive)
        for target, portal, device, alive in _sessions()
    ]


# -- copies --------------------------------------------------------------------------------------

#: Seconds between two checks of a copy.
POLL_INTERVAL = 0.2
#: Seconds between two lines about a copy in the log.
PROGRESS_LOG_INTERVAL = 15.0
#: The copies of this process, and what each writes to.
_copies: dict[int, tuple[transfer.Transfer, Destination]] = {}
_numbers = itertools.count()


def copy(
    source: str,
    device: str,
    size: int,
    block: int,
    allocated: Extents | None = None,
    manifest: Manifest | None = None,
) -> Manifest | None:
    """Write an image to an empty thin volume, without holes and zeroes, and flush it.

    A native thread copies; other green threads go on meanwhile.

    :param source: path of a raw file, or of a block device if ``allocated`` is given
    :param block: bytes of a block of the volume's pool. Blocks of zeroes alone are not written;
        others are written as a whole, as the pool may leave in them what was there before
    :param size: of the image in bytes
    :param manifest: digests that all data is checked against before it is written
    :returns: the image's manifest: the given one, or, for a file, the one computed on the way
    :raises errors.TransferError: it failed; the volume is incomplete
    """
    extents = None if allocated is None else allocated.to_wire()
    expected = None if manifest is None else (manifest.chunk, manifest.digests)
    number = _begin(source, device, size, block, extents, expected)
    made = _finish(number, source, device)
    return manifest if made is None else Manifest(size, *made[:2])


def manifest_of(
    device: str,
    size: int,
    allocated: Extents,
    tree: str | None = None,
    block: int = GRAIN,
    chunk: int | None = None,
) -> tuple[Manifest, HashTree]:
    """The digests of what an image's volume has on disk.

    :param allocated: what is mapped of it; the rest reads as zeroes, and is not read
    :param tree: the device of a snapshot of the volume, to which the image's hash tree is written
    :param block: bytes of a block of that device's pool
    :param chunk: bytes that a digest covers, unless as in new manifests
    :raises errors.TransferError: it cannot be read, or the tree cannot be written
    """
    number = _begin(device, None, size, block, allocated.to_wire(), None, tree, chunk)
    made = _finish(number, device, tree or "nowhere")
    assert made is not None  # noqa: S101 - it has nothing to be compared with
    return Manifest(size, *made[:2]), HashTree(*made[2:])


def _finish(number: int, source: str, device: str) -> tuple[int, bytes, str, bytes] | None:
    """Wait for the end of a copy; returns what :func:`_result` does."""
    try:
        began = logged = time.monotonic()
        while True:
            done, total, finished = _progress(number)
            if finished:
                break
            if time.monotonic() - logged >= PROGRESS_LOG_INTERVAL:
                logged = time.monotonic()
                LOG.info("%s to %s: %d of %d MiB", source, device, done >> 20, total >> 20)
            time.sleep(POLL_INTERVAL)
        made: tuple[int, bytes, str, bytes] | None = _result(number)
    finally:
        _end(number)
    seconds = time.monotonic() - began
    LOG.info("Copied %d MiB of %s to %s in %.1f s", total >> 20, source, device, seconds)
    return made


@context.entrypoint
def _begin(
    source: str,
    device: str | None,
    size: int,
    block: int,
    extents: list[list[int]] | None,
    expected: tuple[int, bytes] | None,
    tree: str | None = None,
    chunk: int | None = None,
) -> int:
    """:param device: None to read the source alone, and write its hash tree if ``tree`` is given"""
    target: Destination = Nowhere(size)
    if device is not None:
        target = Disk(device, size, write=True, sparse=True, block=block)
    elif tree is not None:
        data = Extents.from_wire(extents or ())
        target = TreeWriter(tree, size, data, block, chunk or chunk_for(size))
    opened: Input
    try:
        if extents is None:
            opened = File(source, size)
        else:
            opened = Disk(source, size, Extents.from_wire(extents))
    except BaseException:
        target.close()
        raise
    number = next(_numbers)
    started = transfer.copy(
        opened,
        target,
        check=Manifest(size, *expected) if expected else None,
        digest=expected is None and (extents is None or device is None),
        chunk=chunk,
        piece=transfer.PIECE,
        spawn=_in_a_native_thread,
    )
    _copies[number] = started, target
    return number


def _in_a_native_thread(work: Callable[[], None]) -> None:
    threads: Any = threading
    if concurrency.is_green():  # a read in a green thread would stop all of them
        from eventlet import patcher

        threads = patcher.original("threading")
    threads.Thread(target=work, name="transfer", daemon=True).start()


@context.entrypoint
def _progress(number: int) -> tuple[int, int, bool]:
    found, _ = _copies[number]
    return found.done, found.total, found.finished


@context.entrypoint
def _result(number: int) -> tuple[int, bytes, str, bytes] | None:
    """Chunk and digests of the manifest that a finished copy computed, and root and digests of the
    hash tree, which are empty if there is none. Raises its error.
    """
    found, target = _copies[number]
    found.wait()
    if found.manifest is None:
        return None
    tree = (target.root, target.digests) if isinstance(target, TreeWriter) else ("", b"")
    return found.manifest.chunk, found.manifest.digests, *tree


@context.entrypoint
def _end(number: int) -> None:
    """Cancel a copy if it is still running, and close its source and its target."""
    _copies.pop(number)[0].close()
