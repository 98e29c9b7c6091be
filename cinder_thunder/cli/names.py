"""From what an operator types to the id of an image or a volume.

The tables have ids only. Names are looked up in Glance and Cinder, with openstacksdk, if the
environment has credentials as for the openstack client (``OS_CLOUD`` or ``OS_AUTH_URL``, …).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from typing import Any, NoReturn

from cinder_thunder.db.api import Database
from os_brick_thunder.common import errors

#: How an operator can give each of them.
HOST_HELP = "the host, as shown by `thunder host list`"
IMAGE_HELP = "the image: its id in Glance, the beginning of it, or its name"
TEMPLATE_HELP = "the snapshot or volume: its id in Cinder"
VOLUME_HELP = "the volume: its id in Cinder, the beginning of it, or its name"
#: Fewer characters are not taken for the beginning of an id.
_MIN_PREFIX = 4
#: Seconds to wait for each answer of Glance or Cinder.
_TIMEOUT = 10
_CREDENTIALS = ("OS_CLOUD", "OS_AUTH_URL")

Named = Callable[[str], list[str]]


def image(database: Database, word: str, named: Named | None = None) -> str:
    """The id of an image that has a replica, from its id, the beginning of it, or its name.

    :raises errors.InvalidRequest: there is none, or more than one
    """
    known = [found.id for found in database.images.all()]
    found = _find("image", word, known, named or images_named)
    if found not in known:
        raise errors.InvalidRequest(
            f"there is no replica of an image {_called(word, found)}: its first volume creates one "
            f"(openstack volume create --type TYPE --image {found} --size GIB NAME)"
        )
    return found


def volume(database: Database, word: str, named: Named | None = None) -> str:
    """The id of a volume that shares an image or has a stack, likewise.

    :raises errors.InvalidRequest: there is none, or more than one
    """
    known = database.volumes.known_ids()
    found = _find("volume", word, known, named or volumes_named)
    if found not in known:
        raise errors.InvalidRequest(
            f"volume {_called(word, found)} shares no image with a master and is not "
            "attached: it is a plain volume"
        )
    return found


def _find(kind: str, word: str, known: Iterable[str], named: Named) -> str:
    known = set(known)
    if word in known:
        return word
    return only(kind, word, named(word) or beginning(word, known)) or _unknown(kind, word)


def beginning(word: str, ids: Iterable[str]) -> list[str]:
    """The ids that are ``word`` or begin with it."""
    return [
        each for each in ids if each == word or (len(word) >= _MIN_PREFIX and each.startswith(word))
    ]


def only(kind: str, word: str, matches: Iterable[str]) -> str | None:
    """The one match; None if there is none.

    :raises errors.InvalidRequest: there are several
    """
    several = sorted(set(matches))
    if len(several) > 1:
        raise errors.InvalidRequest(
            f"{kind} {word} is ambiguous, give the id: it may be {', '.join(several)}"
        )
    return several[0] if several else None


def _unknown(kind: str, word: str) -> NoReturn:
    where = "replica of an image" if kind == "image" else "volume"
    listed = "thunder image list" if kind == "image" else "openstack volume list --all-projects"
    message = f"there is no {where} {word}: {listed} shows all of them"
    if not _credentials():
        message += (
            f"; to use names, set {_CREDENTIALS[0]}, or {_CREDENTIALS[1]} and the others, as for "
            "the openstack client"
        )
    raise errors.InvalidRequest(message)


def _called(word: str, found: str) -> str:
    return found if word == found else f"{word} ({found})"


def _credentials() -> bool:
    return any(os.environ.get(name) for name in _CREDENTIALS)


def images_named(word: str) -> list[str]:
    """Ids of Glance's images with that name or id; none without credentials.

    :raises errors.ThunderError: there are credentials, but Glance does not answer
    """
    return _asked("Glance", word, lambda cloud: cloud.image.images(name=word), "image")


def volumes_named(word: str) -> list[str]:
    """The same for Cinder's volumes, of all projects if the credentials allow it."""

    def search(cloud: Any) -> Any:
        return cloud.block_storage.volumes(details=False, name=word, all_projects=True)

    return _asked("Cinder", word, search, "volume")


def _asked(service: str, word: str, search: Callable[[Any], Any], kind: str) -> list[str]:
    if not _credentials():
        return []
    try:
        import openstack  # takes half a second, and compute hosts may lack it
    except ImportError:
        return []
    try:
        # Major versions: the environment may set a microversion for the openstack client.
        cloud = openstack.connect(
            api_timeout=_TIMEOUT, image_api_version="2", block_storage_api_version="3"
        )
        found = [each.id for each in search(cloud)]
        if found:
            return found
        finder = cloud.image.find_image if kind == "image" else cloud.block_storage.find_volume
        one = finder(word, ignore_missing=True)
        return [one.id] if one else []
    except Exception as error:  # it may come from any of several libraries
        message = " ".join(str(error).split())
        raise errors.ThunderError(
            f"{service} could not be asked for {kind} {word} ({message[:200]}): give its id, or "
            f"unset {' and '.join(_CREDENTIALS)}"
        ) from error
