"""The command that the cluster tests start through the launcher: what a run would find, as JSON in argv[1].

argv[2] is the second node's namespace, argv[3] and argv[4] are interpreters of environments with another version of the
plug-in and without it, argv[5] a folder on a full disk.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import psutil
import ray

result, second, other_version, without, full = sys.argv[1:]
token = Path(os.environ["RAY_AUTH_TOKEN_PATH"]).read_text()
plain = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")} | {"RAY_AUTH_MODE": "token"}
address = os.environ["RAY_ADDRESS"]


def start(*command, env=None):
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def end(process):
    return {"output": process.communicate()[0], "code": process.returncode}


def node(python, folder):
    ports = ["--dashboard-agent-listen-port=0", f"--temp-dir={Path(os.environ['RAY_AUTH_TOKEN_PATH']).parent / folder}"]
    command = [python, "-m", "ray.scripts.scripts", "start", f"--address={address}", "--num-cpus=2", *ports]
    return ["ip", "netns", "exec", second, *command, "--block"]


found = {}

# Neither a driver nor a node gets in with another token; a driver without any does not either.
wrong = plain | {"RAY_AUTH_TOKEN": "0" * 64}
driver = [sys.executable, "-c", "import ray, sys; ray.init(sys.argv[1]); print(len(ray.nodes()))", address]
stranger = start(*driver, env=wrong)
nobody = start(*driver, env=plain | {"HOME": "/nonexistent"})
intruder = start(*node(sys.executable, "intruder"), env=wrong)

ray.init(log_to_driver=False)
found["nodes"] = sorted(n["NodeManagerAddress"] for n in ray.nodes() if n["Alive"])
found["slots"] = ray.cluster_resources()["GPU"]
found["environments"] = [
    ray.get(
        ray.remote(num_cpus=0)(lambda: dict(os.environ))
        .options(scheduling_strategy=ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(n["NodeID"], False))
        .remote()
    )
    for n in ray.nodes()
]
dashboard = ray._private.worker.global_worker.node.address_info["webui_url"]
found["dashboard"] = sorted(
    {
        c.laddr.ip
        for c in psutil.net_connections("tcp")
        if c.status == psutil.CONN_LISTEN and c.laddr.port == int(dashboard.rsplit(":", 1)[1])
    }
)
ray.shutdown()

found["stranger"], found["nobody"], found["intruder"] = end(stranger), end(nobody), end(intruder)

# A job by Ray's own job server, and a command of its that fails.
submit = [sys.executable, "-m", "cppo_verl", "cluster", "submit", "--address", f"http://{dashboard}", "--"]
found["job"] = end(start(*submit, "python", "-c", "print('hello from a job')"))
found["no token"] = end(start(*submit, "true", env=plain | {"HOME": "/nonexistent"}))

# What a run would miss, on both nodes and on one that has another version of the plug-in and one without it.
# (a checkout on PYTHONPATH would be everywhere)
own = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"RAY_raylet_start_wait_time_s": "300"}
others = []
for python, folder in ((other_version, "other"), (without, "without")):
    other = start(*node(python, folder), env=own)
    others.append(other)
    # one after the other: Ray gives a node's agent fifteen seconds to start
    while "will now block forever" not in (line := other.stdout.readline()):
        assert line, f"{folder} ended: {other.wait()}"
doctor = [sys.executable, "-m", "cppo_verl", "doctor", "--cluster", "--nodes=4", "--"]
doctor += ["+method=cppo", "+platform=cpu", "trainer.nnodes=5", "trainer.n_gpus_per_node=1", "trainer.logger=[wandb]"]
doctor += ["data.train_files=/nowhere/train.parquet", "data.val_files=x.parquet", f"trainer.default_local_dir={full}"]
doctor += ["actor_rollout_ref.model.path=no-one/no-model"]
environment = {k: v for k, v in os.environ.items() if not k.startswith("WANDB_")} | {"HF_HUB_OFFLINE": "1"}
found["doctor"] = end(start(*doctor, env=environment))
for other in others:
    other.terminate()
    other.wait()

command_lines = []
for process in psutil.process_iter():
    try:
        command_lines += process.cmdline()
    except psutil.Error:
        continue
logs = b"".join(p.read_bytes() for p in Path(os.environ["RAY_AUTH_TOKEN_PATH"]).parent.rglob("logs/*") if p.is_file())
found["token on a command line"] = any(token in word for word in command_lines)
found["token in a log"] = token.encode() in logs
found["bytes of logs"] = len(logs)
found["token"] = token
Path(result).write_text(json.dumps(found))
