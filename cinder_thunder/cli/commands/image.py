"""What commands about one image share."""

from __future__ import annotations

import argparse

from cinder_thunder.cli import names
from cinder_thunder.cli.cloud import CloudCommand


class ImageCommand(CloudCommand):
    """A command about one image."""

    def get_parser(self, prog_name: str) -> argparse.ArgumentParser:
        parser: argparse.ArgumentParser = super().get_parser(prog_name)
        parser.add_argument("image", metavar="IMAGE", help=names.IMAGE_HELP)
        return parser
