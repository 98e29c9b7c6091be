"""What is read of QEMU's trace of a boot, how it is replayed, and in which arms."""

from __future__ import annotations

import json
import shlex
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from bench import results
from bench.replay import Replays, parser
from bench.replaying.arms import ARMS, OTHERS, Arm, Boot
from bench.replaying.found import Found
from bench.replaying.trace import Read, distinct, parse
from lab.errors import LabError
from lab.inside import replay
from lab.nodes.node import Node

TRACE = """\
qemu: a message
842@100.000000:virtio_blk_handle_read vdev 0x55 req 0xa sector 0 nsectors 1
842@100.000500:virtio_blk_rw_complete vdev 0x55 req 0xa ret 0
842@100.002500:virtio_blk_handle_read vdev 0x55 req 0xa sector 2048 nsectors 8
842@100.002600:virtio_blk_handle_read vdev 0x55 req 0xb sector 2056 nsectors 8
842@100.003000:virtio_blk_rw_complete vdev 0x55 req 0xb ret 0
842@100.003100:virtio_blk_rw_complete vdev 0x55 req 0xc ret 0
842@100.004000:virtio_blk_rw_complete vdev 0x55 req 0xa ret 0
842@100.005000:virtio_blk_handle_read vdev 0x55 req 0xd sector 2052 nsectors 8
"""


def test_thinking_is_the_time_in_which_no_read_is_in_flight() -> None:
    reads = list(parse(TRACE.splitlines()))
    assert reads == [Read(0, 0, 1), Read(2000, 2048, 8), Read(0, 2056, 8), Read(1000, 2052, 8)]
    assert distinct(reads) == 17 * 512


def test_the_same_reads_are_made_with_less_thinking(tmp_path: Path) -> None:
    device, trace = tmp_path / "device", tmp_path / "trace"
    device.write_bytes(bytes(2 << 20))
    trace.write_text("".join(f"{read}\n" for read in parse(TRACE.splitlines())))
    found = replay.replay(str(device), str(trace), 0.1)
    assert (found["reads"], found["bytes"]) == (4, 25 * 512)
    assert found["thinking"] == pytest.approx(0.0003)
    assert found["seconds"] >= found["thinking"]


def test_reads_that_are_held_begin_when_they_may(tmp_path: Path) -> None:
    device, trace, hold = tmp_path / "device", tmp_path / "trace", tmp_path / "hold"
    device.write_bytes(bytes(2 << 20))
    trace.write_text("".join(f"{read}\n" for read in parse(TRACE.splitlines())))
    hold.touch()
    with ThreadPoolExecutor() as threads:
        reading = threads.submit(replay.replay, str(device), str(trace), 0.1, str(hold))
        while not Path(f"{hold}.ready").exists():
            time.sleep(0.001)
        time.sleep(0.1)
        assert not reading.done()
        began = time.monotonic()
        hold.unlink()
        assert reading.result()["seconds"] <= time.monotonic() - began


class WithoutNodes(Replays):
    """Boots of arms that need no lab; NBD fails."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        journey: Any = SimpleNamespace(cluster=SimpleNamespace(of_kind=lambda kind: []))
        super().__init__(journey, [], self.notes.append)

    def _arm(self, name: str, nodes: Sequence[Node], *_: Any, **__: Any) -> Arm:
        return Arm(name, 1, (Boot(1.0, 2.0, 0.1),), 0, 0)

    def _local(self, nodes: Sequence[Node]) -> Arm:
        return self._arm("local", nodes)

    def _nbd(self, name: str, nodes: Sequence[Node]) -> Arm:
        raise LabError("there is no module nbd")


def test_a_peer_that_fails_is_told_of_and_left_out() -> None:
    replays = WithoutNodes()
    found = list(replays.run(1, ["local", "nbd", "plain"]))
    assert [arm.name for arm in found] == ["plain", "local"]
    assert replays.notes == ["nbd failed: there is no module nbd"]


def test_arms_that_are_named_elsewhere_exist() -> None:
    assert set(ARMS) >= OTHERS | set(results.ARMS)


@pytest.mark.parametrize("options", results.RUNS.values())
def test_what_the_page_is_made_of_can_be_run(options: str) -> None:
    parser().parse_args(shlex.split(options))


def _measured(guest: str, chain: bool) -> Any:
    profile = {"boots": 3, "coverage": "-, 99 %", "waste": "-, 1 %"}
    found = Found("25mbit", 52 << 20, 0.5, chain, guest, profile)
    boots = Boot(1.0, 112.0, 0.1), Boot(1.0, 113.0, 0.2)
    arm = Arm("plain", 6, boots, 52 << 20, 0, busy=0.954)
    return json.loads(json.dumps(asdict(replace(found, arms=(arm,)))))


def test_the_page_has_all_runs() -> None:
    page = results.page(_measured("debian", False), [_measured("ubuntu", True)]).splitlines()
    first = page.index("## Debian, links of 25mbit")
    second = page.index("## Ubuntu, links of 25mbit, each host read from the one before it")
    row = "| 6 | plain | 1.0 | 112.5 | 113.5 | 114.0 | 0.20 | - | 1.00 | 95% |"
    for lines in (page[first:second], page[second:]):
        assert row in lines
        assert "A boot reads 52 MiB. Hosts began to fill 0.5 s before the first reads." in lines
        assert "The profile: 3 boots, coverage -, 99 %, waste -, 1 %." in lines
