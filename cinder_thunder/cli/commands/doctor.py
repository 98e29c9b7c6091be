"""``thunder doctor``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from cliff.lister import Lister

from cinder_thunder.cli.base import CINDER_CONFIG, FAILED, INSTALL_EXTRA
from cinder_thunder.cli.commands.local import HostCommand
from cinder_thunder.cli.doctor.checks import FAIL, Check, skipped
from cinder_thunder.cli.doctor.compute import compute_report
from os_brick_thunder.common import conf as options
from os_brick_thunder.common import errors


class Doctor(HostCommand, Lister):
    """Check everything that Thunder needs on this host, and show a remedy for each fault.

    A host with thunder.conf is checked as a compute host. With cinder.conf, the database and RPC
    are checked, and with Thunder backends in it, the storage host. Checks that do not apply to this
    host are skipped. Nothing is changed. Exit code 1 if there is a fault.
    """

    def get_parser(self, prog_name: str) -> argparse.ArgumentParser:
        parser: argparse.ArgumentParser = super().get_parser(prog_name)
        parser.add_argument(
            "--config-file",
            default=CINDER_CONFIG,
            metavar="FILE",
            help=f"Cinder's configuration ({CINDER_CONFIG})",
        )
        parser.set_defaults(fit_width=True)  # remedies are sentences: wrap them on a terminal
        return parser

    def take_action(self, parsed_args: argparse.Namespace) -> tuple[Any, Any]:
        agent, cinder = parsed_args.agent_config_file, parsed_args.config_file
        for file, default in ((agent, options.DEFAULT_FILE), (cinder, CINDER_CONFIG)):
            if file != default and not Path(file).exists():
                raise errors.InvalidRequest(f"there is no {file}: correct the option that names it")
        if not Path(agent).exists() and not Path(cinder).exists():
            raise errors.InvalidRequest(
                f"there is nothing to check here, neither {agent} nor {cinder}: a compute host "
                "needs the first, a storage host the second"
            )
        report = [*_compute(agent), *_cinder(cinder)]
        if any(check.result == FAIL for check in report):
            self.app.exit_code = FAILED
        return ("Check", "Result", "Found", "Remedy"), [
            (check.name, check.result, check.found, check.remedy) for check in report
        ]


def _compute(file: str) -> list[Check]:
    if not Path(file).exists():
        return skipped(["compute host"], f"not a compute host: there is no {file}")
    return compute_report(file)


def _cinder(file: str) -> list[Check]:
    if not Path(file).exists():
        return skipped(["cinder"], f"not a host with Cinder: there is no {file}")
    try:
        # A compute host does without a database driver.
        from cinder_thunder.cli.doctor.storage import cinder_report
    except ModuleNotFoundError as error:
        found, remedy = f"{error.name} is not installed", INSTALL_EXTRA
        return [Check("cinder", FAIL, found, remedy)]
    return cinder_report(file)
