"""``thunder db upgrade|version``."""

from __future__ import annotations

import argparse

from cinder_thunder.cli.cloud import CloudCommand, engine
from cinder_thunder.db import migration


class Upgrade(CloudCommand):
    """Create Thunder's tables, or bring them up to date. Cinder's own are not touched."""

    def take_action(self, parsed_args: argparse.Namespace) -> None:
        database = engine(parsed_args.config_file)
        before = migration.version(database)
        migration.upgrade(database)
        after = migration.version(database)
        self.app.stdout.write(
            f"the tables are at revision {after}\n"
            if before == after
            else f"the tables were at revision {before} and are at {after} now\n"
        )


class Version(CloudCommand):
    """Print the revision that Thunder's tables are at."""

    def take_action(self, parsed_args: argparse.Namespace) -> None:
        revision = migration.version(engine(parsed_args.config_file))
        self.app.stdout.write(f"{revision or 'none: run thunder db upgrade'}\n")
