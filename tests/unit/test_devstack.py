"""The DevStack plugin, dry: with stubs for what DevStack gives it, into a temporary folder."""

from __future__ import annotations

import configparser
import getpass
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from lab import config
from lab.topology import Topology

DEVSTACK = Path(__file__).parents[2] / "devstack"
HARNESS = """\
set -o errexit -o nounset -o pipefail
sudo() { "$@"; }
iniset() { printf '[%s]\\n%s = %s\\n' "$2" "$3" "$4" >> "$1"; }
iniset_rpc_backend() { iniset "$2" DEFAULT transport_url rabbit://stack@192.0.2.1/; }
is_service_enabled() { [[ " $ENABLED " == *" $1 "* ]]; }
get_python_exec_prefix() { echo "$FOLDER/bin"; }
define_plugin() { :; }
enable_service() { ENABLED+=" $1"; }
called() { echo "$@" >> "$FOLDER/calls"; }
for name in setup_develop init_lvm_volume_group clean_lvm_volume_group run_process stop_process; do
    eval "$name() { called $name \\"\\$@\\"; }"
done
python3() { called unexport; }
dmsetup() { [ "$1" = ls ] && echo "$DEVICES" || called dmsetup "$@"; }
losetup() { [ "$1" = --noheadings ] && echo "$LOOPS" || called losetup "$@"; }
iscsiadm() { [ "$2" = session ] && echo "$SESSIONS" || called iscsiadm "$@"; }

source "$DEVSTACK/override-defaults"
source "$DEVSTACK/settings"
plugin() { source "$DEVSTACK/plugin.sh" "$@"; }
"""


class DevStack:
    """A host of a DevStack cloud that exists in one folder only."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.cinder_conf = folder / "cinder/cinder.conf"
        self.thunder_conf = folder / "thunder/thunder.conf"
        self.drop_in = folder / "n-cpu.service.d/thunder.conf"
        self.cinder_conf.parent.mkdir()
        command = folder / "bin/thunder"
        command.parent.mkdir()
        command.write_text(f'#!/bin/sh\necho thunder "$@" >> {folder}/calls\n')
        command.chmod(0o755)

    def run(self, script: str, services: str) -> None:
        settings = {
            "PATH": os.environ["PATH"],
            "FOLDER": self.folder,
            "DEVSTACK": DEVSTACK,
            "ENABLED": services,
            "DEST": self.folder,
            "DATA_DIR": self.folder / "data",
            "THUNDER_DIR": DEVSTACK.parent,
            "STACK_USER": getpass.getuser(),
            "HOST_IP": "10.77.0.11",
            "CINDER_CONF": self.cinder_conf,
            "CINDER_CONF_DIR": self.cinder_conf.parent,
            "NOVA_CONF_DIR": self.folder / "nova",
            "NOVA_CPU_CONF": "/etc/nova/nova-cpu.conf",
            "NOVA_BIN_DIR": "/opt/stack/data/venv/bin",
            "THUNDER_CONF": self.thunder_conf,
            "THUNDER_DROP_IN": self.drop_in,
            "THUNDER_RACK": "r0",
            "THUNDER_ZONE": "z1",
            "VOLUME_GROUP_NAME": "stack-volumes",
            "VOLUME_BACKING_FILE_SIZE": "30G",
            "ENABLE_DEBUG_LOG_LEVEL": "True",
            "DEVICES": "thunder-vol-1\t(253:7)\nthunder-paths-2\t(253:5)\nvg-thunder\t(253:1)",
            "LOOPS": "/dev/loop3 /dev/mapper/thunder-paths-2\n/dev/loop4 /var/other.img",
            "SESSIONS": "tcp: [1] 192.0.2.1:3260,1 iqn.2026-11.org.thunder:stor1:2 (non-flash)\n"
            "tcp: [2] 192.0.2.1:3260,1 iqn.2010-10.org.openstack:volume-1 (non-flash)",
        }
        subprocess.run(
            ["bash", "-c", HARNESS + script],
            check=True,
            env={name: str(value) for name, value in settings.items()},
        )

    def calls(self) -> list[str]:
        """What the plugin asked of DevStack, and of the thunder command."""
        path = self.folder / "calls"
        return path.read_text().splitlines() if path.exists() else []


@pytest.fixture
def devstack(tmp_path: Path) -> DevStack:
    return DevStack(tmp_path)


def read(path: Path) -> configparser.ConfigParser:
    parser = configparser.ConfigParser(interpolation=None, default_section="", strict=False)
    parser.read_string(path.read_text())
    return parser


def test_the_backend_is_the_labs(devstack: DevStack) -> None:
    """What the lab runs with is what DevStack is given, but for names."""
    (storage,) = Topology.standard(storage=1, compute=0).nodes
    driver = "cinder_thunder.driver.ThunderDriver"
    wanted = dict(config.storage_backend(storage, driver)["thunder"])

    devstack.run(
        """
        plugin stack pre-install
        be=${CINDER_ENABLED_BACKENDS}
        "configure_cinder_backend_${be%%:*}" "${be##*:}"
        "init_cinder_backend_${be%%:*}" "${be##*:}"
        """,
        "c-vol",
    )

    found = dict(read(devstack.cinder_conf)["thunder"])
    del wanted["thunder_clean_interval"]  # a lab does not wait for minutes
    assert found == {**wanted, "volume_group": "stack-volumes-thunder"}
    assert devstack.calls() == ["init_lvm_volume_group stack-volumes-thunder 30G"]


def test_a_storage_host(devstack: DevStack) -> None:
    devstack.run("plugin stack install; plugin stack post-config; plugin stack extra", "c-vol")
    assert devstack.calls() == [
        f"setup_develop {DEVSTACK.parent} cinder",
        f"thunder db upgrade --config-file {devstack.cinder_conf}",
    ]
    filters = devstack.folder / "cinder/rootwrap.d/thunder.filters"
    assert "cinder_thunder.privileged.context" in filters.read_text()
    assert not devstack.thunder_conf.exists()
    assert not devstack.drop_in.exists()


def test_a_compute_host(devstack: DevStack) -> None:
    devstack.run("plugin stack install; plugin stack post-config; plugin stack extra", "n-cpu")
    bin_dir, conf = devstack.folder / "bin", devstack.thunder_conf
    assert devstack.calls() == [
        f"setup_develop {DEVSTACK.parent}",
        "init_lvm_volume_group stack-thunder-pool 10G",
        f"run_process thunder-agent {bin_dir}/thunder-agent --config-file {conf}  root",
    ]
    found = read(conf)
    assert found["DEFAULT"]["transport_url"].startswith("rabbit://")
    assert dict(found["thunder"]) == {
        "address": "10.77.0.11",
        "rack": "r0",
        "zone": "z1",
        "pool_volume_group": "stack-thunder-pool",
        "state_file": str(devstack.folder / "data/thunder/state.json"),
    }
    filters = devstack.folder / "nova/rootwrap.d/thunder.filters"
    assert "os_brick_thunder.privileged.context" in filters.read_text()
    assert devstack.drop_in.read_text().splitlines() == [
        "[Service]",
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
    assert not (devstack.folder / "data/thunder").exists()


def test_a_controller_gets_neither(devstack: DevStack) -> None:
    devstack.run("plugin stack post-config; plugin stack extra; plugin unstack", "c-api n-api")
    assert devstack.calls() == []


@pytest.mark.skipif(not shutil.which("shellcheck"), reason="there is no shellcheck here")
def test_shellcheck() -> None:
    scripts = ["plugin.sh", "settings", "override-defaults"]
    subprocess.run(["shellcheck", *scripts], cwd=DEVSTACK, check=True)
