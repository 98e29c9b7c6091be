"""Whether the thin pool's tools tell the truth on this host.

Versions 1.0.0 to 1.0.5 of thin-provisioning-tools report a block that was modified in the middle of
a mapped run as "same". A map made of that would have a guest read the image's bytes in place of its
own. So thin_delta(8) and thin_dump(8) are tried on a file whose contents are known, before their
answers are used.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

from oslo_log import log as logging

from os_brick_thunder.common import errors
from os_brick_thunder.common.mechanism.thinmeta import different_ranges, mapped_ranges
from os_brick_thunder.common.policy.extents import Extents
from os_brick_thunder.common.run import Runner, run

LOG = logging.getLogger(__name__)

REMEDY = (
    "install another version of thin-provisioning-tools, 1.0.6 or newer (or 0.9); it is used "
    "within a minute, without a restart"
)
#: Seconds after which tools are tried again: right ones, and others.
AGAIN, AGAIN_WHEN_WRONG = 3600.0, 60.0

_BLOCK = 64 << 10
_MIB = 1 << 20
#: A master (1) and a clone of it (2) that differ in blocks 3 (modified amid a run), 15 (at the end
#: of one), 16 to 19 (discarded), 32 and 33 (written into a hole), and 40 to 43 (all modified).
_METADATA = """\
<superblock uuid="" time="1" transaction="1" data_block_size="128" nr_data_blocks="1024">
  <device dev_id="1" mapped_blocks="28" transaction="0" creation_time="0" snap_time="1">
    <range_mapping origin_begin="0" data_begin="100" length="16" time="0"/>
    <range_mapping origin_begin="16" data_begin="200" length="8" time="0"/>
    <range_mapping origin_begin="40" data_begin="300" length="4" time="0"/>
  </device>
  <device dev_id="2" mapped_blocks="26" transaction="0" creation_time="1" snap_time="1">
    <range_mapping origin_begin="0" data_begin="100" length="3" time="0"/>
    <single_mapping origin_block="3" data_block="500" time="1"/>
    <range_mapping origin_begin="4" data_begin="104" length="11" time="0"/>
    <single_mapping origin_block="15" data_block="501" time="1"/>
    <range_mapping origin_begin="20" data_begin="204" length="4" time="0"/>
    <range_mapping origin_begin="32" data_begin="600" length="2" time="1"/>
    <range_mapping origin_begin="40" data_begin="400" length="4" time="1"/>
  </device>
</superblock>
"""


def _blocks(*ranges: tuple[int, int]) -> Extents:
    return Extents.of((first * _BLOCK, end * _BLOCK) for first, end in ranges)


_DIFFERENT = _blocks((3, 4), (15, 20), (32, 34), (40, 44))
_MAPPED = _blocks((0, 16), (20, 24), (32, 34), (40, 44))


def flaw(runner: Runner = run) -> str:
    """Try the tools on a known file. Takes some 50 ms; needs no rights.

    :returns: why their answers cannot be used; empty if they are right
    """
    try:
        with tempfile.TemporaryDirectory(prefix="thunder-", dir=_direct_folder()) as folder:
            return _flaw(runner, Path(folder))
    except (errors.ProcessError, OSError, ValueError, SyntaxError, KeyError) as error:
        return f"thin_delta could not be tried on a known file: {' '.join(str(error).split())}"


def _direct_folder() -> str:
    """A folder whose files can be opened with O_DIRECT, as the tools do.

    A tmpfs, which /tmp often is, refuses that before Linux 6.6.
    """
    folders = (tempfile.gettempdir(), "/var/tmp")  # noqa: S108 - a folder of our own is made in it
    for folder in folders:
        with contextlib.suppress(OSError), tempfile.TemporaryFile(dir=folder) as file:
            fcntl.fcntl(file, fcntl.F_SETFL, os.O_DIRECT)
            return folder
    return folders[0]


def _flaw(runner: Runner, folder: Path) -> str:
    xml, metadata = folder / "xml", folder / "metadata"
    xml.write_text(_METADATA)
    with metadata.open("wb") as file:
        file.truncate(4 * _MIB)
    runner(_program("thin_restore"), "--input", str(xml), "--output", str(metadata))
    delta = runner(_program("thin_delta"), "--thin1", "2", "--thin2", "1", str(metadata))
    if different_ranges(delta) != _DIFFERENT:
        return "thin_delta of this host gives a wrong answer for a known file"
    if mapped_ranges(runner(_program("thin_dump"), "--dev-id", "2", str(metadata))) != _MAPPED:
        return "thin_dump of this host gives a wrong answer for a known file"
    return ""


def _program(name: str) -> str:
    """Its path: an operator's shell may lack the sbin folders that daemons have in their PATH."""
    return shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin") or name


def installed() -> object:
    """A value that changes when another version of the tools is installed."""
    try:
        found = os.stat(_program("thin_delta"))
    except OSError:
        return None
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


class ToolTrial:
    """The result of :func:`flaw`, kept as long as the tools are the same."""

    def __init__(
        self,
        trial: Callable[[], str],
        identity: Callable[[], object] = installed,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """:param trial: as :func:`flaw`
        :param identity: as :func:`installed`
        """
        self._trial = trial
        self._identity = identity
        self._clock = clock
        self._lock = threading.Lock()  # many plans at once need one trial
        self._flaw: str | None = None
        self._tried: object = None
        self._until = 0.0

    def __call__(self) -> str:
        """Why the tools' answers cannot be used; empty if they can."""
        with self._lock:
            identity = self._identity()
            if self._flaw is None or identity != self._tried or self._clock() >= self._until:
                found = self._try()
                if found and found != self._flaw:
                    LOG.error("Volumes are attached without caches: %s. Remedy: %s", found, REMEDY)
                elif self._flaw and not found:
                    LOG.info("thin_delta gives right answers now: volumes get caches again")
                self._flaw, self._tried = found, identity
                self._until = self._clock() + (AGAIN_WHEN_WRONG if found else AGAIN)
            return self._flaw

    def _try(self) -> str:
        try:
            return self._trial()
        except Exception as error:  # of the privileged daemon
            LOG.exception("Could not try thin_delta")
            return f"thin_delta could not be tried on a known file: {error}"
