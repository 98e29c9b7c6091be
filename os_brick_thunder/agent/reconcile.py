"""After a start: the kernel and the state file are made to agree."""

from __future__ import annotations

import logging

from os_brick_thunder.agent import devices
from os_brick_thunder.agent.base.bases import Bases
from os_brick_thunder.agent.base.paths import in_use
from os_brick_thunder.agent.devices import Expected
from os_brick_thunder.agent.ports import Host, Kit
from os_brick_thunder.agent.stack.stacks import Stacks
from os_brick_thunder.common import errors
from os_brick_thunder.common.mechanism.dmsetup import MappedDevice
from os_brick_thunder.common.policy.iscsinames import IQN_PREFIX

LOG = logging.getLogger(__name__)


def reconcile(host: Host, bases: Bases, stacks: Stacks) -> None:
    """Make the kernel and the state file agree; what belongs to nothing is removed.

    :raises errors.ThunderError: a device could not be removed or restored
    """
    kit = host.kit
    for device in kit.dm.devices():
        if device.suspended:
            LOG.warning("device %s was left suspended: resumed", device.name)
            kit.dm.resume(device.name)
    stacks.reconcile()
    bases.reconcile()
    known = host.store.bases.values()
    expected = devices.expected(host.topology.host, known, host.store.stacks.values())
    _sweep_exports(kit, expected)  # first: an export has its device open
    _sweep_devices(kit, expected)
    _sweep_thin_ids(kit, expected)
    _sweep_sessions(kit, {path.iqn for base in known for path in in_use(base)})


def _sweep_exports(kit: Kit, expected: Expected) -> None:
    for target in kit.targets.targets(IQN_PREFIX):
        if target.iqn not in expected.exports:
            LOG.warning("export %s belongs to no base: removed", target.iqn)
            kit.targets.unexport(target.iqn)


def _sweep_devices(kit: Kit, expected: Expected) -> None:
    """Remove strays that are not open; those under them are no longer open in the next round."""

    def strays() -> list[MappedDevice]:
        return [device for device in kit.dm.devices() if device.name not in expected.names]

    while True:
        for device in strays():
            devices.detach_loop(kit, device.name)  # it has the device open
        idle = [device for device in strays() if not device.opened]
        if not idle:
            return
        for device in idle:
            LOG.warning("device %s belongs to nothing: removed", device.name)
            kit.dm.remove(device.name)


def _sweep_thin_ids(kit: Kit, expected: Expected) -> None:
    for thin_id in sorted(kit.metadata.ids() - expected.thin_ids):
        LOG.warning("thin device %d belongs to nothing: deleted", thin_id)
        try:
            kit.pool.delete_thin(thin_id)
        except errors.ThunderError as error:  # a stray in use must not stop the agent
            LOG.error("thin device %d: %s", thin_id, error)


def _sweep_sessions(kit: Kit, targets: set[str]) -> None:
    for session in kit.initiator.sessions():
        target = session.endpoint.target
        if target not in targets:
            LOG.warning("session to %s belongs to no base: logged out", target)
            kit.initiator.logout(session.endpoint)
