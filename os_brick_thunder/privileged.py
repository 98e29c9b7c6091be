"""The connector's privsep context: only root may use the agent's socket, and device-mapper.

In a process of root's, its functions are called directly. Otherwise oslo.privsep starts a helper
process through Nova's root helper, which ``etc/nova/rootwrap.d/thunder.filters`` allows.
"""

from __future__ import annotations

import os

from oslo_privsep import capabilities, priv_context

context = priv_context.PrivContext(
    "os_brick_thunder",
    cfg_section="thunder_brick_privileged",
    pypath=__name__ + ".context",
    capabilities=[
        capabilities.CAP_DAC_OVERRIDE,  # to connect to root's socket
        capabilities.CAP_SYS_ADMIN,  # to change and remove devices
    ],
)
if os.geteuid() == 0:
    context.set_client_mode(False)
