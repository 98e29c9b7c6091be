"""Paths that fail and come back, and hosts whose bytes are wrong."""

from __future__ import annotations

import contextlib
import logging
import time

from os_brick_thunder.agent.base.paths import Paths
from os_brick_thunder.agent.base.verified import VerifiedPaths
from os_brick_thunder.agent.policy import layout
from os_brick_thunder.agent.ports import Host
from os_brick_thunder.common.policy import devnames, dmstatus
from os_brick_thunder.common.policy.devnames import ImageNames
from os_brick_thunder.common.state import Base, ReplicaPath

LOG = logging.getLogger(__name__)

#: A path that failed again within this many seconds after it was reinstated is not reinstated.
_FLAPPING = 60.0
#: Seconds for which a host whose bytes were wrong is not read from.
_DISTRUST = 600.0


class PathHealth:
    """Reinstates the paths of bases that answer again, and fails those that deliver wrong bytes."""

    def __init__(self, host: Host, paths: Paths, verified: VerifiedPaths) -> None:
        self._kit = host.kit
        self._paths = paths
        self._verified = verified
        #: By image and host: when a path was reinstated, and when bytes were found to be wrong.
        self._reinstated: dict[tuple[str, str], float] = {}
        self._distrusted: dict[tuple[str, str], float] = {}
        #: How often the bytes of a host were wrong since this agent was started.
        self.wrong: dict[str, int] = {}

    def repair(self, image_id: str) -> tuple[str, ...]:
        """Reinstate paths that failed and answer again: replicas do not change.

        :returns: hosts of the paths that do not work, and of those whose bytes were wrong, also if
            a base reads from one as there is no other
        """
        base = self._paths.reading(image_id)
        if base is None:
            return ()
        flags, devices = self._paths.flags(base), self._paths.devices(base, alive=True)
        broken = []
        for path in base.paths:
            number = self._paths.devnum(devices.get(path))
            works = flags.get(number)
            if works is False:
                self._find_out_why(base, path)
            distrusted = self._is_distrusted(image_id, path.host)
            last = path == base.paths[-1]
            if not works or (distrusted and not last):
                if works is None or not self._may_reinstate(base, path, devices[path]):
                    broken.append(path.host)
                    continue
                self._reinstate(base, path, number)
            if distrusted and not path.master:
                broken.append(path.host)  # it is read from until there is another source
        return tuple(broken)

    def _find_out_why(self, base: Base, path: ReplicaPath) -> None:
        """Of a path that has failed: its host may have sent what is not the image."""
        session = self._paths.sessions(base).get(path)
        disk = session.device if session else None
        if not disk or self._is_distrusted(base.image_id, path.host):
            return
        if self._verified.sent_wrong_blocks(base, path, disk):
            self._blame(base.image_id, path.host)

    def _blame(self, image_id: str, host: str) -> None:
        LOG.error("image %s: the bytes read from %s are wrong", image_id, host)
        self.wrong[host] = self.wrong.get(host, 0) + 1
        self._distrusted[image_id, host] = time.monotonic()

    def _reinstate(self, base: Base, path: ReplicaPath, number: str) -> None:
        for name in layout.multipaths(base):
            if number in dmstatus.paths(self._kit.dm.status(name)):
                self._kit.dm.message(name, f"reinstate_path {number}")
                self._kit.dm.message(name, "switch_group 1")
        self._reinstated[base.image_id, path.host] = time.monotonic()
        LOG.warning("base of image %s: the replica on %s is back", base.image_id, path.host)

    def _may_reinstate(self, base: Base, path: ReplicaPath, device: str) -> bool:
        if path != base.paths[-1]:  # the last one always: without it nothing is left
            since = time.monotonic() - self._reinstated.get((base.image_id, path.host), -_FLAPPING)
            if since < _FLAPPING or self._is_distrusted(base.image_id, path.host):
                return False
        return self._kit.blocks.answers(device)

    def distrust(self, base: Base) -> None:
        """What was just read for a base is not the image: fail the path that is read through, and
        forget what was read through the base so far: guests would be given more of it.

        The wrong bytes may have come over another path than that. Then a good path is given up for
        a while, and the bad one is met by the next read. The only path is not failed, nor is a
        storage host blamed that is the only source: a host that was left may have sent them.
        """
        image_id, found = base.image_id, self._paths.reading(base.image_id)
        if found is None or found.thin_id != base.thin_id:
            return  # another base has taken its place
        working = self._paths.working(found)
        if len(working) > 1:
            path, device = next(iter(working.items()))
            self._blame(image_id, path.host)
            number = self._paths.devnum(device)
            self._kit.dm.message(ImageNames(image_id).paths, f"fail_path {number}")
        else:
            LOG.error("image %s: its bytes are wrong, and there is no other source", image_id)
            for path in working:
                if not path.master:
                    self._blame(image_id, path.host)
        self._drop_read(found)

    def _drop_read(self, base: Base) -> None:
        for name in layout.multipaths(base):
            with contextlib.suppress(OSError):  # its device has just been removed
                self._kit.blocks.drop_cache(devnames.path(name), 0, base.length)

    def _is_distrusted(self, image_id: str, host: str) -> bool:
        since = self._distrusted.get((image_id, host))
        return since is not None and time.monotonic() - since < _DISTRUST
