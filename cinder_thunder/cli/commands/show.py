"""``thunder host|image|location|volume list|show|tree``: looking, changing nothing."""

from __future__ import annotations

import argparse
from typing import Any

from cliff.lister import Lister
from cliff.show import ShowOne

from cinder_thunder.cli import names
from cinder_thunder.cli.cloud import CloudCommand, database, hosts_rpc
from cinder_thunder.db.api import Database
from cinder_thunder.db.values import KnownHost
from cinder_thunder.policy.ranking import BASE, COMPLETE, MASTER, Location
from os_brick_thunder.common import errors
from os_brick_thunder.common.transport import lio

_List = tuple[tuple[str, ...], list[tuple[Any, ...]]]
_Shown = tuple[tuple[str, ...], tuple[Any, ...]]
#: Seconds that the agent of a host may take to tell more of what is shown.
_PATIENCE = 5.0
#: How an image may be given.
IMAGE_HELP = "the image: its id in Glance, the beginning of that, or its name"


def _shown(**fields: Any) -> _Shown:
    return tuple(fields), tuple(fields.values())


class HostList(CloudCommand, Lister):
    """List storage and compute hosts, and the seconds since each was heard of.

    A host is alive, suspect (late: nobody new is sent there) or dead (who read from it is sent
    elsewhere). A drained one is alive, but nobody reads from it.
    """

    def take_action(self, parsed_args: argparse.Namespace) -> _List:
        rows = [
            (h.host, h.kind, h.rack, h.zone, h.address, round(h.silent, 1), h.state, h.drained)
            for h in database(parsed_args.config_file).hosts.all()
        ]
        columns = ("Host", "Kind", "Rack", "Zone", "Address", "Silent (s)", "State", "Drained")
        return columns, rows


class HostShow(CloudCommand, ShowOne):
    """Show a host: where it is, its replicas, and what its agent says of its local pool.

    An agent that does not answer leaves its fields empty.
    """

    def get_parser(self, prog_name: str) -> argparse.ArgumentParser:
        parser: argparse.ArgumentParser = super().get_parser(prog_name)
        parser.add_argument("host", metavar="HOST", help="as thunder host list has it")
        return parser

    def take_action(self, parsed_args: argparse.Namespace) -> _Shown:
        found = database(parsed_args.config_file)
        host = known_host(found, parsed_args.host)
        here = [loc for image in found.images.all() for loc in found.locations.of(image.id)]
        here = [location for location in here if location.host == host.host]
        says, trouble = _agent(parsed_args.config_file, host)
        pool = says.get("pool", {})
        return _shown(
            host=host.host,
            kind=host.kind,
            rack=host.rack,
            zone=host.zone,
            address=host.address,
            silent_s=round(host.silent, 1),
            state=host.state,
            drained=host.drained,
            free=host.free if host.free is not None else "",
            replicas=len(here),
            complete=sum(location.state == COMPLETE for location in here),
            agent=trouble or ("answers" if says else ""),
            pool_used=pool.get("used", ""),
            pool_total=pool.get("total", ""),
            pool_healthy=pool.get("healthy", ""),
            stacks=len(says["stacks"]) if "stacks" in says else "",
        )


def known_host(found: Database, name: str) -> KnownHost:
    """:raises errors.InvalidRequest: there is no such host"""
    hosts = {host.host: host for host in found.hosts.all()}
    if name not in hosts:
        raise errors.InvalidRequest(
            f"there is no host {name}: known are {', '.join(hosts) or 'none'}"
        )
    return hosts[name]


def _agent(config_file: str, host: KnownHost) -> tuple[dict[str, Any], str]:
    """What the agent of a compute host says of itself; or nothing, and why."""
    if host.kind != "compute":
        return {}, ""
    if not host.alive:
        return {}, f"silent for {host.silent:.0f} s: is thunder-agent running there?"
    try:
        return hosts_rpc(config_file, _PATIENCE).status(host.host), ""
    except errors.ThunderError as error:
        return {}, str(error)


class ImageList(CloudCommand, Lister):
    """List images that have a replica; sizes in bytes."""

    def take_action(self, parsed_args: argparse.Namespace) -> _List:
        found = database(parsed_args.config_file)
        rows = []
        for image in found.images.all():
            locations = found.locations.of(image.id)
            masters = sum(location.kind == MASTER for location in locations)
            bases = len(locations) - masters
            rows.append((image.id, image.size, image.allocated.length, masters, bases))
        return ("Image", "Size", "Allocated", "Masters", "Bases"), rows


class _ImageCommand(CloudCommand):
    def get_parser(self, prog_name: str) -> argparse.ArgumentParser:
        parser: argparse.ArgumentParser = super().get_parser(prog_name)
        parser.add_argument("image", metavar="IMAGE", help=IMAGE_HELP)
        return parser


class ImageShow(_ImageCommand, ShowOne):
    """Show an image: its size, where its masters are, how many hosts have it; sizes in bytes."""

    def take_action(self, parsed_args: argparse.Namespace) -> _Shown:
        found = database(parsed_args.config_file)
        image_id = names.image(found, parsed_args.image)
        (image,) = [image for image in found.images.all() if image.id == image_id]
        locations = found.locations.of(image_id)
        masters = sorted(loc.host for loc in locations if loc.kind == MASTER)
        bases = [location for location in locations if location.kind == BASE]
        verified = image.signature_verified
        return _shown(
            id=image_id,
            size=image.size,
            allocated=image.allocated.length,
            signature={None: "not asked for", True: "verified"}.get(verified, "not verified"),
            masters=", ".join(masters),
            volumes=sum(found.volumes.count(image_id, host) for host in masters),
            bases=len(bases),
            complete=sum(location.state == COMPLETE for location in bases),
            depth=max((location.depth for location in locations), default=0),
        )


class ImageTree(_ImageCommand):
    """Draw who reads an image from whom."""

    def take_action(self, parsed_args: argparse.Namespace) -> None:
        found = database(parsed_args.config_file)
        image_id = names.image(found, parsed_args.image)
        allocated = {image.id: image.allocated.length for image in found.images.all()}
        lines = draw(found.locations.of(image_id), allocated[image_id])
        self.app.stdout.write("\n".join(lines) + "\n")


def draw(locations: list[Location], allocated: int) -> list[str]:
    """A tree of replicas, one line each, with how much of ``allocated`` bytes is there."""
    known = {location.id for location in locations}
    lines: list[str] = []

    def grow(parent: str | None, indent: str) -> None:
        children = sorted(
            (
                location
                for location in locations
                if location.parent == parent
                or (parent is None and location.parent is not None and location.parent not in known)
            ),
            key=lambda location: (location.depth, location.host),
        )
        for child in children:
            last = child is children[-1]
            share = percent(child, allocated)
            branch = "" if parent is None else ("└── " if last else "├── ")
            lines.append(f"{indent}{branch}{child.host}  {child.kind} {child.state} {share}%")
            grow(child.id, indent + ("" if parent is None else "    " if last else "│   "))

    grow(None, "")
    return lines


def percent(location: Location, allocated: int) -> int:
    """How much of an image is there; whole pool blocks may be more than the image has."""
    if location.state == COMPLETE or not allocated:
        return 100
    return min(99, 100 * location.filled // allocated)


class LocationList(CloudCommand, Lister):
    """List replicas: where they are, how full (bytes), and whom they read from."""

    def get_parser(self, prog_name: str) -> argparse.ArgumentParser:
        parser: argparse.ArgumentParser = super().get_parser(prog_name)
        parser.add_argument("--image", metavar="IMAGE", help="of this image alone (id or name)")
        return parser

    def take_action(self, parsed_args: argparse.Namespace) -> _List:
        found = database(parsed_args.config_file)
        word = parsed_args.image
        wanted = [names.image(found, word)] if word else [image.id for image in found.images.all()]
        rows = []
        for image in wanted:
            locations = {location.id: location for location in found.locations.of(image)}
            for location in sorted(locations.values(), key=lambda loc: (loc.depth, loc.host)):
                parent = locations.get(location.parent or "")
                rows.append(
                    (
                        location.id,
                        image,
                        location.host,
                        location.kind,
                        location.state,
                        location.filled,
                        parent.host if parent else "",
                    )
                )
        return ("Location", "Image", "Host", "Kind", "State", "Filled", "Reads from"), rows


class LocationShow(CloudCommand, ShowOne):
    """Show a replica: how it is reached, whom it reads from, who reads from it."""

    def get_parser(self, prog_name: str) -> argparse.ArgumentParser:
        parser: argparse.ArgumentParser = super().get_parser(prog_name)
        parser.add_argument(
            "location",
            metavar="LOCATION",
            help="its id, or the beginning of that, as thunder location list has it",
        )
        return parser

    def take_action(self, parsed_args: argparse.Namespace) -> _Shown:
        found = database(parsed_args.config_file)
        everywhere = {
            location.id: (image, location)
            for image in found.images.all()
            for location in found.locations.of(image.id)
        }
        word = parsed_args.location
        match = names.only("location", word, names.beginning(word, everywhere))
        if match is None:
            raise errors.InvalidRequest(
                f"there is no location {word}: thunder location list shows all of them"
            )
        image, location = everywhere[match]
        address = {host.host: host.address for host in found.hosts.all()}.get(location.host, "")
        parent = everywhere.get(location.parent or "")
        children = sorted(loc.host for _, loc in everywhere.values() if loc.parent == location.id)
        return _shown(
            id=location.id,
            image=image.id,
            host=location.host,
            address=address,
            iqn=lio.iqn_of(location.host, image.id),
            kind=location.kind,
            state=location.state,
            filled=location.filled,
            percent=percent(location, image.allocated.length),
            depth=location.depth,
            reads_from=parent[1].host if parent else "",
            read_by=", ".join(children),
            heard_of_s=round(location.age, 1),
        )


class VolumeShow(CloudCommand, ShowOne):
    """Show how a volume is attached: its stack, its cache's coverage and hits.

    Coverage is the share of the image's blocks that the host answers for itself, hits is the share
    of reads there that it answered. Both are the agent's, and empty while it does not answer.
    """

    def get_parser(self, prog_name: str) -> argparse.ArgumentParser:
        parser: argparse.ArgumentParser = super().get_parser(prog_name)
        parser.add_argument(
            "volume",
            metavar="VOLUME",
            help="the volume: its id in Cinder, the beginning of that, or its name",
        )
        return parser

    def take_action(self, parsed_args: argparse.Namespace) -> _Shown:
        found = database(parsed_args.config_file)
        volume_id = names.volume(found, parsed_args.volume)
        volume, stacks = found.volumes.get(volume_id), found.volumes.stacks(volume_id)
        hosts = {host.host: host for host in found.hosts.all()}
        entry: dict[str, Any] = {}
        troubles = []
        for stack in stacks:
            if stack.host not in hosts:
                continue
            says, trouble = _agent(parsed_args.config_file, hosts[stack.host])
            troubles += [trouble] if trouble else []
            # The cached one, if there are two in a live migration.
            for candidate in says.get("stacks", []):
                if candidate["volume_id"] == volume_id and entry.get("mode") != "cached":
                    entry = candidate
        return _shown(
            id=volume_id,
            image=volume.image_id if volume else "",
            backend=volume.host if volume else "",
            hosts=", ".join(sorted(stack.host for stack in stacks)),
            mode=", ".join(sorted({stack.mode for stack in stacks})) or "not attached",
            agent="; ".join(troubles) or ("answers" if stacks else ""),
            **stack_fields(entry),
        )


def stack_fields(entry: dict[str, Any]) -> dict[str, Any]:
    """What an agent's entry of a stack says, for people; empty without one."""
    cache = entry.get("cache") or {}
    reads = cache.get("read_hits", 0) + cache.get("read_misses", 0)
    return {
        "device": entry.get("device", ""),
        "source": entry.get("source", ""),
        "reason": entry.get("reason", ""),
        "failed_paths": entry.get("failed", ""),
        "coverage": f"{cache['mapped'] / cache['total']:.1%}" if cache else "",
        "hits": f"{cache['read_hits'] / reads:.1%}" if reads else "",
        "read_hits": cache.get("read_hits", ""),
        "read_misses": cache.get("read_misses", ""),
    }
