"""The connector's privsep context: the agent's socket is root's, nova-compute is not.

Run as root, its functions are called directly. Otherwise oslo.privsep starts a helper through
Nova's root helper, which ``etc/nova/rootwrap.d/thunder.filters`` allows.
"""

from __future__ import annotations

import os

from oslo_privsep import capabilities, priv_context

context = priv_context.PrivContext(
    "os_brick_thunder",
    cfg_section="thunder_brick_privileged",
    pypath=__name__ + ".context",
    capabilities=[capabilities.CAP_DAC_OVERRIDE],  # to connect to a socket of root's, no more
)
if os.geteuid() == 0:
    context.set_client_mode(False)
