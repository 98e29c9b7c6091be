"""``thunder stack list``: the stacks of this host, from its state file and its kernel only."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from cliff.lister import Lister
from oslo_config import cfg

from cinder_thunder.cli import caches
from cinder_thunder.cli.base import ThunderCommand
from os_brick_thunder.common import conf as options
from os_brick_thunder.common import errors, stats
from os_brick_thunder.common.mechanism.devicemapper import KernelDeviceMapper
from os_brick_thunder.common.policy.devnames import VolumeNames, path
from os_brick_thunder.common.state import StateFile


def agent_config(file: str) -> Any:
    """The agent's options.

    :raises oslo_config.cfg.Error: the file does not exist or is not valid
    """
    config = cfg.ConfigOpts()
    options.register(config, agent=True)
    config(["--config-file", file], project="thunder")
    return config


class HostCommand(ThunderCommand):
    """A command about the host that it runs on. It requires root, and no server."""

    def get_parser(self, prog_name: str) -> argparse.ArgumentParser:
        parser: argparse.ArgumentParser = super().get_parser(prog_name)
        parser.add_argument(
            "--agent-config-file",
            default=options.DEFAULT_FILE,
            metavar="FILE",
            help=f"thunder-agent's configuration ({options.DEFAULT_FILE})",
        )
        return parser


class StackList(HostCommand, Lister):
    """List the volumes that are attached on this host, with the coverage and hits of their caches.

    Coverage is the share of the image's blocks that the host serves itself, hits is the share of
    reads that it served itself. The command reads the agent's state file and asks the kernel:
    neither the agent nor any server has to be running.
    """

    def take_action(self, parsed_args: argparse.Namespace) -> tuple[Any, Any]:
        mine = agent_config(parsed_args.agent_config_file).thunder
        if os.geteuid() != 0:
            raise errors.InvalidRequest(
                f"no permission to read {mine.state_file} and device-mapper: run it as root"
            )
        dm = KernelDeviceMapper()
        stacks = StateFile(Path(mine.state_file)).stacks.values()
        rows = [_row(stats.of_stack(dm, stack)) for stack in stacks]
        columns = ("Volume", "Mode", "State", "Image", "Device", "Coverage", "Hits", "Source")
        return columns, rows


def _row(entry: dict[str, Any]) -> tuple[Any, ...]:
    coverage, hits = caches.shares(caches.counters(entry))
    state = entry["phase"]
    if not entry["present"]:
        state += ", its device is not there"
    elif entry["failed"]:
        state += f", {entry['failed']} path(s) failed"
    return (
        entry["volume_id"],
        entry["mode"],
        state,
        entry["image_id"] or "",
        path(VolumeNames(entry["volume_id"]).vol),
        coverage,
        hits,
        entry["source"],
    )
