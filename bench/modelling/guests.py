"""What guests do with their volumes, and what they must find there."""

from __future__ import annotations

import errno
import random
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from typing import Any

from bench.modelling.contents import Contents, Wrong
from bench.modelling.hosts import Hosts
from bench.modelling.outcome import Outcome
from bench.modelling.steps import Step, World
from lab.errors import LabError
from lab.inside.sectors import SECTOR, ZERO

#: Seconds for which a guest tries again what failed, outside of a fault of its LUN.
PATIENCE = 30.0
#: An operation as lab/inside/worker.py takes it: [kind, first, count, token].
Op = list[Any]


class WrongBytes(Exception):
    """A volume returned what it cannot hold."""


class Guests:
    """The contents of volumes and snapshots by number, and where the volumes are.

    ``paths``: the device of a volume on a host; ``places``: a volume's storage host, and the name
    of its device there.
    """

    def __init__(self, hosts: Hosts, world: World, outcome: Outcome) -> None:
        self.contents: dict[int, Contents] = {}
        self.paths: dict[tuple[int, str], str] = {}
        self.places: dict[int, tuple[str, str]] = {}
        self._hosts = hosts
        self._world = world
        self._outcome = outcome

    def do(self, number: int, ops: Sequence[Op], node: str = "", may_fail: bool = False) -> None:
        """Operations on a volume, one after the other.

        :param node: "" is where the guest is
        :param may_fail: while its LUN fails; otherwise they are tried again for a while
        :raises LabError: one failed
        :raises WrongBytes: one did not return what it must
        """
        node = node or self._world.volumes[number].hosts[0]
        answer = self._begin(number, ops, node, 0 if may_fail else PATIENCE).result()
        self._outcome.saw(answer)
        errors = self._account(number, ops, answer)
        if errors and not may_fail:
            raise LabError(f"v{number} on {node}: {errors[0]}, for {PATIENCE:g} s")

    def _begin(
        self, number: int, ops: Sequence[Op], node: str, patience: float
    ) -> Future[Mapping[str, Any]]:
        device = self.paths[number, node]
        return self._hosts.worker(node).begin("io", device=device, ops=ops, patience=patience)

    def check(self, number: int, node: str = "") -> None:
        """Read all that was ever written to a volume, and what is beside it."""
        spans = self.contents[number].spans(self._world.volumes[number].sectors)
        self.do(number, [["read", first, count, 0] for first, count in spans], node)

    def compare_whole(self, number: int) -> None:
        """Compare every byte of a volume, read from its LV on the storage host."""
        host, device = self.places[number]
        sectors = self._world.volumes[number].sectors
        runs = self._hosts.worker(host).ask("whole", device=device, count=sectors)
        self._judge(number, self.contents[number].observe(tuple(run) for run in runs))

    def begin_last(self, number: int, node: str, ops: Sequence[Op]) -> Future[Mapping[str, Any]]:
        """Operations that a power cut will interrupt: see :meth:`crash`."""
        return self._begin(number, ops, node, 0)

    def crash(self, number: int, ops: Sequence[Op], doing: Future[Mapping[str, Any]]) -> None:
        """A volume's host has lost power while it did these operations."""
        contents = self.contents[number]
        if doing.exception() is None:
            self._account(number, ops, doing.result())
        else:
            for kind, first, count, token in ops:
                if kind == "write":
                    contents.attempt(first, count, token)
        contents.crash()

    def _account(self, number: int, ops: Sequence[Op], answer: Mapping[str, Any]) -> list[str]:
        """Tell the model what was done; returns the errors."""
        found = []
        for op, result in zip(ops, answer["results"], strict=True):
            error = result if isinstance(result, dict) else None
            if error is None:
                self._succeeded(number, op, result)
            else:
                found += self._failed(number, op, error)
        return found

    def _succeeded(self, number: int, op: Op, result: Any) -> None:
        kind, first, count, token = op
        contents = self.contents[number]
        match kind:
            case "read":
                self._judge(number, contents.observe(tuple(run) for run in result))
            case "flush":
                contents.flush()
            case "trim":  # of each block, or of none
                contents.attempt(first, count, ZERO)
            case "zero":
                contents.write(first, count, ZERO)
            case "write":
                contents.write(first, count, token)

    def _failed(self, number: int, op: Op, error: Mapping[str, Any]) -> list[str]:
        kind, first, count, token = op
        if kind == "trim" and error["errno"] == errno.EOPNOTSUPP:
            return []
        if kind in ("write", "zero", "trim"):
            self.contents[number].attempt(first, count, token if kind == "write" else ZERO)
        return [str(error["error"])]

    def _judge(self, number: int, wrong: Sequence[Wrong]) -> None:
        if wrong:
            lost = sum(each.count for each in wrong if each.lost)
            self._outcome.bytes(sum(each.count for each in wrong) * SECTOR, lost * SECTOR)
            raise WrongBytes(f"v{number}: wrong bytes: {'; '.join(map(str, wrong[:8]))}")

    def burst(self, step: Step, number: int) -> list[Op]:
        """What a guest does while something happens to it, at the place that the step names."""
        dice = random.Random(f"{step.number} {number}")  # noqa: S311 - reproducible, not a secret
        end = self._world.volumes[number].sectors
        ops: list[Op] = []
        for _ in range(6):
            first = step.first or dice.randrange(8192)
            first = min(max(first + dice.randrange(-256, 256), 0), end - 64)
            ops.append(["write", first, dice.choice((1, 8, 64)), step.number])
            ops.append(["read", max(first - 32, 0), 64, 0])
        ops[7:7] = [["flush", 0, 0, 0]]
        return ops
