"""The file with LIO's configuration, from which targets are restored after a reboot.

``cinder-rtstool``, ``targetctl`` and targetcli write and read it, too: its format is rtslib's.
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import rtslib_fb
from oslo_log import log as logging

from os_brick_thunder.common import files
from os_brick_thunder.common.policy.iscsinames import IQN_PREFIX
from os_brick_thunder.common.transport import lio

LOG = logging.getLogger(__name__)
#: Where ``cinder-rtstool save`` puts the configuration.
SAVED = Path("/etc/target/saveconfig.json")


def save(changed: Collection[str] | None, file: Path = SAVED) -> None:
    """Save the configuration; it is on disk afterwards.

    rtslib reads some hundred files of each target of a host. Here those that have changed are read,
    and the rest remains as it was saved. Replicas are left out: their owners export them.

    :param changed: names of the targets that may differ from what is saved; None: all may, but
        those that are absent with their disks, which stay saved
    :raises RTSLibError: the kernel's configuration cannot be read
    :raises OSError: the file cannot be written, or the kernel's configuration cannot be read
    """
    with lio.exclusive():
        saved = _read(file)
        if changed is None or saved is None:
            config = _with_absent(rtslib_fb.RTSRoot().dump(), saved)
        else:
            config = {**saved, **_updated(saved, changed)}
        files.replace(file, _text(_without_replicas(config)))


def parts(file: Path = SAVED) -> Iterator[dict[str, Any]]:
    """The saved configuration as one for each target that Cinder made: its disk has its name."""
    yield from _parts(_read(file))


def _parts(saved: dict[str, Any] | None) -> Iterator[dict[str, Any]]:
    if saved is None:
        return
    stores = {store["name"]: store for store in saved["storage_objects"]}
    for target in saved["targets"]:
        if target["wwn"] in stores:
            yield {"storage_objects": [stores[target["wwn"]]], "targets": [target]}


def _read(file: Path) -> dict[str, Any] | None:
    """None if there is no file, or none that can be used."""
    try:
        saved: dict[str, Any] = json.loads(file.read_text())
        for kind, key in (("storage_objects", "name"), ("targets", "wwn")):
            if not all(isinstance(entry[key], str) for entry in saved[kind]):
                raise ValueError(f"no {key} in {kind}")
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        LOG.warning("%s cannot be read (%s)", file, error)
        return None
    return saved


def _updated(saved: dict[str, Any], changed: Collection[str]) -> dict[str, list[Any]]:
    stores = [store for store in saved["storage_objects"] if store["name"] not in changed]
    targets = [target for target in saved["targets"] if target["wwn"] not in changed]
    for iqn in changed:
        store, target = lio.find_store(iqn), lio.find(iqn)
        if store is not None:
            stores.append(store.dump())
        if target is not None:
            targets.append(target.dump())
    return {"storage_objects": stores, "targets": targets}


def _with_absent(config: dict[str, Any], saved: dict[str, Any] | None) -> dict[str, Any]:
    """The kernel's configuration, and what was saved of targets that are still to be restored:
    after a reboot their disks become active one by one.
    """
    known = {entry["name"] for entry in config["storage_objects"]}
    known.update(target["wwn"] for target in config["targets"])
    absent = [
        part
        for part in _parts(saved)
        if part["targets"][0]["wwn"] not in known
        and not os.path.exists(part["storage_objects"][0].get("dev", ""))
    ]
    added = {
        kind: [*config[kind], *(entry for part in absent for entry in part[kind])]
        for kind in ("storage_objects", "targets")
    }
    return {**config, **added}


def _without_replicas(config: dict[str, Any]) -> dict[str, Any]:
    targets = config["targets"]
    replicas = {lio.store_name(t["wwn"]) for t in targets if t["wwn"].startswith(IQN_PREFIX)}
    return {
        **config,
        "storage_objects": [s for s in config["storage_objects"] if s["name"] not in replicas],
        "targets": [t for t in targets if not t["wwn"].startswith(IQN_PREFIX)],
    }


def _text(config: dict[str, Any]) -> str:
    """JSON with a line for each storage object and each target; indented, it takes three times as
    long.
    """

    def value(found: Any) -> str:
        if not isinstance(found, list):
            return json.dumps(found, sort_keys=True)
        return "[\n" + ",\n".join(json.dumps(entry, sort_keys=True) for entry in found) + "\n]"

    pairs = (f"{json.dumps(key)}: {value(config[key])}" for key in sorted(config))
    return "{" + ",\n".join(pairs) + "}\n"
