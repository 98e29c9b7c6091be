"""Nova and what it depends on: configuration and daemons, on the controller and in the nodes.

Nova, Placement, libvirt and QEMU are the real ones. In place of Neutron there is
``lab.cloud.nonetwork``, as servers have no network.
"""

from __future__ import annotations

import sys
from pathlib import Path

from lab import pace
from lab.cloud import config
from lab.cloud.config import Sections, ini
from lab.nodes.services import Service, api, listens, logged, serves
from lab.nodes.topology import HOST_ADDRESS, NodeSpec

#: The daemons of the controller.
NAMES = ("placement", "nonetwork", "nova-api", "nova-conductor", "nova-scheduler")
_PREFIX = sys.prefix
_STATE = Path("/var/lib/nova")
#: nova-compute's command: with Thunder's connector in os-brick's map, and without.
_THUNDER_RUN = (f"{_PREFIX}/bin/python", "-m", "os_brick_thunder.launcher")
_NOVA_COMPUTE = f"{_PREFIX}/bin/nova-compute"
#: Guests share one or two processors with everything else: what takes seconds on real servers
#: takes minutes here.
_PATIENCE = 300


def placement_conf() -> str:
    """placement.conf."""
    return ini(
        {
            "placement_database": {"connection": config.database_url("placement")},
            "api": {"auth_strategy": "keystone"},
            "keystone_authtoken": config.token("placement"),
        }
    )


def nova_conf(state: Path, address: str, extra: Sections | None = None) -> str:
    """nova.conf of API, conductor and scheduler; ``extra`` sections are a compute node's."""
    extra = extra or {}
    auth = config.service_auth("nova")
    default: dict[str, object] = {
        "transport_url": config.TRANSPORT_URL,
        "my_ip": address,
        "state_path": state,
        "report_interval": 5,
        "service_down_time": pace.whole(60),
        "rpc_response_timeout": pace.whole(_PATIENCE),
        "block_device_allocate_retries": pace.whole(_PATIENCE),
        "block_device_allocate_retries_interval": 1,
        "resume_guests_state_on_host_boot": True,
        **extra.get("DEFAULT", {}),
    }
    common: Sections = {
        "DEFAULT": default,
        "api_database": {"connection": config.database_url("nova_api")},
        "database": {"connection": config.database_url("nova")},
        "keystone_authtoken": config.token("nova"),
        "service_user": {"send_service_user_token": True, **auth},
        "placement": auth,
        "neutron": auth,
        "cinder": {
            **auth,
            "catalog_info": "block-storage:cinder:publicURL",
            "os_region_name": config.REGION,
        },
        "glance": {"api_servers": f"http://{HOST_ADDRESS}:{config.GLANCE_PORT}"},
        "oslo_concurrency": {"lock_path": state / "locks"},
        "wsgi": {"api_paste_config": f"{_PREFIX}/etc/nova/api-paste.ini"},
        "scheduler": {"workers": 1, "discover_hosts_in_cells_interval": 5},
        "conductor": {"workers": 1},
        "vnc": {"enabled": False},
    }
    return ini({**common, **{k: v for k, v in extra.items() if k != "DEFAULT"}})


def compute_conf(spec: NodeSpec) -> str:
    """nova.conf of a compute node."""
    helper = f"{_PREFIX}/bin/privsep-helper --config-file {_STATE}/nova.conf"
    contexts = ("privsep_osbrick", "nova_sys_admin", "vif_plug_ovs_privileged")
    return nova_conf(
        _STATE,
        spec.address,
        {
            "DEFAULT": {
                "compute_driver": "libvirt.LibvirtDriver",
                "host": spec.name,
                "instances_path": _STATE / "instances",
                "reserved_host_memory_mb": 0,
                "ram_allocation_ratio": 8,
                "cpu_allocation_ratio": 64,
                # nova-compute logs this when it is ready.
                "default_log_levels": "nova.service=DEBUG,amqp=WARN,urllib3.connectionpool=WARN,"
                "keystoneauth=WARN,stevedore=WARN,sqlalchemy=WARN,iso8601=WARN",
            },
            "libvirt": {
                "virt_type": "qemu",
                # Cache of a guest's translated code, in MiB; QEMU's default is a gigabyte.
                "tb_cache_size": 64,
                "live_migration_scheme": "tcp",
                "live_migration_inbound_addr": spec.address,
                "live_migration_permit_auto_converge": True,
                "num_iscsi_scan_tries": 5,
            },
            **{context: {"helper_command": helper} for context in contexts},
        },
    )


def services(folder: Path) -> list[Service]:
    """The daemons of the controller, in order of their dependencies."""
    nova, placement = folder / "nova", folder / "placement"
    conf = str(nova / "nova.conf")
    files = {conf: nova_conf(nova, HOST_ADDRESS)}
    return [
        api(
            "placement",
            config.PLACEMENT_PORT,
            "placement.wsgi.api",
            env={"OS_PLACEMENT_CONFIG_DIR": str(placement)},
            files={str(placement / "placement.conf"): placement_conf()},
        ),
        api("nonetwork", config.NETWORK_PORT, "lab.cloud.nonetwork"),
        api(
            "nova-api",
            config.NOVA_PORT,
            "nova.wsgi.osapi_compute",
            env={
                "OS_NOVA_CONFIG_DIR": str(nova),
                "OS_NOVA_CONFIG_FILES": f"{_PREFIX}/etc/nova/api-paste.ini;nova.conf",
            },
            files=files,
        ),
        *(
            Service(
                f"nova-{name}",
                (f"{_PREFIX}/bin/nova-{name}", "--config-file", conf),
                ready=logged(f"Starting {name} node"),
                files=files,
            )
            for name in ("conductor", "scheduler")
        ),
    ]


# -- daemons of the compute nodes --------------------------------------------------------------

_QEMU_CONF = """\
user = "root"
group = "root"
security_driver = "none"
cgroup_controllers = [ ]
namespaces = []
"""
_LIBVIRTD_CONF = """\
listen_tls = 0
listen_tcp = 1
auth_tcp = "none"
"""


def compute_services(spec: NodeSpec, *, thunder: bool = True) -> list[Service]:
    """libvirt and nova-compute.

    :param thunder: start nova-compute through ``thunder-run``
    """
    conf = str(_STATE / "nova.conf")
    command = (_NOVA_COMPUTE, "--config-file", conf)
    return [
        Service(
            "dbus",
            ("dbus-daemon", "--system", "--nofork", "--nopidfile"),
            ready=serves("/run/dbus/system_bus_socket"),
            before="mkdir -p /run/dbus; rm -f /run/dbus/system_bus_socket",
        ),
        Service("virtlogd", ("virtlogd",), ready=serves("/run/libvirt/virtlogd-sock")),
        Service(
            "libvirtd",
            ("libvirtd", "--listen"),
            # libvirt's compiled-in user for guests: it must exist, though it is not used.
            before="id -u libvirt-qemu > /dev/null 2>&1"
            " || useradd --system --user-group --no-create-home libvirt-qemu",
            ready=listens(16509),
            files={
                "/etc/libvirt/qemu.conf": _QEMU_CONF,
                "/etc/libvirt/libvirtd.conf": _LIBVIRTD_CONF,
            },
        ),
        Service(
            "nova-compute",
            (*_THUNDER_RUN, *command) if thunder else command,
            # A resize copies the server's folder to another host over ssh.
            before=f"mkdir -p {_STATE}/instances {_STATE}/locks; mkdir -p -m 700 /root/.ssh\n"
            "install -m 600 /lab/user_key /root/.ssh/id_ed25519\n"
            "echo 'StrictHostKeyChecking no' > /root/.ssh/config",
            ready=logged("Join ServiceGroup membership"),
            files={conf: compute_conf(spec)},
        ),
    ]
