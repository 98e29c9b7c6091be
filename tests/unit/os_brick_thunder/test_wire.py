"""Values cross process borders unharmed, and nonsense is refused by name."""

from __future__ import annotations

import json
from typing import Any

import pytest

from os_brick_thunder.common import wire

TOPOLOGY = wire.Topology("cmp1", "10.0.0.1", "r1", "z1", "iqn.x:cmp1")
PLAN = wire.Plan(
    volume_id="v",
    mode="cached",
    reason="",
    image=wire.ImageInfo("i", 1 << 30, ((0, 4096), (8192, 512))),
    location_id="l",
    sources=(wire.Source("l0", "stor1", "master", "stor1@thunder"),),
    unmodified=((0, 1 << 20),),
)


@pytest.mark.parametrize("value", [TOPOLOGY, PLAN, wire.Plan("v", "direct", "no image")])
def test_round_trip_through_json(value: wire.Value) -> None:
    assert wire.parse(type(value), json.loads(json.dumps(value.to_wire()))) == value


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (None, "Payload: an object was expected, not NoneType"),
        ({"volume_id": "v"}, "Payload: missing image_id, tracker"),
        (
            {"volume_id": 3, "image_id": "i", "tracker": "t"},
            "Payload.volume_id: str was expected, not 3",
        ),
        (
            {"volume_id": "v", "image_id": "i", "tracker": "t", "version": "1"},
            "Payload.version: int was expected, not '1'",
        ),
    ],
)
def test_nonsense_is_refused(raw: Any, message: str) -> None:
    with pytest.raises(wire.MalformedValue) as caught:
        wire.parse(wire.Payload, raw)
    assert str(caught.value) == message


def test_a_newer_peer_may_send_more() -> None:
    raw = {**TOPOLOGY.to_wire(), "colour": "red"}
    assert wire.parse(wire.Topology, raw) == TOPOLOGY


def test_orders_of_an_older_tracker() -> None:
    assert wire.parse(wire.Orders, {"reparent": ["i"], "remove": []}) == wire.Orders(("i",))


def test_extents_that_are_none_are_refused() -> None:
    raw = {**PLAN.to_wire(), "unmodified": [[1, 2, 3]]}
    with pytest.raises(wire.MalformedValue, match="start, length"):
        wire.parse(wire.Plan, raw)


def test_a_secret_is_not_printed() -> None:
    export = wire.Export("10.0.0.1:3260", "iqn.x", 0, "user", "hunter2")
    assert "hunter2" not in repr(export)
