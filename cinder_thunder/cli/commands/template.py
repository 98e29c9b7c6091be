"""``thunder template create|delete``: volumes and snapshots that many servers are booted from."""

from __future__ import annotations

import argparse
from concurrent.futures import as_completed

from cinder_thunder.cli import names
from cinder_thunder.cli.asking import ask_all
from cinder_thunder.cli.base import seconds
from cinder_thunder.cli.cloud import CloudCommand, database, hosts_rpc
from cinder_thunder.db.values import KnownHost
from cinder_thunder.policy.ranking import ALIVE
from os_brick_thunder.common import errors
from os_brick_thunder.common.rpc import RpcTracker


class _TemplateCommand(CloudCommand):
    def get_parser(self, prog_name: str) -> argparse.ArgumentParser:
        parser: argparse.ArgumentParser = super().get_parser(prog_name)
        parser.add_argument("template", metavar="SNAPSHOT|VOLUME", help=names.TEMPLATE_HELP)
        return parser


class TemplateCreate(_TemplateCommand):
    """Have volumes made from a snapshot or volume read its data from caches, as from an image.

    What it has now gets a master, which shares its blocks in the storage pool, and is read once,
    which may take minutes. Volumes that are made from it later (openstack volume create --snapshot
    or --source) are cached where they are attached; it may be changed meanwhile, but what was
    changed is not cached. `thunder image list|show|tree|precache|profile` know it by its id. It
    needs no care: its replicas are removed once the snapshot or volume was deleted, and the volumes
    that were made from it.
    """

    def get_parser(self, prog_name: str) -> argparse.ArgumentParser:
        parser = super().get_parser(prog_name)
        parser.add_argument(
            "--timeout",
            type=seconds,
            default=3600.0,
            metavar="SECONDS",
            help="how long to wait at most (%(default)g); the storage host goes on",
        )
        return parser

    def take_action(self, parsed_args: argparse.Namespace) -> None:
        found = database(parsed_args.config_file)
        rpc = hosts_rpc(parsed_args.config_file)
        host = create(rpc, found.hosts.all(), parsed_args.template, parsed_args.timeout)
        self.app.stdout.write(
            f"{parsed_args.template} is a template: volumes that are made from it on {host} are "
            "cached\n"
        )


def create(rpc: RpcTracker, known: list[KnownHost], source_id: str, timeout: float) -> str:
    """Ask all storage hosts: the one that has it makes the template.

    :returns: its name
    :raises errors.InvalidRequest: none has it
    :raises errors.ThunderError: one that may have it could not; says why
    """
    storage = {host.host: host.state for host in known if host.kind == "storage"}
    silent = [name for name, state in storage.items() if state != ALIVE]
    asked = sorted(storage.keys() - silent)
    answers = ask_all(asked, lambda name: rpc.make_template(name, source_id, timeout))
    hosts = {answer: name for name, answer in answers.items()}
    failed: list[Exception] = []
    for answer in as_completed(hosts):  # the host that has it answers last, unless one is hung
        try:
            answer.result()
        except errors.NoReplica:
            continue
        except errors.ThunderError as error:
            failed.append(error)
        else:
            return hosts[answer]
    if failed:
        raise failed[0]
    but = f"; {', '.join(silent)} could not be asked: dead or suspect" if silent else ""
    raise errors.InvalidRequest(
        f"no storage host has a snapshot or volume {source_id}: give its id, as shown by openstack "
        f"volume snapshot list or openstack volume list{but}"
    )


class TemplateDelete(_TemplateCommand):
    """Have volumes made from a snapshot or volume no longer use its master.

    Volumes that were made before keep their caches. The replicas are removed when these are gone.
    """

    def take_action(self, parsed_args: argparse.Namespace) -> None:
        found = database(parsed_args.config_file)
        if parsed_args.template not in found.images.templates():
            raise errors.InvalidRequest(
                f"{parsed_args.template} is not a template: thunder image list shows all of them"
            )
        found.images.set_deleted(parsed_args.template, True)
        self.app.stdout.write(f"{parsed_args.template} is no longer a template\n")
