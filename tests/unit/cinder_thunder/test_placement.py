"""Placement of masters: properties that hold for all hosts and images."""

from __future__ import annotations

import random

from hypothesis import given
from hypothesis import strategies as st

from cinder_thunder.policy import placement
from cinder_thunder.policy.placement import ReplicatedImage, StorageHost

GIB = 1 << 30

STORAGE_HOSTS = st.lists(
    st.builds(
        StorageHost,
        st.sampled_from([f"s{n}" for n in range(8)]),
        st.sampled_from(["r0", "r1", "r2"]),
        st.sampled_from(["z0", "z1"]),
        st.integers(0, 40),
    ),
    min_size=1,
    max_size=8,
    unique_by=lambda host: host.host,
)


@st.composite
def clouds(draw: st.DrawFn) -> tuple[list[ReplicatedImage], list[StorageHost]]:
    hosts = draw(STORAGE_HOSTS)
    images = []
    for number in range(draw(st.integers(0, 5))):
        holders = draw(st.lists(st.sampled_from(hosts), max_size=3, unique=True))
        lost = draw(st.frozensets(st.sampled_from([f"s{n}" for n in range(8)]), max_size=2))
        names = {host.host for host in holders}
        images.append(
            ReplicatedImage(f"i{number}", draw(st.integers(0, 20)), tuple(holders), lost - names)
        )
    return images, hosts


WANTED = st.integers(1, 4)


@given(clouds(), WANTED)
def test_missing_masters(
    cloud: tuple[list[ReplicatedImage], list[StorageHost]], wanted: int
) -> None:
    """As many as are missing, only where they fit, never two on one host."""
    images, hosts = cloud
    found = placement.missing(images, hosts, wanted)
    free = {host.host: host.free for host in hosts}
    for name, given_to in found.items():
        assert len(set(given_to)) == len(given_to)
        assert sum(image.size for image in images if image.image_id in given_to) <= free[name]
    for image in images:
        made = [name for name, given_to in found.items() if image.image_id in given_to]
        held = {host.host for host in image.counted}
        assert not set(made) & (held | image.others)
        if not held:
            assert made == []
        assert len(made) <= max(0, wanted - len(held))
        if held and len(made) < wanted - len(held):  # then it fits nowhere else
            for host in hosts:
                if host.host not in held | image.others | set(made):
                    taken = sum(i.size for i in images if i.image_id in found.get(host.host, []))
                    assert host.free - taken < image.size


@given(clouds(), WANTED, st.randoms(use_true_random=False))
def test_all_trackers_agree(
    cloud: tuple[list[ReplicatedImage], list[StorageHost]], wanted: int, dice: random.Random
) -> None:
    images, hosts = cloud
    mixed = (dice.sample(images, len(images)), dice.sample(hosts, len(hosts)))
    assert placement.missing(*mixed, wanted) == placement.missing(images, hosts, wanted)


@given(clouds())
def test_other_zones_and_racks_come_first(
    cloud: tuple[list[ReplicatedImage], list[StorageHost]],
) -> None:
    _images, hosts = cloud
    roomy = [StorageHost(host.host, host.rack, host.zone, 100 * GIB) for host in hosts]
    holder = roomy[0]
    [image] = [ReplicatedImage("i", GIB, (holder,))]
    found = placement.missing([image], roomy, 2)
    others = roomy[1:]
    if not others:
        assert found == {}
        return
    [name] = found
    chosen = next(host for host in roomy if host.host == name)

    def distance(host: StorageHost) -> tuple[bool, bool]:
        same_zone = host.zone == holder.zone
        return same_zone, same_zone and host.rack == holder.rack

    assert distance(chosen) == min(distance(host) for host in others)


def test_free_space_decides_between_equals_and_a_running_copy_does_not() -> None:
    here = StorageHost("here", "r0", "z", 0)
    small = StorageHost("small", "r1", "z", 10 * GIB)
    large = StorageHost("large", "r1", "z", 100 * GIB)
    image = ReplicatedImage("i", 5 * GIB, (here,))
    assert placement.missing([image], [here, small, large], 2) == {"large": ["i"]}
    for number in range(20):
        image = ReplicatedImage(f"i{number}", 5 * GIB, (here,))
        twins = [StorageHost(name, "r1", "z", 100 * GIB) for name in ("a", "b")]
        [first] = placement.missing([image], twins, 2)
        filling = [
            StorageHost(t.host, t.rack, t.zone, t.free - (4 * GIB if t.host == first else 0))
            for t in twins
        ]
        assert list(placement.missing([image], filling, 2)) == [first]


def test_images_are_spread_over_equal_hosts() -> None:
    here = StorageHost("here", "r0", "z", 0)
    hosts = [StorageHost(f"s{n}", "r1", "z", 1000 * GIB) for n in range(4)]
    images = [ReplicatedImage(f"image-{n}", GIB, (here,)) for n in range(100)]
    found = placement.missing(images, [here, *hosts], 2)
    assert sum(map(len, found.values())) == 100
    assert all(len(found[host.host]) > 10 for host in hosts)
