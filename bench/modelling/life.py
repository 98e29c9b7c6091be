"""The life of volumes, as users and Nova have it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from bench.modelling.api import Cinder
from bench.modelling.contents import Contents, Image
from bench.modelling.guests import Guests
from bench.modelling.hosts import Hosts
from bench.modelling.outcome import Outcome
from bench.modelling.parallel import each_of
from bench.modelling.steps import Step, World
from lab.errors import LabError


class Life:
    """Does the steps of a volume's life; each is in the world when it is done.

    :param images: each with its id in Glance
    """

    def __init__(
        self,
        cinder: Cinder,
        hosts: Hosts,
        guests: Guests,
        world: World,
        outcome: Outcome,
        images: Sequence[tuple[Image, str]],
    ) -> None:
        self.volumes: dict[int, str] = {}  # number → id
        self._snapshots: dict[int, str] = {}
        self._cinder = cinder
        self._hosts = hosts
        self._guests = guests
        self._world = world
        self._outcome = outcome
        self._images = images
        self.verbs: Mapping[str, Callable[[Step], None]] = {
            **dict.fromkeys(("create", "clone", "restore"), self._create),
            **dict.fromkeys(("attach", "migrate"), self._attach),
            **dict.fromkeys(("detach", "leave"), self._detach),
            "delete": self._delete,
            "snapshot": self._snapshot,
            "forget": self._forget,
            "revert": self._revert,
            "extend": self._extend,
            "hand over": self._hand_over,
        }

    def _create(self, step: Step) -> None:
        contents = self._guests.contents
        if step.kind == "create":
            image, source = self._images[step.other]
            gib, key, content = 1, "imageRef", Contents(image)
        elif step.kind == "clone":
            gib, key = self._world.volumes[step.other].gib, "source_volid"
            source, content = self.volumes[step.other], contents[step.other].copy()
        else:
            gib, key = self._world.snapshots[step.other][1], "snapshot_id"
            source, content = self._snapshots[step.other], contents[step.other].copy()
        created = self._cinder.create(gib, key, source)
        contents[step.volume], self.volumes[step.volume] = content, created
        self._guests.places[step.volume] = self._cinder.place(created)
        self._world.apply(step)

    def _delete(self, step: Step) -> None:
        self._guests.compare_whole(step.volume)
        self._cinder.delete("volumes", self.volumes[step.volume])
        del self.volumes[step.volume]
        self._world.apply(step)

    def _snapshot(self, step: Step) -> None:
        self._snapshots[step.other] = self._cinder.snapshot(self.volumes[step.volume])
        self._guests.contents[step.other] = self._guests.contents[step.volume].copy()
        self._world.apply(step)

    def _forget(self, step: Step) -> None:
        self._cinder.delete("snapshots", self._snapshots[step.other])
        del self._snapshots[step.other]
        self._world.apply(step)

    def _revert(self, step: Step) -> None:
        self._cinder.revert(self.volumes[step.volume], self._snapshots[step.other])
        self._guests.contents[step.volume] = self._guests.contents[step.other].copy()
        self._world.apply(step)

    def _extend(self, step: Step) -> None:
        volume, found = self._world.volumes[step.volume], self.volumes[step.volume]
        self._cinder.extend(found, volume.gib + 1, "in-use" if volume.hosts else "available")
        for node in volume.hosts:
            self._connect(node, "extend", step.volume)
        self._world.apply(step)
        if volume.hosts:
            self._guests.check(step.volume)
            end = self._world.volumes[step.volume].sectors
            self._guests.do(step.volume, [["read", end - 128, 128, 0]])

    def _attach(self, step: Step) -> None:
        """Also to a second host, for a migration."""
        self._open(step.volume, step.node, "attach")
        self._world.apply(step)
        self._guests.check(step.volume, step.node)

    def _hand_over(self, step: Step) -> None:
        """The guest moves: from here on it uses the other host, and nobody this one."""
        self._world.apply(step)
        self._guests.check(step.volume)

    def _detach(self, step: Step) -> None:
        """From its only host, or from the one that the guest has left or never reached."""
        self._connect(self._world.volumes[step.volume].hosts[-1], "detach", step.volume)
        self._world.apply(step)
        if step.kind == "leave":
            self._guests.check(step.volume)

    def reconnect(self, number: int, node: str) -> None:
        """What Nova does for a volume after a reboot of its host."""
        self._open(number, node, "reconnect")
        volume = self._world.volumes[number]
        if not volume.handed or node == volume.hosts[0]:
            self._guests.check(number, node)

    def _open(self, number: int, node: str, how: str) -> None:
        answer = self._connect(node, how, number)
        self._guests.paths[number, node] = answer["path"]
        self._outcome.opened(answer["path"], answer["cached"])

    def _connect(self, node: str, what: str, number: int) -> Mapping[str, Any]:
        found = self.volumes[number]
        answer: Mapping[str, Any] = self._hosts.worker(node).ask("connect", what=what, volume=found)
        return answer

    def clear(self) -> None:
        """Detach and delete everything; what cannot be is a problem."""

        def guarded(action: Callable[[], object]) -> None:
            try:
                action()
            except LabError as error:
                self._outcome.problem("at the end", error)

        def detach(number: int) -> None:
            for node in reversed(self._world.volumes[number].hosts):
                guarded(functools.partial(self._connect, node, "detach", number))

        def delete(kind: str, found: str) -> None:
            guarded(functools.partial(self._cinder.delete, kind, found))

        each_of(set(self.volumes) & set(self._world.volumes), detach)
        each_of(self._snapshots.values(), functools.partial(delete, "snapshots"))
        each_of(self.volumes.values(), functools.partial(delete, "volumes"))
