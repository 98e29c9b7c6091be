"""``thunder-failover``: the watcher's process; one on each compute host, started by the agent.

It takes no options and reads no files, and it outlives the agent.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import signal
import sys
from types import FrameType

from os_brick_thunder.common import errors
from os_brick_thunder.common.mechanism import dmioctl, failoverlocks
from os_brick_thunder.common.policy.devnames import FAILOVER_PREFIX
from os_brick_thunder.common.policy.failover import VERSION
from os_brick_thunder.common.run import when_killed
from os_brick_thunder.failover.kernel import RealKernel
from os_brick_thunder.failover.watcher import Watcher

LOG = logging.getLogger(__name__)

#: Seconds between two checks without an event: one may be missed.
_INTERVAL = 1.0
_STOPS = (signal.SIGTERM, signal.SIGINT)
#: The kernel is to kill others first, if memory runs out.
_OOM_SCORE = "-900"
#: As failoverlocks.running() asks: the two must not take each other for a watcher.
_UNLESS_ANOTHER_RUNS = 'flock --shared --nonblock "$1" true || exit 0'
#: If this process is killed and no other one takes its place for some seconds, I/O that finds no
#: path fails, rather than wait for a watcher that may never come. One that came and was killed as
#: well has left a newer time at the file, and sees to this itself. One that comes meanwhile waits.
_NO_HEIR = (
    f'sleep 10; exec 9>"$2"; flock 9; {_UNLESS_ANOTHER_RUNS}; '
    'test $(($(date +%s) - $(stat -c %Y "$1"))) -ge 9 || exit 0; '
    f"for each in /dev/mapper/{FAILOVER_PREFIX}*; do "
    'dmsetup message "${each##*/}" 0 fail_if_no_path; done'
)


def main(argv: list[str] | None = None) -> int:
    usage = "Switches volumes from their caches to their LUNs. thunder-agent starts it."
    argparse.ArgumentParser("thunder-failover", description=usage).parse_args(argv)
    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s %(process)d thunder-failover: %(message)s"
    )
    logging.raiseExceptions = False  # standard error is the agent's, and may end with it
    if os.geteuid() != 0:
        print("thunder-failover works on devices: run it as root", file=sys.stderr)
        return 1
    # Both before the claim, after which the agent relies on this process, however it ends.
    files = (failoverlocks.watcher_file(), failoverlocks.last_will_file())
    cancel_last_will = when_killed("/bin/sh", "-c", _NO_HEIR, "sh", *map(str, files))
    signal.pthread_sigmask(signal.SIG_BLOCK, _STOPS)
    for number in _STOPS:
        signal.signal(number, _exit)
    try:
        claim = failoverlocks.claim(failoverlocks.Watcher(os.getpid(), VERSION))
        if claim is None:
            print(f"thunder-failover runs already: {failoverlocks.running()}", file=sys.stderr)
            return 1
        with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
            file.write(_OOM_SCORE)
        _run(claim)
    finally:
        cancel_last_will()
    return 0


def _run(claim: int) -> None:
    watcher = Watcher(RealKernel(), failoverlocks.volume)
    try:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _STOPS)
        events = dmioctl.Events()
        events.arm()
        watcher.start()
        LOG.info("watches")
        _watch(watcher, events, claim)
    finally:
        signal.pthread_sigmask(signal.SIG_BLOCK, _STOPS)
        watcher.stop()
        LOG.info("stopped")


def _watch(watcher: Watcher, events: dmioctl.Events, claim: int) -> None:
    while True:
        failoverlocks.beat(claim)
        events.arm()  # first: what happens during the check is seen after it
        try:
            watcher.check()
        except errors.ThunderError as error:
            LOG.warning("%s", error)
        except Exception:
            LOG.exception("checking the volumes")
        events.wait(_INTERVAL)


def _exit(signum: int, frame: FrameType | None) -> None:
    raise SystemExit(0)


if __name__ == "__main__":
    sys.exit(main())
