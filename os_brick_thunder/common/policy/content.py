"""The content of images: an id may be used again after a purge of Glance's database."""

from __future__ import annotations


def may_be_same(one: str, other: str) -> bool:
    """Whether two contents, as in :class:`.wire.ImageInfo`, may be one: an empty one is not known,
    and fits all.
    """
    return not one or not other or one == other
