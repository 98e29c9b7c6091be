"""``thunder stack list``: what this host has, from its state file and its kernel alone."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from cliff.lister import Lister
from oslo_config import cfg

from cinder_thunder.cli.base import ThunderCommand
from os_brick_thunder.common import conf as options
from os_brick_thunder.common import errors
from os_brick_thunder.common import stats as figures
from os_brick_thunder.common.mechanism.dmsetup import DmSetup
from os_brick_thunder.common.policy.devnames import VolumeNames, path
from os_brick_thunder.common.state import StateFile


def agent_config(file: str) -> Any:
    """The agent's options.

    :raises oslo_config.cfg.Error: the file is not there or makes no sense
    """
    config = cfg.ConfigOpts()
    options.register(config, agent=True)
    config(["--config-file", file], project="thunder")
    return config


class HostCommand(ThunderCommand):
    """A command about the host that it runs on; it wants no server, and is for root."""

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
    """List the volumes that are attached on this host, and how well their caches do.

    Coverage is the share of the image's blocks that this host answers for itself, hits is the
    share of reads there that it answered. It reads the agent's state file and asks the kernel:
    neither the agent nor any server needs to run.
    """

    def take_action(self, parsed_args: argparse.Namespace) -> tuple[Any, Any]:
        mine = agent_config(parsed_args.agent_config_file).thunder
        if os.geteuid() != 0:
            raise errors.InvalidRequest(
                f"no right to read {mine.state_file} and device-mapper: run it as root"
            )
        dm = DmSetup()
        stacks = StateFile(Path(mine.state_file)).stacks.values()
        rows = [_row(figures.of_stack(dm, stack)) for stack in stacks]
        columns = ("Volume", "Mode", "State", "Image", "Device", "Coverage", "Hits", "Source")
        return columns, rows


def _row(entry: dict[str, Any]) -> tuple[Any, ...]:
    cache = entry["cache"] or {}
    reads = cache.get("read_hits", 0) + cache.get("read_misses", 0)
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
        f"{cache['mapped'] / cache['total']:.1%}" if cache else "",
        f"{cache['read_hits'] / reads:.1%}" if reads else "",
        entry["source"],
    )
