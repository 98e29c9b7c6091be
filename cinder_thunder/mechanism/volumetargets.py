"""Targets of volumes in LIO, one by one: whether they are whole, and how they were when saved.

``cinder-rtstool restore`` knows no single target: it first removes all there are, those of the
host's agent and of other backends included, and then restores those whose disks are there now.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import rtslib_fb
from oslo_log import log as logging
from rtslib_fb.utils import RTSLibError

from os_brick_thunder.common.policy.iscsinames import IQN_PREFIX
from os_brick_thunder.common.transport import lio

LOG = logging.getLogger(__name__)
#: Where ``cinder-rtstool save`` puts the configuration.
SAVED = Path("/etc/target/saveconfig.json")


def restore(iqn: str, saved: Path = SAVED) -> bool:
    """Have a volume's target as it was saved, with its disk's identity and its initiators.

    A target that is whole is left alone; what remains of one that is not is removed.

    :returns: whether it is whole now
    """
    with lio.exclusive():
        if _is_whole(iqn):
            return True
        _remove(iqn)
        for part in _parts(saved):
            if part["targets"][0]["wwn"] == iqn:
                _restore(part)
        if _is_whole(iqn):
            return True
        _remove(iqn)  # cinder-rtstool takes a disk without a target for a target
        return False


def restore_others(saved: Path = SAVED) -> None:
    """Restore whatever is missing, except replicas, whose owners export them when asked.

    Other backends of this host restore theirs only while there is no target at all.
    """
    with lio.exclusive():
        present = {target.wwn for target in rtslib_fb.RTSRoot().targets}
        for part in _parts(saved):
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


def _parts(file: Path) -> Iterator[dict[str, Any]]:
    """The saved configuration as one for each target that Cinder made: its disk has its name."""
    try:
        raw = json.loads(file.read_text())
        stores = {store["name"]: store for store in raw["storage_objects"]}
        targets = [target for target in raw["targets"] if target["wwn"] in stores]
    except FileNotFoundError:
        return
    except (OSError, ValueError, KeyError, TypeError) as error:
        LOG.warning("%s cannot be read (%s)", file, error)
        return
    for target in targets:
        yield {"storage_objects": [stores[target["wwn"]]], "targets": [target]}


def _is_whole(iqn: str) -> bool:
    """Whether a target is enabled, has portals, and a LUN with a disk behind it."""
    with contextlib.suppress(RTSLibError, OSError):
        for target in _targets(iqn):
            groups = list(target.tpgs)
            return bool(groups) and all(
                group.enable
                and any(True for _ in group.network_portals)
                and [lun.storage_object.name for lun in group.luns] == [iqn]
                for group in groups
            )
    return False


def _remove(iqn: str) -> None:
    for target in list(_targets(iqn)):
        target.delete()
    for store in list(rtslib_fb.RTSRoot().storage_objects):
        if store.name == iqn:
            store.delete()


def _targets(iqn: str) -> Iterator[Any]:
    for target in rtslib_fb.RTSRoot().targets:
        if target.fabric_module.name == "iscsi" and target.wwn == iqn:
            yield target
