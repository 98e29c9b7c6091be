"""Shows what boots gain: the figures of bench.replay and bench.simulate, on a page with pictures.

With --run both are run first, which takes hours on a quiet machine. `make bench` does that,
and installs matplotlib beside the lab's environment, which needs it for nothing else.
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import subprocess
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bench.replaying.arms import HEADINGS, Arm
from bench.replaying.trace import DEBIAN

#: Of bench.replay, with their names for readers; the last one is the limit of what is possible.
ARMS = {
    "plain": "plain iSCSI",
    "copied": "whole image copied first",
    "multicast": "the same by multicast",
    "nbd": "qcow2 above NBD",
    "ceph": "Ceph RBD clone",
    "cold": "unknown image",
    "cold, profile": "with a boot profile",
    "warm": "image is here",
    "local": "host's own disk",
}
REPLAY, SIMULATED = "replay.json", "simulated.json"
MIB = 1 << 20
#: The links of a lab, so slow that its cores matter less.
LINK = "100mbit"
#: What is run of bench.replay, and the file that it writes: the page begins with the first one. The
#: others: links that are slower than the lab's cores, and another guest.
RUNS = {
    REPLAY: f"--link {LINK}",
    "chain.json": '--chain --link 10mbit --hosts 1 6 --arms plain "cold, profile" warm local',
    "ubuntu.json": f'--guest ubuntu --link {LINK} --hosts 2 4 --arms plain "cold, profile"',
}
HOSTS = (10, 30, 100, 300, 1000, 3000, 10000)


def run(folder: Path) -> None:
    """Run the benches, on this machine, and keep their figures."""
    commands = [["bench.replay", *shlex.split(RUNS[file]), "--json", file] for file in RUNS]
    commands.append(["bench.simulate", "--hosts", *map(str, HOSTS), "--json", SIMULATED])
    for *command, file in commands:
        subprocess.run([sys.executable, "-m", *command, str(folder / file)], check=True)


def draw_boots(measured: Any, file: Path) -> None:
    """Seconds of a boot's reads: a group of bars for each number of hosts, one bar for each way."""
    arms = {(arm["name"], arm["hosts"]): arm["boots"] for arm in measured["arms"]}
    counts = sorted({hosts for _, hosts in arms})
    measured_here = {arm for arm, _ in arms}  # kept figures may be older than an arm
    ways = {arm: name for arm, name in ARMS.items() if arm in measured_here}
    width = 0.8 / len(ways)
    with _picture(file, "A boot's reads: medians, fastest and slowest", "seconds of reads") as axes:
        for number, (arm, name) in enumerate(ways.items()):
            present = [place for place, hosts in enumerate(counts) if (arm, hosts) in arms]
            reads = [[boot["reads"] for boot in arms[arm, counts[place]]] for place in present]
            heights = [statistics.median(each) for each in reads]
            spread = [
                [height - min(each) for height, each in zip(heights, reads, strict=True)],
                [max(each) - height for height, each in zip(heights, reads, strict=True)],
            ]
            at = [place + (number - (len(ways) - 1) / 2) * width for place in present]
            bars = axes.bar(at, heights, width, yerr=spread, label=name, capsize=2)
            axes.bar_label(bars, fmt="%.1f", fontsize=7, padding=2)
        axes.set_xticks(range(len(counts)), [str(each) for each in counts])


def draw_scale(simulated: Any, file: Path) -> None:
    """Seconds that boots take longer than from the hosts' own disks, by the number of hosts."""
    lines: dict[str, list[tuple[int, float]]] = {}
    for found in simulated:
        setting = found["setting"]
        if setting["name"]:  # of somebody else's cloud
            continue
        head = f"{setting['head']:g} s after the attach began" if setting["head"] else "at once"
        name = f"guests read {head}, profile covers {setting['coverage']:.0%}"
        lines.setdefault(name, []).append((setting["hosts"], found["last"]))
        for other in ("central", "pipeline"):
            lines.setdefault(other, []).append((setting["hosts"], found[other]))
    names = {"central": "central iSCSI, at least", "pipeline": "whole image copied first, at least"}
    title = "Simulated, links of 10 Gbit/s: by how much the last boot is longer"
    with _picture(file, title, "seconds") as axes:
        for name, points in lines.items():
            hosts, seconds = zip(*sorted(set(points)), strict=True)
            style = "--" if name in names else "-"
            axes.plot(hosts, seconds, style, marker=".", label=names.get(name, name))
        axes.set_xscale("log")
        axes.set_yscale("symlog", linthresh=0.1)
        axes.set_ylim(bottom=0)


def page(measured: Any, further: Iterable[Any] = ()) -> str:
    """All that was measured of boots, in Markdown.

    :param further: other runs
    """
    return "\n".join(
        [
            "# What boots gain",
            "",
            "Written by `python -m bench.results`; `python -m bench.replay --help` says what the "
            "names mean. Medians",
            "of the hosts; each way to boot was measured once.",
            "",
            *_described(measured),
            "",
            "![Seconds of a boot's reads](boots.svg)",
            "",
            "![Simulated: by how much boots are longer](scale.svg)",
            "",
            *(line for each in further for line in [*_described(each), ""]),
        ]
    )


def _described(measured: Any) -> Iterator[str]:
    """A run, in Markdown: its table, below what was measured."""
    profile, guest = measured["profile"], measured.get("guest", DEBIAN).title()
    arms = map(Arm.of, measured["arms"])
    place = ", each host read from the one before it" if measured["chain"] else ""
    yield f"## {guest}, links of {measured['link']}{place}"
    yield ""
    yield (
        f"A boot reads {measured['bytes'] / MIB:.0f} MiB. Hosts began to fill "
        f"{measured['head']:g} s before the first reads."
    )
    yield ""
    for row in [HEADINGS, ("---",) * len(HEADINGS), *(arm.row(measured["bytes"]) for arm in arms)]:
        yield f"| {' | '.join(row)} |"
    yield ""
    yield (
        f"The profile: {profile['boots']} boots, coverage {profile['coverage']}, waste "
        f"{profile['waste']}."
    )


@contextmanager
def _picture(file: Path, title: str, seconds: str) -> Iterator[Any]:
    """The axes to draw in, by the number of hosts; the same figures make the same file.

    :param seconds: what the vertical axis is called
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots()
    yield axes
    axes.set_xlabel("hosts at the same moment")
    axes.set_ylabel(seconds)
    axes.set_title(title)
    axes.legend(fontsize=8)
    with rc_context({"svg.hashsalt": "thunder"}):
        figure.savefig(file, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(prog="bench.results", description=__doc__)
    parser.add_argument("folder", type=Path, help="of the figures and the pictures")
    parser.add_argument("--run", action="store_true", help="run the benches first")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    if options.run:
        run(options.folder)
    for source, draw, name in (
        (REPLAY, draw_boots, "boots.svg"),
        (SIMULATED, draw_scale, "scale.svg"),
    ):
        draw(json.loads((options.folder / source).read_text()), options.folder / name)
        print(options.folder / name)
    runs = [json.loads((options.folder / file).read_text()) for file in RUNS]
    (options.folder / "README.md").write_text(page(runs[0], runs[1:]))
    print(options.folder / "README.md")


if __name__ == "__main__":
    main()
