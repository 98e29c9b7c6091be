"""The databases that a lab starts with: every table, user, endpoint and volume type.

Creating them takes half a minute, so the first lab that needs them does it once for each set of
versions; every other lab copies them. Thunder's own tables are not included: they change with the
tree.
"""

from __future__ import annotations

import hashlib
import shutil
import sys
from pathlib import Path

from lab.cloud import accounts, config
from lab.cloud.control import Controller, database_socket
from lab.nodes.image import only_one
from lab.nodes.node import TREE
from lab.shell import run

_KEPT = ("mysql", "keystone/fernet-keys", "keystone/credential-keys")


def provide(controller: Controller, cache: Path) -> None:
    """Put the databases and Keystone's keys into the controller's folder, before MariaDB starts."""
    seed = cache / f"seed-{_key()}"
    if not seed.exists():
        with only_one(cache / "seed.lock"):
            if not seed.exists():
                _make(controller)
                _keep(controller.folder, seed)
                return
    run(["cp", "-a", "--reflink=auto", f"{seed}/.", str(controller.folder)])


def _key() -> str:
    sources = [Path(__file__), Path(accounts.__file__), TREE / "constraints.txt"]
    parts = [path.read_text() for path in sources]
    parts += [run(["mariadbd", "--version"]).stdout, config.keystone(Path("/"))]
    parts += [repr((config.ENDPOINTS, config.BACKEND, config.VOLUME_TYPE, config.PASSWORD))]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def _make(controller: Controller) -> None:
    folder = controller.folder
    run(
        ["mariadb-install-db", "--no-defaults", "--user=root", f"--datadir={folder / 'mysql'}",
         "--auth-root-authentication-method=normal", "--skip-test-db"]
    )  # fmt: skip
    controller.service_start("mariadb")
    statements = [f"CREATE DATABASE {name} CHARACTER SET utf8mb4" for name in config.DATABASES]
    statements += [
        f"CREATE USER 'lab'@'%' IDENTIFIED BY '{config.PASSWORD}'",
        "GRANT ALL PRIVILEGES ON *.* TO 'lab'@'%'",
    ]
    controller.run(
        ["mariadb", "--no-defaults", f"--socket={database_socket(folder)}", "--user=root"],
        input=";\n".join(statements) + ";\n",
    )
    _make_tables(controller)
    controller.service_start("keystone")
    controller.run([f"{sys.prefix}/bin/python", "-m", "lab.cloud.accounts"])
    controller.service_start("cinder-api")
    controller.run(
        ["openstack", "volume", "type", "create", config.VOLUME_TYPE,
         "--property", f"volume_backend_name={config.BACKEND}"]
    )  # fmt: skip
    for name in ("cinder-api", "keystone", "mariadb"):
        controller.service_stop(name, timeout=60)


def _make_tables(controller: Controller) -> None:
    folder = controller.folder
    for service in controller.catalog.values():
        for path, text in service.files.items():
            controller.write(path, text)
    for keys in ("fernet-keys", "credential-keys"):
        (folder / "keystone" / keys).mkdir(mode=0o700)
    keystone = f"keystone-manage --config-file {folder / 'keystone/keystone.conf'}"
    placement = f"placement-manage --config-file {folder / 'placement/placement.conf'}"
    nova = f"nova-manage --config-file {folder / 'nova/nova.conf'}"
    urls = " ".join(
        f"--bootstrap-{interface}-url {config.IDENTITY_URL}"
        for interface in ("admin", "internal", "public")
    )
    controller.run(
        "set -e\n"
        f"glance-manage --config-file {folder / 'glance/glance-api.conf'} db_sync & glance=$!\n"
        f"cinder-manage --config-file {folder / 'cinder/cinder.conf'} db sync & cinder=$!\n"
        f"{placement} db sync & placement=$!\n"
        f"({nova} api_db sync && {nova} cell_v2 map_cell0 --database_connection"
        f" {config.database_url('nova_cell0')} && {nova} db sync"
        f" && {nova} cell_v2 create_cell --name lab) & nova=$!\n"
        f"{keystone} db_sync\n"
        f"{keystone} fernet_setup --keystone-user root --keystone-group root\n"
        f"{keystone} credential_setup --keystone-user root --keystone-group root\n"
        f"{keystone} bootstrap --bootstrap-password {config.PASSWORD}"
        f" --bootstrap-region-id {config.REGION} {urls}\n"
        "wait $glance; wait $cinder; wait $placement; wait $nova",
        timeout=600,
    )


def _keep(folder: Path, seed: Path) -> None:
    part = seed.with_suffix(".part")
    shutil.rmtree(part, ignore_errors=True)
    for name in _KEPT:
        shutil.copytree(folder / name, part / name)
    part.rename(seed)
