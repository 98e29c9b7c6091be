"""What commands about the whole cloud share: Cinder's configuration, the tables, RPC."""

from __future__ import annotations

import argparse

import oslo_messaging
import sqlalchemy
from oslo_config import cfg
from oslo_db import exception as db_exc
from oslo_db import options as db_options

from cinder_thunder import conf
from cinder_thunder.cli.base import CINDER_CONFIG, ThunderCommand
from cinder_thunder.db.api import Database
from os_brick_thunder.common.rpc import RpcTracker

#: Seconds that a host may take to answer.
RPC_TIMEOUT = 30.0
#: How MySQL, SQLite and PostgreSQL report a table that does not exist.
_NO_TABLE = ("1146", "no such table", "UndefinedTable")


def configuration(path: str) -> cfg.ConfigOpts:
    """Cinder's configuration file, with the options of databases.

    :raises oslo_config.cfg.Error: it does not exist or cannot be read
    """
    config = cfg.ConfigOpts()
    register(config)
    config(["--config-file", path], project="cinder")
    return config


def register(config: cfg.ConfigOpts) -> None:
    """Register the options that name the database with our tables."""
    conf.register_database(config)
    db_options.set_defaults(config)


def engine(path: str) -> sqlalchemy.Engine:
    """The database in Cinder's configuration file."""
    return sqlalchemy.create_engine(conf.connection(configuration(path)))


def database(path: str) -> Database:
    """The tables in that database."""
    config = configuration(path)
    timeout = conf.heartbeat_timeout(config)
    # An operator is waiting: fail at once if the database does not answer.
    return Database(conf.connection(config), timeout, max_retries=0)


def hosts_rpc(path: str, timeout: float = RPC_TIMEOUT) -> RpcTracker:
    """RPC to trackers and to hosts with replicas."""
    # The global options: oslo.messaging registers some of its own only there.
    cfg.CONF(["--config-file", path], project="cinder")
    return RpcTracker(oslo_messaging.get_rpc_transport(cfg.CONF), timeout)


class CloudCommand(ThunderCommand):
    """A command that uses the tables."""

    def get_parser(self, prog_name: str) -> argparse.ArgumentParser:
        parser: argparse.ArgumentParser = super().get_parser(prog_name)
        parser.add_argument(
            "--config-file",
            default=CINDER_CONFIG,
            metavar="FILE",
            help=f"Cinder's configuration, which names the database ({CINDER_CONFIG})",
        )
        return parser

    def explained(self, error: Exception) -> str:
        if isinstance(error, db_exc.DBError):
            error = error.inner_exception or error
        if isinstance(error, sqlalchemy.exc.SQLAlchemyError):
            message = " ".join(str(getattr(error, "orig", None) or error).split())
            if any(sign in message for sign in _NO_TABLE):
                return f"Thunder's tables do not exist: run thunder db upgrade ({message})"
            return f"the database: {message}; check connection in [database] of cinder.conf"
        return super().explained(error)
