"""Queries of a storage host's pool: few processes, and no cached answers."""

from __future__ import annotations

import errno
import subprocess
import sys
from dataclasses import dataclass, field

import pytest

from cinder_thunder.mechanism.thinpool import StoragePool
from os_brick_thunder.common import errors
from tests.unit.os_brick_thunder import test_thinmeta

DELTA = """\
<superblock data_block_size="128">
  <diff left="7" right="3"><same begin="0" length="9"/><different begin="9" length="1"/></diff>
</superblock>
"""


@dataclass
class Host:
    """A host's device-mapper, and a record of the processes that were run."""

    tables: dict[str, str] = field(
        default_factory=lambda: {
            "v--g-master": "0 2048 thin 253:4 3",
            "v--g-volume": "0 4096 thin 253:4 7",
            "v--g-linear": "0 4096 linear 8:0 0",
            "v--g-pool-tpool": "0 131072 thin-pool 253:1 253:2 128 0 0",
        }
    )
    messages: list[tuple[str, str]] = field(default_factory=list)
    ran: list[tuple[str, ...]] = field(default_factory=list)

    def table(self, name: str) -> str:
        if name not in self.tables:
            raise errors.ProcessError(["dm", name, "table"], errno.ENXIO, "No such device")
        return self.tables[name]

    def status(self, name: str) -> str:
        self.table(name)
        return "thin-pool 1 500/1024 16/1024 - rw discard_passdown queue_if_no_space - 1024"

    def message(self, name: str, text: str) -> str:
        self.messages.append((name, text))
        return ""

    def run(self, *argv: str, stdin: str | None = None, timeout: float = 60) -> str:
        self.ran.append(argv)
        return DELTA


@pytest.fixture
def host() -> Host:
    return Host()


@pytest.fixture
def pool(host: Host) -> StoragePool:
    return StoragePool("v-g", "pool", host.run, host)


def test_a_map_takes_one_process(host: Host, pool: StoragePool) -> None:
    assert pool.modified("volume", "master").ranges == ((9 << 16, 10 << 16),)
    (argv,) = host.ran
    assert argv == (
        *("thin_delta", "--metadata-snap", "--thin1", "7", "--thin2", "3"),
        "/dev/mapper/v--g-pool_tmeta",
    )
    assert host.messages == [
        ("v--g-pool-tpool", "reserve_metadata_snap"),
        ("v--g-pool-tpool", "release_metadata_snap"),
    ]


def test_a_volume_that_was_replaced_is_queried_by_its_new_id(host: Host, pool: StoragePool) -> None:
    pool.modified("volume", "master")
    host.tables["v--g-volume"] = "0 4096 thin 253:4 8"
    pool.modified("volume", "master")
    assert [argv[argv.index("--thin1") + 1] for argv in host.ran] == ["7", "8"]


def test_the_status_takes_no_process(host: Host, pool: StoragePool) -> None:
    found = pool.status()
    assert (found.used, found.total, found.healthy) == (16 << 16, 1024 << 16, True)
    # Without an active volume there is no -tpool.
    host.tables = {"v--g-pool": host.tables["v--g-pool-tpool"]}
    assert pool.status() == found
    host.tables = {}
    with pytest.raises(errors.ProcessError, match="No such device"):
        pool.status()
    assert host.ran == []


def test_a_volume_that_is_not_thin_has_no_map(host: Host, pool: StoragePool) -> None:
    with pytest.raises(errors.DeviceNotFound, match="activate v-g/absent"):
        pool.modified("absent", "master")
    with pytest.raises(errors.DeviceError, match="v-g/linear is not a thin volume"):
        pool.modified("volume", "linear")
    host.tables["v--g-bare"] = ""  # as a device is for a moment, when it is created
    with pytest.raises(errors.DeviceError, match="v-g/bare is not a thin volume"):
        pool.allocated("bare")
    assert host.ran == []


def test_snapshots_are_shared_by_green_threads_too() -> None:
    """Runs the tests of the snapshot again, in a process with eventlet as in cinder-volume."""
    script = (
        "import sys, eventlet; eventlet.monkey_patch(); import pytest;"
        "sys.exit(pytest.main(['-q', '-p', 'no:cacheprovider', sys.argv[1]]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(test_thinmeta.__file__)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
