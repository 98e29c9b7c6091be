"""Configuration of everything that runs in a lab: values in, file contents out.

Passwords are trivial because nothing outside the lab's namespace can reach it.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from oslo_config import cfg

import cinder_thunder.conf
import os_brick_thunder.common.conf
from lab import pace
from lab.nodes.topology import HOST_ADDRESS, NodeSpec

PASSWORD = "lab"
REGION = "RegionOne"
VOLUME_TYPE = "thunder"
BACKEND = "thunder"
#: Name of a backend and volume type of Cinder's LVM driver, and the driver.
PLAIN, LVM = "lvm", "cinder.volume.drivers.lvm.LVMVolumeDriver"
VOLUME_GROUP, PLAIN_GROUP = "cinder-volumes", "plain-volumes"
#: The key of all encrypted volumes, in hex.
FIXED_KEY = "5c" * 32
KEYSTONE_PORT, GLANCE_PORT, CINDER_PORT = 5000, 9292, 8776
NOVA_PORT, PLACEMENT_PORT, NETWORK_PORT = 8774, 8778, 9696
IDENTITY_URL = f"http://{HOST_ADDRESS}:{KEYSTONE_PORT}/v3"
TRANSPORT_URL = f"rabbit://lab:{PASSWORD}@{HOST_ADDRESS}:5672/"
#: Thunder's time limits that are stretched on a slow machine, starting from their defaults.
_AGENT_LIMITS = ("attach_budget", "attach_deadline", "parent_wait", "rpc_timeout", "drain_timeout")
_TRACKER_LIMITS = ("thunder_heartbeat_timeout", "thunder_creating_timeout")
DATABASES = ("keystone", "glance", "cinder", "placement", "nova_api", "nova_cell0", "nova")
SERVICE_USERS = ("glance", "cinder", "placement", "nova")


@dataclass(frozen=True)
class Endpoint:
    """An entry of Keystone's catalogue."""

    service: str
    type: str
    port: int
    path: str

    @property
    def url(self) -> str:
        return f"http://{HOST_ADDRESS}:{self.port}{self.path}"


ENDPOINTS = (
    Endpoint("glance", "image", GLANCE_PORT, ""),
    Endpoint("cinder", "block-storage", CINDER_PORT, "/v3"),
    Endpoint("placement", "placement", PLACEMENT_PORT, ""),
    Endpoint("nova", "compute", NOVA_PORT, "/v2.1"),
    Endpoint("neutron", "network", NETWORK_PORT, ""),
)

Sections = Mapping[str, Mapping[str, object]]


def ini(sections: Sections) -> str:
    """An oslo.config file."""
    lines: list[str] = []
    for section, values in sections.items():
        lines += [f"[{section}]", *(f"{key} = {value}" for key, value in values.items()), ""]
    return "\n".join(lines)


def credentials(user: str = "admin", project: str = "admin") -> dict[str, str]:
    """Keyword arguments of ``openstack.connect``."""
    return {
        "auth_url": IDENTITY_URL,
        "username": user,
        "password": PASSWORD,
        "project_name": project,
        "user_domain_name": "Default",
        "project_domain_name": "Default",
        "region_name": REGION,
    }


def client_environment() -> dict[str, str]:
    """``OS_…`` variables of the openstack client."""
    return {
        **{f"OS_{key.upper()}": value for key, value in credentials().items()},
        "OS_IDENTITY_API_VERSION": "3",
        "OS_VOLUME_API_VERSION": "3.70",
        "OS_COMPUTE_API_VERSION": "2.95",
    }


def database_url(name: str) -> str:
    return f"mysql+pymysql://lab:{PASSWORD}@{HOST_ADDRESS}/{name}?charset=utf8mb4"


def service_auth(user: str) -> dict[str, object]:
    """How a service authenticates to others, as options of keystoneauth."""
    return {
        "auth_type": "password",
        "auth_url": IDENTITY_URL,
        "username": user,
        "password": PASSWORD,
        "project_name": "service",
        "user_domain_name": "Default",
        "project_domain_name": "Default",
        "region_name": REGION,
    }


def token(user: str) -> dict[str, object]:
    """[keystone_authtoken] of a service."""
    return {
        **service_auth(user),
        "www_authenticate_uri": IDENTITY_URL,
        "service_token_roles": "service",
        "service_token_roles_required": True,
    }


def keystone(folder: Path) -> str:
    """keystone.conf; the keys are in ``folder``."""
    return ini(
        {
            "database": {"connection": database_url("keystone")},
            "token": {"provider": "fernet"},
            "fernet_tokens": {"key_repository": folder / "fernet-keys"},
            "credential": {"key_repository": folder / "credential-keys"},
            "cache": {"enabled": True, "backend": "dogpile.cache.memory"},
            # More rounds would only protect a password that is written above.
            "identity": {"password_hash_rounds": 4},
        }
    )


def glance(folder: Path) -> str:
    """glance-api.conf; the images are files in ``folder``/images."""
    return ini(
        {
            "DEFAULT": {"enabled_backends": "file:file", "enable_v2_api": True},
            "database": {"connection": database_url("glance")},
            "glance_store": {"default_backend": "file"},
            "file": {"filesystem_store_datadir": folder / "images"},
            "os_glance_staging_store": {"filesystem_store_datadir": folder / "staging"},
            "os_glance_tasks_store": {"filesystem_store_datadir": folder / "tasks"},
            "keystone_authtoken": token("glance"),
            "paste_deploy": {
                "flavor": "keystone",
                "config_file": f"{sys.prefix}/etc/glance/glance-api-paste.ini",
            },
            "oslo_concurrency": {"lock_path": folder / "locks"},
            "oslo_messaging_notifications": {"driver": "noop"},
        }
    )


def cinder(state: Path, address: str, extra: Sections | None = None) -> str:
    """cinder.conf of the API and the scheduler; ``extra`` sections are a storage node's."""
    extra = extra or {}
    etc = f"{sys.prefix}/etc/cinder"
    helper = f"{sys.prefix}/bin/privsep-helper --config-file {state}/cinder.conf"
    default: dict[str, object] = {
        "transport_url": TRANSPORT_URL,
        "my_ip": address,
        "state_path": state,
        "image_conversion_dir": state / "conversion",
        "auth_strategy": "keystone",
        "api_paste_config": f"{etc}/api-paste.ini",
        "resource_query_filters_file": f"{etc}/resource_filters.json",
        "glance_api_servers": f"http://{HOST_ADDRESS}:{GLANCE_PORT}",
        "default_volume_type": VOLUME_TYPE,
        "report_interval": 5,
        "service_down_time": pace.whole(30),
        "rpc_response_timeout": pace.whole(60),  # oslo.messaging's default
        "enable_force_upload": True,
        "backup_driver": "cinder.backup.drivers.posix.PosixBackupDriver",
        "backup_posix_path": state / "backup",
        "backup_file_size": 32 << 20,  # read into memory as a whole; the default is 2 GB
        # Cinder's three defaults, and one that lets a test exclude a backend.
        "scheduler_default_filters": "AvailabilityZoneFilter,CapacityFilter,CapabilitiesFilter,"
        "DifferentBackendFilter",
        **extra.get("DEFAULT", {}),
    }
    common: dict[str, Mapping[str, object]] = {
        "DEFAULT": default,
        "database": {"connection": database_url("cinder")},
        "keystone_authtoken": token("cinder"),
        "service_user": {"send_service_user_token": True, **service_auth("cinder")},
        "nova": service_auth("cinder"),
        "oslo_concurrency": {"lock_path": state / "locks"},
        "privsep_osbrick": {"helper_command": helper},
        "cinder_sys_admin": {"helper_command": helper},
        "key_manager": {
            "backend": "cinder.keymgr.conf_key_mgr.ConfKeyManager",
            "fixed_key": FIXED_KEY,
        },
    }
    return ini({**common, **{k: v for k, v in extra.items() if k != "DEFAULT"}})


def operator(state: Path) -> str:
    """cinder.conf for the ``thunder`` command, with the timeout after which hosts are dead."""
    backend: Sections = {"DEFAULT": {"enabled_backends": BACKEND}, BACKEND: tracker_limits()}
    return cinder(state, HOST_ADDRESS, backend)


def storage_backend(spec: NodeSpec, driver: str, *, plain: bool = False) -> Sections:
    """The sections of a storage node's cinder.conf beyond the common part.

    :param plain: add a backend of Cinder's LVM driver, on the same disks
    """
    common = _lvm(spec, VOLUME_GROUP)
    backend = {"volume_driver": driver, "volume_backend_name": BACKEND, **common}
    if driver.startswith("cinder_thunder."):
        backend |= {
            "thunder_rack": spec.rack,
            "thunder_zone": spec.zone,
            "thunder_clean_interval": 5,
            **tracker_limits(),
        }
    backends: dict[str, dict[str, object]] = {BACKEND: backend}
    if plain:
        backends[PLAIN] = {"volume_driver": LVM, "volume_backend_name": PLAIN, **common}
    return {"DEFAULT": {"enabled_backends": ",".join(backends), "host": spec.name}, **backends}


def plain_backend(spec: NodeSpec) -> Sections:
    """The same for a cinder-volume of Cinder's LVM driver alone, in a volume group of its own."""
    backend = {"volume_driver": LVM, "volume_backend_name": PLAIN, **_lvm(spec, PLAIN_GROUP)}
    return {"DEFAULT": {"enabled_backends": PLAIN, "host": spec.name}, PLAIN: backend}


def _lvm(spec: NodeSpec, group: str) -> dict[str, object]:
    """Options of a backend that both drivers have."""
    return {
        "volume_group": group,
        "lvm_type": "thin",
        "max_over_subscription_ratio": 1000,  # of a pool of a few GiB: one image has 1 TiB
        "target_helper": "lioadm",
        "target_protocol": "iscsi",
        "target_ip_address": spec.address,
    }


def tracker_limits() -> dict[str, float]:
    """Time limits of a storage host's section of cinder.conf, in seconds, for this machine."""
    return _stretched(cinder_thunder.conf.backend_opts, _TRACKER_LIMITS)


def agent_limits() -> dict[str, float]:
    """Time limits of thunder.conf, in seconds: the defaults, stretched for this machine."""
    options = os_brick_thunder.common.conf.CONNECTOR_OPTS + os_brick_thunder.common.conf.AGENT_OPTS
    return _stretched(options, _AGENT_LIMITS)


def _stretched(options: Sequence[cfg.Opt], names: Sequence[str]) -> dict[str, float]:
    defaults = {option.dest: option.default for option in options}
    return {name: pace.stretch(defaults[name]) for name in names}


def agent(spec: NodeSpec, **options: object) -> str:
    """thunder.conf of a compute node: its whole data disk is the local pool; if it is a storage
    node, too, what is free in the volume group there.

    :param options: override the lab's options in [thunder]
    """
    pool = {"pool_device": "/dev/ubdb"}
    if spec.is_a("storage"):
        pool = {"pool_volume_group": VOLUME_GROUP}
    return ini(
        {
            "DEFAULT": {"transport_url": TRANSPORT_URL},
            "thunder": {
                "host": spec.name,
                "address": spec.address,
                "rack": spec.rack,
                "zone": spec.zone,
                **pool,
                **agent_limits(),
                **options,
            },
        }
    )


def rabbitmq() -> str:
    """rabbitmq.conf."""
    values = {
        "listeners.tcp.1": f"{HOST_ADDRESS}:5672",
        "loopback_users": "none",
        "default_user": "lab",
        "default_pass": PASSWORD,
        "disk_free_limit.absolute": "50MB",
        "log.console": "true",
        "log.file": "false",
    }
    return "".join(f"{key} = {value}\n" for key, value in values.items())
