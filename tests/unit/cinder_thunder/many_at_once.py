"""Four green threads ask for the master of one image at once; run by test_master.py.

Usage: python -m tests.unit.cinder_thunder.many_at_once FOLDER IMAGE
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import eventlet

eventlet.monkey_patch()  # as cinder-volume does; cinder.monkey_patch is in Cinder 29 alone

import cinder.privsep  # noqa: E402
from cinder import context, coordination  # noqa: E402
from oslo_config import cfg  # noqa: E402

from cinder_thunder import concurrency  # noqa: E402
from cinder_thunder.db import migration  # noqa: E402
from cinder_thunder.db.api import Database  # noqa: E402
from cinder_thunder.masters.masters import Masters  # noqa: E402
from cinder_thunder.masters.peers import Peers  # noqa: E402
from tests.fake_storage import FileVolumes, StorageNetwork  # noqa: E402
from tests.unit.cinder_thunder.conftest import STORAGE, Glance  # noqa: E402


def main(folder: Path, image: Path) -> None:
    cinder.privsep.sys_admin_pctxt.set_client_mode(False)
    cfg.CONF([], project="cinder", default_config_files=[])
    cfg.CONF.set_override("image_conversion_dir", str(folder / "conversion"))
    cfg.CONF.set_override("lock_path", str(folder / "locks"), group="oslo_concurrency")
    cfg.CONF.set_override("backend_url", f"file://{folder}/coordination", group="coordination")
    coordination.COORDINATOR.start()
    database = Database(f"sqlite:///{folder / 'many.sqlite'}")
    migration.upgrade(database.engine)
    volumes = FileVolumes(folder / "many")
    nobody = StorageNetwork()
    peers = Peers(nobody, nobody, folder / "peers")
    masters = Masters(STORAGE, database, volumes, volumes, "1M", peers)  # type: ignore[arg-type]
    glance = Glance()
    meta = glance.add(image, "raw")
    admin = context.get_admin_context()
    pool = eventlet.GreenPool()
    asked = list(
        pool.imap(lambda _: masters.ensure(admin, glance.per_request(), meta, 1), range(4))
    )
    summary = {
        "masters": len(volumes.names()),
        "downloads": len(glance.downloads),
        "asked": len(asked),
        "green": concurrency.is_green(),
    }
    coordination.COORDINATOR.stop()
    sys.stdout.write(json.dumps(summary))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
