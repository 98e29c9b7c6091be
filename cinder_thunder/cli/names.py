"""What an operator calls a thing, and its id.

Our tables have ids alone. Names are Glance's and Cinder's, and are asked for there if there are
credentials in the environment, as for the openstack client (``OS_CLOUD`` or ``OS_AUTH_URL``, …).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from typing import Any, NoReturn

from cinder_thunder.db.api import Database
from os_brick_thunder.common import errors

#: Fewer characters than these are no beginning of an id, but a slip.
_PREFIX = 4
#: Seconds for each answer of the cloud.
_PATIENCE = 10
_CREDENTIALS = ("OS_CLOUD", "OS_AUTH_URL")

Named = Callable[[str], list[str]]


def image(database: Database, word: str, named: Named | None = None) -> str:
    """The id of an image that has a replica, from its id, the beginning of that, or its name.

    :raises errors.InvalidRequest: there is none, or more than one
    """
    known = [found.id for found in database.images.all()]
    found = _find("image", word, known, named or images_named)
    if found not in known:
        raise errors.InvalidRequest(
            f"there is no replica of an image {_called(word, found)}: its first volume makes one "
            f"(openstack volume create --type TYPE --image {found} --size GIB NAME)"
        )
    return found


def volume(database: Database, word: str, named: Named | None = None) -> str:
    """The id of a volume that shares an image or has a stack: from its id, the beginning, a name.

    :raises errors.InvalidRequest: there is none, or more than one
    """
    known = database.volumes.known_ids()
    found = _find("volume", word, known, named or volumes_named)
    if found not in known:
        raise errors.InvalidRequest(
            f"volume {_called(word, found)} shares no image with a master, and is attached "
            "nowhere: it is a plain volume"
        )
    return found


def _find(kind: str, word: str, known: Iterable[str], named: Named) -> str:
    known = set(known)
    if word in known:
        return word
    return only(kind, word, named(word) or beginning(word, known)) or _unknown(kind, word)


def beginning(word: str, ids: Iterable[str]) -> list[str]:
    """The ids that begin with ``word``, or are it."""
    return [
        each for each in ids if each == word or (len(word) >= _PREFIX and each.startswith(word))
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
    said = f"there is no {where} {word}: {listed} shows those that there are"
    if not _credentials():
        said += (
            f"; to give a name and not an id, set {_CREDENTIALS[0]}, or {_CREDENTIALS[1]} and "
            "the others, as for the openstack client"
        )
    raise errors.InvalidRequest(said)


def _called(word: str, found: str) -> str:
    return found if word == found else f"{word} ({found})"


def _credentials() -> bool:
    return any(os.environ.get(name) for name in _CREDENTIALS)


def images_named(word: str) -> list[str]:
    """Ids of Glance's images with that name or id; none without credentials.

    :raises errors.ThunderError: there are credentials, but no answer
    """
    return _asked("Glance", word, lambda cloud: cloud.image.images(name=word), "image")


def volumes_named(word: str) -> list[str]:
    """The same for Cinder's volumes, of all projects if we may see them."""

    def look(cloud: Any) -> Any:
        return cloud.block_storage.volumes(details=False, name=word, all_projects=True)

    return _asked("Cinder", word, look, "volume")


def _asked(service: str, word: str, look: Callable[[Any], Any], kind: str) -> list[str]:
    if not _credentials():
        return []
    try:
        import openstack  # takes half a second, and is not everywhere
    except ImportError:
        return []
    try:
        # Majors: the environment may have a microversion for the openstack client.
        cloud = openstack.connect(
            api_timeout=_PATIENCE, image_api_version="2", block_storage_api_version="3"
        )
        found = [each.id for each in look(cloud)]
        if found:
            return found
        finder = cloud.image.find_image if kind == "image" else cloud.block_storage.find_volume
        one = finder(word, ignore_missing=True)
        return [one.id] if one else []
    except Exception as error:  # of half a dozen libraries
        said = " ".join(str(error).split())
        raise errors.ThunderError(
            f"{service} could not be asked for {kind} {word} ({said[:200]}): give its id, or unset "
            f"{' and '.join(_CREDENTIALS)}"
        ) from error
