#!/bin/bash
# DevStack plugin of Thunder: enable_plugin thunder <URL of this repository>
#
# On hosts with c-vol it configures a Cinder backend of type "thunder"; on hosts with n-cpu it runs
# thunder-agent, and has nova-compute started through thunder-run.

_XTRACE_THUNDER=$(set +o | grep xtrace)
set +o xtrace

# A drop-in for DevStack's own unit of nova-compute.
THUNDER_DROP_IN=${THUNDER_DROP_IN:-/etc/systemd/system/devstack@n-cpu.service.d/thunder.conf}
THUNDER_UDEV_RULES=${THUNDER_UDEV_RULES:-/etc/udev/rules.d/59-thunder.rules}

function is_thunder_agent_enabled {
    is_service_enabled n-cpu && is_service_enabled thunder-agent
}

# The Python that Thunder is installed for; unstack.sh and clean.sh do not run in DevStack's venv.
function thunder_python {
    if [[ "$GLOBAL_VENV" == "True" ]]; then
        echo "$DEVSTACK_VENV/bin/python3"
    else
        command -v python3
    fi
}

# The backend
# -----------
# DevStack calls these for every "thunder:NAME" in CINDER_ENABLED_BACKENDS, writes enabled_backends
# and default_volume_type, and creates a volume type NAME with volume_backend_name=NAME.

function configure_cinder_backend_thunder {
    local name=$1
    iniset "$CINDER_CONF" "$name" volume_driver cinder_thunder.driver.ThunderDriver
    iniset "$CINDER_CONF" "$name" volume_backend_name "$name"
    iniset "$CINDER_CONF" "$name" volume_group "$VOLUME_GROUP_NAME-$name"
    iniset "$CINDER_CONF" "$name" lvm_type thin
    iniset "$CINDER_CONF" "$name" target_helper lioadm
    iniset "$CINDER_CONF" "$name" target_protocol iscsi
    iniset "$CINDER_CONF" "$name" target_ip_address "$CINDER_MY_IP"
    iniset "$CINDER_CONF" "$name" thunder_rack "$THUNDER_RACK"
    iniset "$CINDER_CONF" "$name" thunder_zone "$THUNDER_ZONE"
}

function init_cinder_backend_thunder {
    init_lvm_volume_group "$VOLUME_GROUP_NAME-$1" "$VOLUME_BACKING_FILE_SIZE"
}

function cleanup_cinder_backend_thunder {
    clean_lvm_volume_group "$VOLUME_GROUP_NAME-$1"
}

# stack
# -----

function install_thunder {
    if is_service_enabled c-vol; then
        setup_develop "$THUNDER_DIR" cinder
    else
        setup_develop "$THUNDER_DIR"
    fi
}

# Only an admin learns from Glance that an image was deleted; its replicas are then removed.
function configure_thunder_accounts {
    get_or_add_user_project_role admin cinder "$SERVICE_PROJECT_NAME" \
        "$SERVICE_DOMAIN_NAME" "$SERVICE_DOMAIN_NAME"
}

function configure_thunder_udev {
    sudo install -D -m 644 "$THUNDER_DIR/etc/udev/rules.d/59-thunder.rules" "$THUNDER_UDEV_RULES"
    sudo udevadm control --reload
}

# At post-config Cinder's database exists, and cinder-volume is not running yet.
function configure_thunder_storage {
    local bin
    bin=$(get_python_exec_prefix)
    sudo install -D -m 644 "$THUNDER_DIR/etc/cinder/rootwrap.d/thunder.filters" \
        "$CINDER_CONF_DIR/rootwrap.d/thunder.filters"
    "$bin/thunder" db upgrade --config-file "$CINDER_CONF"
    # 1 is a warning: Cinder's development version is not among the known ones.
    "$bin/thunder-status" --config-file "$CINDER_CONF" upgrade check || [[ $? == 1 ]]
}

# Remove the agent's state: it refers to the previous cloud.
function configure_thunder_agent {
    sudo install -d -o "$STACK_USER" "$(dirname "$THUNDER_CONF")" "$THUNDER_STATE_DIR"
    sudo rm -f "$THUNDER_CONF" "$THUNDER_STATE_DIR/state.json"
    iniset "$THUNDER_CONF" DEFAULT debug "$ENABLE_DEBUG_LOG_LEVEL"
    setup_logging "$THUNDER_CONF"
    iniset "$THUNDER_CONF" thunder address "$NOVA_MY_IP"
    iniset "$THUNDER_CONF" thunder rack "$THUNDER_RACK"
    iniset "$THUNDER_CONF" thunder zone "$THUNDER_ZONE"
    iniset "$THUNDER_CONF" thunder pool_volume_group "$THUNDER_POOL_VOLUME_GROUP"
    iniset "$THUNDER_CONF" thunder state_file "$THUNDER_STATE_DIR/state.json"
    iniset_rpc_backend thunder "$THUNDER_CONF"
    init_lvm_volume_group "$THUNDER_POOL_VOLUME_GROUP" "$THUNDER_POOL_SIZE"
}

# DevStack writes nova-compute's unit itself; a drop-in changes only its command, and sets the path
# of the connector's configuration.
function configure_thunder_nova {
    local bin
    bin=$(get_python_exec_prefix)
    sudo install -D -m 644 "$THUNDER_DIR/etc/nova/rootwrap.d/thunder.filters" \
        "$NOVA_CONF_DIR/rootwrap.d/thunder.filters"
    sudo install -d "$(dirname "$THUNDER_DROP_IN")"
    sudo tee "$THUNDER_DROP_IN" > /dev/null << END
[Unit]
Wants=devstack@thunder-agent.service
After=devstack@thunder-agent.service

[Service]
Environment="THUNDER_CONF=$THUNDER_CONF"
ExecStart=
ExecStart=$bin/thunder-run $NOVA_BIN_DIR/nova-compute --config-file $NOVA_CPU_CONF
END
}

function configure_thunder {
    if is_service_enabled c-api; then
        configure_thunder_accounts
    fi
    if is_service_enabled c-vol || is_thunder_agent_enabled; then
        configure_thunder_udev
    fi
    if is_service_enabled c-vol; then
        configure_thunder_storage
    fi
    if is_thunder_agent_enabled; then
        configure_thunder_agent
        configure_thunder_nova
    fi
}

function start_thunder {
    if is_thunder_agent_enabled; then
        run_process thunder-agent \
            "$(get_python_exec_prefix)/thunder-agent --config-file $THUNDER_CONF" "" root
    fi
}

# unstack, clean
# --------------

# The agent leaves its devices, and the watcher over them, to the guests that use them, but after
# unstack there are no guests.
# --deferred removes a device that another one uses as soon as that one is removed.
function remove_thunder_devices {
    local name loop below
    sudo "$(thunder_python)" -c '
from os_brick_thunder.common.mechanism import failoverlocks
from os_brick_thunder.common.transport import lio
failoverlocks.end()
for target in lio.targets(lio.IQN_PREFIX):
    lio.unexport(target.iqn)'
    for name in $(sudo dmsetup ls | awk '/^thunder-/ { print $1 }'); do
        below=$(realpath --canonicalize-missing "/dev/mapper/$name")
        for loop in $(sudo losetup --noheadings --output NAME,BACK-FILE |
                awk -v below="$below" '$2 == below { print $1 }'); do
            sudo losetup --detach "$loop"
        done
        sudo dmsetup remove --deferred "$name"
    done
    for name in $(sudo iscsiadm --mode session 2> /dev/null |
            awk '$4 ~ /^iqn\.2026-11\.org\.thunder:/ { print $4 }'); do
        sudo iscsiadm --mode node --targetname "$name" --logout
    done
}

function stop_thunder {
    if is_thunder_agent_enabled; then
        stop_process thunder-agent
        remove_thunder_devices
    fi
}

function cleanup_thunder {
    sudo rm -f "$THUNDER_UDEV_RULES"
    if is_thunder_agent_enabled; then
        clean_lvm_volume_group "$THUNDER_POOL_VOLUME_GROUP"
        sudo rm -f "$THUNDER_DROP_IN" "$THUNDER_CONF"
        sudo rm -rf "$THUNDER_STATE_DIR"
    fi
}

case "$1 ${2:-}" in
    "stack install") install_thunder ;;
    "stack post-config") configure_thunder ;;
    "stack extra") start_thunder ;;
    "unstack "*) stop_thunder ;;
    "clean "*) cleanup_thunder ;;
esac

$_XTRACE_THUNDER
