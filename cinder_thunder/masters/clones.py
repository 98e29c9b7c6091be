"""Volumes as snapshots of masters: one LVM command each, when one size is asked for repeatedly.

A snapshot has the size of its origin, and a second command extends it. Each takes LVM's lock of the
volume group, so that a bulk of volumes takes twice as long. Therefore an image gets a *sized
snapshot* of its master, whose clones need no second command. It has no data of its own, and no
device: it is never activated.
"""

from __future__ import annotations

import threading

from oslo_log import log as logging

from cinder_thunder.mechanism.lvm import ThinVolumes
from os_brick_thunder.common import errors

LOG = logging.getLogger(__name__)

MASTER = "thunder-master-"
#: Of what is not complete: a restart removes it.
FILLING = "thunder-filling-"
SIZED = "thunder-sized-"
#: A snapshot of a master with the hash tree behind the image.
TREE = "thunder-tree-"
#: The most sized snapshots that an image has: users choose the sizes of volumes.
MOST_SIZES = 4


def is_ours(volume: str) -> bool:
    """Whether an LV is a master or made for one, and so not for Cinder to manage."""
    return volume.startswith((MASTER, FILLING, SIZED, TREE))


def has_no_data(volume: str) -> bool:
    """Whether all blocks of an LV are a master's, but for those of a hash tree."""
    return volume.startswith((SIZED, FILLING + SIZED, TREE))


def image_of(volume: str) -> str:
    """The image of a master, sized snapshot or tree; empty for any other LV."""
    if volume.startswith(SIZED):
        return volume.removeprefix(SIZED).rpartition("-")[0]
    prefix = next((each for each in (MASTER, TREE) if volume.startswith(each)), volume)
    return volume.removeprefix(prefix)


class Clones:
    """Makes volumes from the masters of one volume group."""

    def __init__(self, volumes: ThinVolumes) -> None:
        self._volumes = volumes
        self._lock = threading.Lock()  # held while a sized snapshot is made or removed
        self._sized: set[str] = set()
        self._asked: dict[str, int] = {}  # the last size for which an image had none

    def make(self, image_id: str, image_size: int, name: str, size: int) -> None:
        """Make an LV as a snapshot of a master, or leave none.

        :param size: of the LV in bytes
        :raises errors.ProcessError: LVM refused
        """
        if size <= self._volumes.rounded(image_size):
            self._volumes.snapshot(name, MASTER + image_id)
            return  # lvextend fails if the size does not change
        sized = self._sized_for(image_id, size)
        if sized:
            try:
                self._volumes.snapshot(name, sized)
            except errors.ProcessError as error:
                LOG.warning("No snapshot of %s, the master is used instead: %s", sized, error)
                with self._lock:
                    self._sized.discard(sized)
            else:
                return
        self._volumes.snapshot(name, MASTER + image_id)
        try:
            self._volumes.extend(name, size)
        except errors.ProcessError:
            self._remove(name)
            raise

    def _sized_for(self, image_id: str, size: int) -> str:
        """The sized snapshot to make an LV from; empty if it is to be made from the master.

        One is made when a size is asked for twice in a row: volumes of a bulk have one size.
        """
        name = f"{SIZED}{image_id}-{size}"
        with self._lock:
            if name in self._sized:
                return name
            if self._asked.get(image_id) != size:
                self._asked[image_id] = size
                return ""
            if sum(image_of(each) == image_id for each in self._sized) >= MOST_SIZES:
                return ""
            try:
                self._make_sized(name, image_id, size)
            except errors.ProcessError as error:
                LOG.warning("Could not make %s; volumes take longer to make: %s", name, error)
                del self._asked[image_id]
                return ""
            self._sized.add(name)
            return name

    def _make_sized(self, name: str, image_id: str, size: int) -> None:
        filling = f"{FILLING}{name}"
        self._volumes.snapshot_without_device(filling, MASTER + image_id)
        try:
            self._volumes.extend(filling, size)
            self._volumes.rename(filling, name)
        except errors.ProcessError:
            self._remove(filling)
            raise

    def forget(self, image_id: str) -> None:
        """Remove an image's sized snapshots, after its master, when nobody can make another.

        :raises errors.ProcessError: LVM refused
        """
        with self._lock:
            self._asked.pop(image_id, None)
            for name in self._volumes.names():
                if name.startswith(SIZED) and image_of(name) == image_id:
                    self._sized.discard(name)
                    self._volumes.remove(name)

    def adopt(self, names: set[str]) -> None:
        """Use the sized snapshots among LVs that an earlier process made."""
        with self._lock:
            self._sized = {name for name in names if name.startswith(SIZED)}

    def _remove(self, name: str) -> None:
        try:
            self._volumes.remove(name)
        except errors.ThunderError:
            LOG.exception("Could not remove %s after a failure; remove it by hand", name)
