"""The time limits of the product, in seconds, and what waits for what.

Whoever waits must be more patient than what it waits for. Otherwise it gives up on something that
succeeds a moment later, and the work was in vain: in a storm, everybody's.
"""

from __future__ import annotations

from dataclasses import dataclass

# Defaults of options: thunder.conf of compute hosts, cinder.conf of storage hosts.
ATTACH_BUDGET = 2.0
ATTACH_DEADLINE = 10.0
RPC_TIMEOUT = 8.0
PARENT_WAIT = 5.0
DRAIN_TIMEOUT = 30.0
HEARTBEAT_INTERVAL = 5.0
HEARTBEAT_TIMEOUT = 20.0
CREATING_TIMEOUT = 120.0
#: Silence after which a host is suspect, as a share of that after which it is dead.
SUSPECT_SHARE = 0.5

#: Somebody who only probes a volume (udev, a scan of LVM's) may have it open for so long.
PROBE = 2.0
#: Another program may hold a pool's metadata snapshot for so long.
METADATA_SNAPSHOT = 3.0
#: Another process may use LIO for so long. One that hangs in the kernel must not stop the others:
#: it has made its change, or will find it refused.
LIO_LOCK = 5.0
#: An exporter may take so long for its answer, beside waiting for a base to be built.
EXPORTER = 2.0
#: A target may take so long to answer a login, of which there are :data:`LOGIN_ATTEMPTS`; iscsiadm,
#: which logs in; and then the LUN, until it appears.
LOGIN, LOGIN_ATTEMPTS, ISCSIADM, LUN_APPEARS = 5, 2, 20.0, 10.0
#: A replica's session may be silent for so long before it is probed, then the probe; a live target
#: may take so long for a command, then for aborting it. After that its path fails.
PING, PONG, COMMAND, ABORT = 1, 1, 5, 1
#: A pool may be full for so long before all caches are cut off. The agent frees space one cache at
#: a time; the kernel fails writes that have waited for a minute.
FULL_POOL = 15.0

# Of others: what Linux allows a guest's SCSI disk for a command, a full thin pool a write, and Nova
# a call to a compute host by default.
GUEST_DISK = 30.0
KERNEL_FULL_POOL = 60.0
NOVA_RPC = 60.0
#: Sources that a plan names at most, :class:`cinder_thunder.policy.ranking.Limits`.
SOURCES = 3


@dataclass(frozen=True)
class Options:
    """Those limits that operators can set."""

    attach_budget: float = ATTACH_BUDGET
    attach_deadline: float = ATTACH_DEADLINE
    rpc_timeout: float = RPC_TIMEOUT
    parent_wait: float = PARENT_WAIT
    drain_timeout: float = DRAIN_TIMEOUT
    heartbeat_interval: float = HEARTBEAT_INTERVAL
    heartbeat_timeout: float = HEARTBEAT_TIMEOUT
    creating_timeout: float = CREATING_TIMEOUT

    @property
    def suspect(self) -> float:
        """Silence after which a host gets no further readers."""
        return self.heartbeat_timeout * SUSPECT_SHARE


@dataclass(frozen=True)
class Wait:
    """Somebody waits ``patience`` for what takes ``takes`` at most."""

    inner: str
    takes: float
    outer: str
    patience: float

    @property
    def is_too_short(self) -> bool:
        return self.takes >= self.patience

    def __str__(self) -> str:
        return (
            f"{self.inner} ({self.takes:g} s) must be less than {self.outer} ({self.patience:g} s)"
        )


def on_a_compute_host(options: Options) -> tuple[Wait, ...]:
    """What waits for what in the agent, the connector and the kernel."""
    return (
        Wait("attach_budget", options.attach_budget, "attach_deadline", options.attach_deadline),
        Wait("a probe of a volume", PROBE, "attach_deadline", options.attach_deadline),
        Wait("a lock on LIO", LIO_LOCK, "rpc_timeout", options.rpc_timeout),
        Wait("a login to a target", LOGIN * LOGIN_ATTEMPTS, "iscsiadm --login", ISCSIADM),
        Wait("a probe of a session", PING + PONG, "a SCSI command", COMMAND),
        Wait("failing all sources", SOURCES * (COMMAND + ABORT), "a guest's disk", GUEST_DISK),
        Wait("a full pool", FULL_POOL, "a guest's disk", GUEST_DISK),
        Wait("a full pool", FULL_POOL, "the kernel's no_space_timeout", KERNEL_FULL_POOL),
        Wait(
            "two heartbeats", 2 * options.heartbeat_interval, "drain_timeout", options.drain_timeout
        ),
    )


def in_a_cloud(options: Options) -> tuple[Wait, ...]:
    """What waits for what on other hosts."""
    built = SOURCES * (options.parent_wait + EXPORTER + ISCSIADM + LUN_APPEARS)
    return (
        Wait("attach_deadline", options.attach_deadline, "a call of Nova's", NOVA_RPC),
        Wait("a metadata snapshot", METADATA_SNAPSHOT, "rpc_timeout", options.rpc_timeout),
        Wait(
            "heartbeat_interval",
            options.heartbeat_interval,
            "a host being suspect",
            options.suspect,
        ),
        Wait("rpc_timeout", options.rpc_timeout, "a host being suspect", options.suspect),
        Wait("building a base", built, "thunder_creating_timeout", options.creating_timeout),
    )
