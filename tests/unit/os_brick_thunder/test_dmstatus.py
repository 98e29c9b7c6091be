"""What the kernel says of caches, multipaths, pools and thin devices."""

from __future__ import annotations

import pytest

from os_brick_thunder.common.policy import dmstatus

#: As printed on Linux 6.1, without start and length.
CACHE = (
    "cache 8 34/1024 128 620/4096 600 20 8 2 1 3 4 3 metadata2 writethrough no_discard_passdown "
    "2 migration_threshold 0 cleaner 0 rw - \nlinear "
)
BLOCK = 64 << 10


def test_a_cache() -> None:
    found = dmstatus.cache(CACHE)
    assert found == dmstatus.CacheStatus(
        total=4096 * BLOCK,
        mapped=620 * BLOCK,
        read_hits=600,
        read_misses=20,
        write_hits=8,
        write_misses=2,
        dirty=4 * BLOCK,
        healthy=True,
    )
    assert found.hit_ratio == 600 / 620
    assert found.coverage == 620 / 4096


def test_a_cache_that_nobody_read() -> None:
    found = dmstatus.cache(CACHE.replace("600 20", "0 0"))
    assert found is not None
    assert found.hit_ratio is None


def test_a_cache_that_failed() -> None:
    assert dmstatus.cache("cache Fail") is None
    for word in ("ro -", "rw needs_check"):
        found = dmstatus.cache(CACHE.replace("rw -", word))
        assert found is not None
        assert not found.healthy


@pytest.mark.parametrize(
    "status", ["", "linear ", "cache 8 34/1024", "cache a b c d e f g h i j k"]
)
def test_what_is_no_cache(status: str) -> None:
    with pytest.raises(ValueError, match="not the status of a cache"):
        dmstatus.cache(status)


def test_paths() -> None:
    said = "multipath 2 0 0 0 2 1 E 0 1 0 253:9 F 3 A 0 1 0 8:16 A 0 "
    assert dmstatus.paths(said) == {"253:9": False, "8:16": True}


def test_pools() -> None:
    text = "thin-pool 1 141/1024 20/8112 - {} discard_passdown queue_if_no_space - 1024"
    sizes = (20 * BLOCK, 8112 * BLOCK)
    metadata = (39 * 4096, 922 * 4096)  # without the tenth that the kernel keeps back
    assert dmstatus.pool(text.format("rw"), BLOCK) == dmstatus.PoolStatus(*sizes, True, *metadata)
    full = dmstatus.pool(text.format("out_of_data_space"), BLOCK)
    assert full == dmstatus.PoolStatus(*sizes, False, *metadata, full=True)
    assert not dmstatus.pool(text.format("ro"), BLOCK).healthy
    assert dmstatus.pool("thin-pool Fail", BLOCK) == dmstatus.PoolStatus(0, 0, False)


def test_thin_devices() -> None:
    assert dmstatus.mapped("thin 2048 4095") == 1 << 20
    assert dmstatus.mapped("thin 0 -") == 0
    assert dmstatus.mapped("thin Fail") == 0
    assert dmstatus.mapped("error") == 0


def test_a_verity_device_says_that_it_has_met_a_wrong_block() -> None:
    assert dmstatus.is_corrupted("verity C")
    assert not dmstatus.is_corrupted("verity V")
    assert not dmstatus.is_corrupted("linear ")
