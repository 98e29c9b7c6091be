"""What the subcommands of ``thunder`` share. Needs neither Cinder nor a database to be imported.

Exit codes: 0, all was done; 1, it failed or was done in part; 2, what was asked for makes no sense
(nothing was changed).
"""

from __future__ import annotations

import argparse
import sys

from cliff.command import Command
from oslo_config import cfg

from os_brick_thunder.common import errors

FAILED, BAD_INPUT = 1, 2
#: thunder-status could check nothing; in oslo.upgradecheck it is this number without a name.
NOTHING_CHECKED = 255
CINDER_CONFIG = "/etc/cinder/cinder.conf"
#: The distribution that these packages are installed from, with the extra of Cinder's hosts.
DISTRIBUTION, EXTRA = "openstack-thunder", "cinder"
#: Remedy where a module is missing that compute hosts do without.
INSTALL_EXTRA = f"install Thunder with its extra [{EXTRA}] (README, Packages)"
WHERE_CINDER_IS = f"run it on a host with Cinder, or {INSTALL_EXTRA}"


class ThunderCommand(Command):
    """A command whose errors are one line each; ``--debug`` shows where they come from."""

    def run(self, parsed_args: argparse.Namespace) -> int:
        try:
            return int(super().run(parsed_args))
        except (errors.InvalidRequest, cfg.Error) as error:
            raise _Refused(_one_line(error)) from error
        except Exception as error:
            raise _Failed(self.explained(error)) from error

    def explained(self, error: Exception) -> str:
        """What to tell of an error that is not the caller's."""
        return _one_line(error)


class _Failed(Exception):
    """One line; the command ends with code 1."""

    code = FAILED


class _Refused(_Failed):
    """One line; the command ends with code 2."""

    code = BAD_INPUT


def exit_code(error: BaseException | None) -> int:
    """The code of a command that ended with one of our errors; 0 for any other."""
    return error.code if isinstance(error, _Failed) else 0


def nothing_checked(reason: str) -> int:
    """Say in one line why thunder-status could check nothing; returns its exit code."""
    print(f"thunder-status: {' '.join(reason.split())}", file=sys.stderr)
    return NOTHING_CHECKED


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    known = isinstance(error, errors.ThunderError | cfg.Error | ValueError | OSError)
    return text if known and text else f"{type(error).__name__}: {text} (--debug shows more)"
