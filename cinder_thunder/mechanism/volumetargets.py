"""Targets of volumes in LIO, one by one: made, changed, removed, and restored as they were saved.

They are as ``cinder-rtstool`` makes them, which goes through all targets of the host to find one.
Its ``restore`` knows no single target: it first removes all there are, those of the host's agent
and of other backends included, and then restores those whose disks are there now.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import rtslib_fb
from oslo_log import log as logging
from rtslib_fb.utils import RTSLibError

from cinder_thunder.mechanism import saveconfig
from os_brick_thunder.common.policy.iscsinames import IQN_PREFIX, LUN
from os_brick_thunder.common.transport import lio

LOG = logging.getLogger(__name__)


def exists(iqn: str) -> bool:
    """Whether there is a target of this name, whole or not."""
    return lio.find(iqn) is not None


def create(device: str, iqn: str, portals: Sequence[str], port: int, iser: bool) -> None:
    """Export a volume, to nobody yet. A target that is there is left alone, unless an attempt that
    was interrupted has left it incomplete.

    :param portals: addresses
    :raises RTSLibError: it failed, and nothing of the target remains
    :raises OSError: as RTSLibError
    """
    with lio.exclusive():
        if _is_whole(iqn) or _has_initiators(iqn):
            return
        lio.remove(iqn, iqn)
        with contextlib.ExitStack() as undo:
            undo.callback(_undo, iqn)
            store = lio.create_store(iqn, device)
            target = rtslib_fb.Target(rtslib_fb.FabricModule("iscsi"), iqn, mode="create")
            group = rtslib_fb.TPG(target, 1, mode="create")
            group.set_attribute("authentication", "1")
            rtslib_fb.LUN(group, LUN, store)
            group.enable = True
            for address in portals:
                bracketed = address if "." in address or address.startswith("[") else f"[{address}]"
                portal = rtslib_fb.NetworkPortal(group, bracketed, port)
                if iser:
                    portal.iser = True
            undo.pop_all()


def admit(iqn: str, initiator: str, user: str, password: str) -> None:
    """Let an initiator use a volume. One that has been admitted gets what it does not have yet.

    :raises RTSLibError: there is no such target, or it failed
    :raises OSError: it failed
    """
    with lio.exclusive():
        target = lio.find(iqn)
        if target is None:
            raise RTSLibError(f"there is no target {iqn}")
        acl = rtslib_fb.NodeACL(rtslib_fb.TPG(target, 1, mode="lookup"), initiator)
        if (acl.chap_userid, acl.chap_password) != (user, password):
            acl.chap_userid, acl.chap_password = user, password
        if LUN not in {mapped.mapped_lun for mapped in acl.mapped_luns}:
            rtslib_fb.MappedLUN(acl, LUN, tpg_lun=LUN)


def revoke(iqn: str, initiator: str) -> None:
    """Remove an initiator's access to a volume, which ends its session. Absent is success.

    :raises RTSLibError: the kernel refused
    :raises OSError: the kernel refused
    """
    with lio.exclusive():
        target = lio.find(iqn)
        for group in target.tpgs if target else ():
            for acl in group.node_acls:
                if acl.node_wwn == initiator.lower():
                    acl.delete()


def remove(iqn: str) -> None:
    """Remove a volume's target and its storage object. Absent is success.

    :raises RTSLibError: the kernel refused
    :raises OSError: the kernel refused
    """
    with lio.exclusive():
        lio.remove(iqn, iqn)


def restore(iqn: str, saved: Path = saveconfig.SAVED) -> bool:
    """Have a volume's target as it was saved, with its disk's identity and its initiators.

    A target that is whole is left alone; what remains of one that is not is removed.

    :returns: whether it is whole now
    """
    with lio.exclusive():
        if _is_whole(iqn):
            return True
        lio.remove(iqn, iqn)
        for part in saveconfig.parts(saved):
            if part["targets"][0]["wwn"] == iqn:
                _restore(part)
        if _is_whole(iqn):
            return True
        lio.remove(iqn, iqn)  # cinder-rtstool takes a disk without a target for a target
        return False


def restore_others(saved: Path = saveconfig.SAVED) -> None:
    """Restore whatever is missing, except replicas, whose owners export them when asked.

    Other backends of this host restore theirs only while there is no target at all.
    """
    with lio.exclusive():
        present = set(lio.names())
        for part in saveconfig.parts(saved):
            iqn = part["targets"][0]["wwn"]
            disk = part["storage_objects"][0].get("dev", "")
            if not iqn.startswith(IQN_PREFIX) and iqn not in present and os.path.exists(disk):
                _restore(part)


def _restore(part: dict[str, Any]) -> None:
    try:
        problems = rtslib_fb.RTSRoot().restore(part)
    except (RTSLibError, OSError) as error:
        problems = [str(error)]
    for problem in problems:
        LOG.warning("Target %s: %s", part["targets"][0]["wwn"], problem)


def _is_whole(iqn: str) -> bool:
    """Whether a target is enabled, has portals, and a LUN with a disk behind it."""
    with contextlib.suppress(RTSLibError, OSError):
        target = lio.find(iqn)
        groups = list(target.tpgs) if target else []
        return bool(groups) and all(
            group.enable
            and any(True for _ in group.network_portals)
            and [lun.storage_object.name for lun in group.luns] == [iqn]
            for group in groups
        )
    return False


def _has_initiators(iqn: str) -> bool:
    """Whether a host was let in: then it is no remains of an interrupted attempt to make it."""
    target = lio.find(iqn)
    return target is not None and any(True for group in target.tpgs for _ in group.node_acls)


def _undo(iqn: str) -> None:
    """Remove the remains of a failed export; a failure here must not hide the first one."""
    try:
        lio.remove(iqn, iqn)
    except (RTSLibError, OSError):
        LOG.exception("Could not remove the incomplete target %s", iqn)
