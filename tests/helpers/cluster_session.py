"""In the trainer's place on a cluster of two nodes: what a run finds there, as JSON in the run's folder.

The environment names interpreters of environments with another version of the plug-in (OTHER) and without it (WITHOUT),
a folder on a full disk (FULL), and a script that says hello (HELLO).
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import ray
from ray._common.utils import get_default_ray_temp_dir

ENTRYPOINT = Path(__file__).parents[2] / "recipes" / "cluster" / "entrypoint.sh"
ARGUMENTS = sys.argv[1:]
(folder,) = (Path(word.partition("=")[2]) for word in ARGUMENTS if word.startswith("trainer.default_local_dir="))
address, token_file = os.environ["RAY_ADDRESS"], os.environ["RAY_AUTH_TOKEN_PATH"]
plain = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")} | {"RAY_AUTH_MODE": "token"}


def start(*command, env=None, cwd=None):
    return subprocess.Popen(command, env=env, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def end(process):
    return {"output": process.communicate()[0], "code": process.returncode}


def node(python, name):
    """A further node of Ray on this machine."""
    ports = ["--dashboard-agent-listen-port=0", f"--temp-dir={get_default_ray_temp_dir()}/{name}"]
    return [python, "-m", "ray.scripts.scripts", "start", f"--address={address}", "--num-cpus=2", *ports, "--block"]


found = {"left over": sorted(path.name for path in folder.glob("stop*")), "token file": token_file}

# Neither a driver nor a node gets in with another token; a driver without any does not either.
wrong = plain | {"RAY_AUTH_TOKEN": "0" * 64}
driver = [sys.executable, "-c", "import ray, sys; ray.init(sys.argv[1]); print(len(ray.nodes()))", address]
stranger = start(*driver, env=wrong)
nobody = start(*driver, env=plain | {"HOME": "/nonexistent"})
intruder = start(*node(sys.executable, "intruder"), env=wrong)

ray.init(log_to_driver=False)
found["nodes"] = sorted([n["NodeManagerHostname"], n["NodeManagerAddress"]] for n in ray.nodes() if n["Alive"])
found["slots"] = ray.cluster_resources()["GPU"]
found["marks"] = [
    ray.get(
        ray.remote(num_cpus=0)(lambda: os.environ["CPPO_VERL_TEST_RUN"])
        .options(scheduling_strategy=ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(n["NodeID"], False))
        .remote()
    )
    for n in ray.nodes()
]
listening = [c.laddr for c in psutil.net_connections("tcp") if c.status == psutil.CONN_LISTEN]
found["dashboard"] = sorted({a.ip for a in listening if a.port == 8265})
ray.shutdown()

# The same entrypoint by Ray's own job server.
submit = ["ray", "job", "submit", "--address", "http://127.0.0.1:8265", "--runtime-env-json"]
submit += [json.dumps({"env_vars": {"IN_PLACE_OF_THE_TRAINER": os.environ["HELLO"]}}), "--", str(ENTRYPOINT)]
found["job"] = end(start(*submit, *ARGUMENTS))

# What a run would miss, on both nodes and on one that has another version of the plug-in and one without it.
# (a checkout on PYTHONPATH, or as a driver's folder, would be everywhere)
own = {k: v for k, v in os.environ.items() if k != "PYTHONPATH" and not k.startswith("WANDB_")}
missing = ["trainer.nnodes=5", "trainer.logger=[wandb]", f"trainer.default_local_dir={os.environ['FULL']}"]
missing += ["data.train_files=/nowhere/train.parquet", "actor_rollout_ref.model.path=no-one/no-model"]
never = own | {"HF_HUB_OFFLINE": "1", "IN_PLACE_OF_THE_TRAINER": os.environ["HELLO"]}
others = []
for name in ("OTHER", "WITHOUT"):
    other = start(*node(os.environ[name], name.lower()), env=own)
    others.append(other)
    # one after the other: Ray gives a node's agent fifteen seconds to start
    while "will now block forever" not in (line := other.stdout.readline()):
        assert line, f"{name} ended: {other.wait()}"
refused = start(str(ENTRYPOINT), *ARGUMENTS, *missing, env=never, cwd="/")  # waits a minute for a fifth node
found["refused"], found["stranger"], found["nobody"], found["intruder"] = map(
    end, (refused, stranger, nobody, intruder)
)
for other in others:
    other.terminate()
    other.wait()

(folder / "found.json").write_text(json.dumps(found))
print("the session waits for a request to stop", flush=True)
while not (folder / "stop").exists():
    time.sleep(0.5)
reason = (folder / "stop").read_text()
(folder / "stop").unlink()
(folder / "stopped").write_text(f"stopped after step 1 of 2: {reason}")
