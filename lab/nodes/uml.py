"""One User Mode Linux machine: a kernel that runs as an ordinary process of the host.

It runs in a sandbox, and needs one. A process in a node is a process of the host whose system
calls User Mode Linux catches with ptrace; when the kernel process is killed, there can be an
instant in which what it traced goes on, now with the host's own system calls, as root: a node
that was killed while it started has mounted its /tmp over the host's. So the machine has a pid
namespace (one kill ends all of it), no capabilities, and nothing that it can write to but its
own folders.
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
    """A node's hardware: its disks, its tap and the process that is its kernel."""

    spec: NodeSpec
    network: Network
    root: Path  # the shared root image, never written
    preload: Path  # lab/nodes/xstate.c, compiled
    folder: Path  # disks, control folder and sockets
    console: Path

    @property
    def control(self) -> Path:
        """The folder that the node sees as /lab."""
        return self.folder / "control"

    def start(self) -> None:
        """Start the kernel; disks that are there are used again, so this is also a reboot."""
        # A kernel that was killed leaves its socket here, and refuses to start over it.
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

        The kernel and the process it traces take turns. On two CPUs each turn wakes an idle
        one, which made a page fault in the node take three times as long. Where other labs
        keep the CPUs awake it is the other way round: then a crowded CPU must be avoidable.
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
            "--dev", "/dev",  # with a /dev/shm of its own, where the machine's memory is kept
            "--dev-bind", "/dev/net/tun", "/dev/net/tun",
            "--proc", "/proc",
            *(part for path in writable for part in ("--bind", str(path), str(path))),
            "--unshare-pid", "--unshare-ipc",
            "--cap-drop", "ALL",
            "--cap-add", "CAP_DAC_READ_SEARCH",  # the source tree may be another user's
            "--setenv", "TMPDIR", "/dev/shm",
            "--setenv", "LD_PRELOAD", str(self.preload),
            "--info-fd", str(info),
            "--",
        ]  # fmt: skip

    def running(self) -> bool:
        return self._process() is not None

    def cpu_seconds(self) -> float:
        """CPU time of the kernel and of all that runs in it; 0 if it does not."""
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
        """Pull the plug; returns when the tap is free for the next start. Absent is success."""
        process = self._process()
        if process is not None:
            process.kill()
        # A kernel that starts while the tap is still held comes up without a network.
        wait_for(
            f"{self.spec.name}: its process to end, and its tap to be free",
            lambda: not self.running() and not self.network.plugged(self.spec.name),
            timeout=30,
        )

    @property
    def _pid_file(self) -> Path:
        """The first process of the sandbox, with which all others end, and when it began."""
        return self.folder / "pid"

    def _process(self) -> psutil.Process | None:
        try:
            pid, created = self._pid_file.read_text().split()
        except FileNotFoundError:
            return None
        return Process(int(pid), float(created)).find()
