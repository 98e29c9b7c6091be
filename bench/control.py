"""The control plane alone in a storm of attaches: without nodes, without data.

Real are MariaDB, RabbitMQ, oslo.messaging, and a tracker process for each storage host. Compute
hosts are played: some attach a volume each within two seconds, others only send heartbeats. So are
the kernel, thin_delta and Cinder's database of the storage hosts, by the times that are printed.

Everything shares this machine's cores: the figures are lower bounds of what the same code does on
hosts of its own. CPU seconds are printed for that reason.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import sqlalchemy as sa

from bench.controlling import load
from bench.controlling.tracker import IMAGE, Costs
from cinder_thunder.db.engine import HEARTBEATS
from os_brick_thunder.common.policy.timelimits import (
    HEARTBEAT_INTERVAL,
    HEARTBEAT_TIMEOUT,
    SUSPECT_SHARE,
)
from tests import mariadb, rabbitmq
from tests.mariadb import ServerError

ROOT = Path(__file__).parents[1]
TRACKER = ROOT / "bench" / "controlling" / "tracker.py"
#: Seconds of heartbeats before the storm and after it.
AROUND = 5.0
#: Rows that are inserted with one statement.
_ROWS = 1000


@dataclasses.dataclass(frozen=True)
class Case:
    """A storm.

    :ivar bases: how many of the idle hosts have a complete base of the image
    :ivar interval: seconds between two heartbeats of a host
    """

    attaches: int
    storage: int
    idle: int
    bases: int
    interval: float


class Children:
    """Processes that take a line of JSON, say that they are ready, and wait for another line."""

    def __init__(self, argv: Sequence[str | Path], tree: Path, *given: object) -> None:
        self._process = subprocess.Popen(
            [sys.executable, *argv],
            cwd=tree,
            env={**os.environ, "PYTHONPATH": str(tree)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._say(json.dumps(given[0] if len(given) == 1 else given))

    def ready(self) -> None:
        assert self._process.stdout
        line = self._process.stdout.readline()
        assert line == "ready\n", f"{self._process.args!r} did not start"

    def go(self) -> None:
        self._say("go")

    def _say(self, line: str) -> None:
        assert self._process.stdin
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()

    def result(self) -> Any:
        """End its input, and read its last line."""
        out, _ = self._process.communicate()
        assert self._process.returncode == 0
        return json.loads(out)


def fill(url: str, case: Case) -> None:
    """Record all compute hosts, and the bases of idle ones."""
    engine = sa.create_engine(url)
    tables = sa.MetaData()
    hosts = sa.Table("thunder_hosts", tables, autoload_with=engine)
    locations = sa.Table("thunder_locations", tables, autoload_with=engine)
    now = sa.func.utc_timestamp()
    compute = [load.host(number) for number in range(case.attaches + case.idle)]
    with engine.begin() as connection:
        for at in range(0, len(compute), _ROWS):
            rows = [
                _known(hosts, {**dataclasses.asdict(each), "drained": False, "heartbeat_at": now})
                for each in compute[at : at + _ROWS]
            ]
            connection.execute(sa.insert(hosts).values(rows))
        for at in range(0, case.bases, _ROWS):
            rows = [
                _known(
                    locations,
                    {
                        "id": f"base-{number}", "image_id": IMAGE, "host": load.host(number).host,
                        "kind": "base", "state": "complete", "depth": 0, "filled": 1 << 29,
                        "portal": "", "iqn": "", "lun": 0, "updated_at": now,
                    },
                )
                for number in range(case.attaches, case.attaches + case.bases)[at : at + _ROWS]
            ]  # fmt: skip
            connection.execute(sa.insert(locations).values(rows))
    engine.dispose()


def _known(table: sa.Table, values: dict[str, Any]) -> dict[str, Any]:
    """Those values that this version of the table has a column for."""
    return {name: value for name, value in values.items() if name in table.c}


def run(case: Case, tree: Path, database: str, broker: str, costs: Costs) -> dict[str, Any]:
    """Play a case.

    :param tree: the code of the trackers
    :param database: URL of an empty database
    """
    storage = [f"stor{number + 1}@thunder" for number in range(case.storage)]
    volumes = [(f"volume-{n}", storage[n % case.storage]) for n in range(case.attaches)]
    subprocess.run(
        [sys.executable, "-P", str(TRACKER), "prepare", database],
        cwd=tree,
        env={**os.environ, "PYTHONPATH": str(tree)},
        input=json.dumps([storage, volumes]),
        text=True,
        check=True,
    )
    fill(database, case)
    older = is_older(tree)
    attached = {volume: load.host(n).host for n, (volume, _host) in enumerate(volumes)}
    given = [dataclasses.asdict(costs), attached]
    trackers = [
        Children(["-P", TRACKER, "serve", database, broker, host], tree, *given) for host in storage
    ]
    player = ["-m", "bench.controlling.load"]
    idle = Children(
        player,
        ROOT,
        {
            "what": "idle", "url": broker, "hosts": [case.attaches, case.attaches + case.idle],
            "interval": case.interval, "bases": case.bases, "older": older,
        },
    )  # fmt: skip
    storm = Children(
        player, ROOT, {"what": "storm", "url": broker, "volumes": volumes, "older": older}
    )
    for tracker in trackers:
        tracker.ready()
        tracker.go()
    for child in (idle, storm):
        child.ready()
    time.sleep(AROUND)
    storm.go()
    answers = storm.result()
    suspect = _suspect(database, case)
    sent = idle.result()
    return {
        "answers": answers,
        "suspect": suspect,
        "heartbeats": sent,
        "tracker_cpu": sum(tracker.result() for tracker in trackers),
    }


def is_older(tree: Path) -> bool:
    """Whether it is from before trackers knew ids of stacks."""
    return not (tree / "os_brick_thunder" / "common").exists()


def _suspect(database: str, case: Case) -> int:
    """Hosts that count as suspect right after the storm."""
    engine = sa.create_engine(database)
    limit = max(HEARTBEAT_TIMEOUT * SUSPECT_SHARE, case.interval * 2)
    with engine.connect() as connection:
        found = connection.scalar(
            sa.text(
                "SELECT COUNT(*) FROM thunder_hosts WHERE kind = 'compute' AND "
                "heartbeat_at < UTC_TIMESTAMP() - INTERVAL :limit SECOND AND host >= :first"
            ),
            {"limit": limit, "first": load.host(case.attaches).host},
        )
    engine.dispose()
    return int(found or 0)


def show(case: Case, result: dict[str, Any], cpu: dict[str, float]) -> str:
    answers = result["answers"]
    good = sorted(each["seconds"] for each in answers if each["mode"] == "cached")
    modes = Counter(each["mode"] for each in answers if each["mode"] != "cached")
    lines = [
        f"{case.attaches} attaches in {load.WITHIN:g} s, {case.storage} storage host(s), "
        f"{case.idle} idle hosts every {case.interval:g} s, {case.bases} of them with the image"
    ]
    if good:
        ended = max(each["ended"] for each in answers if each["mode"] == "cached")
        began = min(each["began"] for each in answers)
        lines.append(
            f"  {len(good)} plans, {len(good) / (ended - began):.0f} a second; p50 "
            f"{statistics.median(good):.2f}, p99 {good[int(len(good) * 0.99)]:.2f}, "
            f"max {good[-1]:.2f} s"
        )
    lines.append(
        f"  not answered within rpc_timeout: {case.attaches - len(good)} "
        f"({(case.attaches - len(good)) / case.attaches:.0%}) {dict(modes) or ''}"
    )
    lines.append(f"  {result['heartbeats']} heartbeats sent; {result['suspect']} hosts suspect")
    spent = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in cpu.items())
    lines.append(f"  CPU: trackers {result['tracker_cpu']:.1f} s, {spent}")
    return "\n".join(lines)


def cpu_of(pids: dict[str, int]) -> dict[str, float]:
    """CPU seconds of processes and their children so far."""
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)  # trackers and played agents
    found = {"these and the agents": ended.ru_utime + ended.ru_stime}
    for name, pid in pids.items():
        every = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
        found[name] = sum(sum(each.cpu_times()[:2]) for each in every)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(prog="bench.control", description=__doc__)
    parser.add_argument("--attaches", type=int, nargs="+", default=[160, 500])
    parser.add_argument("--storage", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--idle", type=int, default=1000, help="hosts that only send heartbeats")
    parser.add_argument("--bases", type=int, help="how many of these have the image")
    parser.add_argument("--interval", type=float, help="default: what the trackers order")
    parser.add_argument("--tree", type=Path, default=ROOT, help="the trackers' code")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    parsed = parser.parse_args()
    if not parsed.inside:  # with a network of our own, where RabbitMQ's ports are free
        os.execvp(  # noqa: S606
            "unshare",
            [
                *("unshare", "--net", "--", "sh", "-c", 'ip link set lo up && exec "$@"', "sh"),
                *(sys.executable, "-m", "bench.control", "--inside", *sys.argv[1:]),
            ],
        )
    costs = Costs()
    print(
        f"played, in seconds: {dataclasses.asdict(costs)}; this machine has {os.cpu_count()} cores"
    )
    try:
        with (
            tempfile.TemporaryDirectory(prefix="control-") as home,
            mariadb.server(_folder(home, "m")) as databases,
            rabbitmq.server(_folder(home, "r")) as (broker, pid),
        ):
            pids = {"MariaDB": int((Path(home) / "m" / "pid").read_text()), "RabbitMQ": pid}
            older = is_older(parsed.tree)
            ordered = 0.0 if older else parsed.idle / HEARTBEATS
            interval = parsed.interval or max(HEARTBEAT_INTERVAL, ordered)
            for storage in parsed.storage:
                for attaches in parsed.attaches:
                    bases = parsed.idle if parsed.bases is None else parsed.bases
                    case = Case(attaches, storage, parsed.idle, bases, interval)
                    before = cpu_of(pids)
                    url = mariadb.new_database(databases)
                    result = run(case, parsed.tree.resolve(), url, broker, costs)
                    spent = {name: now - before[name] for name, now in cpu_of(pids).items()}
                    print(show(case, result, spent), flush=True)
    except ServerError as error:
        sys.exit(f"bench.control: {error}")


def _folder(home: str, name: str) -> Path:
    folder = Path(home, name)
    folder.mkdir()
    return folder


if __name__ == "__main__":
    main()
