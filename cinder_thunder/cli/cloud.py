"""What commands need that work on the whole cloud: Cinder's configuration, our tables, RPC."""

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
#: MySQL's codes for a table that is not there; PostgreSQL's and SQLite's are words.
_NO_TABLE = ("1146", "no such table", "UndefinedTable")


def configuration(path: str) -> cfg.ConfigOpts:
    """Cinder's configuration file, as far as it is about databases and RPC.

    :raises oslo_config.cfg.Error: it is not there or cannot be read
    """
    config = cfg.ConfigOpts()
    register(config)
    config(["--config-file", path], project="cinder")
    return config


def register(config: cfg.ConfigOpts) -> None:
    """Register the options that say where our tables are."""
    conf.register_database(config)
    db_options.set_defaults(config)


def engine(path: str) -> sqlalchemy.Engine:
    """The database that a configuration file of Cinder's names."""
    return sqlalchemy.create_engine(conf.connection(configuration(path)))


def database(path: str) -> Database:
    """The tracker's tables in that database."""
    config = configuration(path)
    timeout = conf.heartbeat_timeout(config)
    # An operator waits: a database that does not answer is an error at once.
    return Database(conf.connection(config), timeout, max_retries=0)


def hosts_rpc(path: str, timeout: float = RPC_TIMEOUT) -> RpcTracker:
    """RPC to trackers and to whoever has replicas."""
    # The global one: oslo.messaging registers some of its options nowhere else.
    cfg.CONF(["--config-file", path], project="cinder")
    return RpcTracker(oslo_messaging.get_rpc_transport(cfg.CONF), timeout)


class CloudCommand(ThunderCommand):
    """A command that works on the tracker's tables."""

    def get_parser(self, prog_name: str) -> argparse.ArgumentParser:
        parser: argparse.ArgumentParser = super().get_parser(prog_name)
        parser.add_argument(
            "--config-file",
            default=CINDER_CONFIG,
            metavar="FILE",
            help=f"Cinder's configuration, which says where the database is ({CINDER_CONFIG})",
        )
        return parser

    def explained(self, error: Exception) -> str:
        if isinstance(error, db_exc.DBError):
            error = error.inner_exception or error
        if isinstance(error, sqlalchemy.exc.SQLAlchemyError):
            said = " ".join(str(getattr(error, "orig", None) or error).split())
            if any(sign in said for sign in _NO_TABLE):
                return f"Thunder's tables are not there: run thunder db upgrade ({said})"
            return f"the database: {said}; connection in [database] of cinder.conf says where it is"
        return super().explained(error)
