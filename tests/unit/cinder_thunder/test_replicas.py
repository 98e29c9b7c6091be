"""Masters on several storage hosts: one is downloaded, the others are verified copies."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from cinder import exception

from cinder_thunder import privileged
from cinder_thunder.db.api import Database
from cinder_thunder.db.values import ClonedVolume, Image, Master
from cinder_thunder.masters import lease as leases
from cinder_thunder.masters import masters as masters_module
from cinder_thunder.masters.clones import FILLING, MASTER, TREE
from cinder_thunder.masters.download import RawImage, content_of
from cinder_thunder.masters.lease import Lease
from cinder_thunder.masters.masters import Masters
from cinder_thunder.masters.peers import Peers
from cinder_thunder.policy.ranking import Limits
from cinder_thunder.tracker.budget import Budget
from cinder_thunder.tracker.service import TrackerService
from cinder_thunder.volumes import Attachment, CinderVolume
from os_brick_thunder.common import errors, wire
from os_brick_thunder.common.copyends import GRAIN
from os_brick_thunder.common.policy import manifest as manifests
from os_brick_thunder.common.policy.extents import Extents
from os_brick_thunder.common.policy.hashtree import HashTree
from os_brick_thunder.common.policy.iscsinames import iqn_of
from os_brick_thunder.common.policy.manifest import Manifest
from os_brick_thunder.common.wire import ImageDigests, Topology
from tests.fake_storage import FileVolumes, StorageNetwork
from tests.unit.cinder_thunder.conftest import Glance
from tests.unit.cinder_thunder.test_master import again
from tests.unit.os_brick_thunder.test_hashtree import tree_of

NEAR, FAR, HERE = "near@thunder", "far@thunder", "here@thunder"
PLACES = {FAR: ("r9", "z9"), NEAR: ("r2", "z1"), HERE: ("r1", "z1")}


@dataclass
class Cloud:
    """Storage hosts with one database and one Glance."""

    database: Database
    admin: Any
    folder: Path
    glance: Glance = field(default_factory=Glance)
    network: StorageNetwork = field(default_factory=StorageNetwork)
    joined: list[str] = field(default_factory=list)

    def holders(self, device: str) -> list[str]:
        """Each of them is an agent of the same host, which reads from it."""
        return self.joined

    def masters(self, host: str) -> Masters:
        rack, zone = PLACES[host]
        self.database.hosts.heartbeat(Topology(host, "10.0.0.1", rack, zone, "", "storage"))
        if host not in self.network.backends:
            self.network.backends[host] = FileVolumes(self.folder / host)
        volumes: Any = self.network.backends[host]
        peers = Peers(self.network, self.network, self.folder / f"{host}-peers", self.holders)
        return Masters(host, self.database, volumes, volumes, "1M", peers)

    def ensure(self, host: str, meta: dict[str, Any], gibibytes: int = 1) -> Master:
        return self.masters(host).ensure(self.admin, self.glance.per_request(), meta, gibibytes)

    def content(self, host: str, image_id: str) -> bytes:
        return (self.network.backends[host].folder / (MASTER + image_id)).read_bytes()

    def check_nothing_is_open(self) -> None:
        assert self.network.logged_in == {}
        assert self.network.admitted == set()
        assert [*self.folder.glob("*-peers/*")] == []
        for volumes in self.network.backends.values():
            assert not [name for name in volumes.names() if name.startswith(FILLING)]
        assert self.database.leases.acquire("image-x", "t", 1)
        with self.database.engine.connect() as connection:
            rows = connection.exec_driver_sql("SELECT name FROM thunder_leases").all()
        assert [row[0] for row in rows] == ["image-x"]


@pytest.fixture
def cloud(cinder_conf: Any, database: Database, admin: Any, tmp_path: Path) -> Iterator[Cloud]:
    cloud = Cloud(database, admin, tmp_path)
    yield cloud
    cloud.check_nothing_is_open()


@pytest.fixture
def meta(cloud: Cloud, raw_image: Path) -> dict[str, Any]:
    return cloud.glance.add(raw_image, "raw")


def test_the_first_master_has_a_manifest(cloud: Cloud, meta: Any, raw_image: Path) -> None:
    cloud.ensure(NEAR, meta)
    data = raw_image.read_bytes()
    found = cloud.database.images.manifest(meta["id"])
    assert found is not None
    chunk = manifests.CHUNK
    wanted = [manifests.digest(data[at : at + chunk]) for at in range(0, len(data), chunk)]
    assert Manifest.parse(len(data), found.chunk, found.digests).digests == b"".join(wanted)


def test_a_second_host_copies_from_the_nearest(cloud: Cloud, meta: Any, raw_image: Path) -> None:
    for host in (FAR, NEAR, HERE):
        found = cloud.ensure(host, meta)
        assert found == Master(raw_image.stat().st_size, False, content_of(meta))
        assert cloud.content(host, meta["id"])[: found.size] == raw_image.read_bytes()
    assert cloud.glance.downloads == [meta["id"]]
    opened = [said for said in cloud.network.said if said.startswith("open_export")]
    assert opened == [f"open_export {FAR}", f"open_export {NEAR}"]
    volumes = cloud.network.backends[HERE]
    assert volumes.protected == {MASTER + meta["id"]}
    # Holes are neither read nor written.
    assert (volumes.folder / (MASTER + meta["id"])).stat().st_blocks * 512 <= 400 << 10


def test_a_master_with_a_manifest_of_longer_chunks_is_copied(
    cloud: Cloud, meta: Any, raw_image: Path
) -> None:
    """Older versions made them of 1 MiB."""
    cloud.ensure(NEAR, meta)
    data, chunk = raw_image.read_bytes(), 1 << 20
    digests = [manifests.digest(data[at : at + chunk]) for at in range(0, len(data), chunk)]
    text = Manifest(len(data), chunk, b"".join(digests)).text
    recorded = json.dumps(ImageDigests(meta["id"], chunk, text).to_wire())
    with cloud.database.engine.begin() as connection:
        connection.exec_driver_sql("UPDATE thunder_images SET root = '', manifest = ?", (recorded,))
    found = cloud.ensure(HERE, meta)
    assert cloud.content(HERE, meta["id"])[: found.size] == data
    assert cloud.glance.downloads == [meta["id"]]


def test_an_image_that_is_larger_than_the_volume_is_not_copied(
    cloud: Cloud, meta: Any, tmp_path: Path
) -> None:
    cloud.masters(NEAR)
    cloud.database.images.add_master(Image(meta["id"], 3 << 30, Extents()), NEAR)
    with pytest.raises(exception.ImageUnacceptable, match="doesn't fit in a volume of size 2GB"):
        cloud.ensure(HERE, meta, 2)
    assert cloud.network.said == []


@pytest.mark.parametrize("verb", ["open_export", "login", "wrong bytes", "hole", "dead", "gone"])
def test_a_master_that_cannot_be_copied_is_skipped(
    cloud: Cloud, meta: Any, raw_image: Path, verb: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next one is copied instead, with a warning, and no wrong data is kept."""
    cloud.ensure(FAR, meta)
    cloud.ensure(NEAR, meta)
    path = cloud.network.backends[NEAR].folder / (MASTER + meta["id"])
    if verb in ("open_export", "login"):
        honest = getattr(cloud.network, verb)

        def refuse(*arguments: Any) -> Any:
            if "near" in str(arguments[0]):
                if verb == "open_export":
                    cloud.network.admitted.add((NEAR, arguments[1], arguments[2]))
                raise errors.TrackerUnavailable("no answer")
            return honest(*arguments)

        monkeypatch.setattr(cloud.network, verb, refuse)
    elif verb in ("wrong bytes", "hole"):
        with path.open("r+b") as file:
            file.seek(100 if verb == "wrong bytes" else 6 << 20)
            file.write(b"X" if verb == "wrong bytes" else bytes(100))
    elif verb == "dead":
        long_ago = "UPDATE thunder_hosts SET heartbeat_at='2001-01-01 00:00:00' WHERE host = ?"
        with cloud.database.engine.begin() as connection:
            connection.exec_driver_sql(long_ago, (NEAR,))
    else:
        path.unlink()
    here = cloud.masters(HERE)
    here.replicate(meta["id"])
    assert cloud.glance.downloads == [meta["id"]]
    size = raw_image.stat().st_size
    assert cloud.content(HERE, meta["id"])[:size] == raw_image.read_bytes()
    opened = [said for said in cloud.network.said if said.startswith("login")]
    assert opened[-1] == f"login {iqn_of(FAR, meta['id'])}"


def test_an_image_without_a_usable_master_is_downloaded_again(
    cloud: Cloud, meta: Any, raw_image: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cloud.ensure(NEAR, meta)
    cloud.network.fail = "login"
    with pytest.raises(errors.NoReplica, match=f"that {HERE} can copy: those of {NEAR} failed"):
        cloud.masters(HERE).replicate(meta["id"])
    cloud.ensure(HERE, meta)
    assert cloud.glance.downloads == [meta["id"]] * 2
    assert "could not be copied from the master on near@thunder: login refused" in caplog.text
    assert "downloading it from Glance" in caplog.text
    size = raw_image.stat().st_size
    assert cloud.content(HERE, meta["id"])[:size] == raw_image.read_bytes()


def test_a_download_that_differs_from_the_masters_is_refused(
    cloud: Cloud, meta: Any, raw_image: Path, tmp_path: Path
) -> None:
    """With two different masters, caches of one would be wrong for clones of the other."""
    cloud.ensure(NEAR, meta)
    cloud.database.images.set_verified(meta["id"], False, "")  # as an older version recorded it
    cloud.network.fail = "login"
    for data in (raw_image.read_bytes().replace(b"late", b"Late", 1), b"short"):
        other = tmp_path / "other"
        other.write_bytes(data)
        changed = cloud.glance.add(other, "raw", id=meta["id"])
        cloud.glance.images[meta["id"]] = (changed, other)
        with pytest.raises(exception.ImageUnacceptable, match="differs from that of its replicas"):
            cloud.ensure(HERE, changed)
        assert cloud.database.images.mastered_on(HERE) == set()


def test_a_master_is_recorded_only_when_it_can_be_opened(
    cloud: Cloud, meta: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    near = cloud.masters(NEAR)
    add_master = cloud.database.images.add_master

    def check(image: Image, host: str) -> None:
        assert cloud.network.backends[NEAR].names() == {MASTER + image.id}
        add_master(image, host)

    monkeypatch.setattr(cloud.database.images, "add_master", check)
    near.ensure(cloud.admin, cloud.glance.per_request(), meta, 1)


def test_a_master_that_was_never_recorded_is_made_again(cloud: Cloud, meta: Any) -> None:
    near = cloud.masters(NEAR)
    cloud.network.backends[NEAR].create(MASTER + meta["id"], 1)
    near.ensure(cloud.admin, cloud.glance.per_request(), meta, 1)
    assert cloud.network.backends[NEAR].names() == {MASTER + meta["id"]}


def test_replicate(cloud: Cloud, meta: Any) -> None:
    here = cloud.masters(HERE)
    with pytest.raises(errors.NoReplica, match="there is none"):
        here.replicate(meta["id"])
    made = cloud.ensure(NEAR, meta)
    assert here.replicate(meta["id"]) == made
    said = len(cloud.network.said)
    assert here.replicate(meta["id"]) == made  # nothing is left to do
    assert len(cloud.network.said) == said


def test_an_image_without_a_manifest_is_copied_too(
    cloud: Cloud, meta: Any, raw_image: Path
) -> None:
    cloud.ensure(NEAR, meta)
    with cloud.database.engine.begin() as connection:
        connection.exec_driver_sql("UPDATE thunder_images SET manifest = NULL")
    cloud.masters(HERE).replicate(meta["id"])
    size = raw_image.stat().st_size
    assert cloud.content(HERE, meta["id"])[:size] == raw_image.read_bytes()
    assert cloud.database.images.manifest(meta["id"]) is None


@pytest.mark.parametrize("verb", ["create", "protect", "rename"])
def test_a_failing_step_leaves_nothing(cloud: Cloud, meta: Any, verb: str) -> None:
    cloud.ensure(NEAR, meta)
    here = cloud.masters(HERE)
    cloud.network.backends[HERE].fail = verb
    with pytest.raises(errors.NoReplica):
        here.replicate(meta["id"])
    assert cloud.network.backends[HERE].names() == set()
    assert cloud.database.images.mastered_on(HERE) == set()
    cloud.network.backends[HERE].fail = None
    here.replicate(meta["id"])


def test_a_session_of_another_service_is_used_and_kept(cloud: Cloud, meta: Any) -> None:
    """An agent on the same host has the same initiator name."""
    cloud.ensure(NEAR, meta)
    iqn = iqn_of(NEAR, meta["id"])
    device = cloud.network.backends[NEAR].path(MASTER + meta["id"])
    cloud.network.logged_in[(iqn, "portal")] = device
    cloud.masters(HERE).replicate(meta["id"])
    assert cloud.network.said == []
    assert cloud.network.logged_in.pop((iqn, "portal")) == device


def test_a_session_that_an_agent_has_joined_is_left_to_it(cloud: Cloud, meta: Any) -> None:
    """It found this session when it logged in itself: it would lose its base's source."""
    cloud.ensure(NEAR, meta)
    cloud.joined.append("dm-3")
    cloud.masters(HERE).replicate(meta["id"])
    iqn = iqn_of(NEAR, meta["id"])
    assert [key for key in cloud.network.logged_in if key[0] == iqn]
    assert cloud.network.admitted
    assert [*cloud.folder.glob("*-peers/*")] == []
    cloud.network.logged_in.clear()  # the agent's end of it
    cloud.network.admitted.clear()


def test_a_dead_session_of_another_service_is_left_alone(
    cloud: Cloud, meta: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """Its device would block the copy, and a logout would take it from its owner."""
    cloud.ensure(FAR, meta)
    cloud.ensure(NEAR, meta)
    cloud.network.said.clear()
    iqn = iqn_of(NEAR, meta["id"])
    cloud.network.logged_in[(iqn, "portal")] = "/nowhere"
    cloud.network.dead.add(iqn)
    cloud.masters(HERE).replicate(meta["id"])
    assert f"another service's session to {iqn} is not usable now" in caplog.text
    assert cloud.network.said[0] == f"open_export {FAR}"
    assert not any(iqn in said for said in cloud.network.said)
    assert cloud.network.logged_in.pop((iqn, "portal")) == "/nowhere"


def test_a_host_that_was_admitted_anew_logs_in_again(cloud: Cloud, meta: Any) -> None:
    """Its earlier close_export may be processed late, and remove the new ACL."""
    cloud.ensure(NEAR, meta)
    cloud.network.passwords, cloud.network.revoked = ["new", "old"], {"old"}
    cloud.masters(HERE).replicate(meta["id"])
    iqn = iqn_of(NEAR, meta["id"])
    assert cloud.network.said.count(f"login {iqn}") == 2
    assert meta["id"] in cloud.database.images.mastered_on(HERE)


def test_what_a_crash_left_open_is_closed(cloud: Cloud, meta: Any, tmp_path: Path) -> None:
    cloud.ensure(NEAR, meta)
    here = cloud.masters(HERE)

    class Crash(BaseException):
        pass

    def crash(note: Path) -> None:
        raise Crash

    for logged_in in (False, True):
        peers = Peers(cloud.network, cloud.network, tmp_path / f"{HERE}-peers", lambda device: [])
        cloud.network.fail = None if logged_in else "login"
        peers._close = crash  # type: ignore[method-assign]
        source = wire.Source("l", NEAR, "master", NEAR)
        with pytest.raises(Crash), peers.opened(source, meta["id"]):
            pass
        assert len(cloud.network.admitted) == 1
        cloud.network.backends[HERE].create(FILLING + meta["id"], 1)
        cloud.database.leases.acquire("image-y", HERE, 60)
        here.reconcile()
        cloud.check_nothing_is_open()
        cloud.database.leases.release("image-x", "t")


def test_a_note_that_a_crash_left_unfinished_is_removed(cloud: Cloud, tmp_path: Path) -> None:
    folder = tmp_path / f"{HERE}-peers"
    folder.mkdir()
    (folder / ".image.new").write_text("{")
    cloud.masters(HERE).reconcile()
    assert [*folder.iterdir()] == []
    assert cloud.network.said == []


def test_a_session_that_failed_to_close_is_closed_later(cloud: Cloud, meta: Any) -> None:
    cloud.ensure(NEAR, meta)
    here = cloud.masters(HERE)
    cloud.network.fail = "logout"
    here.replicate(meta["id"])
    assert len(cloud.network.logged_in) == 1
    cloud.network.fail = None
    here.reconcile()


def test_a_session_that_failed_to_close_is_closed_without_a_restart(
    cloud: Cloud, meta: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And none that a copy is read from."""
    cloud.ensure(NEAR, meta)
    here = cloud.masters(HERE)
    cloud.network.fail = "logout"
    here.replicate(meta["id"])
    here.sweep()  # in vain
    assert len(cloud.network.logged_in) == 1
    cloud.network.fail = None
    here.sweep()
    cloud.check_nothing_is_open()
    cloud.network.backends[HERE].remove(MASTER + meta["id"])
    here.forget_if_missing(meta["id"])
    copy = privileged.copy

    def while_copied(*arguments: Any) -> Any:
        here.sweep()
        assert len(cloud.network.logged_in) == 1
        return copy(*arguments)

    monkeypatch.setattr(privileged, "copy", while_copied)
    here.replicate(meta["id"])
    cloud.check_nothing_is_open()


# -- the lease ------------------------------------------------------------------------------------


@pytest.fixture
def quick(cloud: Cloud, monkeypatch: pytest.MonkeyPatch) -> None:
    cloud.database = OneAtATime(cloud.database)  # type: ignore[assignment]
    monkeypatch.setattr(masters_module, "POLL_INTERVAL", 0.02)
    monkeypatch.setattr(leases, "DURATION", 0.5)
    monkeypatch.setattr(leases, "RENEWAL_INTERVAL", 0.05)


class OneAtATime:
    """A database for threads: SQLite refuses concurrent writers, MariaDB lets them wait."""

    def __init__(self, wrapped: Any, lock: threading.RLock | None = None) -> None:
        self._wrapped = wrapped
        self._lock = lock or threading.RLock()

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._wrapped, name)
        if name == "engine":
            return found
        if not callable(found):  # the tables of one subject
            return OneAtATime(found, self._lock)

        def call(*arguments: Any, **named: Any) -> Any:
            with self._lock:
                return found(*arguments, **named)

        return call


def test_hosts_that_ask_at_once_make_one_download(
    cloud: Cloud, meta: Any, raw_image: Path, quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The download takes longer than a lease that is not renewed."""
    go = threading.Event()

    @contextlib.contextmanager
    def downloaded(
        context: Any, service: Glance, meta: dict[str, Any], *options: Any
    ) -> Iterator[RawImage]:
        """Replaces Cinder's download, whose thread pool serves one native thread."""
        service.downloads.append(meta["id"])
        assert go.wait(30)
        yield RawImage(str(raw_image), raw_image.stat().st_size, False)

    monkeypatch.setattr(masters_module, "downloaded", downloaded)
    made = {host: cloud.masters(host) for host in PLACES}
    with ThreadPoolExecutor(3) as threads:
        asked = [
            threads.submit(one.ensure, cloud.admin, cloud.glance.per_request(), meta, 1)
            for one in made.values()
        ]
        try:
            until = time.monotonic() + 20
            while not cloud.glance.downloads and time.monotonic() < until:
                time.sleep(0.05)
            time.sleep(1.2)
            assert cloud.glance.downloads == [meta["id"]]
            assert not any(future.done() for future in asked), asked
        finally:
            go.set()
        assert len({future.result(30) for future in asked}) == 1
    assert cloud.glance.downloads == [meta["id"]]
    size = raw_image.stat().st_size
    for host in PLACES:
        assert cloud.content(host, meta["id"])[:size] == raw_image.read_bytes()


def test_the_lease_of_a_dead_holder_is_taken_over(cloud: Cloud, meta: Any, quick: None) -> None:
    assert Lease(cloud.database, f"image-{meta['id']}", "dead@thunder").acquire()
    began = time.monotonic()
    cloud.ensure(HERE, meta)
    assert time.monotonic() - began >= 0.4
    assert cloud.glance.downloads == [meta["id"]]


def test_the_wait_for_a_lease_has_a_timeout(
    cloud: Cloud, meta: Any, quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(masters_module, "DOWNLOAD_TIMEOUT", 0.2)
    lease = Lease(cloud.database, f"image-{meta['id']}", FAR)
    assert lease.acquire()
    with (
        lease.kept(),
        pytest.raises(exception.VolumeBackendAPIException, match="another storage host has been"),
    ):
        cloud.ensure(HERE, meta)
    assert cloud.glance.downloads == []


def test_a_failed_download_lets_the_next_one_try(
    cloud: Cloud, meta: Any, raw_image: Path, quick: None
) -> None:
    cloud.glance.images[meta["id"]] = ({**meta, "os_hash_value": "0"}, raw_image)
    with pytest.raises(exception.ImageUnacceptable, match="does not match its hash"):
        cloud.ensure(NEAR, {**meta, "os_hash_value": "0"})
    cloud.ensure(HERE, meta)
    assert cloud.glance.downloads == [meta["id"]] * 2


# -- in the daemon --------------------------------------------------------------------------------


def test_a_copy_that_fails_is_forgotten(cloud: Cloud, tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    source.write_bytes(b"x" * 1024)
    target.write_bytes(b"")
    wrong = Manifest(1024, 1 << 20, bytes(16))
    with pytest.raises(errors.WrongDigest, match="the 1024 bytes at 0 are not the image's"):
        privileged.copy(str(source), str(target), 1024, GRAIN, Extents.of([(0, 1024)]), wrong)
    assert target.read_bytes() == b""
    with pytest.raises(FileNotFoundError):
        privileged.copy(str(tmp_path / "absent"), str(target), 1024, GRAIN)
    assert privileged._copies == {}


def test_values_survive_privseps_pipe(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """privsep sends msgpack, which has fewer types than JSON has."""
    import msgpack  # type: ignore[import-untyped]

    def through(value: Any) -> Any:
        return msgpack.unpackb(msgpack.packb(value, use_bin_type=True), use_list=False, raw=False)

    for name in ("_begin", "_progress", "_result", "_end", "_login", "_sessions"):
        function = getattr(privileged, name)
        monkeypatch.setattr(
            privileged, name, lambda *args, f=function: through(f(*through(list(args))))
        )
    source, target = tmp_path / "source", tmp_path / "target"
    source.write_bytes(b"x" * 1000)
    target.write_bytes(b"")
    made = privileged.copy(str(source), str(target), 1024, GRAIN)
    assert made == Manifest(1024, manifests.CHUNK, manifests.digest(b"x" * 1000 + bytes(24)))
    again = tmp_path / "again"
    again.write_bytes(b"")
    assert (
        privileged.copy(str(target), str(again), 1024, GRAIN, Extents.of([(0, 1024)]), made) == made
    )
    assert again.read_bytes() == b"x" * 1000 + bytes(24)
    image, tree = b"i" * (256 << 10), tmp_path / "tree"
    tree.write_bytes(image)
    found = privileged.manifest_of(
        str(tree), len(image), Extents.of([(0, len(image))]), str(tree), GRAIN
    )
    root, whole = tree_of(image)
    assert found == (
        Manifest(len(image), manifests.CHUNK, manifests.digest(image[: manifests.CHUNK]) * 4),
        HashTree(root, manifests.digest(whole)),
    )
    export = wire.Export("10.0.0.1:3260", iqn_of(FAR, "i"), 0, "u", "secret")
    monkeypatch.setattr(
        "os_brick_thunder.common.transport.iscsi.IscsiAdm.login",
        lambda self, e: json.dumps(e.to_wire()),
    )
    assert json.loads(privileged.login(export)) == export.to_wire()


def tracker(cloud: Cloud, host: str) -> TrackerService:
    """A tracker on a storage host; the volume "v" is attached to c1."""
    at = frozenset({Attachment("c1", of_compute_host().initiator)})
    cinder = {"v": CinderVolume("volume-v", False, at)}
    pool: Any = cloud.network.backends[host]
    return TrackerService(host, cloud.database, pool, Limits(), cinder.get, checks=Budget(1e9, 1e9))


def of_compute_host() -> Topology:
    return Topology("c1", "10.0.0.9", "r2", "z1", "iqn.x:c1")


@pytest.fixture
def cloned(cloud: Cloud, meta: dict[str, Any]) -> str:
    """The image of the volume "v" on a storage host."""
    image_id = str(meta["id"])
    made = cloud.ensure(NEAR, meta)
    cloud.masters(NEAR).clones.make(image_id, made.size, "volume-v", 1 << 30)
    cloud.database.volumes.put(ClonedVolume("v", image_id, NEAR))
    return image_id


def test_a_volume_of_what_an_image_was_gets_no_other_bytes(
    cloud: Cloud, meta: dict[str, Any], cloned: str, other_image: Path
) -> None:
    """The image's id is used again, and another storage host makes a master of it."""
    assert tracker(cloud, NEAR).plan_attach("v", of_compute_host()).mode == "cached"
    cloud.ensure(FAR, again(cloud.glance, meta, other_image))
    cloud.masters(NEAR)  # its heartbeat is fresh
    plan = tracker(cloud, NEAR).plan_attach("v", of_compute_host())
    reason = f"{NEAR} has no master of image {cloned} any longer"
    assert (plan.mode, plan.reason) == ("direct", reason)
    assert (plan.image, plan.sources, plan.unmodified) == (None, (), ())


def test_the_same_while_its_map_is_computed(
    cloud: Cloud,
    meta: dict[str, Any],
    cloned: str,
    other_image: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = tracker(cloud, NEAR)
    modified = cloud.network.backends[NEAR].modified

    def meanwhile(volume: str, master: str) -> Extents:
        found = modified(volume, master)
        cloud.ensure(NEAR, again(cloud.glance, meta, other_image))
        return found

    monkeypatch.setattr(cloud.network.backends[NEAR], "modified", meanwhile)
    plan = asked.plan_attach("v", of_compute_host())
    reason = f"image {cloned} has just got other content"
    assert (plan.mode, plan.reason) == ("direct", reason)


def test_masters_that_are_not_recorded_are_swept(
    cloud: Cloud, meta: dict[str, Any], cloned: str, other_image: Path
) -> None:
    """Those of what the image was before, on other hosts than that of its new master."""
    cloud.masters(NEAR).sweep()
    assert MASTER + cloned in cloud.network.backends[NEAR].names()
    cloud.ensure(FAR, again(cloud.glance, meta, other_image))
    for host in (NEAR, FAR):
        cloud.masters(host).sweep()
    assert cloud.network.backends[NEAR].names() == {"volume-v"}
    assert MASTER + cloned in cloud.network.backends[FAR].names()


def test_a_master_that_cannot_be_swept_keeps_no_other(
    cloud: Cloud, monkeypatch: pytest.MonkeyPatch
) -> None:
    volumes = cloud.network.backends.setdefault(NEAR, FileVolumes(cloud.folder / NEAR))
    for image_id in "ab":
        for prefix in (MASTER, TREE):
            volumes.create(prefix + image_id, 1 << 20)
    remove = volumes.remove

    def refuse(name: str) -> None:
        if name == f"{MASTER}a":
            raise errors.ProcessError(("lvremove", name), 5, "is used by another device")
        remove(name)

    monkeypatch.setattr(volumes, "remove", refuse)
    cloud.masters(NEAR).sweep()
    assert volumes.names() == {f"{MASTER}a"}
    monkeypatch.undo()
    cloud.masters(NEAR).sweep()
    assert volumes.names() == set()
