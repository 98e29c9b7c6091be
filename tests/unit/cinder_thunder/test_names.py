"""From what an operator types to an id: an id, its beginning, or a name in Glance or Cinder."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from cinder_thunder.cli import names
from os_brick_thunder.common import errors

ONE = "11111111-aaaa-4aaa-8aaa-111111111111"
TWO = "11111111-bbbb-4bbb-8bbb-222222222222"
ABSENT = "99999999-cccc-4ccc-8ccc-333333333333"


class Known:
    """A database with two images and one volume."""

    images = SimpleNamespace(all=lambda: [SimpleNamespace(id=ONE), SimpleNamespace(id=TWO)])
    volumes = SimpleNamespace(known_ids=lambda: {ONE})


def image(word: str, **named: list[str]) -> str:
    return names.image(Known(), word, lambda name: named.get(name, []))  # type: ignore[arg-type]


def test_an_id_is_not_looked_up() -> None:
    def refuse(word: str) -> list[str]:
        raise AssertionError(word)

    assert names.image(Known(), TWO, refuse) == TWO  # type: ignore[arg-type]


def test_a_name_and_the_beginning_of_an_id() -> None:
    assert image("debian", debian=[TWO]) == TWO
    assert image("11111111-b") == TWO
    # A name goes before the beginning of an id.
    assert image("11111111-b", **{"11111111-b": [ONE]}) == ONE


def test_ambiguous() -> None:
    for word, named in (("debian", {"debian": [TWO, ABSENT]}), ("1111", {})):
        with pytest.raises(errors.InvalidRequest) as caught:
            image(word, **named)
        other = ABSENT if named else ONE
        ids = ", ".join(sorted((TWO, other)))
        assert str(caught.value) == (f"image {word} is ambiguous, give the id: it may be {ids}")


def test_known_to_glance_alone() -> None:
    with pytest.raises(errors.InvalidRequest) as caught:
        image("debian", debian=[ABSENT])
    assert str(caught.value) == (
        f"there is no replica of an image debian ({ABSENT}): its first volume creates one "
        f"(openstack volume create --type TYPE --image {ABSENT} --size GIB NAME)"
    )


def test_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OS_CLOUD", "mine")
    with pytest.raises(errors.InvalidRequest) as caught:
        image("debian")
    assert str(caught.value) == (
        "there is no replica of an image debian: thunder image list shows all of them"
    )
    with pytest.raises(errors.InvalidRequest, match="there is no replica of an image 111: "):
        image("111")  # too short for the beginning of an id


def test_a_plain_volume() -> None:
    def named(word: str) -> list[str]:
        return [ABSENT]

    with pytest.raises(errors.InvalidRequest, match=r"shares no image .* it is a plain volume"):
        names.volume(Known(), "data", named)  # type: ignore[arg-type]
    assert names.volume(Known(), ONE, named) == ONE  # type: ignore[arg-type]


@pytest.fixture
def clean(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in ("OS_CLOUD", "OS_AUTH_URL"):
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


def test_no_service_is_asked_without_credentials(clean: pytest.MonkeyPatch) -> None:
    assert names.images_named("debian") == []
    assert names.volumes_named("data") == []


def test_glance_that_does_not_answer(clean: pytest.MonkeyPatch) -> None:
    for key, value in {
        "AUTH_URL": "http://127.0.0.1:1/v3",
        "USERNAME": "a",
        "PASSWORD": "SECRET",
        "PROJECT_NAME": "a",
        "USER_DOMAIN_NAME": "Default",
        "PROJECT_DOMAIN_NAME": "Default",
    }.items():
        clean.setenv(f"OS_{key}", value)
    with pytest.raises(errors.ThunderError) as caught:
        names.images_named("debian")
    said = str(caught.value)
    assert said.startswith("Glance could not be asked for image debian (")
    assert said.endswith("): give its id, or unset OS_CLOUD and OS_AUTH_URL")
    assert "SECRET" not in said
    assert "\n" not in said
