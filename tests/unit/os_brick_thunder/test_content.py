"""An image is its id and its content: an id may be used again after a purge of Glance."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from os_brick_thunder.common import errors, wire
from os_brick_thunder.common.state import StateFile
from tests.unit.os_brick_thunder.test_agent import (
    GIB,
    IMAGE,
    LUN,
    PAYLOAD,
    PLAN,
    VOLUME,
    Host,
    _reboot,
    soon,
)

OLD, NEW = "sha512:01", "sha512:02"


@pytest.fixture
def host(tmp_path: Path) -> Host:
    return Host(tmp_path)


def of(content: str) -> wire.Plan:
    assert PLAN.image is not None
    return dataclasses.replace(PLAN, image=dataclasses.replace(PLAN.image, content=content))


def test_a_base_knows_its_content_and_reports_it(host: Host) -> None:
    _, stacks, _, store = host.agent()
    host.tracker.plan = of(OLD)
    stacks.attach(PAYLOAD, LUN, soon())
    assert store.bases[IMAGE].content == OLD
    assert StateFile(host.file).bases == store.bases
    host.catch_up()
    assert host.tracker.reports[-1].content == OLD


@pytest.mark.parametrize("known", [OLD, ""])
def test_a_base_of_the_same_or_an_unknown_content_is_used(host: Host, known: str) -> None:
    _, stacks, bases, store = host.agent()
    host.tracker.plan = of(known)
    stacks.attach(PAYLOAD, LUN, soon())
    before = store.bases[IMAGE].thin_id
    host.tracker.plan = of(OLD)
    bases.ensure(of(OLD))
    assert store.bases[IMAGE].thin_id == before


def test_a_base_of_another_content_is_built_anew(host: Host) -> None:
    _, stacks, _, store = host.agent()
    host.tracker.plan = of(OLD)
    stacks.attach(PAYLOAD, LUN, soon())
    host.complete()
    stacks.detach(VOLUME)
    before = store.bases[IMAGE]
    host.tracker.plan = of(NEW)
    assert stacks.attach(PAYLOAD, LUN, soon()).mode == "cached"
    after = store.bases[IMAGE]
    assert (after.content, after.complete) == (NEW, False)
    assert after.thin_id != before.thin_id
    assert before.thin_id not in host.dm.thin_ids
    assert host.leftovers(store) == []


def test_a_base_of_another_content_that_is_in_use_is_left_to_its_volumes(host: Host) -> None:
    _, stacks, _, store = host.agent()
    host.tracker.plan = of(OLD)
    stacks.attach(PAYLOAD, LUN, soon())
    host.blocks.sizes["/dev/sdc"] = GIB
    host.tracker.plan = dataclasses.replace(of(NEW), volume_id="vol-2")
    answer = stacks.attach(wire.Payload("vol-2", IMAGE, "stor1@thunder"), "/dev/sdc", soon())
    assert answer.mode == "direct"
    assert store.bases[IMAGE].content == OLD
    with pytest.raises(errors.ThunderError):
        host.app.stack.builder.to_cached("vol-2")
    assert store.stacks["vol-2"].mode == "direct"
    assert host.leftovers(store) == []


def test_a_filling_base_gets_no_sources_of_another_content(host: Host) -> None:
    _, stacks, _, store = host.agent()
    host.tracker.plan = of(OLD)
    stacks.attach(PAYLOAD, LUN, soon())
    before = store.bases[IMAGE].paths
    host.tracker.plan = of(NEW)
    with pytest.raises(errors.NoReplica, match="of what image img-1 was before"):
        host.app.base.sources.reparent(IMAGE)
    assert store.bases[IMAGE].paths == before


def test_a_base_of_another_content_is_not_restored_after_a_reboot(host: Host) -> None:
    _, stacks, _, _ = host.agent()
    host.tracker.plan = of(OLD)
    stacks.attach(PAYLOAD, LUN, soon())
    _reboot(host)
    host.tracker.plan = of(NEW)
    agent, _, _, store = host.agent()
    agent.reconcile()
    host.catch_up()
    assert store.bases == {}
    assert host.leftovers(store) == []
    assert host.tracker.locations == set()
