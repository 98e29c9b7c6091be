"""What goes wrong: each fault is mended again by the step that causes it."""

from __future__ import annotations

import functools
import random
import threading
import time
from collections.abc import Callable, Mapping, Sequence

from bench.modelling.guests import PATIENCE, Guests
from bench.modelling.hosts import FULL, Hosts
from bench.modelling.life import Life
from bench.modelling.outcome import Outcome
from bench.modelling.parallel import each_of
from bench.modelling.steps import Step, World
from lab.pace import stretch
from lab.play.journey import Journey
from os_brick_thunder.common import errors

#: Seconds that a LUN fails, that a pool is full, and that an eviction may take.
_FAULT, _FULL, _EVICTION = (0.3, 1.5), 3.0, 15.0


class Chaos:
    """Does the steps that break something.

    :param images: their ids in Glance
    """

    def __init__(
        self,
        journey: Journey,
        hosts: Hosts,
        guests: Guests,
        life: Life,
        world: World,
        outcome: Outcome,
        images: Sequence[str],
    ) -> None:
        self._journey = journey
        self._hosts = hosts
        self._guests = guests
        self._life = life
        self._world = world
        self._outcome = outcome
        self._images = images
        self._evicting = threading.Lock()
        self.verbs: Mapping[str, Callable[[Step], None]] = {
            "fail path": self._fail_path,
            "fail lun": self._fail_lun,
            "fill pool": self._fill,
            "evict": self._evict,
            "kill agent": self._kill_agent,
            "kill watcher": self._kill_watcher,
            "kill node": self._kill_node,
            "restart volume": self._restart,
        }

    def _fail_path(self, step: Step) -> None:
        node = self._world.volumes[step.volume].hosts[0]
        volume = self._life.volumes[step.volume]
        found = self._hosts.worker(node).ask("fail_path", volume=volume)
        self._outcome.fault("fail path" if found else "fail path (not cached)")
        self._guests.do(step.volume, self._guests.burst(step, step.volume))
        self._guests.check(step.volume)

    def _fail_lun(self, step: Step) -> None:
        """Meanwhile the guest goes on; what it does may fail, and is right otherwise."""
        host, device = self._guests.places[step.volume]
        seconds = random.Random(step.number).uniform(*_FAULT)  # noqa: S311 - reproducible
        if step.how == "cut":
            worker = self._hosts.worker(self._world.volumes[step.volume].hosts[0])
            address = self._journey.cluster.node(host).address
            fault = worker.begin("cut", address=address, seconds=seconds)
        else:
            count = step.count if step.how == "sector" else 0
            fault = self._hosts.worker(host).begin(
                "break_lun", device=device, first=step.first, count=count, seconds=seconds
            )
        while not fault.done():
            self._guests.do(step.volume, self._guests.burst(step, step.volume), may_fail=True)
        fault.result(stretch(PATIENCE))
        self._outcome.fault(f"fail lun: {step.how}")
        self._guests.check(step.volume)

    def _fill(self, step: Step) -> None:
        written = self._hosts.worker(step.node).ask("fill", percent=FULL, seconds=_FULL)
        self._outcome.fault("fill pool" if written else "fill pool (was full)")

    def _evict(self, step: Step) -> None:
        node, image = self._journey.cluster.node(step.node), self._images[step.other]
        with self._evicting:  # it configures the process
            try:
                self._journey.evict(node, image, _EVICTION)
            except errors.ThunderError:  # in use, not there, or the agent is away
                self._outcome.fault("evict (refused)")
            else:
                self._outcome.fault("evict")

    def _kill_agent(self, step: Step) -> None:
        if step.how:
            self._kill_watcher(step)
        self._hosts.kill_agent(step.node)
        self._outcome.fault(f"{step.kind} {step.how}".strip())

    def _kill_watcher(self, step: Step) -> None:
        """The agent starts another one."""
        if self._hosts.worker(step.node).ask("kill_watcher") and step.kind == "kill watcher":
            self._outcome.fault(step.kind)

    def _restart(self, step: Step) -> None:
        self._hosts.restart_volume(step.node)
        self._outcome.fault("restart cinder-volume")

    def _kill_node(self, step: Step) -> None:
        """Its guests write until the moment of the power cut, and are there again afterwards."""
        attached = self._world.on(step.node)
        here = [each for each in attached if self._world.volumes[each].hosts[0] == step.node]
        bursts = {number: 4 * self._guests.burst(step, number) for number in here}
        begin = self._guests.begin_last
        doing = {number: begin(number, step.node, ops) for number, ops in bursts.items()}
        time.sleep(random.Random(step.number).uniform(0.0, 0.2))  # noqa: S311 - reproducible
        self._hosts.power_cut(step.node)
        for number, ops in bursts.items():
            self._guests.crash(number, ops, doing[number])
        self._hosts.power_on(step.node)
        self._outcome.fault("kill node")
        each_of(attached, functools.partial(self._life.reconnect, node=step.node))
