"""How a host opens a replica on another one: asked for by RPC, then logged in to."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Protocol

from os_brick_thunder.common import errors, wire

LOG = logging.getLogger(__name__)


class Exporters(Protocol):
    """The exporters of other hosts, by RPC."""

    def open_export(
        self, source: wire.Source, image_id: str, initiator: str, wait: float
    ) -> wire.Export: ...
    def close_export(self, exporter: str, image_id: str, initiator: str) -> None: ...


def log_in(
    login: Callable[[wire.Export], str],
    export: wire.Export,
    ask_again: Callable[[], wire.Export],
) -> str:
    """Log in to a replica; once more if its exporter has admitted this host anew meanwhile.

    An exporter whose host was down may process our old close_export after it has added the new
    ACL, and remove it.

    :param ask_again: opens the export again
    :returns: the disk
    :raises errors.LoginError:
    """
    try:
        return login(export)
    except errors.LoginRefused:
        anew = ask_again()
        if anew == export:
            raise
        LOG.info("%s at %s: logging in again", export.iqn, export.portal)
        return login(anew)
