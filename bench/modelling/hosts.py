"""The hosts of a lab as the model uses them: one worker process in each, and power switches."""

from __future__ import annotations

import contextlib
import itertools
import json
import shlex
import subprocess
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from signal import SIGKILL
from typing import Any

from lab.cluster import Cluster
from lab.errors import LabError
from lab.nodes.node import Node
from lab.pace import stretch
from lab.play.lowspace import agent_options

#: Seconds for the slowest request: it waits out a failure of a storage host.
_TIMEOUT = 120.0
#: Watermarks of the local pools in per cent, low and high, and what a filled pool is filled to.
LOW, HIGH, FULL = 3, 5, 6
_AGENT, _VOLUME = "thunder-agent", "cinder-volume"


class Worker:
    """The host's side of lab/inside/worker.py.

    :param env: variables for it
    """

    def __init__(self, node: Node, env: Mapping[str, str]) -> None:
        self.node = node
        command = ["python", "-m", "lab.inside.worker"]
        if node.spec.kind == "compute":
            command[1:1] = ["-m", "os_brick_thunder.launcher"]
            command.append("connect")
        setting = [f"{name}={value}" for name, value in env.items()]
        log = (node.logs / "model-worker.log").open("a")
        self._process = subprocess.Popen(
            node.ssh(shlex.join(["env", *setting, *command])),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
        )
        log.close()
        self._ids = itertools.count(1)
        self._lock = threading.Lock()
        self._ready: Future[Any] = Future()
        self._waiting: dict[int, Future[Any]] = {0: self._ready}
        threading.Thread(target=self._listen, daemon=True).start()

    def await_ready(self) -> None:
        """Wait until it serves."""
        self._ready.result(stretch(_TIMEOUT))

    def begin(self, verb: str, **arguments: Any) -> Future[Any]:
        """Ask for something; the answer comes later."""
        answer: Future[Any] = Future()
        with self._lock:
            number = next(self._ids)
            self._waiting[number] = answer
            assert self._process.stdin
            line = json.dumps({"id": number, "verb": verb, **arguments})
            try:
                print(line, file=self._process.stdin, flush=True)
            except OSError:
                self._waiting.pop(number, None)
                answer.set_exception(LabError(f"{self.node.name}: its worker is gone"))
        return answer

    def ask(self, verb: str, **arguments: Any) -> Any:
        """Ask for something, and wait for the answer.

        :raises LabError: it failed there, or took too long
        """
        try:
            return self.begin(verb, **arguments).result(stretch(_TIMEOUT))
        except TimeoutError:
            raise LabError(f"{self.node.name}: {verb} {arguments} takes too long") from None

    def close(self) -> None:
        """End it."""
        self._process.kill()
        self._process.wait()

    def _listen(self) -> None:
        assert self._process.stdout
        for line in self._process.stdout:
            with contextlib.suppress(ValueError):
                answer = json.loads(line)
                waiting = self._waiting.pop(answer["id"])
                if "error" in answer:
                    waiting.set_exception(LabError(f"{self.node.name}: {answer['error']}"))
                else:
                    waiting.set_result(answer["answer"])
        with self._lock:
            for waiting in self._waiting.values():
                waiting.set_exception(LabError(f"{self.node.name}: its worker is gone"))
            self._waiting.clear()


class Hosts:
    """All nodes with their workers."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        self._workers: dict[str, Worker] = {}

    @contextlib.contextmanager
    def running(self) -> Iterator[Hosts]:
        """With workers, and with agents that keep little, so that a pool is soon full."""
        marks = {"pool_low_percent": LOW, "pool_high_percent": HIGH}
        stacks = {name: contextlib.ExitStack() for name in self.cluster.nodes}

        def enter(node: Node) -> None:
            self._work(node)
            stacks[node.name].callback(lambda: self._workers.pop(node.name).close())
            if node.spec.kind == "compute":
                stacks[node.name].enter_context(agent_options(node, **marks))

        try:
            self.on_each(enter)
            yield self
        finally:
            self.on_each(lambda node: stacks[node.name].close())

    def on_each(self, action: Callable[[Node], object]) -> None:
        """Do something on all nodes at once; the first error is raised when all are done."""
        with ThreadPoolExecutor() as threads:
            done = [threads.submit(action, node) for node in self.cluster.nodes.values()]
        for each in done:
            each.result()

    def worker(self, name: str) -> Worker:
        return self._workers[name]

    def _work(self, node: Node) -> None:
        env = {**self.cluster.env(), "LAB_ADDRESS": node.address}
        self._workers[node.name] = Worker(node, env)
        self._workers[node.name].await_ready()

    def kill_agent(self, name: str) -> None:
        """SIGKILL for an agent, and the next one."""
        node = self.cluster.node(name)
        node.service_signal(_AGENT, SIGKILL)
        node.service_stop(_AGENT)
        node.service_start(_AGENT)

    def restart_volume(self, name: str) -> None:
        """Restart a storage host's cinder-volume, and with it the tracker."""
        node = self.cluster.node(name)
        node.service_stop(_VOLUME, 2)
        node.service_start(_VOLUME)

    def power_cut(self, name: str) -> None:
        """End a node without a warning."""
        self.cluster.node(name).kill()
        self._workers[name].close()

    def power_on(self, name: str) -> None:
        """Boot it again, with its agent and its worker."""
        node = self.cluster.node(name)
        node.start()
        node.service_start(_AGENT)
        self._work(node)
