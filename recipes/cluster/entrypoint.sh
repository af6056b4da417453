#!/usr/bin/env bash
# verl's trainer on a Ray cluster that runs, with the trainer's arguments:
#   recipes/cluster/entrypoint.sh --config-dir recipes --config-name paper scale=... method=cppo ...
# First every node is asked whether it can run this command; what is missing is said with the node's name and the way
# out, and nothing is started. A node that dies later ends the run.
set -euo pipefail

python -m cppo_verl doctor --cluster -- "$@"
python -m cppo_verl.launch.node_watch $$ &
exec python -m verl.trainer.main_ppo "$@"
