"""Does the steps in a lab, and compares what volumes return with what they may hold."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait

from bench.modelling.api import Cinder
from bench.modelling.chaos import Chaos
from bench.modelling.contents import Image
from bench.modelling.guests import Guests, WrongBytes
from bench.modelling.hosts import Hosts
from bench.modelling.life import Life
from bench.modelling.outcome import Outcome
from bench.modelling.parallel import each_of
from bench.modelling.steps import IO, Step, World, order
from lab.errors import LabError
from lab.play.journey import Journey
from os_brick_thunder.common.errors import ThunderError

#: Steps that are done at the same time, and how far ahead one may be taken.
_AT_ONCE, _AHEAD = 10, 60


class Player:
    """One run of steps, from volumes that do not exist to volumes that are compared.

    :param images: each with its id in Glance
    """

    def __init__(
        self,
        journey: Journey,
        cinder: Cinder,
        hosts: Hosts,
        images: Sequence[tuple[Image, str]],
        world: World,
    ) -> None:
        self.world = world
        self.outcome = Outcome()
        self._guests = guests = Guests(hosts, world, self.outcome)
        self._life = life = Life(cinder, hosts, guests, world, self.outcome, images)
        ids = [found for _, found in images]
        chaos = Chaos(journey, hosts, guests, life, world, self.outcome, ids)
        io = dict.fromkeys(IO, self._io)
        self._verbs: Mapping[str, Callable[[Step], None]] = {**io, **life.verbs, **chaos.verbs}

    def do(self, step: Step) -> None:
        """Do one step that is allowed; problems go to the outcome."""
        began = time.monotonic()
        try:
            self._verbs[step.kind](step)
        except (LabError, ThunderError, WrongBytes) as error:
            self.outcome.problem(step, error, step.number)
        else:
            self.outcome.did(step, time.monotonic() - began)

    def _io(self, step: Step) -> None:
        """``peek`` reads where the guest is about to go, as QEMU does before it is there."""
        peek = step.kind == "peek"
        node = self.world.volumes[step.volume].hosts[1] if peek else ""
        kind = "read" if peek else step.kind
        self._guests.do(step.volume, [[kind, step.first, step.count, step.number]], node)

    def compare_all(self) -> None:
        """Read all volumes whole, where they are attached and on their storage hosts."""

        def compare(number: int) -> None:
            try:
                if self.world.volumes[number].hosts:
                    self._guests.check(number)
                self._guests.compare_whole(number)
            except (LabError, WrongBytes) as error:
                self.outcome.problem("at the end", error)

        each_of(self.world.volumes, compare)

    def clear(self) -> None:
        """Detach and delete everything."""
        self._life.clear()


def drive(
    player: Player,
    steps: Sequence[Step],
    progress: Callable[[int, int, Outcome], None],
    until: float = math.inf,
) -> None:
    """Do the steps, several at once, each after those that it depends on.

    After a problem, and after the time ``until`` (monotonic), no further one is begun.
    """

    def goes_on() -> bool:
        return not player.outcome.failed and time.monotonic() < until

    after = order(steps, copy.deepcopy(player.world))
    todo = list(range(len(steps)))
    running: dict[Future[None], int] = {}
    unfinished = set(todo)
    with ThreadPoolExecutor(_AT_ONCE) as threads:
        while running or (todo and goes_on()):
            if goes_on():
                free = _AT_ONCE - len(running)
                ready = [i for i in todo[:_AHEAD] if not after[i] & unfinished][:free]
                for index in ready:
                    todo.remove(index)
                    running[threads.submit(player.do, steps[index])] = index
            for done in wait(running, return_when=FIRST_COMPLETED).done:
                done.result()
                unfinished.discard(running.pop(done))
            progress(len(steps) - len(unfinished), len(steps), player.outcome)
