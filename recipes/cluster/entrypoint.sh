#!/usr/bin/env bash
# verl's trainer on a Ray cluster that runs, with the trainer's arguments:
#   recipes/cluster/entrypoint.sh --config-dir recipes --config-name paper scale=... method=cppo ...
# First every node is asked whether it can run this command; what is missing is said with the node's name and the way
# out, and nothing is started.
set -euo pipefail

python -m cppo_verl doctor --cluster -- "$@"
exec python -m verl.trainer.main_ppo "$@"
