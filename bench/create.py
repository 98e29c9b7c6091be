"""The cost of a volume from an image, compared with a thin snapshot on the same backend.

``--image``, with a master in place, is Thunder's path (a snapshot of the master); ``--snapshot`` is
Cinder's LVM driver alone (lvcreate -s). Both are measured in turn, several times; the result is the
ratio of the medians.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

from lab.cluster import Cluster
from lab.guests import guest
from lab.nodes.topology import Topology
from lab.play.journey import Journey
from lab.progress import Steps


def measure(journey: Journey, image: Path, turns: int) -> dict[str, list[float]]:
    """Seconds from the API call to the state available, for both kinds."""
    found = journey.upload(image, "bench")
    made = [journey.create_volume(f"first-{i}", 1, "--image", found) for i in range(3)]
    snapshot = journey.create_snapshot(made[0], "bench")
    seconds: dict[str, list[float]] = {"--image": [], "--snapshot": []}
    for turn in range(turns):
        for what, source in (("--image", found), ("--snapshot", snapshot)):
            began = time.monotonic()
            volume = journey.create_volume(f"{what[2:]}-{turn}", 1, what, source)
            seconds[what].append(time.monotonic() - began)
            journey.delete_volumes([volume])  # the project's quota is ten volumes
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(prog="bench.create", description=__doc__)
    parser.add_argument("--turns", type=int, default=5)
    turns = parser.parse_args().turns
    image = guest.build()
    cluster = Cluster("bench", Topology.standard(compute=0))
    cluster.up(Steps(), bound=True)
    try:
        seconds = measure(Journey(cluster), image, turns)
    finally:
        cluster.down()
    for what, values in seconds.items():
        line = ", ".join(f"{value:.2f}" for value in values)
        print(f"volume create {what:10} median {statistics.median(values):.2f} s  ({line})")
    medians = {what: statistics.median(values) for what, values in seconds.items()}
    print(f"ratio {medians['--image'] / medians['--snapshot']:.2f} (limit: 1.5)")


if __name__ == "__main__":
    main()
