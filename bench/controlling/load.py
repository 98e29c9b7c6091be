"""Played agents: those that attach, and those that only send heartbeats."""

from __future__ import annotations

import json
import logging
import random
import sys
import threading
import time
from typing import Any

import oslo_messaging
from oslo_config import cfg

from bench.controlling.tracker import IMAGE
from os_brick_thunder.agent.reporter import AGAIN
from os_brick_thunder.common import errors, wire
from os_brick_thunder.common.policy.timelimits import RPC_TIMEOUT
from os_brick_thunder.common.rpc import RpcTracker

RACK, ZONE = 40, 10
#: Seconds within which all attaches begin.
WITHIN = 2.0


def host(number: int) -> wire.Topology:
    """A compute host: racks of forty, zones of ten racks."""
    rack, name = number // RACK, f"c{number:05}"
    address = f"10.{1 + rack // 200}.{rack % 200}.{number % RACK + 1}"
    return wire.Topology(
        name, address, f"r{rack}", f"z{rack // ZONE}", f"iqn.2026-11.org.example:{name}"
    )


def _transport(url: str) -> Any:
    cfg.CONF([], project="bench", default_config_files=[])
    return oslo_messaging.get_rpc_transport(cfg.CONF, url=url)


def storm(url: str, volumes: list[tuple[str, str]], older: bool) -> list[dict[str, Any]]:
    """Attach every volume on a host of its own.

    :param volumes: id and storage host of each; the first is attached to host 0
    :param older: the tracker knows no ids of stacks
    :returns: of each the seconds until its plan, None if there was none in time, and when it began
        and ended
    """
    transport, answers = _transport(url), []
    ready = threading.Barrier(len(volumes) + 1)
    pauses = random.Random(1)  # noqa: S311

    def attach(number: int, volume: tuple[str, str], pause: float) -> None:
        tracker, topology = RpcTracker(transport, RPC_TIMEOUT), host(number)
        ready.wait()
        time.sleep(pause)
        began, seconds, mode = time.monotonic(), None, "late"
        try:
            plan = tracker.plan_attach(
                volume[1], volume[0], topology, "" if older else f"stack-{number}"
            )
            seconds, mode = time.monotonic() - began, plan.mode
        except errors.ThunderError as error:
            mode = f"late: {type(error).__name__}"
        answers.append(
            {"seconds": seconds, "mode": mode, "began": began, "ended": time.monotonic()}
        )
        if mode == "cached":
            report = wire.LocationReport(
                plan.location_id or "", IMAGE, topology.host, "filling", 0,
                f"{topology.address}:3260", f"iqn.2026-11.org.example:{topology.host}", 0,
                plan.sources[0].host,
            )  # fmt: skip
            try:
                tracker.report(report)
            except errors.ThunderError as error:
                answers[-1]["report"] = str(error)

    threads = [
        threading.Thread(target=attach, args=(number, volume, pauses.uniform(0, WITHIN)))
        for number, volume in enumerate(volumes)
    ]
    for thread in threads:
        thread.start()
    print("ready", flush=True)
    sys.stdin.readline()
    ready.wait()
    for thread in threads:
        thread.join()
    return answers


def _at_the_end(ended: threading.Event) -> None:
    sys.stdin.read()
    ended.set()


def idle(url: str, hosts: range, interval: float, bases: int, older: bool) -> int:
    """Heartbeats of hosts that do nothing, until standard input ends.

    They are cast: a tracker does the same for them as for calls, but their answers, which nobody
    reads here, would take as much CPU time of this machine again.

    :param bases: how many of the hosts have a complete base. An older agent reports it with every
        heartbeat
    :returns: how many were sent
    """
    transport = _transport(url)
    target = oslo_messaging.Target(
        exchange=wire.EXCHANGE, topic=wire.TRACKER_TOPIC, version=wire.OLDEST_TRACKER_VERSION
    )
    client = oslo_messaging.get_rpc_client(transport, target)
    ended = threading.Event()
    sent, began = 0, time.monotonic()
    every = 1 if older else max(1, round(AGAIN / interval))  # heartbeats for one report
    print("ready", flush=True)
    threading.Thread(target=_at_the_end, args=(ended,), daemon=True).start()
    while not ended.is_set():
        number = hosts[sent % len(hosts)]
        topology = host(number)
        client.cast({}, "heartbeat", topology=topology.to_wire())
        if number - hosts.start < bases and sent // len(hosts) % every == number % every:
            report = wire.LocationReport(
                f"base-{number}", IMAGE, topology.host, "complete", 1 << 29,
                f"{topology.address}:3260", f"iqn.2026-11.org.example:{topology.host}", 0,
            )  # fmt: skip
            client.cast({}, "report", report=report.to_wire())
        sent += 1
        ended.wait(max(0.0, began + sent * interval / len(hosts) - time.monotonic()))
    return sent


def main() -> None:
    logging.basicConfig(level=logging.CRITICAL)
    arguments = json.loads(sys.stdin.readline())
    what = arguments.pop("what")
    if what == "storm":
        arguments["volumes"] = [tuple(pair) for pair in arguments["volumes"]]
        print(json.dumps(storm(**arguments)))
    else:
        arguments["hosts"] = range(*arguments["hosts"])
        print(json.dumps(idle(**arguments)))


if __name__ == "__main__":
    main()
