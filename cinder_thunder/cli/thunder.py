"""``thunder``: the operator's command.

Commands are imported when they are run: on a compute host, ``thunder doctor`` and ``thunder stack
list`` need neither Cinder nor a database.
"""

from __future__ import annotations

import logging
import sys
import warnings
from importlib import metadata
from typing import Any

from cliff.app import App
from cliff.commandmanager import CommandManager

from cinder_thunder.cli.base import DISTRIBUTION, FAILED, WHERE_CINDER_IS, exit_code

#: Each command as module:class below cinder_thunder.cli.commands. They are named here, not as entry
#: points, so that they work in a source tree, too.
COMMANDS = {
    "db upgrade": "db:Upgrade",
    "db version": "db:Version",
    "doctor": "doctor:Doctor",
    "host drain": "change:HostDrain",
    "host list": "show:HostList",
    "host show": "show:HostShow",
    "host undrain": "change:HostUndrain",
    "image evict": "change:ImageEvict",
    "image list": "show:ImageList",
    "image precache": "precache:ImagePrecache",
    "image profile record": "profile:ImageProfileRecord",
    "image profile reset": "profile:ImageProfileReset",
    "image profile show": "profile:ImageProfileShow",
    "image show": "show:ImageShow",
    "image tree": "show:ImageTree",
    "location list": "show:LocationList",
    "location show": "show:LocationShow",
    "stack list": "local:StackList",
    "template create": "template:TemplateCreate",
    "template delete": "template:TemplateDelete",
    "volume show": "show:VolumeShow",
}
#: They log every connection attempt; a failure is raised as an error, too.
_NOISY = ("alembic", "oslo", "oslo_messaging", "oslo_db", "oslo_service", "amqp", "kombu")
_DESCRIPTION = """\
Thunder: boot hundreds of servers from one image at once. The commands are about the whole cloud and
require Cinder's configuration, on any host that has it, except "doctor" and "stack list", which are
about the host that they run on. Exit codes: 0, everything was done; 1, it failed or was done in
part; 2, bad input, nothing was changed.
"""


class Thunder(App):
    NAME = "thunder"  # also when started as a module

    def __init__(self) -> None:
        commands = CommandManager("thunder.commands")
        for name, where in COMMANDS.items():
            commands.commands[name] = metadata.EntryPoint(
                name, f"cinder_thunder.cli.commands.{where}", "thunder.commands"
            )
        super().__init__(description=_DESCRIPTION, version=_version(), command_manager=commands)

    #: Set by a command that did a part of what was asked.
    exit_code = 0

    def configure_logging(self) -> None:
        super().configure_logging()
        if not self.options.debug:
            for noisy in _NOISY:
                logging.getLogger(noisy).setLevel(logging.CRITICAL)

    def run_subcommand(self, argv: list[str]) -> int:
        try:
            return int(super().run_subcommand(argv))
        except ModuleNotFoundError as error:
            if self.options.debug:
                raise
            self.LOG.error(
                "thunder %s needs %s, which is not installed: %s",
                " ".join(argv[:2]),
                error.name,
                WHERE_CINDER_IS,
            )
            return FAILED

    def clean_up(self, cmd: Any, result: int, err: BaseException | None) -> None:
        self.exit_code = exit_code(err) or self.exit_code


def _version() -> str:
    try:
        return metadata.version(DISTRIBUTION)
    except metadata.PackageNotFoundError:
        return "unknown (running from a source tree)"


def main(argv: Any = None) -> int:
    # oslo.messaging imports it; nothing here uses it.
    warnings.filterwarnings("ignore", message=r"\s*Eventlet is deprecated")
    app = Thunder()
    code = int(app.run(sys.argv[1:] if argv is None else argv))
    return app.exit_code or code


if __name__ == "__main__":
    sys.exit(main())
