"""One User Mode Linux machine: a kernel that runs as an ordinary process of the host.

It must run in a sandbox. A process in a node is a process of the host whose system calls User Mode
Linux intercepts with ptrace. When the kernel process is killed, a traced process may continue for
an instant with the host's own system calls, as root: a node that was killed while it started once
mounted its /tmp over the host's. So the machine has a pid namespace (one kill ends all of it), no
capabilities, and write access to its own folders only.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import psutil

from lab.nodes.net import Network, tap_name
from lab.nodes.topology import NodeSpec
from lab.process import Process
from lab.shell import run, spawn, wait_for

KERNEL = "linux.uml"


@dataclass(frozen=True)
class Machine:
    """A node's hardware: its disks, its tap, and the process that runs its kernel."""

    spec: NodeSpec
    network: Network
    root: Path  # the shared root image, read only
    preload: Path  # lab/nodes/xstate.c, compiled
    folder: Path  # disks, control folder and sockets
    console: Path

    @property
    def control(self) -> Path:
        """The folder that the node sees as /lab."""
        return self.folder / "control"

    def start(self) -> None:
        """Start the kernel; existing disks are reused, so this is also a reboot."""
        # A killed kernel leaves its socket here, and the next one would refuse to start.
        shutil.rmtree(self.folder / "uml", ignore_errors=True)
        self.folder.mkdir(parents=True, exist_ok=True)
        data = self.folder / "data.img"
        if not data.exists():
            run(["truncate", "--size", f"{self.spec.disk}G", str(data)])
        argv = [
            KERNEL,
            f"mem={self.spec.memory}M",
            f"ubd0={self.folder / 'root.cow'},{self.root}",
            f"ubd1={data}",
            "root=/dev/ubda",
            "rw",
            "quiet",
            "init=/sbin/entry",
            f"lab_control={self.control}",
            f"vec0:transport=tap,ifname={tap_name(self.spec.name)},mac={self.spec.mac},"
            "depth=128,gro=1",
            "con=null",
            "con0=null,fd:1",
            f"uml_dir={self.folder / 'uml'}/",
            f"umid={self.spec.name}",
        ]
        read, write = os.pipe()
        with open(read) as info:
            sandbox = self._sandbox(write)
            spawn(
                self.network.command(["taskset", "--cpu-list", self._cpus(), *sandbox, *argv]),
                log=self.console,
                cwd=self.folder,
                pass_fds=[write],
            )
            os.close(write)
            first = Process.of(json.load(info)["child-pid"])
        self._pid_file.write_text(f"{first.pid} {first.created}")

    def _cpus(self) -> str:
        """The CPUs that this machine may run on: one, if the lab has the host to itself.

        The kernel and the process that it traces take turns. On two CPUs each turn wakes an idle
        CPU, which made a page fault in the node take three times as long. Where other labs keep
        the CPUs busy, pinning would be harmful: the scheduler must be free to choose an idle one.
        """
        cpus = sorted(os.sched_getaffinity(0))
        if self.network.is_alone():
            cpus = [cpus[self.spec.index % len(cpus)]]
        return ",".join(map(str, cpus))

    def _sandbox(self, info: int) -> list[str]:
        writable = [self.folder, self.console.parent]
        return [
            "bwrap",
            "--ro-bind", "/", "/",
            "--dev", "/dev",  # with a /dev/shm of its own, which holds the machine's memory
            "--dev-bind", "/dev/net/tun", "/dev/net/tun",
            "--proc", "/proc",
            *(part for path in writable for part in ("--bind", str(path), str(path))),
            "--unshare-pid", "--unshare-ipc",
            "--cap-drop", "ALL",
            "--cap-add", "CAP_DAC_READ_SEARCH",  # the source tree may belong to another user
            "--setenv", "TMPDIR", "/dev/shm",
            "--setenv", "LD_PRELOAD", str(self.preload),
            "--info-fd", str(info),
            "--",
        ]  # fmt: skip

    def running(self) -> bool:
        return self._process() is not None

    def cpu_seconds(self) -> float:
        """CPU time of the kernel and all processes in it; 0 if it does not run."""
        top = self._process()
        if top is None:
            return 0.0
        found = 0.0
        for process in [top, *top.children(recursive=True)]:
            with contextlib.suppress(psutil.NoSuchProcess):
                times = process.cpu_times()
                found += times.user + times.system
        return found

    def kill(self) -> None:
        """Cut the power; returns when the tap is free for the next start. Absent is success."""
        process = self._process()
        if process is not None:
            process.kill()
        # A kernel that starts while the tap is still in use has no network.
        wait_for(
            f"{self.spec.name}: its process to end, and its tap to be free",
            lambda: not self.running() and not self.network.plugged(self.spec.name),
            timeout=30,
        )

    @property
    def _pid_file(self) -> Path:
        """Holds the pid and start time of the sandbox's first process; all others end with it."""
        return self.folder / "pid"

    def _process(self) -> psutil.Process | None:
        try:
            pid, created = self._pid_file.read_text().split()
        except FileNotFoundError:
            return None
        return Process(int(pid), float(created)).find()
