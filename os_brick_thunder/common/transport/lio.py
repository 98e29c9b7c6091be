"""LIO, the kernel's iSCSI target: read-only exports of replicas, through rtslib-fb as a library.

Each replica is a target with one LUN, and each initiator has an ACL of its own. All functions are
idempotent: an existing export is matched, and removing an absent one is success. The kernel's
configfs is the only state. Credentials are read back from it, so a restart of the exporter does not
break sessions.

A host may have hundreds of targets, so each is looked up by its name. rtslib's lists of all targets
and of all storage objects make an object of each, and fail if it cannot make one of them.

Calls must not run at the same time as other users of rtslib (``cinder-rtstool``, targetcli): the
library has no locking of its own. :func:`exclusive` serialises all of ours on a host, the agent's
and cinder-volume's; a caller that shares the host with others takes their lock, too.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import secrets
import threading
import uuid
from collections.abc import Callable, Iterator
from functools import wraps
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import rtslib_fb
from rtslib_fb.utils import RTSLibError, RTSLibNotInCFSError

from os_brick_thunder.common import errors, files, formats, wire
from os_brick_thunder.common.policy.iscsinames import IQN_PREFIX, LUN
from os_brick_thunder.common.policy.timelimits import LIO_LOCK
from os_brick_thunder.common.transport.base import Credentials, Target

#: Where rtslib has the kernel keep persistent reservations. Neither it nor its package makes the
#: folder, and without it every call fails: "Cannot set dbroot".
DBROOT = Path("/etc/target")
#: Attributes of a target's portal group: an initiator needs an ACL of its own and its CHAP secret,
#: and cannot write.
#: https://docs.kernel.org/target/index.html
ATTRIBUTES = {
    "authentication": "1",
    "generate_node_acls": "0",
    "cache_dynamic_acls": "0",
    "demo_mode_discovery": "0",
    "demo_mode_write_protect": "1",
    "prod_mode_write_protect": "1",
}

_P = ParamSpec("_P")
_R = TypeVar("_R")
LOG = logging.getLogger(__name__)
#: The beginning of CHAP names that the kernel takes for base64, and refuses (extract_param() in
#: drivers/target/iscsi/iscsi_target_nego.c).
_REFUSED = "0b"
#: What processes lock: the root of the tree that they change, which is the same one in every
#: container of a host.
CONFIGFS = Path("/sys/kernel/config")
#: The kernel's folder of a block device that is exported: below ``core``, one for each.
_BACKSTORE = "iblock"
_lock = threading.RLock()
_held: list[int] = []  # the descriptor that has the lock, while a call has it


@contextlib.contextmanager
def exclusive() -> Iterator[None]:
    """Keep other threads, and other processes of ours on this host, from using rtslib, and have it
    read the kernel's state again, which they may have changed.

    :raises OSError: :data:`DBROOT` cannot be made
    """
    with _lock, _process_lock():
        forget_cached()
        yield


@contextlib.contextmanager
def _process_lock() -> Iterator[None]:
    if _held:
        yield
        return
    try:
        _held.append(os.open(CONFIGFS, os.O_RDONLY | os.O_DIRECTORY))
    except OSError:  # not mounted: rtslib says what to do
        yield
        return
    try:
        if not files.lock(_held[0], LIO_LOCK):
            LOG.warning("LIO has been in use by another process for %g s", LIO_LOCK)
        yield
    finally:
        os.close(_held.pop())


def forget_cached() -> None:
    """Have rtslib read the kernel's state again.

    :raises OSError: :data:`DBROOT` cannot be made
    """
    DBROOT.mkdir(mode=0o755, parents=True, exist_ok=True)  # oslo.privsep's daemon has no umask
    rtslib_fb.RTSRoot().invalidate_caches()


# -- by name: for callers of exclusive() ---------------------------------------------------------


def names() -> list[str]:
    """Names of all iSCSI targets of this host."""
    fabric = rtslib_fb.FabricModule("iscsi")
    return [name for name in _listed(fabric.path) if name.startswith(("iqn.", "naa.", "eui."))]


def find(iqn: str) -> Any | None:
    """rtslib's target of this name, or None.

    :raises RTSLibError: no target can have that name
    """
    fabric = rtslib_fb.FabricModule("iscsi")
    if not fabric.exists:  # rtslib would load the module
        return None
    try:
        return rtslib_fb.Target(fabric, iqn, mode="lookup")
    except RTSLibNotInCFSError:
        return None


def find_store(name: str) -> Any | None:
    """rtslib's storage object of this name, for a block device, or None."""
    for backstore, index in _backstores():
        if backstore == _BACKSTORE and os.path.isdir(f"{_core()}/{backstore}_{index}/{name}"):
            return rtslib_fb.BlockStorageObject(name, index=index)
    return None


def create_store(name: str, device: str, **options: Any) -> Any:
    """A new storage object for a block device.

    :param options: of rtslib's
    :raises RTSLibError: the device is in use, or cannot be exported
    """
    used = {index for _, index in _backstores()}
    index = next(index for index in itertools.count() if index not in used)
    return rtslib_fb.BlockStorageObject(name, dev=device, index=index, **options)


def remove(iqn: str, store: str) -> None:
    """Remove a target and its storage object. Absent is success.

    :raises RTSLibError: the kernel refused
    :raises OSError: the kernel refused
    """
    target = find(iqn)
    if target is not None:
        target.delete()
    found = find_store(store)
    if found is None:
        return
    folder = Path(found.path)
    try:
        folder.rmdir()
    except OSError:  # something uses it: rtslib looks for that in all targets
        found.delete()
    else:
        folder.parent.rmdir()


def _core() -> str:
    return f"{rtslib_fb.Target.configfs_dir}/core"


def _backstores() -> Iterator[tuple[str, int]]:
    """Kind and index of each: "iblock_7" is ("iblock", 7)."""
    for folder in _listed(_core()):
        kind, _, index = folder.rpartition("_")
        if kind and index.isdecimal():
            yield kind, int(index)


def _listed(folder: str) -> list[str]:
    try:
        return os.listdir(folder)
    except FileNotFoundError:  # LIO's modules are not loaded
        return []


# -- replicas ------------------------------------------------------------------------------------


def _serialised(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """Run one at a time, and turn errors of rtslib and configfs into :class:`ExportError`."""

    @wraps(function)
    def guarded(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        try:
            with exclusive():
                return function(*args, **kwargs)
        except (RTSLibError, OSError, wire.MalformedValue) as error:
            what = " ".join(str(arg) for arg in args)
            raise errors.ExportError(
                f"LIO refused to {function.__name__} {what}: {error}"
            ) from error

    return guarded


@_serialised
def export(device: str, iqn: str, portal: str) -> None:
    """Export ``device`` read-only as ``iqn`` at ``portal`` ("address:port"), without any ACL yet.

    An export of another device under that name is replaced. The device must not be open
    exclusively elsewhere; a device that another dm device uses is, so export a dm-linear on it.

    :raises errors.ExportError: it failed, and nothing of the export remains
    """
    _check(iqn)
    wire.checked(formats.Portal, portal, "portal")
    found = find(iqn)
    if found is not None and _is(found, device, portal):
        return
    unexport(iqn)
    with contextlib.ExitStack() as undo:
        undo.callback(_undo, iqn)
        store = create_store(
            store_name(iqn),
            device,
            wwn=str(uuid.uuid5(uuid.NAMESPACE_URL, iqn)),  # the same disk after a restart
            readonly=True,
        )
        target = rtslib_fb.Target(rtslib_fb.FabricModule("iscsi"), iqn, mode="create")
        group = rtslib_fb.TPG(target, 1, mode="create")
        for name, value in ATTRIBUTES.items():
            group.set_attribute(name, value)
        rtslib_fb.LUN(group, LUN, store)
        address, _, port = portal.rpartition(":")
        rtslib_fb.NetworkPortal(group, address, int(port))
        group.enable = True
        undo.pop_all()


@_serialised
def admit(iqn: str, initiator: str) -> Credentials:
    """Let ``initiator`` read ``iqn``; it keeps its credentials until it is revoked.

    :raises errors.ExportError: there is no such export, or the initiator's name is not valid
    """
    _check(iqn)
    _check_initiator(initiator)
    target = find(iqn)
    if target is None:
        raise errors.ExportError(f"there is no export {iqn} to admit {initiator} to")
    group = rtslib_fb.TPG(target, 1, mode="lookup")
    acl = rtslib_fb.NodeACL(group, initiator)
    userid = str(acl.chap_userid)
    if not acl.chap_password or not userid or userid.startswith(_REFUSED):
        acl.chap_password = secrets.token_hex(16)
        acl.chap_userid = "u" + secrets.token_hex(8)  # last: it marks the pair as complete
    if LUN not in {mapped.mapped_lun for mapped in acl.mapped_luns}:
        rtslib_fb.MappedLUN(acl, LUN, tpg_lun=LUN, write_protect=True)
    return Credentials(str(acl.chap_userid), str(acl.chap_password))


@_serialised
def revoke(iqn: str, initiator: str) -> None:
    """Remove an initiator's ACL, which ends its session. Absent is success."""
    _check(iqn)
    target = find(iqn)
    for group in target.tpgs if target else ():
        for acl in group.node_acls:
            if acl.node_wwn == initiator.lower():
                acl.delete()


@_serialised
def unexport(iqn: str) -> None:
    """Remove an export with its sessions and ACLs. Absent is success."""
    _check(iqn)
    remove(iqn, store_name(iqn))


@_serialised
def targets(prefix: str = IQN_PREFIX) -> tuple[Target, ...]:
    """All exports whose name starts with ``prefix``, sorted by name."""
    found = []
    for target in _targets(prefix):
        groups = list(target.tpgs)
        found.append(
            Target(
                iqn=target.wwn,
                device=_device(target),
                portals=tuple(
                    f"{portal.ip_address}:{portal.port}"
                    for group in groups
                    for portal in group.network_portals
                ),
                initiators=tuple(
                    sorted(acl.node_wwn for group in groups for acl in group.node_acls)
                ),
                readers=tuple(
                    sorted(
                        acl.node_wwn
                        for group in groups
                        for acl in group.node_acls
                        if acl.session is not None
                    )
                ),
            )
        )
    return tuple(sorted(found, key=lambda target: target.iqn))


def _check(iqn: str) -> None:
    """Targets of volumes have other names: none of them is ever changed here.

    :raises wire.MalformedValue: not the name of a replica
    """
    wire.checked(formats.Target, iqn, "iqn")


def _check_initiator(name: str) -> None:
    """:raises wire.MalformedValue:"""
    wire.checked(formats.Initiator, name, "initiator")
    if not name:
        raise wire.MalformedValue("initiator: a name was expected")


def _targets(prefix: str) -> Iterator[Any]:
    for name in names():
        target = find(name) if name.startswith(prefix) else None
        if target is not None:
            yield target


def store_name(iqn: str) -> str:
    """Of a replica's storage object."""
    return "thunder." + iqn.removeprefix(IQN_PREFIX).replace(":", ".")


def _device(target: Any) -> str:
    for group in target.tpgs:
        for lun in group.luns:
            with contextlib.suppress(RTSLibError, OSError):  # half-built by a crash
                return str(lun.storage_object.udev_path)
    return ""


def _is(target: Any, device: str, portal: str) -> bool:
    """Whether ``target`` is a complete export of the device that has this path now."""
    groups = list(target.tpgs)
    if len(groups) != 1 or not groups[0].enable or _device(target) != device:
        return False
    luns = list(groups[0].luns)
    if not luns or not Path(device).exists():
        return False
    stored = f"{luns[0].storage_object.major}:{luns[0].storage_object.minor}"
    portals = {f"{p.ip_address}:{p.port}" for p in groups[0].network_portals}
    return stored == _number(device) and portals == {portal}


def _number(device: str) -> str:
    number = Path(device).stat().st_rdev
    return f"{os.major(number)}:{os.minor(number)}"


def _undo(iqn: str) -> None:
    """Remove the remains of a failed export; a failure here must not hide the first one."""
    try:
        remove(iqn, store_name(iqn))
    except (RTSLibError, OSError):
        LOG.exception("Could not remove the incomplete export %s", iqn)
