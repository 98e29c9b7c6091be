"""``thunder host|image|location|volume list|show|tree``: they change nothing."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

from cliff.lister import Lister
from cliff.show import ShowOne

from cinder_thunder.cli import caches, names, views
from cinder_thunder.cli.cloud import CloudCommand, database, hosts_rpc
from cinder_thunder.cli.commands.image import ImageCommand
from cinder_thunder.policy.ranking import MASTER
from os_brick_thunder.common.rpc import RpcTracker

_List = tuple[tuple[str, ...], list[tuple[Any, ...]]]
_Shown = tuple[tuple[str, ...], tuple[Any, ...]]
#: Seconds to wait for an agent that knows more of what is shown.
_AGENT_TIMEOUT = 5.0


def _shown(**fields: Any) -> _Shown:
    return tuple(fields), tuple(fields.values())


def _status_by_rpc(config_file: str) -> views.Ask:
    """Connects only when an agent is asked."""
    rpc: list[RpcTracker] = []

    def ask(host: str) -> Mapping[str, Any]:
        if not rpc:
            rpc.append(hosts_rpc(config_file, _AGENT_TIMEOUT))
        return rpc[0].status(host)

    return ask


class HostList(CloudCommand, Lister):
    """List storage and compute hosts, and the seconds since each one's last heartbeat.

    A host is alive, suspect (its heartbeat is late: no further host is sent there) or dead (hosts
    that read from it are sent elsewhere). A drained host is alive, but no host reads from it.
    """

    def take_action(self, parsed_args: argparse.Namespace) -> _List:
        rows = [
            (h.host, h.kind, h.rack, h.zone, h.address, round(h.silent, 1), h.state, h.drained)
            for h in database(parsed_args.config_file).hosts.all()
        ]
        columns = ("Host", "Kind", "Rack", "Zone", "Address", "Silent (s)", "State", "Drained")
        return columns, rows


class HostShow(CloudCommand, ShowOne):
    """Show a host: where it is, its replicas, and the local pool as its agent reports it.

    If the agent does not answer, its fields are empty.
    """

    def get_parser(self, prog_name: str) -> argparse.ArgumentParser:
        parser: argparse.ArgumentParser = super().get_parser(prog_name)
        parser.add_argument("host", metavar="HOST", help=names.HOST_HELP)
        return parser

    def take_action(self, parsed_args: argparse.Namespace) -> _Shown:
        file = parsed_args.config_file
        view = views.host(database(file), parsed_args.host, _status_by_rpc(file))
        host, status = view.host, view.agent.status
        pool = status.get("pool", {})
        return _shown(
            host=host.host,
            kind=host.kind,
            rack=host.rack,
            zone=host.zone,
            address=host.address,
            silent_s=round(host.silent, 1),
            state=host.state,
            drained=host.drained,
            free="" if host.free is None else host.free,
            replicas=view.replicas,
            complete=view.complete,
            agent=view.agent.summary,
            pool_used=pool.get("used", ""),
            pool_total=pool.get("total", ""),
            pool_healthy=pool.get("healthy", ""),
            stacks=len(status["stacks"]) if "stacks" in status else "",
        )


class ImageList(CloudCommand, Lister):
    """List images and templates that have a replica; sizes in bytes.

    What is left of a deleted one is removed when no volume needs it any longer.
    """

    def take_action(self, parsed_args: argparse.Namespace) -> _List:
        found = database(parsed_args.config_file)
        rows = []
        for image in found.images.all():
            locations = found.locations.of(image.id)
            masters = sum(location.kind == MASTER for location in locations)
            kind = "template" if image.template else "image"
            sizes = image.size, image.allocated.length
            replicas = masters, len(locations) - masters
            rows.append((image.id, kind, *sizes, *replicas, image.deleted))
        return ("Image", "Kind", "Size", "Allocated", "Masters", "Bases", "Deleted"), rows


class ImageShow(ImageCommand, ShowOne):
    """Show an image: its size, where its masters are, how many hosts have it; sizes in bytes."""

    def take_action(self, parsed_args: argparse.Namespace) -> _Shown:
        found = database(parsed_args.config_file)
        view = views.image(found, names.image(found, parsed_args.image))
        verified = view.image.signature_verified
        return _shown(
            id=view.image.id,
            size=view.image.size,
            allocated=view.image.allocated.length,
            signature={None: "not asked for", True: "verified"}.get(verified, "not verified"),
            hash_tree=view.image.root or "none",
            masters=", ".join(view.masters),
            volumes=view.volumes,
            bases=view.bases,
            complete=view.complete,
            depth=view.depth,
        )


class ImageTree(ImageCommand):
    """Draw which host reads an image from which."""

    def take_action(self, parsed_args: argparse.Namespace) -> None:
        found = database(parsed_args.config_file)
        image_id = names.image(found, parsed_args.image)
        allocated = {image.id: image.allocated.length for image in found.images.all()}
        lines = views.tree(found.locations.of(image_id), allocated[image_id])
        self.app.stdout.write("\n".join(lines) + "\n")


class LocationList(CloudCommand, Lister):
    """List replicas: where they are, how many bytes they hold, and which host they read from."""

    def get_parser(self, prog_name: str) -> argparse.ArgumentParser:
        parser: argparse.ArgumentParser = super().get_parser(prog_name)
        parser.add_argument("--image", metavar="IMAGE", help="only of this image (id or name)")
        return parser

    def take_action(self, parsed_args: argparse.Namespace) -> _List:
        found = database(parsed_args.config_file)
        word = parsed_args.image
        images = [names.image(found, word)] if word else [image.id for image in found.images.all()]
        rows = [
            (at.id, image_id, at.host, at.kind, at.state, at.filled, parent)
            for image_id, at, parent in views.locations(found, images)
        ]
        return ("Location", "Image", "Host", "Kind", "State", "Filled", "Reads from"), rows


class LocationShow(CloudCommand, ShowOne):
    """Show a replica: how it is reached, what it reads from, which hosts read from it."""

    def get_parser(self, prog_name: str) -> argparse.ArgumentParser:
        parser: argparse.ArgumentParser = super().get_parser(prog_name)
        parser.add_argument(
            "location",
            metavar="LOCATION",
            help="its id, or the beginning of it, as shown by `thunder location list`",
        )
        return parser

    def take_action(self, parsed_args: argparse.Namespace) -> _Shown:
        view = views.location(database(parsed_args.config_file), parsed_args.location)
        location = view.location
        return _shown(
            id=location.id,
            image=view.image_id,
            host=location.host,
            address=view.address,
            iqn=view.iqn,
            kind=location.kind,
            state=location.state,
            filled=location.filled,
            percent=view.percent,
            depth=view.depth,
            reads_from=view.parent,
            read_by=", ".join(view.children),
            heard_of_s=round(location.age, 1),
        )


class VolumeShow(CloudCommand, ShowOne):
    """Show how a volume is attached: its stack, and the coverage and hits of its cache.

    Coverage is the share of the image's blocks that the host serves itself, hits is the share of
    reads that it served itself. Both come from the agent, and are empty if it does not answer.
    """

    def get_parser(self, prog_name: str) -> argparse.ArgumentParser:
        parser: argparse.ArgumentParser = super().get_parser(prog_name)
        parser.add_argument("volume", metavar="VOLUME", help=names.VOLUME_HELP)
        return parser

    def take_action(self, parsed_args: argparse.Namespace) -> _Shown:
        file = parsed_args.config_file
        found = database(file)
        volume_id = names.volume(found, parsed_args.volume)
        view = views.volume(found, volume_id, _status_by_rpc(file))
        coverage, hits = caches.shares(view.cache)
        return _shown(
            id=view.id,
            image=view.image_id,
            backend=view.backend,
            hosts=", ".join(view.hosts),
            mode=", ".join(view.modes) or "not attached",
            agent=view.agent,
            device=view.entry.get("device", ""),
            source=view.entry.get("source", ""),
            reason=view.entry.get("reason", ""),
            failed_paths=view.entry.get("failed", ""),
            coverage=coverage,
            hits=hits,
            read_hits=view.cache.read_hits if view.cache else "",
            read_misses=view.cache.read_misses if view.cache else "",
        )
