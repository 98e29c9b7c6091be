"""What the servers showed, as values: percentiles, the table, the report. Nothing here calls."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any


class Failure(StrEnum):
    """Why a server was not measured to the end; the cloud's own words may have names in them."""

    VOLUME = "volume failed"
    VOLUME_LATE = "volume not available in time"
    SERVER = "server failed"
    SERVER_LATE = "server not ACTIVE in time"
    SILENT = "server did not answer in time"


@dataclass(frozen=True)
class Outcome:
    """One server; seconds, None for what did not happen.

    :ivar volume_s: from the request for its volume until that was available
    :ivar active_s: from the request for the server until it was ACTIVE
    :ivar answer_s: from the request for the server until it answered
    :ivar host: Nova's hostId, which differs between projects; empty if it got to no host
    """

    volume_s: float | None = None
    active_s: float | None = None
    answer_s: float | None = None
    failure: Failure | None = None
    host: str = ""

    @property
    def both_s(self) -> float | None:
        """Seconds for its volume and until it answered."""
        if self.volume_s is None or self.answer_s is None:
            return None
        return self.volume_s + self.answer_s


@dataclass(frozen=True)
class Turn:
    """The servers of one volume type in one round, counted from 1."""

    round: int
    type: str
    outcomes: tuple[Outcome, ...]


@dataclass(frozen=True)
class Summary:
    """One line of the table; seconds.

    :ivar rounds: "1", or "2 to 5": the first one may have to bring the image to the hosts
    :ivar longest: of those that got so far
    :ivar failed: servers that did not get so far
    :ivar ratio: this p50 in units of that of the first type
    """

    rounds: str
    measure: str
    type: str
    servers: int
    failed: int
    p50: float | None
    p99: float | None
    longest: float | None
    ratio: float | None


@dataclass(frozen=True)
class Facts:
    """What a report says of the cloud, which is no name, address or id of it."""

    image_bytes: int
    image_format: str
    flavor_vcpus: int
    flavor_ram_mib: int
    versions: dict[str, str]


@dataclass(frozen=True)
class Setting:
    """What was asked for, and of which cloud."""

    servers: int
    rounds: int
    volume_gib: int
    ready: str
    timeout_s: float
    cloud: Facts


def order(types: Sequence[str], number: int) -> tuple[str, ...]:
    """The types in the order of a round: to and fro, so that what drifts meets all of them."""
    return tuple(types) if number % 2 else tuple(reversed(types))


def percentile(seconds: Iterable[float | None], percent: int) -> float | None:
    """The nearest rank: a value that was measured, never one between two.

    What did not happen counts as longer than all that did: leaving it out would flatter a type
    whose slow servers fail.

    :returns: None if there is nothing of that rank, or it did not happen
    """
    ordered = sorted(math.inf if each is None else each for each in seconds)
    if not ordered:
        return None
    found = ordered[max(1, -(-len(ordered) * percent // 100)) - 1]
    return None if math.isinf(found) else found


def summarize(turns: Sequence[Turn], types: Sequence[str]) -> list[Summary]:
    """The first round, then all later ones: for each measure, each type."""
    last = max((turn.round for turn in turns), default=0)
    groups = {"1": [turn for turn in turns if turn.round == 1]}
    if last > 1:
        groups["2" if last == 2 else f"2 to {last}"] = [turn for turn in turns if turn.round > 1]
    return [
        line
        for rounds, group in groups.items()
        for measure in ("volume", "ACTIVE", "answers", "volume + answers")
        for line in _compare(rounds, measure, group, types)
    ]


def _compare(
    rounds: str, measure: str, turns: Sequence[Turn], types: Sequence[str]
) -> Iterable[Summary]:
    reference = None
    for kind in types:
        outcomes = [each for turn in turns if turn.type == kind for each in turn.outcomes]
        seconds = [_measured(each, measure) for each in outcomes]
        there = [each for each in seconds if each is not None]
        p50 = percentile(seconds, 50)
        reference = p50 if kind == types[0] else reference
        yield Summary(
            rounds,
            measure,
            kind,
            len(seconds),
            len(seconds) - len(there),
            p50,
            percentile(seconds, 99),
            max(there, default=None),
            p50 / reference if p50 is not None and reference else None,
        )


def _measured(outcome: Outcome, measure: str) -> float | None:
    return {
        "volume": outcome.volume_s,
        "ACTIVE": outcome.active_s,
        "answers": outcome.answer_s,
        "volume + answers": outcome.both_s,
    }[measure]


def hosts(turns: Iterable[Turn]) -> list[str]:
    """The distinct hosts, in the order in which servers were seen on them."""
    every = (each.host for turn in turns for each in turn.outcomes if each.host)
    return list(dict.fromkeys(every))


def failures(turns: Iterable[Turn]) -> Counter[tuple[str, Failure]]:
    """How often what happened, by type."""
    return Counter(
        (turn.type, each.failure) for turn in turns for each in turn.outcomes if each.failure
    )


def table(lines: Sequence[Summary]) -> str:
    """The summary in columns, seconds."""
    heading = ("rounds", "seconds until", "type", "p50", "p99", "max", "failed", "p50 ratio")
    rows: list[tuple[str, ...]] = [heading]
    rows += [
        (
            line.rounds,
            line.measure,
            line.type,
            *(_shown(each, 1) for each in (line.p50, line.p99, line.longest)),
            f"{line.failed} of {line.servers}",
            _shown(line.ratio, 2),
        )
        for line in lines
    ]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if number < 3 else cell.rjust(width)
            for number, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )


def _shown(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def report(
    setting: Setting,
    turns: Sequence[Turn],
    labels: Mapping[str, str],
    *,
    date: str,
    resolution: float,
    interrupted: bool,
    left: int,
) -> dict[str, Any]:
    """What can be shared: figures and versions, without names, addresses or ids of the cloud.

    :param labels: what volume types are called in it
    :param resolution: seconds by which times may be too long
    :param left: things that could not be deleted
    """
    numbers = {host: number for number, host in enumerate(hosts(turns), 1)}
    named = [Turn(turn.round, labels[turn.type], turn.outcomes) for turn in turns]
    return {
        "bench": "bench.field",
        "format": 1,
        "date": date,
        "setting": asdict(setting),
        "hosts": len(numbers),
        "resolution_s": _rounded(resolution),
        "interrupted": interrupted,
        "not_deleted": left,
        "failures": [
            {"type": kind, "failure": str(failure), "servers": count}
            for (kind, failure), count in failures(named).items()
        ],
        "summary": [
            {name: _rounded(value) for name, value in asdict(line).items()}
            for line in summarize(named, list(labels.values()))
        ],
        "turns": [
            {
                "round": turn.round,
                "type": turn.type,
                "servers": [_server(each, numbers) for each in turn.outcomes],
            }
            for turn in named
        ],
    }


def _server(outcome: Outcome, numbers: Mapping[str, int]) -> dict[str, Any]:
    return {
        "volume_s": _rounded(outcome.volume_s),
        "active_s": _rounded(outcome.active_s),
        "answer_s": _rounded(outcome.answer_s),
        "failure": outcome.failure and str(outcome.failure),
        "host": numbers.get(outcome.host),
    }


def _rounded(value: Any) -> Any:
    return round(value, 2) if isinstance(value, float) else value
