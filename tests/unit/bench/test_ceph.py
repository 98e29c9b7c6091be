"""What Ceph's programs and the kernel are told of a cluster."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from bench.replaying import ceph
from bench.replaying.ceph import Settings
from lab.errors import LabError

SETTINGS = Settings("11111111-2222", "33333333-4444", "10.77.0.11", 6 << 30)
MAKEFILE = Path(__file__).parents[3] / "Makefile"


def test_a_machine_without_ceph_is_told_what_to_run(tmp_path: Path) -> None:
    for name in ("ceph", "monmaptool", "rbd", "ceph-osd"):
        (tmp_path / name).touch()
    with pytest.raises(
        LabError, match=r"^ceph-mon not installed .* ceph-mon ceph-osd ceph-common$"
    ):
        ceph.require(tmp_path)
    (tmp_path / "ceph-mon").touch()
    ceph.require(tmp_path)


def test_the_bench_and_nothing_else_installs_ceph() -> None:
    lines = [line for line in MAKEFILE.read_text().splitlines() if "ceph-" in line]
    assert len(lines) == 1
    assert lines[0].startswith("bench: PACKAGES = ")
    assert set(lines[0].split()) >= set(ceph.PACKAGES)


def test_clients_are_told_where_the_monitor_is() -> None:
    address, options, pool, clone, snapshot = SETTINGS.map_line("clone-cmp1").split()
    assert (address, pool, clone, snapshot) == ("10.77.0.11:6789", "rbd", "clone-cmp1", "-")
    assert "name=admin" in options.split(",")
    filled = SETTINGS.fill("{cluster} {osd} {address}:{port} {block_size}")
    assert filled == "11111111-2222 33333333-4444 10.77.0.11:6789 6442450944"


def test_clusters_are_told_apart_and_have_room_for_the_image() -> None:
    one, other = (Settings.fresh("10.77.0.11", 2 << 30) for _ in range(2))
    assert len({one.cluster, one.osd, other.cluster, other.osd}) == 4
    assert one.block_size > 2 << 30


def test_a_script_is_one_command_that_ends_by_itself() -> None:
    words = shlex.split(ceph._script("rbd import 'a b'\nrbd ls\n"))
    assert words[0] == "timeout"
    assert words[-1] == "rbd import 'a b'\nrbd ls\n"
