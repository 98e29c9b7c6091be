"""The failover watcher: a small process beside the agent; see :mod:`.watcher`."""
