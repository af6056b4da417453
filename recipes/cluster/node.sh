#!/usr/bin/env bash
# One command on a Ray cluster made for it, by `ray symmetric-run`. The same line on every node:
#   recipes/cluster/node.sh HEAD:PORT NODES TOKEN_FILE [OPTIONS OF ray start] -- COMMAND
# HEAD is the first node's IP address; a host name costs Ray minutes where no DNS server answers. The command runs there,
# and Ray ends on every node with it.
set -euo pipefail

if [[ $# -lt 5 || $1 != *:* || " ${*:4} " != *" -- "* ]]; then
    echo "usage: node.sh HEAD:PORT NODES TOKEN_FILE [OPTIONS OF ray start] -- COMMAND" >&2
    exit 2
elif [[ ! -s $3 || ! -r $3 ]]; then # `ray start` would fail for it, and symmetric-run end with exit code 0
    echo "no token to be read in $3 on $(hostname): put the cluster's there, as docs/clusters.md shows" >&2
    exit 1
fi

unset RAY_AUTH_TOKEN # Ray would take it instead of the file
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=$3 RAY_ADDRESS=$1

# Seconds that the nodes wait for each other, and that a busy machine has to start Ray.
export RAY_SYMMETRIC_RUN_CLUSTER_WAIT_TIMEOUT=${RAY_SYMMETRIC_RUN_CLUSTER_WAIT_TIMEOUT:-600}
export RAY_py_gcs_connect_timeout_s=$RAY_SYMMETRIC_RUN_CLUSTER_WAIT_TIMEOUT RAY_raylet_start_wait_time_s=300
# Seconds after which the other nodes take the first one for ended, and end too.
export RAY_gcs_rpc_server_reconnect_timeout_s=20

# Of a node that Slurm shares out, Ray would count all CPUs.
exec ray symmetric-run --address "$1" --min-nodes "$2" ${SLURM_CPUS_ON_NODE:+--num-cpus="$SLURM_CPUS_ON_NODE"} "${@:4}"
