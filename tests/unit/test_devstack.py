"""The DevStack plugin's functions, with stubs for DevStack's own, in a temporary folder."""

from __future__ import annotations

import configparser
import contextlib
import getpass
import os
import shutil
import subprocess
from pathlib import Path

import pytest

import cinder_thunder.conf
import os_brick_thunder.common.conf
from lab.cloud import config
from lab.nodes.topology import Topology

DEVSTACK = Path(__file__).parents[2] / "devstack"
DRIVER = "cinder_thunder.driver.ThunderDriver"
HARNESS = """\
set -o errexit -o nounset -o pipefail
sudo() { "$@"; }
iniset() { printf '[%s]\\n%s = %s\\n' "$2" "$3" "$4" >> "$1"; }
iniset_rpc_backend() { iniset "$2" DEFAULT transport_url rabbit://stack@192.0.2.1/; }
setup_logging() { iniset "$1" DEFAULT log_color True; }
is_service_enabled() { [[ " $ENABLED " == *" $1 "* ]]; }
get_python_exec_prefix() { echo "$FOLDER/bin"; }
define_plugin() { :; }
enable_service() { ENABLED+=" $1"; }
called() { echo "$@" >> "$FOLDER/calls"; }
for name in setup_develop init_lvm_volume_group clean_lvm_volume_group run_process stop_process \\
        get_or_add_user_project_role udevadm; do
    eval "$name() { called $name \\"\\$@\\"; }"
done
dmsetup() { [ "$1" = ls ] && echo "$DEVICES" || called dmsetup "$@"; }
losetup() { [ "$1" = --noheadings ] && echo "$LOOPS" || called losetup "$@"; }
iscsiadm() { [ "$2" = session ] && echo "$SESSIONS" || called iscsiadm "$@"; }

source "$DEVSTACK/override-defaults"
source "$DEVSTACK/settings"
plugin() { source "$DEVSTACK/plugin.sh" "$@"; }
"""


class DevStack:
    """A host of a DevStack cloud, simulated in one folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.cinder_conf = folder / "cinder/cinder.conf"
        self.thunder_conf = folder / "thunder/thunder.conf"
        self.drop_in = folder / "n-cpu.service.d/thunder.conf"
        self.udev_rules = folder / "udev/59-thunder.rules"
        self.cinder_conf.parent.mkdir()
        (folder / "bin").mkdir()
        self.command("thunder", 'thunder "$@"')
        self.command("thunder-status", 'thunder-status "$@"')
        self.command("python3", "unexport")

    def command(self, name: str, said: str, code: int = 0) -> None:
        """Create a program in DevStack's virtual environment that only records its calls."""
        program = self.folder / "bin" / name
        program.write_text(f"#!/bin/sh\necho {said} >> {self.folder}/calls\nexit {code}\n")
        program.chmod(0o755)

    def run(self, script: str, services: str, **changes: str) -> None:
        """Run a script on a host with these services, ``changes`` being DevStack's variables."""
        settings = {
            "PATH": os.environ["PATH"],
            "FOLDER": self.folder,
            "DEVSTACK": DEVSTACK,
            "ENABLED": services,
            "DEST": self.folder,
            "DATA_DIR": self.folder / "data",
            "THUNDER_DIR": DEVSTACK.parent,
            "STACK_USER": getpass.getuser(),
            "GLOBAL_VENV": "True",
            "DEVSTACK_VENV": self.folder,
            "SERVICE_PROJECT_NAME": "service",
            "SERVICE_DOMAIN_NAME": "Default",
            "CINDER_MY_IP": "10.77.0.11",
            "NOVA_MY_IP": "10.77.0.12",
            "CINDER_CONF": self.cinder_conf,
            "CINDER_CONF_DIR": self.cinder_conf.parent,
            "NOVA_CONF_DIR": self.folder / "nova",
            "NOVA_CPU_CONF": "/etc/nova/nova-cpu.conf",
            "NOVA_BIN_DIR": "/opt/stack/data/venv/bin",
            "THUNDER_CONF": self.thunder_conf,
            "THUNDER_DROP_IN": self.drop_in,
            "THUNDER_UDEV_RULES": self.udev_rules,
            "THUNDER_RACK": "r0",
            "THUNDER_ZONE": "z1",
            "VOLUME_GROUP_NAME": "stack-volumes",
            "VOLUME_BACKING_FILE_SIZE": "30G",
            "ENABLE_DEBUG_LOG_LEVEL": "True",
            "DEVICES": "thunder-vol-1\t(253:7)\nthunder-paths-2\t(253:5)\nvg-thunder\t(253:1)",
            "LOOPS": "/dev/loop3 /dev/mapper/thunder-paths-2\n/dev/loop4 /var/other.img",
            "SESSIONS": "tcp: [1] 192.0.2.1:3260,1 iqn.2026-11.org.thunder:stor1:2 (non-flash)\n"
            "tcp: [2] 192.0.2.1:3260,1 iqn.2010-10.org.openstack:volume-1 (non-flash)",
            **changes,
        }
        subprocess.run(
            ["bash", "-c", HARNESS + script],
            check=True,
            env={name: str(value) for name, value in settings.items()},
        )

    def calls(self) -> list[str]:
        """The plugin's calls of DevStack's functions and of the thunder commands."""
        path = self.folder / "calls"
        return path.read_text().splitlines() if path.exists() else []


@pytest.fixture
def devstack(tmp_path: Path) -> DevStack:
    return DevStack(tmp_path)


def read(path: Path) -> configparser.ConfigParser:
    return parsed(path.read_text())


def parsed(text: str) -> configparser.ConfigParser:
    parser = configparser.ConfigParser(interpolation=None, default_section="", strict=False)
    parser.read_string(text)
    return parser


#: The calls of configure_cinder and init_cinder in DevStack's lib/cinder for each enabled backend.
CINDER = """
    for be in ${CINDER_ENABLED_BACKENDS//,/ }; do
        "configure_cinder_backend_${be%%:*}" "${be##*:}"
        "init_cinder_backend_${be%%:*}" "${be##*:}"
    done
"""
#: Options whose values differ between DevStack and the lab, and the reason.
DIFFERENCES = {
    "cinder.conf [DEFAULT] enabled_backends": "lib/cinder writes it",
    "cinder.conf [DEFAULT] host": "DevStack's hosts have names: it is the default",
    "cinder.conf [thunder] volume_group": "lib/lvm makes one for each backend",
    "cinder.conf [thunder] max_over_subscription_ratio": "of a pool of a few GiB: bench.large",
    "cinder.conf [thunder] thunder_clean_interval": "a lab does not wait for minutes",
    "thunder.conf [DEFAULT] debug": "ENABLE_DEBUG_LOG_LEVEL",
    "thunder.conf [DEFAULT] log_color": "setup_logging",
    "thunder.conf [DEFAULT] transport_url": "each has its own RabbitMQ",
    "thunder.conf [thunder] host": "DevStack's hosts have names: it is the default, as Nova's is",
    "thunder.conf [thunder] pool_device": "DevStack uses files, it has no spare disks",
    "thunder.conf [thunder] pool_volume_group": "lib/lvm makes one on a file",
    "thunder.conf [thunder] state_file": "DevStack keeps all data in DATA_DIR",
    "cinder.conf [thunder] thunder_heartbeat_timeout": "the default, stretched for the lab",
    "cinder.conf [thunder] thunder_creating_timeout": "the default, stretched for the lab",
    "thunder.conf [thunder] attach_budget": "the default, stretched for the lab's machine",
    "thunder.conf [thunder] attach_deadline": "the default, stretched for the lab's machine",
    "thunder.conf [thunder] parent_wait": "the default, stretched for the lab's machine",
    "thunder.conf [thunder] rpc_timeout": "the default, stretched for the lab's machine",
    "thunder.conf [thunder] drain_timeout": "the default, stretched for the lab's machine",
}


def options(file: str, parser: configparser.ConfigParser) -> dict[str, str]:
    return {
        f"{file} [{section}] {option}": value
        for section in parser.sections()
        for option, value in parser.items(section)
    }


def the_labs() -> dict[str, str]:
    """The options of Thunder's services on a lab's hosts."""
    storage, compute = Topology.standard(storage=1, compute=1).nodes
    backend = config.ini(config.storage_backend(storage, DRIVER))
    return options("cinder.conf", parsed(backend)) | options(
        "thunder.conf", parsed(config.agent(compute))
    )


def test_configuration_beside_the_labs(devstack: DevStack) -> None:
    """DevStack writes the configuration that the lab runs with. ``pytest -s`` prints both."""
    devstack.run("plugin stack pre-install" + CINDER, "c-vol")
    rack = {"THUNDER_RACK": "r1"}  # the location of the lab's first compute host
    devstack.run("plugin stack post-config", "n-cpu", **rack)
    found = options("cinder.conf", read(devstack.cinder_conf)) | options(
        "thunder.conf", read(devstack.thunder_conf)
    )
    wanted = the_labs()

    rows = [("option", "devstack", "lab", "")]
    rows += [
        (
            name,
            found.get(name, "-").replace(str(devstack.folder), "/opt/stack"),
            wanted.get(name, "-"),
            DIFFERENCES.get(name, ""),
        )
        for name in sorted(found | wanted)
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    print()
    for row in rows:
        print(
            "  ".join(f"{cell:{width}}" for cell, width in zip(row, widths, strict=True)).rstrip()
        )

    differing = {name for name in found | wanted if found.get(name) != wanted.get(name)}
    assert differing == set(DIFFERENCES)


def test_the_options_are_ones_that_are_read(devstack: DevStack) -> None:
    devstack.run("plugin stack pre-install" + CINDER + "plugin stack post-config", "c-vol n-cpu")
    backend = {option.dest for option in cinder_thunder.conf.backend_opts}
    written = set(read(devstack.cinder_conf)["thunder"])
    assert {name for name in written if name.startswith("thunder_")} <= backend
    ((_, agent),) = os_brick_thunder.common.conf.list_opts()
    assert set(read(devstack.thunder_conf)["thunder"]) <= {option.dest for option in agent}


def test_a_volume_type_of_devstacks_leads_to_the_backend(devstack: DevStack) -> None:
    """Its name, and its volume_backend_name, is the backend's name (create_volume_types)."""
    devstack.run(
        f"plugin stack pre-install; echo $CINDER_ENABLED_BACKENDS > $FOLDER/be{CINDER}", ""
    )
    assert (devstack.folder / "be").read_text() == "thunder:thunder\n"
    assert read(devstack.cinder_conf)["thunder"]["volume_backend_name"] == "thunder"
    assert devstack.calls() == ["init_lvm_volume_group stack-volumes-thunder 30G"]


def test_backends_that_somebody_asked_for(devstack: DevStack) -> None:
    backends = "thunder:fast,thunder:slow"
    devstack.run("plugin stack pre-install" + CINDER, "c-vol", CINDER_ENABLED_BACKENDS=backends)
    assert read(devstack.cinder_conf).sections() == ["fast", "slow"]


def test_a_storage_host(devstack: DevStack) -> None:
    devstack.run("plugin stack install; plugin stack post-config; plugin stack extra", "c-vol")
    assert devstack.calls() == [
        f"setup_develop {DEVSTACK.parent} cinder",
        "udevadm control --reload",
        f"thunder db upgrade --config-file {devstack.cinder_conf}",
        f"thunder-status --config-file {devstack.cinder_conf} upgrade check",
    ]
    filters = devstack.folder / "cinder/rootwrap.d/thunder.filters"
    assert "cinder_thunder.privileged.context" in filters.read_text()
    assert "THUNDER-" in devstack.udev_rules.read_text()
    assert not devstack.thunder_conf.exists()
    assert not devstack.drop_in.exists()


@pytest.mark.parametrize(("code", "goes_on"), [(1, True), (2, False), (255, False)])
def test_a_check_that_finds_something(devstack: DevStack, code: int, goes_on: bool) -> None:
    devstack.command("thunder-status", "checked", code)
    with contextlib.nullcontext() if goes_on else pytest.raises(subprocess.CalledProcessError):
        devstack.run("plugin stack post-config", "c-vol")


def test_a_compute_host(devstack: DevStack) -> None:
    """Everything in the README's section "Compute hosts"."""
    old = devstack.folder / "data/thunder/state.json"
    old.parent.mkdir(parents=True)
    old.write_text("of another cloud")

    devstack.run("plugin stack install; plugin stack post-config; plugin stack extra", "n-cpu")

    bin_dir, conf = devstack.folder / "bin", devstack.thunder_conf
    assert devstack.calls() == [
        f"setup_develop {DEVSTACK.parent}",
        "udevadm control --reload",
        "init_lvm_volume_group stack-thunder-pool 10G",
        f"run_process thunder-agent {bin_dir}/thunder-agent --config-file {conf}  root",
    ]
    assert not old.exists()
    assert read(conf)["DEFAULT"]["transport_url"].startswith("rabbit://")
    filters = devstack.folder / "nova/rootwrap.d/thunder.filters"
    assert "os_brick_thunder.privileged.context" in filters.read_text()
    assert "THUNDER-" in devstack.udev_rules.read_text()
    assert devstack.drop_in.read_text().splitlines() == [
        "[Unit]",
        "Wants=devstack@thunder-agent.service",
        "After=devstack@thunder-agent.service",
        "",
        "[Service]",
        f'Environment="THUNDER_CONF={conf}"',
        "ExecStart=",
        f"ExecStart={bin_dir}/thunder-run /opt/stack/data/venv/bin/nova-compute "
        "--config-file /etc/nova/nova-cpu.conf",
    ]


def test_unstack_and_clean(devstack: DevStack) -> None:
    devstack.run("plugin stack post-config; rm $FOLDER/calls; plugin unstack", "n-cpu")
    assert devstack.calls() == [
        "stop_process thunder-agent",
        "unexport",
        "dmsetup remove --deferred thunder-vol-1",
        "losetup --detach /dev/loop3",
        "dmsetup remove --deferred thunder-paths-2",
        "iscsiadm --mode node --targetname iqn.2026-11.org.thunder:stor1:2 --logout",
    ]
    assert devstack.thunder_conf.exists()

    devstack.run("rm $FOLDER/calls; plugin clean; cleanup_cinder_backend_thunder x", "n-cpu")

    assert devstack.calls() == [
        "clean_lvm_volume_group stack-thunder-pool",
        "clean_lvm_volume_group stack-volumes-x",
    ]
    assert not devstack.thunder_conf.exists()
    assert not devstack.drop_in.exists()
    assert not devstack.udev_rules.exists()
    assert not (devstack.folder / "data/thunder").exists()


def test_a_controller(devstack: DevStack) -> None:
    """Neither an agent nor a backend, but Cinder's user, which queries Glance about images."""
    devstack.run("plugin stack post-config; plugin stack extra; plugin unstack", "c-api n-api")
    assert devstack.calls() == ["get_or_add_user_project_role admin cinder service Default Default"]


@pytest.mark.skipif(not shutil.which("shellcheck"), reason="there is no shellcheck here")
def test_shellcheck() -> None:
    scripts = ["plugin.sh", "settings", "override-defaults"]
    subprocess.run(["shellcheck", *scripts], cwd=DEVSTACK, check=True)
