"""The launchers on a real Ray cluster of two nodes: network namespaces of this machine, joined by a bridge."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import yaml
from trainer_run import MARK, Program

from cppo_verl.cli import main
from cppo_verl.launch.agents import head_address
from cppo_verl.launch.cluster import trainer_arguments

ROOT = Path(__file__).parents[2]
HELPERS = ROOT / "tests" / "helpers"
SITE_PACKAGES = Path(psutil.__file__).parents[1]


def sh(*command):
    subprocess.run(command, check=True)


@pytest.fixture(scope="module")
def nodes():
    """Two namespaces, each named by its address."""
    if os.geteuid() or not shutil.which("ip"):
        pytest.skip("network namespaces need root and iproute2")
    number = os.getpid() % 200 + 20
    bridge, names = f"cppo{number}", [f"10.{number}.0.1", f"10.{number}.0.2"]
    try:
        sh("ip", "link", "add", bridge, "type", "bridge")
        sh("ip", "addr", "add", f"10.{number}.0.254/24", "dev", bridge)
        sh("ip", "link", "set", bridge, "up")
        for i, name in enumerate(names):
            sh("ip", "netns", "add", name)
            sh("ip", "link", "add", f"{bridge}{i}", "type", "veth", "peer", "name", "eth0", "netns", name)
            sh("ip", "link", "set", f"{bridge}{i}", "master", bridge, "up")
            sh("ip", "-n", name, "link", "set", "lo", "up")
            sh("ip", "-n", name, "addr", "add", f"{name}/24", "dev", "eth0")
            sh("ip", "-n", name, "link", "set", "eth0", "up")
            sh("ip", "-n", name, "route", "add", "default", "via", f"10.{number}.0.254")
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], stderr=subprocess.DEVNULL)
        subprocess.run(["ip", "link", "del", bridge], stderr=subprocess.DEVNULL)


class Launch(Program):
    """`cluster hosts` on the first node."""

    def __init__(self, nodes, *command, names=None, options=(), environment=None):
        arguments = ["--nodes", ",".join(names or nodes), "--rsh", "ip netns exec"]
        arguments += ["--ray-start", "--num-gpus=1 --num-cpus=16", *options, "--", *command]
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        super().__init__(
            ["ip", "netns", "exec", nodes[0], sys.executable, "-m", "cppo_verl", "cluster", "hosts", *arguments],
            {"PATH": path, "TMPDIR": "/tmp"} | (environment or {}),
            signal.SIGTERM,
            start_new_session=True,
            cwd="/",  # Ray's workers import from a driver's folder, and `python -m` does: not from the checkout
        )


def environment_of_a_node(folder, version):
    """A virtual environment with everything of this one but the plug-in, or with another version of it."""
    sh(sys.executable, "-m", "venv", "--without-pip", str(folder))
    packages = next(folder.glob("lib/python*/site-packages"))
    for entry in SITE_PACKAGES.iterdir():
        if not entry.name.startswith(("cppo_verl", "__editable__.cppo_verl", "__editable___cppo_verl", "__pycache__")):
            (packages / entry.name).symlink_to(entry)
    if version is not None:
        (packages / "cppo_verl").symlink_to(ROOT / "cppo_verl")
        metadata = packages / f"cppo_verl-{version}.dist-info"
        metadata.mkdir()
        (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: cppo-verl\nVersion: {version}\n")
        (metadata / "entry_points.txt").write_text("[verl.plugins]\ncppo_verl = cppo_verl.register\n")
    return folder / "bin" / "python"


@pytest.fixture(scope="module")
def session(nodes, tmp_path_factory):
    folder = tmp_path_factory.mktemp("session")
    full = folder / "full"
    full.mkdir()
    sh("mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(full))
    try:
        command = [sys.executable, str(HELPERS / "cluster_session.py"), str(folder / "found.json"), nodes[1]]
        command += [str(environment_of_a_node(folder / "other", "0.0.9"))]
        command += [str(environment_of_a_node(folder / "without", None)), str(full / "checkpoints")]
        launch = Launch(nodes, *command).finish()
    finally:
        sh("umount", str(full))
    assert launch.code == 0, launch.text
    launch.found = json.loads((folder / "found.json").read_text())
    return launch


@pytest.mark.process
def test_the_command_has_a_cluster_of_all_nodes(session, nodes):
    assert session.found["nodes"] == nodes
    assert session.found["slots"] == 2
    # what the launcher was given, the nodes' workers have
    assert [environment[MARK] for environment in session.found["environments"]] == [session.mark] * 2


@pytest.mark.process
def test_nothing_is_left(session):
    assert session.survivors() == []
    folders = [Path(environment["RAY_AUTH_TOKEN_PATH"]).parent for environment in session.found["environments"]]
    assert len(set(folders)) == 2
    assert not any(folder.exists() for folder in folders)


@pytest.mark.process
def test_the_dashboard_is_on_loopback_alone(session):
    assert session.found["dashboard"] == ["127.0.0.1"]


@pytest.mark.process
def test_nobody_gets_in_without_the_token(session):
    for who in ("stranger", "nobody", "intruder"):
        assert session.found[who]["code"] != 0, who
    assert "InvalidAuthToken" in session.found["stranger"]["output"]
    assert "no authentication token was found" in session.found["nobody"]["output"]
    assert len(session.found["nodes"]) == 2


@pytest.mark.process
def test_the_token_is_on_no_command_line_and_in_no_log(session):
    assert len(session.found["token"]) == 64
    assert not session.found["token on a command line"]
    assert session.found["bytes of logs"] > 10_000
    assert not session.found["token in a log"]
    assert session.found["token"] not in session.text


@pytest.mark.process
def test_a_job_is_checked_run_and_its_log_followed(session):
    assert session.found["job"]["code"] == 0, session.found["job"]["output"]
    assert "hello from a job" in session.found["job"]["output"]
    assert "the versions of this machine, the plug-in registered" in session.found["job"]["output"]
    assert session.found["no token"]["code"] == 1
    assert "RAY_AUTH_TOKEN_PATH must hold the cluster's token" in session.found["no token"]["output"]


@pytest.mark.process
def test_the_doctor_names_each_node_and_the_remedy(session, nodes):
    doctor = session.found["doctor"]
    assert doctor["code"] == 1
    lines = [line for line in doctor["output"].splitlines() if line.startswith("FAIL")]
    first, second = ([line for line in lines if f"{name}  " in line] for name in nodes)
    for text in (
        "data.train_files=/nowhere/train.parquet does not exist there",
        "actor_rollout_ref.model.path=no-one/no-model is neither cached there nor to be had from the hub",
        "a checkpoint takes 1.0 GiB: make room, or name another folder",
        "wandb has no API key there: set WANDB_API_KEY, or WANDB_MODE=offline",
    ):
        assert sum(text in line for line in first) == 1, (text, doctor["output"])
        assert sum(text in line for line in second) == 3, (text, doctor["output"])  # three of the four are there
    assert sum("cppo-verl is 0.0.9, here it is 0.1.0: install the same for" in line for line in second) == 1
    assert sum("cppo-verl is not installed, here it is 0.1.0" in line for line in second) == 1
    assert (
        sum("the plug-in does not load (ModuleNotFoundError: No module named 'cppo_verl')" in line for line in second)
        == 1
    )
    assert any("4 of 5 have joined Ray" in line for line in lines)
    assert any("trainer.nnodes=5 trainer.n_gpus_per_node=1, but in Ray" in line for line in lines)


@pytest.mark.process
@pytest.mark.parametrize(("number", "when"), [(signal.SIGTERM, "started"), (signal.SIGINT, "Ray runs on")])
def test_a_signal_leaves_nothing(nodes, number, when):
    # the command's child is in no session of the launcher's
    launch = Launch(nodes, "bash", "-c", "setsid sleep 1000 & echo started; sleep 1000").read_until(when)
    launch.process.send_signal(number)
    launch.finish()
    assert launch.code == 128 + number
    assert launch.survivors() == []


LISTENS = """
import sys, time
from cppo_verl.artifacts import stop_request
folder = sys.argv[-1].removeprefix("trainer.default_local_dir=")
print("left over:", stop_request.start_over(folder), flush=True)
while (asked := stop_request.requested(folder)) is None:
    time.sleep(0.1)
stop_request.answer(folder, f"stopped after step 1 of 2: {asked}")
"""


@pytest.mark.process
def test_a_signal_asks_a_run_and_what_was_asked_before_is_for_the_run_to_find(nodes, tmp_path):
    """A program in the trainer's place, to which tests/test_trainer.py makes the same request."""
    (tmp_path / "stop").write_text("yesterday's")
    arguments = ["+method=cppo", "+platform=cpu", "trainer.n_gpus_per_node=1", "trainer.logger=[console]"]
    arguments += [f"{key}={tmp_path}" for key in ("data.train_files", "data.val_files")]
    arguments += [f"actor_rollout_ref.model.path={tmp_path}", f"trainer.default_local_dir={tmp_path}"]
    command = [sys.executable, "-c", LISTENS, "verl.trainer.main_ppo", *arguments]
    launch = Launch(nodes, *command, names=nodes[:1]).read_until("left over")
    assert "left over: yesterday's" in launch.text
    launch.process.send_signal(signal.SIGTERM)
    launch.finish()
    assert "cppo_verl cluster: stopped after step 1 of 2: SIGTERM; the same command continues" in launch.text
    assert launch.code == 143
    assert [path.name for path in tmp_path.iterdir()] == ["stopped"]
    assert launch.survivors() == []


@pytest.mark.process
def test_ray_and_the_command_end_also_with_a_launcher_that_is_killed(nodes):
    launch = Launch(nodes, sys.executable, "-c", "import time; print('started', flush=True); time.sleep(1000)")
    launch.read_until("started").process.kill()
    launch.finish()
    assert launch.code == -signal.SIGKILL
    assert launch.survivors() == []


@pytest.mark.process
def test_the_commands_exit_code_and_rays_logs_are_kept_where_it_fails(nodes):
    launch = Launch(nodes, "bash", "-c", "exit 7").finish()
    assert launch.code == 7
    assert launch.survivors() == []
    kept = [Path(line.split()[-1]) for line in launch.text.splitlines() if "Ray's logs are in" in line]
    assert len(kept) == 2
    for folder in kept:
        assert list(folder.rglob("raylet.out"))
        assert not (folder / "token").exists()
        shutil.rmtree(folder)


@pytest.mark.process
def test_a_node_that_never_comes_is_named(nodes, tmp_path):
    script = tmp_path / "rsh"
    script.write_text("#!/bin/sh\nexec sleep 1000\n")
    script.chmod(0o755)
    options = ["--rsh", str(script), "--timeout", "75"]
    launch = Launch(nodes, "touch", str(tmp_path / "ran"), names=[nodes[0], "silent"], options=options).finish()
    assert launch.code == 1
    assert "cluster: silent: Ray does not run there yet; --timeout SECONDS gives it longer" in launch.text
    assert launch.survivors() == []
    assert not (tmp_path / "ran").exists()


@pytest.mark.process
def test_a_node_without_the_plug_in_is_named(nodes, tmp_path):
    python = environment_of_a_node(tmp_path / "without", None)
    rsh = "env -u PYTHONPATH ip netns exec"  # a checkout on PYTHONPATH would bring it
    launch = Launch(nodes, "true", options=["--python", str(python), "--rsh", rsh]).finish()
    assert launch.code == 1
    assert "No module named cppo_verl" in launch.text
    command = f"{rsh} {nodes[1]} {python} -m cppo_verl cluster node"
    assert f"{nodes[1]}: `{command}` ended with exit code 1" in launch.text
    assert "is cppo-verl installed for that interpreter there?" in launch.text
    assert launch.survivors() == []


@pytest.mark.parametrize("missing", ["SLURM_JOB_ID", "SLURM_JOB_NODELIST", "SLURMD_NODENAME"])
def test_a_slurm_variable_that_is_not_there(missing, monkeypatch, capsys):
    for name in ("SLURM_JOB_ID", "SLURM_JOB_NODELIST", "SLURMD_NODENAME"):
        monkeypatch.setenv(name, "1")
    monkeypatch.delenv(missing)
    assert main(["cluster", "slurm", "--", "true"]) == 1
    error = capsys.readouterr().err
    assert f"{missing} is not set" in error
    assert "sbatch recipes/cluster/slurm.sbatch" in error


def test_a_launcher_that_srun_started_several_times(monkeypatch, capsys):
    for name in ("SLURM_JOB_ID", "SLURM_JOB_NODELIST", "SLURMD_NODENAME", "SLURM_PROCID"):
        monkeypatch.setenv(name, "1")
    assert main(["cluster", "slurm", "--", "true"]) == 1
    assert "SLURM_PROCID is 1: start this once, without srun" in capsys.readouterr().err


def test_a_mistake_in_the_command_shows_before_anything_starts(capsys):
    command = ["python", "-m", "verl.trainer.main_ppo", "trainer.nnods=2"]
    assert main(["cluster", "hosts", "--nodes", "127.0.0.1,nowhere", "--", *command]) == 1
    assert "Could not override 'trainer.nnods'" in capsys.readouterr().err
    assert main(["cluster", "hosts", "--nodes", "127.0.0.1"]) == 2
    assert "no command" in capsys.readouterr().err


def test_an_unknown_first_node(capsys):
    assert main(["cluster", "hosts", "--nodes", "no.such.host.invalid", "--", "true"]) == 1
    assert "no.such.host.invalid" in capsys.readouterr().err


@pytest.mark.process
def test_a_mistake_ends_nothing_and_adopts_nothing():
    """The launcher ends all that descends from its process and becomes the parent of orphans, but only with Ray."""
    with subprocess.Popen(["sleep", "60"]) as bystander:
        assert main(["cluster", "hosts", "--nodes", "no.such.host.invalid", "--", "true"]) == 1
        assert bystander.poll() is None
        bystander.kill()
    orphan = psutil.Process(int(subprocess.check_output("sleep 60 >/dev/null & echo $!", shell=True)))
    parent = orphan.ppid()
    orphan.kill()
    assert parent != os.getpid()


def test_the_manifests_numbers_fit_its_command():
    """(KubeRay's own schemas were tried by hand, see recipes/cluster/README.md.)"""
    job = yaml.safe_load((ROOT / "recipes" / "cluster" / "kuberay.yaml").read_text())["spec"]
    cluster = job["rayClusterSpec"]
    (workers,) = cluster["workerGroupSpecs"]
    pods = [cluster["headGroupSpec"]["template"]["spec"], workers["template"]["spec"]]
    command = job["entrypoint"].split()
    assert command[:6] == ["python", "-m", "cppo_verl", "cluster", "run", "--"]
    assert f"trainer.nnodes={workers['replicas']}" in command
    assert workers["replicas"] == workers["minReplicas"] == workers["maxReplicas"]
    resources = workers["template"]["spec"]["containers"][0]["resources"]
    assert f"trainer.n_gpus_per_node={resources['limits']['nvidia.com/gpu']}" in command
    assert cluster["authOptions"] == {"mode": "token"}
    assert f"ray[default]=={cluster['rayVersion']}" in (ROOT / "requirements" / "gpu.txt").read_text().split()
    assert job["shutdownAfterJobFinishes"]
    for pod in [*pods, job["submitterPodTemplate"]["spec"]]:
        assert pod["securityContext"]["runAsNonRoot"]
    for pod in pods:
        assert pod["containers"][0]["volumeMounts"] == pods[0]["containers"][0]["volumeMounts"]
        assert pod["containers"][0]["securityContext"]["allowPrivilegeEscalation"] is False


def test_the_trainers_arguments_and_the_heads_address():
    assert trainer_arguments(["python", "-m", "verl.trainer.main_ppo", "a=1", "--cfg"]) == ["a=1", "--cfg"]
    assert trainer_arguments(["bash", "run.sh"]) is None
    assert head_address(["10.1.2.3", "b"]) == "10.1.2.3"
    assert head_address(["localhost", "b"]) is None


# --- verl's trainer on two nodes ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def runs(nodes, tmp_path_factory):
    """Two updates of an untrained model: two ranks on one node, and one on each of two."""
    import pandas
    import torch

    from cppo_verl.data.reasoning_gym import write_parquet
    from cppo_verl.testing import tiny_models

    shared = tmp_path_factory.mktemp("shared")
    numbers = {"min_numbers": 5, "max_numbers": 5, "min_value": 10, "max_value": 99, "max_decimals": 0}
    write_parquet("number_sorting", shared / "data", train_size=64, validation_size=16, seed=1, **numbers)
    rows = pandas.read_parquet(shared / "data" / "train.parquet")
    tokenizer = tiny_models.build_tokenizer(
        [prompt[0]["content"] for prompt in rows["prompt"]], [reward["ground_truth"] for reward in rows["reward_model"]]
    )
    torch.manual_seed(1)
    sizes = {"hidden_size": 96, "intermediate_size": 192, "num_hidden_layers": 3, "num_attention_heads": 3}
    model = tiny_models.build_model(tokenizer, num_key_value_heads=3, max_position_embeddings=128, **sizes)
    tiny_models.save(model, tokenizer, shared / "model", "made_by.json", {"made_by": __file__})

    def command(output):
        output.mkdir()
        for name in ("data", "model"):
            (output / name).symlink_to(shared / name)
        python = [sys.executable, "-m", "verl.trainer.main_ppo"]
        settings = ["--config-dir", str(ROOT / "examples" / "quickstart"), "--config-name", "quickstart"]
        settings += [f"output={output}", "trainer.total_training_steps=2", "trainer.test_freq=-1"]
        settings += ["trainer.save_freq=-1", "trainer.val_before_train=false", "trainer.logger=[console,file]"]
        # one update a step: how verl orders a batch, and so what shares a mini-batch, varies from run to run
        settings += ["data.train_batch_size=16", "actor_rollout_ref.actor.ppo_mini_batch_size=16"]
        settings += ["actor_rollout_ref.rollout.agent.default_agent_loop=seeded"]
        settings += ["reward.custom_reward_function.path=pkg://cppo_verl.testing.tiny_models"]
        return [*python, *settings, "reward.custom_reward_function.name=share_of_digits"]

    def environment(output):
        paths = [str(HELPERS), os.environ.get("PYTHONPATH", "")]
        return {
            "VERL_FILE_LOGGER_PATH": str(output / "metrics.jsonl"),
            "VERL_USE_EXTERNAL_MODULES": "probe",
            "PYTHONPATH": os.pathsep.join(filter(None, paths)),
            "OMP_NUM_THREADS": "1",
        }

    one, two = shared / "one", shared / "two"
    arguments = ["trainer.n_gpus_per_node=2", "ray_kwargs.ray_init.num_gpus=2"]
    subprocess.run([*command(one), *arguments], env=os.environ | environment(one), check=True)
    arguments = ["trainer.nnodes=2", "trainer.n_gpus_per_node=1"]
    arguments += ["ray_kwargs.ray_init.num_cpus=null", "ray_kwargs.ray_init.num_gpus=null"]
    # both namespaces have this machine's name, which gloo would look up
    two_nodes = environment(two) | {"GLOO_SOCKET_IFNAME": "eth0"}
    launch = Launch(nodes, *command(two), *arguments, environment=two_nodes).finish()
    assert launch.code == 0, launch.text
    launch.metrics = [
        [json.loads(line)["data"] for line in (output / "metrics.jsonl").read_text().splitlines()]
        for output in (one, two)
    ]
    return launch


@pytest.mark.trainer
def test_two_nodes_give_the_losses_of_one(runs, nodes):
    one, two = runs.metrics
    assert len(one) == len(two) == 2
    for there, here in zip(one, two, strict=True):
        assert there["critic/score/mean"] == pytest.approx(here["critic/score/mean"], abs=1e-6)
        for name in ("actor/pg_loss", "actor/grad_norm", "response_length/mean"):
            assert there[name] == pytest.approx(here[name], rel=1e-5), name
    assert one[0]["actor/grad_norm"] > 0.01
    assert one[0]["actor/pg_loss"] != one[1]["actor/pg_loss"]


@pytest.mark.trainer
def test_each_node_had_a_rank(runs, nodes):
    # a driver's log names the address of what is on another node
    ranks = re.findall(r"\(WorkerDict pid=\d+(?:, ip=([\d.]+))?\)", runs.text)
    assert set(ranks) == {"", nodes[1]}
    assert runs.survivors() == []
