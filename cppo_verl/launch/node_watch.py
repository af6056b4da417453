"""Ends a run when a node of its Ray cluster dies: ``python -m cppo_verl.launch.node_watch PID``.

What needs the node fails then, and Ray's log names it. But a trainer that waits for responses from there waits for
ever. recipes/cluster/entrypoint.sh therefore starts this beside the trainer.
"""

import logging
import sys
import time

import psutil
import ray

INTERVAL = 2.0
"""Seconds between two questions which nodes are alive."""
GRACE = 10.0
"""Seconds for the run to end with an error of its own, which says more, and again to obey SIGTERM."""
REMOVED_IDLE = 4
"""Ray's NodeDeathInfo.AUTOSCALER_DRAIN_IDLE: the cluster gave the node back because it was idle."""


def watch(run: psutil.Process) -> int:
    """Wait for the end of ``run``; end it when a node that is alive now has died. Return 1 in that case, else 0."""
    members = {node["NodeID"] for node in ray.nodes() if node["Alive"]}
    while run.is_running() and run.status() != psutil.STATUS_ZOMBIE:
        dead = [node for node in ray.nodes() if node["NodeID"] in members and not node["Alive"]]
        if lost := [node for node in dead if node["DeathReason"] != REMOVED_IDLE]:
            for node in lost:
                name = f"{node['NodeManagerHostname']} ({node['NodeManagerAddress']})"
                print(f"node {name} has died: {node['DeathReasonMessage']}; the run ends", file=sys.stderr, flush=True)
            end(run)
            return 1
        time.sleep(INTERVAL)
    return 0


def end(run: psutil.Process) -> None:
    """End ``run`` by SIGTERM, and by SIGKILL if it does not obey."""
    for send in (lambda: None, run.terminate, run.kill):
        try:
            send()
            run.wait(GRACE)
            return
        except psutil.TimeoutExpired:
            continue
        except psutil.NoSuchProcess:
            return


if __name__ == "__main__":
    ray.init("auto", log_to_driver=False, logging_level=logging.ERROR)
    sys.exit(watch(psutil.Process(int(sys.argv[1]))))
