"""A volume follows its LUN's size without its agent."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from os_brick.initiator.connectors import iscsi

from os_brick_thunder import connector, extending, takedown
from os_brick_thunder.agent.policy import layout
from os_brick_thunder.common import errors
from os_brick_thunder.common.policy.devnames import VolumeNames
from os_brick_thunder.common.policy.dmtable import Linear, Table
from os_brick_thunder.common.policy.extents import Extents
from tests.unit.os_brick_thunder.test_agent import (
    GIB,
    LUN,
    PAYLOAD,
    VOLUME,
    Host,
    older,
    soon,
    swapped_meanwhile,
)

NAMES = VolumeNames(VOLUME)


@pytest.fixture
def host(tmp_path: Path) -> Host:
    return Host(tmp_path)


def attached(host: Host) -> Callable[[], object]:
    """Attach the volume, and have its LUN grow.

    :returns: has its agent extend it
    """
    _, stacks, _, _ = host.agent()
    stacks.attach(PAYLOAD, LUN, soon())
    host.blocks.sizes[LUN] = 2 * GIB
    host.dm.log.clear()
    return lambda: stacks.extend(VOLUME)


def table(host: Host) -> Table:
    found = host.dm.table(NAMES.vol)
    assert found is not None
    return found


def follow(host: Host) -> None:
    extending.follow(host.dm, host.blocks, VOLUME)


def test_a_volume_reads_from_its_cache_what_it_read_from_there(host: Host) -> None:
    by_the_agent = attached(host)
    before = table(host)
    follow(host)
    after = table(host)
    assert after.length * 512 == 2 * GIB
    failover = host.blocks.devnum(f"/dev/mapper/{NAMES.failover}")
    shared = [each.resolved(host.blocks.devnum).mapped_to(failover) for each in (before, after)]
    assert shared[0]
    assert shared[0] == shared[1]
    assert host.dm.log == [f"reload {NAMES.vol}"]
    follow(host)
    by_the_agent()
    assert host.dm.log == [f"reload {NAMES.vol}"]  # it has nothing to add


def test_a_volume_without_a_cache_has_one_segment(host: Host) -> None:
    attached(host)
    host.dm.held.add(NAMES.vol)
    host.app.stack.remover.to_direct(VOLUME, "the test")
    follow(host)
    assert table(host) == Table.of((2 * GIB // 512, Linear(LUN)))


def test_a_volume_that_is_all_shared_gets_the_rest_from_its_lun(host: Host) -> None:
    attached(host)
    whole = layout.vol_table(NAMES, LUN, Extents.of([(0, GIB)]), GIB)
    host.dm.reload(NAMES.vol, whole)
    follow(host)
    assert table(host) == layout.vol_table(NAMES, LUN, Extents.of([(0, GIB)]), 2 * GIB)


def test_a_table_that_the_watcher_has_swapped_meanwhile_grows_too(host: Host) -> None:
    attached(host)
    swapped = swapped_meanwhile(host)
    follow(host)
    assert table(host) == Table.of((2 * GIB // 512, Linear(LUN)))
    assert swapped == [NAMES.vol]


def test_a_table_of_an_older_agent_is_left_alone(host: Host) -> None:
    attached(host)
    older(host, (LUN,))
    before = table(host)
    with pytest.raises(errors.InvalidRequest, match="start thunder-agent"):
        follow(host)
    assert table(host) == before


def test_a_volume_that_is_gone_is_named(host: Host) -> None:
    with pytest.raises(errors.DeviceNotFound, match=NAMES.vol):
        follow(host)


@pytest.mark.parametrize("error", [errors.AgentUnavailable("down"), errors.AgentError("no"), None])
def test_the_connector_does_it_where_the_agent_does_not(
    host: Host, monkeypatch: pytest.MonkeyPatch, error: Exception | None
) -> None:
    by_the_agent = attached(host)

    class Agent:
        def extend(self, volume_id: str) -> None:
            if error:
                raise error
            by_the_agent()

    def extend(self: Any, data: dict[str, Any]) -> int:
        return 2 * GIB

    monkeypatch.setattr(iscsi.ISCSIConnector, "extend_volume", extend)
    monkeypatch.setattr(takedown, "has_devices", lambda _: True)
    monkeypatch.setattr(
        extending, "extend", lambda volume_id: extending.follow(host.dm, host.blocks, volume_id)
    )
    mine = connector.ThunderISCSIConnector(None)
    monkeypatch.setattr(mine, "_agent", Agent)
    assert mine.extend_volume({"thunder": PAYLOAD.to_wire()}) == 2 * GIB
    assert table(host).length * 512 == 2 * GIB
    assert host.dm.log == [f"reload {NAMES.vol}"]
