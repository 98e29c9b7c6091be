"""After a start: the kernel and the state file are made to agree."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator

from os_brick_thunder.agent import devices
from os_brick_thunder.agent.base.bases import Bases
from os_brick_thunder.agent.base.paths import in_use
from os_brick_thunder.agent.devices import Expected
from os_brick_thunder.agent.ports import Host, Kit
from os_brick_thunder.agent.stack.stacks import Stacks
from os_brick_thunder.common import errors
from os_brick_thunder.common.mechanism.dmioctl import MappedDevice
from os_brick_thunder.common.policy import devnames
from os_brick_thunder.common.policy.iscsinames import IQN_PREFIX, iqn_of

LOG = logging.getLogger(__name__)


def reconcile(host: Host, bases: Bases, stacks: Stacks) -> None:
    """Make the kernel and the state file agree; what belongs to nothing is removed.

    What fails is logged and stops nothing else.

    :raises errors.ThunderError: the kernel does not tell what there is
    """
    kit = host.kit
    for device in kit.dm.devices():
        if device.suspended:
            LOG.warning("device %s was left suspended: resumed", device.name)
            with _logged(f"device {device.name}"):
                kit.dm.resume(device.name)
    stacks.reconcile()
    bases.reconcile()
    known = host.store.bases.values()
    expected = devices.expected(host.topology.host, known, host.store.stacks.values())
    with _logged("exports that belong to nothing"):
        own = iqn_of(host.topology.host, "")
        _sweep_exports(kit, expected, own)  # first: an export has its device open
    with _logged("devices that belong to nothing"):
        _sweep_devices(kit, expected)
    with _logged("thin devices that belong to nothing"):
        _sweep_thin_ids(kit, expected)
    with _logged("sessions that belong to nothing"):
        _sweep_sessions(kit, {path.iqn for base in known for path in in_use(base)})


@contextlib.contextmanager
def _logged(what: str) -> Iterator[None]:
    """Log an error in the body, and go on."""
    try:
        yield
    except errors.ThunderError as error:
        LOG.error("%s: %s", what, error)
    except Exception:
        LOG.exception("%s", what)


def _sweep_exports(kit: Kit, expected: Expected, own: str) -> None:
    """Remove exports of bases; those of masters are of a cinder-volume on the same host.

    :param own: what the names of this agent's exports begin with. It may have had another name
        before, but its devices have not
    """
    ours = devnames.path(devnames.PREFIX)
    for target in kit.targets.targets(IQN_PREFIX):
        if target.iqn in expected.exports:
            continue
        if target.iqn.startswith(own) or target.device.startswith(ours):
            LOG.warning("export %s belongs to no base: removed", target.iqn)
            with _logged(f"export {target.iqn}"):
                kit.targets.unexport(target.iqn)


def _sweep_devices(kit: Kit, expected: Expected) -> None:
    """Remove strays that are not open; those under them are no longer open in the next round."""
    tried: set[str] = set()

    def strays() -> list[MappedDevice]:
        left = expected.names | tried
        return [device for device in kit.dm.devices() if device.name not in left]

    while True:
        for device in strays():
            with _logged(f"device {device.name}"):
                devices.detach_loops(kit, device.name)  # they have the device open
        idle = [device for device in strays() if not device.opened]
        if not idle:
            return
        for device in idle:
            LOG.warning("device %s belongs to nothing: removed", device.name)
            tried.add(device.name)
            with _logged(f"device {device.name}"):
                kit.dm.remove(device.name)


def _sweep_thin_ids(kit: Kit, expected: Expected) -> None:
    for thin_id in sorted(kit.metadata.ids() - expected.thin_ids):
        LOG.warning("thin device %d belongs to nothing: deleted", thin_id)
        with _logged(f"thin device {thin_id}"):
            kit.pool.delete_thin(thin_id)


def _sweep_sessions(kit: Kit, targets: set[str]) -> None:
    for session in kit.initiator.sessions():
        target = session.endpoint.target
        if target not in targets:
            LOG.warning("session to %s belongs to no base: logged out", target)
            with _logged(f"session to {target}"):
                kit.initiator.logout(session.endpoint)
