"""Random sequences of all that happens to volumes and hosts, against a model of every byte.

Attach, write, trim, flush, detach, snapshot, revert, clone, extend and migrate volumes of several
images on three compute and two storage hosts, while caches and LUNs fail, pools fill, bases are
evicted, and agents, hosts and cinder-volume die. The model knows what was acknowledged and what
was flushed; after a crash of its host a sector may hold what was flushed or anything written since.

The steps follow from the seed; several are done at once where they do not need the same volume.
When something goes wrong, it prints the steps, and looks for fewer that fail, too.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from bench.modelling.generate import Generator
from bench.modelling.hosts import Hosts
from bench.modelling.outcome import Outcome
from bench.modelling.scene import IMAGES, Scene, world
from bench.modelling.shrink import shrink
from bench.modelling.steps import Step
from lab.cluster import Cluster, existing_or_new
from lab.nodes.topology import Topology
from lab.play.journey import Journey

#: Seconds between two lines of progress.
_EVERY = 10.0


class _Reporter:
    """Prints a line of progress every few seconds."""

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        self._began = self._last = time.monotonic()

    def __call__(self, done: int, of: int, outcome: Outcome) -> None:
        now = time.monotonic()
        if now < self._last + _EVERY and done < of:
            return
        self._last = now
        seconds = now - self._began
        print(
            f"  {done}/{of} steps, {seconds:.0f} s, {seconds / max(done, 1):.2f} s a step, "
            f"faults {sum(outcome.faults.values())}, wrong bytes {outcome.wrong}",
            flush=True,
        )


def report(outcome: Outcome, seconds: float) -> None:
    """What one run did and found."""
    print(f"steps {sum(outcome.done.values())} in {seconds:.0f} s: {_counts(outcome.done)}")
    slow = {kind: f"{total / outcome.done[kind]:.1f}" for kind, total in outcome.seconds.items()}
    print(f"seconds a step: {', '.join(f'{kind} {each}' for kind, each in sorted(slow.items()))}")
    print(f"attached: {_counts(outcome.attached)}")
    print(f"faults {sum(outcome.faults.values())}: {_counts(outcome.faults)}")
    print(
        f"wrong bytes {outcome.wrong}, lost flushed writes {outcome.lost}, "
        f"leftovers {len(outcome.leftovers)}, problems {len(outcome.problems)}, "
        f"errors that went away {outcome.errors_seen}, longest call {outcome.longest_s:.1f} s",
        flush=True,
    )
    for problem in outcome.problems:
        print(f"PROBLEM: {problem}")
    for left in outcome.leftovers:
        print(f"LEFT: {left}")


def _counts(counter: Counter[str]) -> str:
    return ", ".join(f"{kind} {count}" for kind, count in sorted(counter.items()))


def _last(steps: Sequence[Step], outcome: Outcome) -> int:
    """The number of the last step that may have to do with a failure."""
    return max(outcome.failed, default=steps[-1].number)


def smaller(
    scene: Scene, steps: Sequence[Step], outcome: Outcome, seconds: float
) -> Sequence[Step]:
    """Look for fewer steps that fail, for a limited time."""
    until = time.monotonic() + seconds
    steps = [step for step in steps if step.number <= _last(steps, outcome)]

    def fails(some: Sequence[Step]) -> bool:
        found = scene.run(some)
        print(f"  {len(some)} steps: {'good' if found.is_good else found.problems}", flush=True)
        return not found.is_good

    return shrink(steps, fails, lambda: time.monotonic() > until)


def save(steps: Sequence[Step], path: Path) -> None:
    path.write_text("".join(json.dumps(step.to_wire()) + "\n" for step in steps))


def load(path: Path) -> list[Step]:
    return [Step.from_wire(json.loads(line)) for line in path.read_text().splitlines()]


@contextlib.contextmanager
def scene_in(cluster: Cluster) -> Iterator[Scene]:
    """A lab that is up, with workers in its hosts."""
    with Hosts(cluster).running() as hosts:
        yield Scene(Journey(cluster), hosts, _Reporter())


def play(
    scene: Scene, steps: Sequence[Step], options: argparse.Namespace, name: str, until: float
) -> bool:
    """One run, and what follows from a failure."""
    began = time.monotonic()
    outcome = scene.run(steps, until)
    report(outcome, time.monotonic() - began)
    if outcome.is_good:
        return True
    path = Path(options.output, f"{name}.steps")
    save(steps, path)
    print("\n".join(f"  {step}" for step in steps if step.number <= _last(steps, outcome)))
    print(f"the steps are in {path}; run them again with --replay {path}", flush=True)
    if options.shrink:
        found = smaller(scene, steps, outcome, options.shrink)
        save(found, path.with_suffix(".small"))
        print(f"{len(found)} steps that fail, too ({path.with_suffix('.small')}):")
        print("\n".join(f"  {step}" for step in found), flush=True)
    return False


def main() -> int:
    parser = argparse.ArgumentParser(prog="bench.model", description=__doc__)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--steps", type=int, default=1000, metavar="N")
    parser.add_argument("--minutes", type=float, default=0, metavar="M",
                        help="go on with the next seeds, and end after so long")  # fmt: skip
    parser.add_argument("--shrink", type=float, default=900, metavar="SECONDS",
                        help="look for fewer steps that fail, for so long")  # fmt: skip
    parser.add_argument("--replay", type=Path, metavar="FILE", help="steps that were saved")
    parser.add_argument("--output", default=".", metavar="FOLDER", help="for steps that fail")
    parser.add_argument("--lab", default="", metavar="NAME", help="in a lab that is up")
    options = parser.parse_args()
    until = time.monotonic() + (options.minutes * 60 or math.inf)
    seed, good = options.seed, True
    with (
        existing_or_new(options.lab, "model", Topology.standard(storage=2, compute=3)) as cluster,
        scene_in(cluster) as scene,
    ):
        while good:
            if options.replay:
                steps, name = load(options.replay), options.replay.stem
            else:
                generator = Generator(seed, world(Journey(cluster)), IMAGES)
                steps, name = generator.steps(options.steps), f"seed-{seed}"
            print(f"{name}: {len(steps)} steps", flush=True)
            good = play(scene, steps, options, name, until)
            seed += 1
            if options.replay or not options.minutes or time.monotonic() > until:
                break
        left = scene.close()
        print(f"left at the end: {'; '.join(left) or 'nothing'}", flush=True)
    return 0 if good and not left else 1


if __name__ == "__main__":
    sys.exit(main())
