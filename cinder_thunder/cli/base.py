"""What the subcommands of ``thunder`` share. It can be imported without Cinder and a database.

Exit codes: 0, everything was done; 1, it failed or was done in part; 2, the request was not valid
(nothing was changed).
"""

from __future__ import annotations

import argparse
import math
import sys

from cliff.command import Command
from oslo_config import cfg

from os_brick_thunder.common import errors

FAILED, BAD_INPUT = 1, 2
#: thunder-status could not check anything; oslo.upgradecheck has no name for this number.
NOTHING_CHECKED = 255
#: The longest timeout of a command, in seconds: RabbitMQ refuses one of two months.
LONGEST_WAIT = 7 * 86_400
CINDER_CONFIG = "/etc/cinder/cinder.conf"
#: The distribution with these packages, and its extra for hosts with Cinder.
DISTRIBUTION, EXTRA = "openstack-thunder", "cinder"
#: Remedies for a missing module that compute hosts do not need.
INSTALL_EXTRA = f"install Thunder with its extra [{EXTRA}] (README, Packages)"
WHERE_CINDER_IS = f"run it on a host with Cinder, or {INSTALL_EXTRA}"


class ThunderCommand(Command):
    """A command that reports an error in one line; ``--debug`` shows the traceback."""

    def run(self, parsed_args: argparse.Namespace) -> int:
        try:
            return int(super().run(parsed_args))
        except (errors.InvalidRequest, cfg.Error) as error:
            raise _Refused(_one_line(error)) from error
        except Exception as error:
            raise _Failed(self.explained(error)) from error

    def explained(self, error: Exception) -> str:
        """The message for an error that the caller did not cause."""
        return _one_line(error)


class _Failed(Exception):
    """One line; the command ends with code 1."""

    code = FAILED


class _Refused(_Failed):
    """One line; the command ends with code 2."""

    code = BAD_INPUT


def seconds(text: str) -> float:
    """Parse the value of a timeout option, in seconds.

    :raises argparse.ArgumentTypeError: it is no number, or out of range
    """
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value <= LONGEST_WAIT:
        raise argparse.ArgumentTypeError(
            f"{text}: give seconds, more than 0 and at most {LONGEST_WAIT}"
        )
    return value


def exit_code(error: BaseException | None) -> int:
    """The exit code for an error of a command; 0 for any other exception, and for None."""
    return error.code if isinstance(error, _Failed) else 0


def nothing_checked(reason: str) -> int:
    """Report in one line why thunder-status could not check anything; returns its exit code."""
    print(f"thunder-status: {' '.join(reason.split())}", file=sys.stderr)
    return NOTHING_CHECKED


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    known = isinstance(error, errors.ThunderError | cfg.Error | ValueError | OSError)
    return text if known and text else f"{type(error).__name__}: {text} (--debug shows more)"
