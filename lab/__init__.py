"""A multi-host cloud with real kernels on one Debian machine.

Nodes are User Mode Linux processes; nodes and control plane live in one network namespace per
lab. Start with :class:`lab.cluster.Cluster`, or with ``lab/lab --help`` on the command line.
"""
