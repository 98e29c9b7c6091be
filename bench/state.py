"""What a change of the agent's state costs: the file, rewritten whole, against a table of SQLite.

A host with 20 bases of 2,000 allocated ranges each and 60 stacks puts one base or one stack, as an
attach, a detach or a fill does. Both sync every change before they return. The folder has to be on
a disk: on tmpfs a sync costs nothing.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sqlite3
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

from os_brick_thunder.common.state import READY, Base, ReplicaPath, Stack, StateFile

BASES, RANGES, STACKS = 20, 2000, 60
THREADS = 8


class Puts(Protocol):
    def put(self, entry: Base | Stack) -> None: ...


class Table:
    """Prototype: a row of JSON for each entry, in a database with a write-ahead log."""

    def __init__(self, path: Path) -> None:
        self._lock = threading.Lock()
        self._database = sqlite3.connect(path, check_same_thread=False, isolation_level=None)
        self._database.execute("PRAGMA journal_mode = WAL")
        self._database.execute("PRAGMA synchronous = FULL")
        self._database.execute(
            "CREATE TABLE entries (kind TEXT, id TEXT, value TEXT, PRIMARY KEY (kind, id))"
        )

    def put(self, entry: Base | Stack) -> None:
        key = entry.image_id if isinstance(entry, Base) else entry.volume_id
        row = (type(entry).__name__, key, json.dumps(dataclasses.asdict(entry)))
        with self._lock:
            self._database.execute("INSERT OR REPLACE INTO entries VALUES (?, ?, ?)", row)


def entries() -> tuple[Sequence[Base], Sequence[Stack]]:
    """The state of a busy host."""
    allocated = tuple((number << 17, 1 << 16) for number in range(RANGES))
    path = ReplicaPath(
        "stor1", "l", "stor1@thunder", "iqn.2026-11.org.thunder:s:i", "10.0.0.1:3260"
    )
    bases = [
        Base(f"image-{number}", 1 << 30, allocated, f"l-{number}", number, READY, paths=(path,) * 3)
        for number in range(BASES)
    ]
    stacks = [
        Stack(f"volume-{number}", "stor1@thunder", "/dev/sdb", "cached", "image-0", number)
        for number in range(STACKS)
    ]
    return bases, stacks


def measure(store: Puts, of: Sequence[Base | Stack], count: int, threads: int) -> str:
    """Put ``count`` entries from some threads at once."""

    def timed(number: int) -> float:
        began = time.perf_counter()
        store.put(of[number % len(of)])
        return time.perf_counter() - began

    began = time.perf_counter()
    with ThreadPoolExecutor(threads) as pool:
        each = sorted(pool.map(timed, range(count)))
    rate = count / (time.perf_counter() - began)
    median, late = statistics.median(each) * 1e3, each[int(count * 0.99)] * 1e3
    return f"{rate:7.0f} puts/s, median {median:6.2f} ms, p99 {late:6.2f} ms"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path("/var/tmp"), help="on a disk")
    parser.add_argument("--puts", type=int, default=300)
    arguments = parser.parse_args(argv)
    bases, stacks = entries()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as made:
        stores: dict[str, tuple[Puts, Path]] = {
            "file": (StateFile(Path(made) / "state.json"), Path(made) / "state.json"),
            "SQLite": (Table(Path(made) / "state.db"), Path(made) / "state.db"),
        }
        for name, (store, path) in stores.items():
            for base in bases:
                store.put(base)
            for stack in stacks:
                store.put(stack)
            print(f"{name}: {path.stat().st_size >> 10} KiB")
            for threads in (1, THREADS):
                for kind, of in (("stacks", stacks), ("bases", bases)):
                    found = measure(store, of, arguments.puts, threads)
                    print(f"  {threads} threads, {kind}: {found}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
