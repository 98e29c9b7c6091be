"""Values cross process borders unharmed, and malformed ones are refused by name."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from os_brick_thunder.common import wire

TOPOLOGY = wire.Topology("cmp1", "10.0.0.1", "r1", "z1", "iqn.x:cmp1")
SOURCE = wire.Source("l0", "stor1", "master", "stor1@thunder", "10.0.0.1")
PLAN = wire.Plan(
    volume_id="v",
    mode="cached",
    reason="",
    image=wire.ImageInfo("i", 1 << 30, ((0, 4096), (8192, 512))),
    location_id="l",
    sources=(SOURCE,),
    unmodified=((0, 1 << 20),),
)
EXPORT = wire.Export(
    portal="10.0.0.1:3260",
    iqn="iqn.2026-11.org.thunder:stor1.thunder:1b4e28ba-2fa1-11d2-883f-0016d3cca427",
    lun=0,
    username="0123456789abcdef",
    password="hunter2",
    size=1 << 30,
)
REPORT = wire.LocationReport(
    "",
    "i",
    "cmp1",
    "gone",
    0,
    "[fd00::1]:3260",
    "iqn.2026-11.org.thunder:cmp1:i",
    0,
    "cmp2",
    "sha512:0f",
)
RECORDING = wire.Recording("i", "sha512:0f", "r", "cmp1", "ARIUARcC", True, 1 << 20, 4096)
VALUES: list[wire.Value] = [
    TOPOLOGY,
    dataclasses.replace(TOPOLOGY, initiator="", kind="storage"),
    wire.Payload("v", "i", "stor1@thunder"),
    SOURCE,
    PLAN,
    wire.Plan("", "direct", "lvs: exit code 5:\n  Failed to find «vg»"),
    wire.Orders(("i",), (), ("v", "w"), ("x",)),
    wire.BootProfile("i", "sha512:0f", "ARI="),
    wire.Orders(profiles=(wire.BootProfile("i", "sha512:0f", "ARI="),)),
    wire.ImageDigests("i", 1 << 20, "bm9uZQ=="),
    wire.ImageInfo("i", 1 << 30, (), "sha512:" + "0f" * 64),
    wire.Clock(1.7e9),
    EXPORT,
    REPORT,
    RECORDING,
    dataclasses.replace(PLAN, profile="ARIUARcC", record="r"),
]


def test_every_kind_of_value_is_tried() -> None:
    assert {type(value) for value in VALUES} == set(wire.Value.__subclasses__())


@pytest.mark.parametrize("value", VALUES)
def test_round_trip_through_json(value: wire.Value) -> None:
    assert wire.parse(type(value), json.loads(json.dumps(value.to_wire()))) == value


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (None, "Payload: an object was expected, not NoneType"),
        ({"volume_id": "v"}, "Payload: missing image_id, tracker"),
        (
            {"volume_id": 3, "image_id": "i", "tracker": "t"},
            "Payload.volume_id: str was expected, not int",
        ),
        (
            {"volume_id": "v", "image_id": "i", "tracker": "t", "version": "1"},
            "Payload.version: int was expected, not str",
        ),
        (
            {"volume_id": "v", "image_id": "i", "tracker": "t", "version": True},
            "Payload.version: int was expected, not bool",
        ),
        (
            {"volume_id": "../x", "image_id": "i", "tracker": "t"},
            "Payload.volume_id: an identifier was expected",
        ),
    ],
)
def test_malformed_values_are_refused(raw: Any, message: str) -> None:
    with pytest.raises(wire.MalformedValue) as caught:
        wire.parse(wire.Payload, raw)
    assert str(caught.value) == message


def test_a_newer_peer_may_send_more() -> None:
    raw = {**TOPOLOGY.to_wire(), "colour": "red"}
    assert wire.parse(wire.Topology, raw) == TOPOLOGY


def test_orders_of_an_older_tracker() -> None:
    assert wire.parse(wire.Orders, {"reparent": ["i"], "remove": []}) == wire.Orders(("i",))


def test_an_image_of_an_older_tracker_has_no_content() -> None:
    assert PLAN.image is not None
    raw = PLAN.image.to_wire()
    del raw["content"]
    assert wire.parse(wire.ImageInfo, raw) == PLAN.image


def test_sources_of_an_older_tracker_have_no_address() -> None:
    raw = SOURCE.to_wire()
    del raw["address"]
    assert wire.parse(wire.Source, raw) == dataclasses.replace(SOURCE, address="")


def test_a_plan_of_an_older_tracker_has_no_profile() -> None:
    raw = PLAN.to_wire()
    assert (raw.pop("profile"), raw.pop("record")) == ("", "")
    assert wire.parse(wire.Plan, raw) == PLAN


@pytest.mark.parametrize(
    ("value", "field", "hostile"),
    [
        (PLAN, "profile", "A" * ((1 << 16) + 1)),
        (PLAN, "profile", "\x1b[2J"),
        (PLAN, "record", "../x"),
        (RECORDING, "part", "AR IU"),
        (RECORDING, "record", ""),
        (RECORDING, "last", 1),
        (RECORDING, "wasted", -1),
        (PLAN, "unmodified", [[1, 2, 3]]),
        (PLAN, "unmodified", [[4096, 4096], [0, 4096]]),
        (PLAN, "unmodified", [[0, 4096], [4095, 1]]),
        (PLAN, "unmodified", [[0, 0]]),
        (PLAN, "unmodified", [[-1, 4096]]),
        (PLAN, "unmodified", [[0, 1 << 63]]),
        (PLAN, "unmodified", [["0", "1"]]),
        (PLAN, "unmodified", {"0": 1}),
        (PLAN, "unmodified", [[2 * at, 1] for at in range((1 << 20) + 1)]),
        (PLAN.image, "content", "sha512"),
        (PLAN.image, "content", "sha512:" + "f" * 255),
        (REPORT, "content", "sha512:\n"),
        (PLAN, "mode", "writeback"),
        (PLAN, "reason", "\x1b[2J"),
        (PLAN, "reason", "x" * (1 << 17)),
        (PLAN, "image", {"id": "i", "size": -1, "allocated": []}),
        (PLAN, "sources", [{**SOURCE.to_wire(), "kind": "friend"}]),
        (PLAN, "sources", [SOURCE.to_wire()] * 100),
        (PLAN, "location_id", ""),
        (TOPOLOGY, "host", ""),
        (TOPOLOGY, "host", "cmp1\nroot"),
        (TOPOLOGY, "host", "h" * 300),
        (TOPOLOGY, "rack", "r1\x1b[31m"),
        (TOPOLOGY, "rack", "\ud800"),
        (TOPOLOGY, "initiator", "iqn.x:../../etc"),
        (TOPOLOGY, "initiator", "somebody"),
        (TOPOLOGY, "address", "10.0.0.1 10.0.0.2"),
        (EXPORT, "iqn", "../../cron.d"),
        (EXPORT, "iqn", "iqn.2010-10.org.openstack:volume-1"),
        (EXPORT, "iqn", "iqn.2026-11.org.thunder:../../../cron.d:i"),
        (EXPORT, "iqn", "iqn.2026-11.org.thunder:h:i\n"),
        (EXPORT, "username", "x\n* * * * * root id\n#"),
        (EXPORT, "password", "a b"),
        (EXPORT, "password", ""),
        (EXPORT, "portal", "10.0.0.1"),
        (EXPORT, "portal", "10.0.0.1:0"),
        (EXPORT, "portal", "10.0.0.1:٣٢٦٠"),
        (EXPORT, "portal", "10.0.0.999:3260"),
        (EXPORT, "portal", "fd00::1:3260"),
        (EXPORT, "portal", "[fe80::1%../../x]:3260"),
        (EXPORT, "lun", 1 << 14),
        (EXPORT, "lun", False),
        (EXPORT, "size", 1 << 63),
        (REPORT, "state", "master"),
        (REPORT, "filled", 0.5),
        (wire.ImageDigests("i", 1, ""), "chunk", 0),
        (wire.ImageDigests("i", 1, ""), "chunk", 1 << 40),
        (wire.ImageDigests("i", 1, ""), "digests", "a?"),
        (wire.Orders(), "remove", ["/"]),
        (wire.Orders(), "remove", ["i"] * (1 << 17)),
        (wire.Orders(), "remove", "ids"),
    ],
)
def test_values_outside_their_format_or_bounds_are_refused(
    value: wire.Value, field: str, hostile: Any
) -> None:
    with pytest.raises(wire.MalformedValue, match=f"^{type(value).__name__}|^Image|^Source"):
        wire.parse(type(value), {**value.to_wire(), field: hostile})


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=8,
)
_FIELDS = [(value, f.name) for value in VALUES for f in dataclasses.fields(value)]


@given(st.sampled_from(_FIELDS), _JSON)
@example((EXPORT, "size"), 10**5000)  # more digits than Python prints
def test_no_hostile_value_does_more_than_to_be_refused(
    valid: tuple[wire.Value, str], hostile: Any
) -> None:
    value, field = valid
    refusal = ""
    try:
        parsed = wire.parse(type(value), {**value.to_wire(), field: hostile})
        assert wire.parse(type(value), parsed.to_wire()) == parsed
    except wire.MalformedValue as error:
        refusal = str(error)
    assert len(refusal) < 200


@given(st.sampled_from([type(value) for value in VALUES]), _JSON)
def test_what_is_not_a_value_at_all_is_refused(kind: type[wire.Value], raw: Any) -> None:
    try:
        wire.parse(kind, raw)
    except wire.MalformedValue:
        return
    assert kind is wire.Orders  # all of its fields may be absent
    assert isinstance(raw, dict)


@given(st.text())
def test_what_root_puts_into_files_and_names_has_no_separators(text: str) -> None:
    for field in ("iqn", "username", "password", "portal"):
        try:
            wire.parse(wire.Export, {**EXPORT.to_wire(), field: text})
        except wire.MalformedValue:
            continue
        assert not set(text) & set("/\\'\"\n\r\0 \t=#")


def test_a_secret_is_not_printed() -> None:
    assert "hunter2" not in repr(EXPORT)
    with pytest.raises(wire.MalformedValue) as caught:
        wire.parse(wire.Export, {**EXPORT.to_wire(), "password": "hunter2 "})
    assert "hunter2" not in str(caught.value)
