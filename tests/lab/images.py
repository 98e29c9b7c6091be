"""Images of the lab tests."""

from __future__ import annotations

import random
import subprocess
from pathlib import Path

MIB = 1 << 20
#: Not a multiple of a pool's block, so that the last block is partial.
SIZE = 40 * MIB + 3 * 512


def with_holes(folder: Path, seed: int) -> tuple[Path, Path]:
    """Data, holes and a partial last block: the image's raw file, and the same as qcow2."""
    raw, qcow2 = folder / "image.raw", folder / "image.qcow2"
    dice = random.Random(seed)
    with open(raw, "wb") as file:
        file.truncate(SIZE)
        for start, length in ((0, 12 * MIB), (16 * MIB, 8 * MIB), (38 * MIB, SIZE - 38 * MIB)):
            file.seek(start)
            file.write(dice.randbytes(length))
    subprocess.run(["qemu-img", "convert", "-f", "raw", "-O", "qcow2", raw, qcow2], check=True)
    return raw, qcow2
