"""A whole lab, as the command line, the tests and the benchmarks use it."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import functools
import json
import os
import re
import shutil
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any, Self, TypeVar

from lab import pace
from lab.cloud import config, control, nova, seed
from lab.cloud.control import Controller
from lab.errors import Cancelled, LabError
from lab.nodes import preconditions
from lab.nodes.image import root_image, xstate_library
from lab.nodes.net import Network
from lab.nodes.node import Node, make_keys
from lab.nodes.topology import Link, Topology
from lab.nodes.uml import Machine
from lab.process import Process
from lab.progress import Steps
from lab.shell import wait_for
from os_brick_thunder.common import files

#: MiB of a compute node that runs a few small servers.
SERVER_MEMORY = 2560
_T = TypeVar("_T")
_NAME = re.compile(r"[a-z][a-z0-9-]{0,19}")


def cache_folder() -> Path:
    """The cache of everything that is built once: ``$THUNDER_LAB_CACHE``."""
    return Path(os.environ.get("THUNDER_LAB_CACHE", "/var/cache/thunder-lab"))


def state_folder() -> Path:
    """Where the labs' disks and logs are: ``$THUNDER_LAB_STATE``."""
    return Path(os.environ.get("THUNDER_LAB_STATE", "/var/tmp/thunder-lab"))


@dataclasses.dataclass(frozen=True)
class Options:
    """Which parts of a lab are started: see ``lab up --help``."""

    control_plane: bool = True
    services: bool = True
    nova: bool = False  # servers: Placement, Nova, libvirt
    plain: bool = False  # a second backend, of Cinder's LVM driver
    backend_driver: str = "cinder_thunder.driver.ThunderDriver"


class Cluster:
    """A lab by its name, up or not.

    >>> with Cluster("mine", Topology.standard(compute=2)) as cluster:
    ...     cluster.node("cmp1").run("uname -a").stdout
    """

    def __init__(
        self,
        name: str = "thunder",
        topology: Topology | None = None,
        options: Options | None = None,
    ) -> None:
        if not _NAME.fullmatch(name):
            raise LabError(f"lab name {name!r}: up to 20 of a-z, 0-9 and -, a letter first")
        self.name = name
        self.folder = state_folder() / name
        self.logs = self.folder / "logs"
        self.network = Network(name)
        self.topology = topology or Topology.standard()
        self.options = options or Options()
        #: How many times slower this machine is than the reference machine: see :mod:`lab.pace`.
        self.pace = 1.0
        self._bound: Process | None = None
        self.controller = Controller(
            self.network, self.folder / "controller", self.logs / Controller.name
        )
        self._cancel = threading.Event()
        self._make_nodes()

    @classmethod
    def load(cls, name: str = "thunder") -> Cluster:
        """The lab of this name that another process brought up.

        :raises LabError: there is none
        """
        cluster = cls(name)
        try:
            state = json.loads(cluster._state_file.read_text())
        except FileNotFoundError:
            raise LabError(
                f"there is no lab {name!r}: bring it up with `lab --name {name} up`"
            ) from None
        cluster = cls(name, Topology.from_wire(state["topology"]), Options(**state["options"]))
        cluster._keep_pace(state.get("pace", 1.0))
        cluster._bound = _bound(state)
        return cluster

    def _make_nodes(self) -> None:
        keys = self.folder / "keys"
        # Set by _up: a lab that is only inspected needs no image.
        image = self.folder / "root.img"
        self.nodes = {
            spec.name: Node(
                Machine(
                    spec,
                    self.network,
                    image,
                    self.folder / "xstate.so",
                    self.folder / "nodes" / spec.name,
                    self.logs / spec.name / "console.log",
                ),
                keys,
                self.logs / spec.name,
            )
            for spec in self.topology.nodes
        }

    def _keep_pace(self, factor: float) -> None:
        """Scale the time limits to this machine, in this process and in the daemons' files."""
        self.pace = factor
        pace.use(factor)
        self.controller.make_catalog()
        for node in self.nodes.values():
            services = []
            if node.spec.is_a("storage"):
                driver, plain = self.options.backend_driver, self.options.plain
                services += [control.cinder_volume(node.spec, driver, plain=plain)]
            if node.spec.is_a("compute"):
                services += [control.thunder_agent(node.spec)]
                services += nova.compute_services(node.spec) if self.options.nova else []
            node.catalog.update({service.name: service for service in services})

    def __enter__(self) -> Self:
        self.up(bound=True)
        return self

    def __exit__(self, *_: object) -> None:
        self.down()

    # -- up and down ---------------------------------------------------------------------------

    def is_up(self) -> bool:
        """Whether :meth:`up` has completed and :meth:`down` has not been called since."""
        return self.network.exists() and (self.folder / "up").exists()

    def up(self, steps: Steps | None = None, *, bound: bool = False) -> None:
        """Bring the lab up; on any failure, take down what was started.

        :param bound: tie the lab to this process, which is to take it down: if the process is
            killed before it does, the next ``up`` of this name takes the lab down first
        :raises PreconditionError: this machine cannot run it; nothing was started
        :raises LabError: a part did not start; has the reason and the end of its log
        """
        preconditions.check(control_plane=self.options.control_plane)
        with self._lock(), steps or Steps(quiet=True) as shown:
            if left := self._left_behind():
                shown.note(
                    f"lab {self.name!r} was left behind by an earlier run (process {left.pid}): "
                    "taken down"
                )
            self._clear()
            preconditions.check_memory(self.topology)
            shutil.rmtree(self.logs, ignore_errors=True)
            self._cancel.clear()
            self._bound = Process.current() if bound else None
            try:
                self._up(shown)
                (self.folder / "up").touch()
            except BaseException:
                self._cancel.set()
                with shown.step("taking down what was started"):
                    self._clear()
                raise

    def _left_behind(self) -> Process | None:
        """The process to which this lab was bound, if it has ended and the lab is still up.

        :raises LabError: the lab is up and in use
        """
        try:
            bound = _bound(json.loads(self._state_file.read_text()))
        except FileNotFoundError:
            bound = None
        if bound is not None and bound.find() is None:
            return bound if self.network.exists() else None
        if not self.is_up():
            return None
        if bound is not None:
            raise LabError(f"lab {self.name!r} is up, and process {bound.pid} uses it")
        raise LabError(
            f"lab {self.name!r} is up: use it, or run `lab --name {self.name} down` first"
        )

    def _up(self, steps: Steps) -> None:
        self._keep_pace(pace.measure())
        steps.note(pace.describe(self.pace))
        self.folder.mkdir(parents=True, exist_ok=True)
        self._save()
        with steps.step("network"):
            self.network.create()
        make_keys(self.folder / "keys")
        with steps.step("root image"):
            (self.folder / "root.img").symlink_to(root_image(cache_folder()))
            (self.folder / "xstate.so").symlink_to(xstate_library(cache_folder()))
        with _Tasks(steps, self._cancel, self.network.kill) as tasks:
            boots = {
                node.name: tasks.start(f"{node.name}: boot", functools.partial(self._boot, node))
                for node in self.nodes.values()
            }
            if self.options.control_plane:
                self._start_services(tasks, boots)
            tasks.finish()

    def _start_services(self, tasks: _Tasks, boots: Mapping[str, Future[None]]) -> None:
        """Start each daemon as soon as its dependencies are ready."""

        def start(place: Controller | Node, name: str, *after: Future[None]) -> Future[None]:
            action = functools.partial(place.service_start, name, self._cancel)
            return tasks.start(f"{place.name}: {name}", action, after)

        controller = self.controller
        controller.make_folders()
        rabbitmq = start(controller, "rabbitmq")
        databases = functools.partial(seed.provide, controller, cache_folder())
        mariadb = start(controller, "mariadb", tasks.start("databases", databases))
        upgrade = functools.partial(self.thunder, "db", "upgrade")
        tables = tasks.start("thunder's tables", upgrade, [mariadb])
        keystone = start(controller, "keystone", mariadb)
        policy = tasks.start("keystone: policy", self._load_policy, [keystone])
        apis = [start(controller, name, mariadb) for name in ("glance-api", "cinder-api")]
        start(controller, "cinder-scheduler", mariadb, rabbitmq)
        cloud = [rabbitmq, mariadb, tables]
        if self.options.nova:
            cloud += [policy, *apis]
            cloud += [start(controller, name, mariadb, rabbitmq) for name in nova.NAMES]
        if not self.options.services:
            return
        daemons: list[Future[None]] = []
        for node in self.nodes.values():
            ready = [boots[node.name], *cloud]
            for name in node.catalog:  # in the order of their dependencies
                ready.append(start(node, name, *ready))
            daemons += ready
        if self.options.nova:
            tasks.start("nova: compute hosts", self._discover_hosts, daemons)

    def _load_policy(self) -> None:
        """Have Keystone read its policy before any service needs it.

        It does so at the first request; requests that arrive meanwhile are forbidden, and the
        service that needed a token checked answers with 503.
        """
        self.ask(lambda cloud: list(cloud.identity.projects()))

    def _discover_hosts(self) -> None:
        self.controller.discover_hosts()
        names = {node.name for node in self.of_kind("compute")}

        def known(cloud: Any) -> bool:
            found = {
                provider.name
                for provider in cloud.placement.resource_providers()
                if any(cloud.placement.resource_provider_inventories(provider))
            }
            return found >= names

        # nova-compute reports its inventory to Placement at its start and every minute.
        wait_for(
            "Placement knows the compute hosts",
            lambda: self.ask(known),
            timeout=600,
            cancel=self._cancel,
        )

    def _boot(self, node: Node) -> None:
        node.prepare(self.topology)
        self.network.add_node(node.spec)
        node.start(self._cancel)

    def down(self, steps: Steps | None = None) -> None:
        """Take the lab down; only its logs are kept, until the next start. Absent is success.

        An ``up`` that is running in another process is interrupted first.
        """
        with steps or Steps(quiet=True) as shown, shown.step(f"lab {self.name} down"):
            self._cancel.set()
            with self._lock(interrupt=True):
                self._clear()

    def _clear(self) -> None:
        (self.folder / "up").unlink(missing_ok=True)
        self.network.delete()
        if not self.folder.exists():
            return
        for path in self.folder.iterdir():
            if path == self.logs:
                continue
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()

    @contextlib.contextmanager
    def _lock(self, *, interrupt: bool = False) -> Iterator[None]:
        """Run one operation at a time on a lab.

        The lock ends with its holder, so a killed process leaves nothing to clean up.
        """
        lock = state_folder() / f"{self.name}.lock"
        lock.parent.mkdir(parents=True, exist_ok=True)
        with lock.open("a+") as held:
            if not files.lock(held.fileno()):
                held.seek(0)
                holder = int(held.read() or 0)
                if not interrupt:
                    raise LabError(f"process {holder} is bringing lab {self.name!r} up or down")
                if holder:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(holder, signal.SIGTERM)
                fcntl.flock(held, fcntl.LOCK_EX)
            held.truncate(0)
            held.write(str(os.getpid()))
            held.flush()
            yield

    # -- use -----------------------------------------------------------------------------------

    def node(self, name: str) -> Node:
        """A node by its name.

        :raises LabError: there is no such node; the message lists those there are
        """
        if name not in self.nodes:
            raise LabError(f"there is no node {name!r}; there are: {', '.join(self.nodes)}")
        return self.nodes[name]

    def of_kind(self, kind: str) -> list[Node]:
        """The "storage" or the "compute" nodes, in their order."""
        return [node for node in self.nodes.values() if node.spec.is_a(kind)]

    def set_link(self, name: str, link: Link) -> None:
        """Change a node's cable while it runs."""
        node = self.node(name)
        self.topology = self.topology.with_link(name, link)
        self.network.limit(dataclasses.replace(node.spec, link=link))
        node.set_link(link)
        self._save()

    def openstack(self, *arguments: str, timeout: float = 300) -> str:
        """Run the openstack client with the administrator's credentials; returns what it printed.

        :raises CommandError: with what the client said
        """
        return self.controller.run(["openstack", *arguments], timeout=timeout).stdout

    def openstack_json(self, *arguments: str, timeout: float = 300) -> Any:
        """The same for commands that show something (list, show, create): the parsed answer."""
        return json.loads(self.openstack(*arguments, "-f", "json", timeout=timeout))

    def ask(self, question: Callable[[Any], _T]) -> _T:
        """Call ``question`` with an openstacksdk connection of the administrator, in the lab.

        For frequent queries: the client takes over a second of CPU for each command.

        >>> cluster.ask(lambda cloud: cloud.block_storage.find_volume("v1").status)
        """
        return self.network.call(lambda: question(self._cloud))

    @functools.cached_property
    def _cloud(self) -> Any:
        import openstack  # takes half a second, and most commands do not need it

        return openstack.connect(**config.credentials(), load_yaml_config=False, load_envvars=False)

    def thunder(self, *arguments: str) -> str:
        """Run Thunder's own operator command against the lab's database; returns its output.

        :raises CommandError: with what the command said
        """
        return self.controller.thunder(*arguments)

    def env(self) -> dict[str, str]:
        """``OS_…`` variables for clients that are run in the lab."""
        return config.client_environment()

    @property
    def _state_file(self) -> Path:
        return self.folder / "state.json"

    def _save(self) -> None:
        state = {
            "topology": dataclasses.asdict(self.topology),
            "options": dataclasses.asdict(self.options),
            "pace": self.pace,
            "bound": self._bound and dataclasses.asdict(self._bound),
        }
        part = self._state_file.with_suffix(".part")
        part.write_text(json.dumps(state, indent=1))
        part.rename(self._state_file)


class _Tasks:
    """Concurrent parts of one operation; the first failure ends all of them.

    :param abort: called repeatedly after a failure, until every part has ended
    """

    def __init__(self, steps: Steps, cancel: threading.Event, abort: Callable[[], object]) -> None:
        self._steps = steps
        self._cancel = cancel
        self._abort = abort
        self._pool = ThreadPoolExecutor(max_workers=64)
        self._all: list[Future[None]] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            self._cancel.set()
            while wait(self._all, timeout=0.5).not_done:
                self._abort()
        self._pool.shutdown()

    def start(
        self, what: str, action: Callable[[], object], after: Sequence[Future[None]] = ()
    ) -> Future[None]:
        """Run ``action`` when all of ``after`` are done; shown as a step while it runs."""

        def body() -> None:
            wait(after)
            if self._cancel.is_set() or any(earlier.exception() for earlier in after):
                raise Cancelled(f"{what}: not started")
            with self._steps.step(what):
                action()

        task = self._pool.submit(body)
        self._all.append(task)
        return task

    def finish(self) -> None:
        """Wait for all parts, or raise the error of the first that fails."""
        done, _ = wait(self._all, return_when=FIRST_EXCEPTION)
        errors = [error for task in done if (error := task.exception())]
        # A part that was cancelled because of a failure is not the failure to report.
        for error in sorted(errors, key=lambda each: isinstance(each, Cancelled)):
            raise error


@contextlib.contextmanager
def existing_or_new(
    existing: str, name: str, topology: Topology, options: Options | None = None
) -> Iterator[Cluster]:
    """The lab called ``existing``, which stays up; without one, a new lab for the body alone.

    :param name: of the new one
    :raises LabError: there is no such lab, or the new one did not come up
    """
    if existing:
        yield Cluster.load(existing)
        return
    cluster = Cluster(name, topology, options)
    cluster.up(Steps(), bound=True)
    try:
        yield cluster
    finally:
        cluster.down()


def _bound(state: Mapping[str, Any]) -> Process | None:
    found = state.get("bound")
    return None if found is None else Process(**found)
