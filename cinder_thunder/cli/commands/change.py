"""``thunder image evict`` and ``thunder host drain|undrain``."""

from __future__ import annotations

import argparse
from typing import Any

from cliff.lister import Lister

from cinder_thunder.cli import names
from cinder_thunder.cli.base import FAILED
from cinder_thunder.cli.cloud import CloudCommand, database, hosts_rpc
from cinder_thunder.cli.commands.image import ImageCommand
from cinder_thunder.masters.eviction import evict
from os_brick_thunder.common import errors
from os_brick_thunder.common.rpc import DRAIN_TIMEOUT, RpcTracker

#: Seconds; an agent that claims to need longer is not waited for.
_LONGEST_DRAIN = 24 * 3600.0


class ImageEvict(ImageCommand, Lister):
    """Remove all replicas of an image that no volume uses, masters last.

    Exit code 1 if a replica had to stay.
    """

    def take_action(self, parsed_args: argparse.Namespace) -> tuple[Any, Any]:
        found = database(parsed_args.config_file)
        image_id = names.image(found, parsed_args.image)
        rpc = hosts_rpc(parsed_args.config_file)
        agents = {host.host for host in found.hosts.all() if host.kind == "compute"}

        def remove(host: str, image: str) -> None:
            rpc.evict(host, image, drain_timeout(rpc, host) if host in agents else DRAIN_TIMEOUT)

        outcomes = evict(found, image_id, remove)
        if any(outcome.kept for outcome in outcomes):
            self.app.exit_code = FAILED
        rows = [(o.host, o.kind, o.kept or "evicted") for o in outcomes]
        return ("Host", "Kind", "Result"), rows


def drain_timeout(rpc: RpcTracker, host: str) -> float:
    """Seconds that an agent gives other hosts to leave its replica; each agent has its own option.

    :raises errors.TrackerUnavailable: it does not answer
    """
    try:
        seconds = rpc.status(host).get("drain_timeout")
    except errors.TrackerUnavailable:
        raise
    except errors.ThunderError:  # an older agent, which has no status by RPC
        return DRAIN_TIMEOUT
    if isinstance(seconds, int | float) and 0 <= seconds <= _LONGEST_DRAIN:
        return float(seconds)
    return DRAIN_TIMEOUT


class _Drain(CloudCommand):
    drained: bool

    def get_parser(self, prog_name: str) -> argparse.ArgumentParser:
        parser: argparse.ArgumentParser = super().get_parser(prog_name)
        parser.add_argument("host", metavar="HOST", help=names.HOST_HELP)
        return parser

    def take_action(self, parsed_args: argparse.Namespace) -> None:
        database(parsed_args.config_file).hosts.set_drained(parsed_args.host, self.drained)
        self.app.stdout.write(
            f"{parsed_args.host} is drained: hosts that read from it move to others at their next "
            "heartbeat, and pre-caching leaves it out\n"
            if self.drained
            else f"{parsed_args.host} serves replicas again\n"
        )


class HostDrain(_Drain):
    """Let no other host read from a host any longer, before it is serviced or removed.

    Its own volumes stay attached and keep their caches. Hosts that read from it are given other
    parents; `thunder location show` shows those that still do.
    """

    drained = True


class HostUndrain(_Drain):
    """Let other hosts read from a host again."""

    drained = False
