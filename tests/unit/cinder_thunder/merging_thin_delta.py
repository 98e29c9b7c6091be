"""A thin_delta(8) with the fault of versions 1.0.0 to 1.0.5, on top of the real thin_dump(8).

Their src/thin/delta.rs merges mappings that are adjacent in the thin device, whether or not their
data blocks are, and then compares only the first data block of each run.
"""

from __future__ import annotations

import argparse
import subprocess
import xml.etree.ElementTree as ElementTree

Run = list[int]  # first thin block, first data block, length


def runs(metadata: list[str], device: int) -> tuple[list[Run], str]:
    """The merged runs of a device, and the sectors of a block."""
    dump = ["thin_dump", "--dev-id", str(device), *metadata]
    text = subprocess.run(dump, check=True, capture_output=True, text=True).stdout
    root = ElementTree.fromstring(text)
    found: list[Run] = []
    for mapping in root.iter():
        values = mapping.attrib
        if mapping.tag == "single_mapping":
            run = [int(values["origin_block"]), int(values["data_block"]), 1]
        elif mapping.tag == "range_mapping":
            run = [int(values[key]) for key in ("origin_begin", "data_begin", "length")]
        else:
            continue
        if found and found[-1][0] + found[-1][2] == run[0]:  # the fault
            found[-1][2] += run[2]
        else:
            found.append(run)
    return found, root.attrib["data_block_size"]


def delta(one: list[Run], other: list[Run]) -> list[tuple[str, int, int]]:
    found = []
    while one and other:
        a, b = one[0], other[0]
        if a[0] == b[0]:
            length = min(a[2], b[2])
            found.append(("same" if a[1] == b[1] else "different", a[0], length))
            used = [one, other]
        else:
            side, first, second = (one, a, b) if a[0] < b[0] else (other, b, a)
            length = min(first[2], second[0] - first[0])
            found.append(("left_only" if side is one else "right_only", first[0], length))
            used = [side]
        for side in used:
            side[0] = [side[0][0] + length, side[0][1] + length, side[0][2] - length]
            if not side[0][2]:
                side.pop(0)
    found += [("left_only", run[0], run[2]) for run in one]
    return found + [("right_only", run[0], run[2]) for run in other]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--metadata-snap", action="store_true")
    parser.add_argument("--thin1", type=int)
    parser.add_argument("--thin2", type=int)
    parser.add_argument("metadata")
    options = parser.parse_args()
    metadata = ["--metadata-snap"] * options.metadata_snap + [options.metadata]
    one, block = runs(metadata, options.thin1)
    other, _ = runs(metadata, options.thin2)
    print(f'<superblock data_block_size="{block}">')
    print(f'<diff left="{options.thin1}" right="{options.thin2}">')
    for kind, begin, length in delta(one, other):
        print(f'<{kind} begin="{begin}" length="{length}"/>')
    print("</diff></superblock>")


if __name__ == "__main__":
    main()
