"""The agent killed at every step of building and removing, one after the other, in a lab.

A point is a moment of a verb: before the n-th step of a name (see bench/faults.py), or after
the verb's last one; "after" one step is "before" the next. For each: the verb is run and the agent
dies there; a guest goes on reading and writing; the agent is started again, and kernel, pool, state
file, iSCSI, exporter and tracker must come to agree; then the volume is detached and attached
again, and every byte of it must be right.

The verb "cache back" is not called but provoked. The volume is also attached elsewhere, as plain
iSCSI, and therefore direct here; that attachment ends, and the agent dies while it builds the
volume's cache. The guest may then have to wait for the next agent, which must build it unasked.

Each compute node sweeps a share of the points, with an image of its own, so that they do not
interfere.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import random
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from bench.faults import AFTER, BEFORE, VARIABLE
from lab.cluster import existing_or_new
from lab.errors import LabError
from lab.inside import blocks
from lab.nodes.node import Node
from lab.nodes.topology import Topology
from lab.play import audit
from lab.play.journey import Journey
from os_brick_thunder.common import errors

MIB = 1 << 20
#: Bytes of an image, with data, holes, and a partial last block; then how much of a volume is
#: hashed, which is more.
SIZE, HASHED = 24 * MIB + 3 * 512, 26 * MIB
_DATA = ((0, 6 * MIB), (12 * MIB, 4 * MIB), (23 * MIB, SIZE - 23 * MIB))
_CONTROL = "/run/failpoint"
_AGENT = "thunder-agent"
#: The modules that are run as the agent: the product's, and the same with failpoints.
_PLAIN, _FAULTY = "os_brick_thunder.agent.main", "bench.faults"
#: Seconds for the agent to reach its point, and for everything to agree after its restart.
_REACHED, _CONVERGED = 40.0, 40.0
#: States of a host, as far as one image and one volume of it go.
_ABSENT, _IDLE, _ATTACHED, _DIRECT = "absent", "idle", "attached", "direct"
#: Verb → the state that it starts from.
VERBS = {
    "first attach": _ABSENT,
    "detach": _ATTACHED,
    "second attach": _IDLE,
    "eviction": _IDLE,
    "cache back": _DIRECT,
}


@dataclass(frozen=True)
class Point:
    """``moment`` is a line of the control file, with ``{image}`` and ``{volume}`` for the ids."""

    verb: str
    moment: str

    def __str__(self) -> str:
        return f"{self.verb}: {self.moment}"


@dataclass
class Outcome:
    """The result of one run; ``reached``: the agent died at the point."""

    point: Point
    reached: bool = False
    seconds: float = 0.0
    orphans: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)  # bytes
    failures: list[str] = field(default_factory=list)  # of verbs that must succeed

    @property
    def problems(self) -> list[str]:
        return self.orphans + self.wrong + self.failures


@dataclass(frozen=True)
class Image:
    id: str
    raw: Path  # as long as what is hashed of a volume


def make_image(journey: Journey, folder: Path, name: str) -> Image:
    """Upload an image of known bytes."""
    raw, qcow2 = folder / f"{name}.raw", folder / f"{name}.qcow2"
    dice = random.Random(name)  # noqa: S311 - reproducible, not secret
    with open(raw, "wb") as file:
        file.truncate(SIZE)
        for start, length in _DATA:
            file.seek(start)
            file.write(dice.randbytes(length))
    subprocess.run(["qemu-img", "convert", "-f", "raw", "-O", "qcow2", raw, qcow2], check=True)
    found = journey.upload(qcow2, name)
    with open(raw, "r+b") as file:
        file.truncate(HASHED)
    return Image(found, raw)


@contextmanager
def failpoints_on(node: Node) -> Iterator[None]:
    """A node's agent, restarted with failpoints, and without them at the end."""
    plain = node.catalog[_AGENT]
    node.service_stop(_AGENT)
    argv = tuple({_PLAIN: _FAULTY}.get(word, word) for word in plain.argv)
    if argv == plain.argv:
        raise LabError(f"{_AGENT} is not started as {_PLAIN}: {' '.join(argv)}")
    env = {**plain.env, VARIABLE: _CONTROL}
    node.catalog[_AGENT] = dataclasses.replace(plain, argv=argv, env=env)
    try:
        node.service_start(_AGENT)
        yield
    finally:
        node.run(f"rm -f {_CONTROL} {_CONTROL}.log", check=False)
        node.service_stop(_AGENT)
        node.catalog[_AGENT] = plain
        node.service_start(_AGENT)


class SweptHost:
    """One node with one image and one volume of it, and the checks of these."""

    def __init__(
        self, journey: Journey, node: Node, other: Node, image: Image, volume: str
    ) -> None:
        """:param other: has the volume attached, too, while it is direct here"""
        self._journey = journey
        self._node = node
        self._other = other
        self._image = image
        self._volume = volume
        self._state = _ABSENT
        self._path = ""
        self._written: dict[int, str] = {}  # offset → seed
        self._writes = 0

    # -- points -----------------------------------------------------------------------------

    def record(self) -> list[Point]:
        """Every point of every verb, from a run without a crash."""
        found: list[Point] = []
        for verb in ("first attach", "detach", "second attach", "cache back", "detach", "eviction"):
            self.reach(VERBS[verb])
            self._arm("nothing")
            self.reach(_after(verb))
            if verb == "first attach":
                self._await(self._is_complete, "the base to be complete")
                audit.settle(self._journey.cluster, self._node)
            log = self._node.run(f"rm -f {_CONTROL}; cat {_CONTROL}.log; rm {_CONTROL}.log").stdout
            known = {point.verb for point in found}
            moments = self._named(log).splitlines()
            # Heartbeats report by the clock; the first report may be the verb's own.
            moments = [m for m in moments if "tracker.report" not in m or " 1 " in m]
            expected = [moment for moment in moments if moment.startswith(BEFORE)]
            expected += [moment for moment in moments if moment.startswith(AFTER)][-1:]
            found += [Point(verb, moment) for moment in expected if verb not in known]
        return found

    def _named(self, text: str) -> str:
        return text.replace(self._image.id, "{image}").replace(self._volume, "{volume}")

    def _arm(self, moment: str) -> None:
        line = moment.format(image=self._image.id, volume=self._volume)
        self._node.run(f"rm -f {_CONTROL}.log; cat > {_CONTROL}", input=line)

    def _is_complete(self) -> bool:
        bases = self._journey.agent(self._node)["bases"]
        return any(base["image_id"] == self._image.id and base["complete"] for base in bases)

    # -- verbs ------------------------------------------------------------------------------

    def reach(self, state: str) -> None:
        """Go to a state by verbs that must succeed."""
        while self._state != state:
            if self._state == _DIRECT:
                self._detach_other()
                self._await(self._is_cached, "a cache")
            elif self._state == _ATTACHED:
                self._detach()
            elif (
                state == _DIRECT and self._state == _ABSENT
            ):  # the agent then has to build a base, too
                self._journey.attach(self._other, self._volume, plain=True)
                self._attach()
                self._state = _DIRECT
            elif state == _ATTACHED or (state == _IDLE and self._state == _ABSENT):
                self._attach_cached()
            else:
                self._evict()

    def clear(self) -> None:
        """Leave nothing of the image and the volume here."""
        self.reach(_ABSENT)

    def _attach(self) -> None:
        self._path = self._journey.attach(self._node, self._volume).path
        self._state = _ATTACHED

    def _attach_cached(self) -> None:
        self._attach()
        self._await(self._is_cached, "a cache")

    def _detach_other(self) -> None:
        self._journey.detach(self._other, self._volume, plain=True)
        self._state = _ATTACHED

    def _is_cached(self) -> bool:
        return bool(self._journey.stack(self._node, self._volume).get("mode") == "cached")

    def _detach(self) -> None:
        self._journey.detach(self._node, self._volume)
        self._state = _IDLE

    def _evict(self) -> None:
        self._journey.evict(self._node, self._image.id)
        self._state = _ABSENT

    # -- one run ----------------------------------------------------------------------------

    def run(self, point: Point) -> Outcome:
        """Have the agent die at a point, and check everything.

        :raises LabError: the host could not be brought back into a known state
        """
        outcome, began = Outcome(point), time.monotonic()
        try:
            self.reach(VERBS[point.verb])
            self._arm(point.moment)
            self._interrupted(point.verb, outcome)
            if point.verb == "cache back":
                self._use(outcome, "with the next agent")
                self._await(self._is_cached, "a cache")
                self._use(outcome, "with its cache back")
            self._converge(outcome)
            if "attach" in point.verb:
                self._detach()
                self._attach_cached()
                self._use(outcome, "attached again")
            else:
                self.reach(_after(point.verb))
                self._converge(outcome)
        except (LabError, errors.ThunderError) as error:
            outcome.failures.append(f"{type(error).__name__}: {error}")
            self._recover()
        outcome.seconds = time.monotonic() - began
        return outcome

    def _interrupted(self, verb: str, outcome: Outcome) -> None:
        """Run the verb, in which the agent dies; use the volume meanwhile; restart the agent."""
        gone = f"! test -e {_CONTROL} && ! ss -Hxl src /run/thunder/agent.sock | grep -q ."
        if verb == "eviction":
            call = threading.Thread(target=self._evict_quietly, daemon=True)
            call.start()
        elif verb == "detach":
            with contextlib.suppress(LabError):  # os-brick leaves it connected: there is a stack
                self._detach()
        elif verb == "cache back":
            self._detach_other()
        else:
            self._attach()  # plain, if need be
        outcome.reached = self._happens(gone, _REACHED)
        if not outcome.reached:
            self._node.run(f"rm -f {_CONTROL}")
            return
        if "attach" in verb:
            self._use(outcome, f"{self._path} without the agent")
        self._node.service_stop(_AGENT)  # and whatever it had started
        self._node.service_start(_AGENT)

    def _evict_quietly(self) -> None:
        with contextlib.suppress(errors.ThunderError):  # the agent is dead
            self._journey.evict(self._node, self._image.id)

    def _happens(self, test: str, timeout: float) -> bool:
        end = f"end=$(($(date +%s) + {int(timeout)}))"
        loop = f"until {test}; do [ $(date +%s) -lt $end ] || exit 1; sleep 0.2; done"
        return self._node.run(f"{end}; {loop}", check=False).returncode == 0

    def _use(self, outcome: Outcome, when: str) -> None:
        """As a guest: check all bytes, then write one more page, in the image or past it."""
        patches = [(seed, offset) for offset, seed in self._written.items()]
        expected = blocks.expected_digest(self._image.raw, patches)
        self._writes += 1
        seed = f"{self._volume}-{self._writes}"
        offset = self._writes * 977 * blocks.PAGE % HASHED
        done = self._node.run(
            f"python -m lab.inside.blocks hash {self._path} {HASHED} && "
            f"python -m lab.inside.blocks write {self._path} {seed} {offset}",
            check=False,
        )
        if done.returncode != 0:
            outcome.failures.append(f"{when}: {done.stderr.strip()[-200:]}")
            return
        self._written[offset] = seed
        if done.stdout.strip() != expected:
            outcome.wrong.append(f"{when}: wrong bytes")

    def _recover(self) -> None:
        """Return to a known state after a run that failed."""
        self._node.run(f"rm -f {_CONTROL}")
        if not self._node.service_running(_AGENT):
            self._node.service_start(_AGENT)
        look = f"test -e /var/lib/lab-brick/{self._volume}.json"
        if self._other.run(look, check=False).returncode == 0:
            self._detach_other()
        attached = self._node.run(look, check=False).returncode == 0
        self._state = _ATTACHED if attached else _IDLE
        self.reach(_IDLE)
        self.clear()

    # -- what must agree ----------------------------------------------------------------------

    def _converge(self, outcome: Outcome) -> None:
        found = audit.settle(self._journey.cluster, self._node, _CONVERGED)
        outcome.orphans += [self._named(line) for line in found]

    def _await(self, condition: Callable[[], bool], what: str) -> None:
        until = time.monotonic() + _CONVERGED
        while not condition():
            if time.monotonic() > until:
                raise LabError(f"{self._node.name}: waited too long for {what}")
            time.sleep(0.5)


def _after(verb: str) -> str:
    return {"detach": _IDLE, "eviction": _ABSENT}.get(verb, _ATTACHED)


# -- the sweep ---------------------------------------------------------------------------------


def sweep(
    journey: Journey, nodes: Sequence[Node], every: int = 1, first: int = 0, only: str = ""
) -> list[Outcome]:
    """Every ``every``-th point from the ``first`` on, spread over ``nodes``; nothing stays.

    :param only: points with this text in their names
    """
    cluster, folder = journey.cluster, Path(tempfile.mkdtemp())
    images = [make_image(journey, folder, f"crash-{node.name}") for node in nodes]
    volumes = [journey.create_volume(i.id, 1, "--image", i.id) for i in images]
    compute = cluster.of_kind("compute")
    others = [next(other for other in compute if other is not node) for node in nodes]
    hosts = list(map(SweptHost, [journey] * len(nodes), nodes, others, images, volumes))
    outcomes: list[Outcome] = []

    def work(node: Node, host: SweptHost, points: Iterable[Point]) -> None:
        with failpoints_on(node):
            for point in points:
                outcome = host.run(point)
                outcomes.append(outcome)
                show(node, outcome)
            host.clear()

    with failpoints_on(nodes[0]):
        points = in_turn([p for p in hosts[0].record() if only in str(p)][first::every])
    print(f"{len(points)} points")
    shares = [points[index :: len(nodes)] for index in range(len(nodes))]
    shares = [in_turn(share) for share in shares]
    with ThreadPoolExecutor(len(nodes)) as threads:
        list(threads.map(work, nodes, hosts, shares))
    journey.delete_volumes(volumes)
    for image in images:
        cluster.openstack("image", "delete", image.id)
        cluster.thunder("image", "evict", image.id)
    return outcomes


def in_turn(points: Sequence[Point]) -> list[Point]:
    """The points in an order in which each verb starts where the one before it ended."""
    by_verb = {verb: [p for p in points if p.verb == verb] for verb in VERBS}
    ordered = []
    while any(by_verb.values()):
        ordered += [left.pop(0) for left in by_verb.values() if left]
    return ordered


def show(node: Node, outcome: Outcome) -> None:
    """One line of progress, and one for each problem."""
    word = "ok" if not outcome.problems else "FAILED"
    word += "" if outcome.reached else " (not reached)"
    print(f"{node.name} {outcome.seconds:5.1f} s  {word:6}  {outcome.point}", flush=True)
    for problem in outcome.problems:
        print(f"    {problem}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(prog="bench.failpoints", description=__doc__)
    parser.add_argument("--every", type=int, default=1, metavar="K", help="every K-th point only")
    parser.add_argument("--first", type=int, default=0, metavar="I", help="starting with the I-th")
    parser.add_argument("--only", default="", metavar="TEXT", help="points with TEXT in the name")
    parser.add_argument("--lab", default="", metavar="NAME", help="in a lab that is up")
    options = parser.parse_args()
    lab = vars(options).pop("lab")
    with existing_or_new(lab, "failpoints", Topology.standard(storage=1, compute=2)) as cluster:
        began = time.monotonic()
        journey = Journey(cluster)
        journey.start_bricks()
        outcomes = sweep(journey, cluster.of_kind("compute"), **vars(options))
        left = journey.all_leftovers()
    seconds = time.monotonic() - began
    failed = [outcome for outcome in outcomes if outcome.problems]
    print(
        f"points {len({o.point for o in outcomes})}, runs {len(outcomes)}, "
        f"killed {sum(o.reached for o in outcomes)}, "
        f"orphans {sum(len(o.orphans) for o in outcomes) + len(left)}, "
        f"wrong bytes {sum(len(o.wrong) for o in outcomes)}, "
        f"failures {sum(len(o.failures) for o in outcomes)}, {seconds:.0f} s"
    )
    for outcome in failed:
        print(f"failed: {outcome.point}: {'; '.join(outcome.problems)}")
    for what in left:
        print(f"left at the end: {what}")
    return 1 if failed or left else 0


if __name__ == "__main__":
    raise SystemExit(main())
