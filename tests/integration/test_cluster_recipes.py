"""What the ways to several nodes run: every command that a page or a manifest shows composes to the run it names."""

import os
import shlex
import subprocess

import pytest
import yaml
from documented import ROOT, shown

from cppo_verl.doctor.checks import compose_command

CLUSTER = ROOT / "recipes" / "cluster"
ENTRYPOINT = "recipes/cluster/entrypoint.sh"
PAGES = ("examples/README.md", "docs/clusters.md")
SHOWN = [words for page in PAGES for part in (ENTRYPOINT, "slurm.sbatch") for words in shown(page, part)]


@pytest.fixture(autouse=True)
def in_the_checkout(monkeypatch):
    monkeypatch.chdir(ROOT)


def trained(words):
    """The config of the arguments that ``words`` hand to the trainer."""
    (at,) = (i for i, word in enumerate(words) if word.endswith(("/entrypoint.sh", "/slurm.sbatch")))
    there = ("/opt/cppo_verl/recipes", "/shared/cppo_verl/recipes")
    return compose_command(["recipes" if word in there else word for word in words[at + 1 :]])


@pytest.mark.parametrize("words", SHOWN, ids=lambda words: words[0])
def test_a_shown_command_trains_on_the_nodes_that_it_names(words):
    config = trained(words)
    assert config.actor_rollout_ref.actor.policy_loss.loss_mode == "cppo"
    assert config.trainer.default_local_dir == "/shared/runs/30b-cppo/checkpoints"
    if words[0] == "sbatch":
        assert f"--nodes={config.trainer.nnodes}" in words
    if words[0] == "recipes/cluster/node.sh":
        assert words[2] == str(config.trainer.nnodes)
        assert words[4] == "--"


def test_every_way_is_shown():
    assert {words[0] for words in SHOWN} >= {"sbatch", "recipes/cluster/node.sh", "RAY_AUTH_MODE=token"}


def test_the_batch_script_shows_a_command_that_composes():
    script = (CLUSTER / "slurm.sbatch").read_text()
    comment = script.partition("#   sbatch")[2].partition("\n# Submit")[0]
    words = shlex.split("sbatch" + comment.replace("\\\n#", " "))
    assert f"--nodes={trained(words).trainer.nnodes}" in words


def test_the_numbers_of_kuberays_manifest_fit_its_command():
    """(KubeRay's own schemas were tried by hand, see docs/clusters.md.)"""
    job = yaml.safe_load((CLUSTER / "kuberay.yaml").read_text())["spec"]
    cluster = job["rayClusterSpec"]
    (workers,) = cluster["workerGroupSpecs"]
    pods = [cluster["headGroupSpec"]["template"]["spec"], workers["template"]["spec"]]
    command = job["entrypoint"].split()
    assert command[0] == f"/opt/cppo_verl/{ENTRYPOINT}"
    trainer = trained(command).trainer
    assert trainer.nnodes == workers["replicas"] == workers["minReplicas"] == workers["maxReplicas"]
    resources = workers["template"]["spec"]["containers"][0]["resources"]
    assert trainer.n_gpus_per_node == resources["limits"]["nvidia.com/gpu"]
    assert cluster["authOptions"] == {"mode": "token"}
    assert f"ray[default]=={cluster['rayVersion']}" in (ROOT / "requirements" / "gpu.txt").read_text().split()
    assert job["shutdownAfterJobFinishes"]
    for pod in [*pods, job["submitterPodTemplate"]["spec"]]:
        assert pod["securityContext"]["runAsNonRoot"]
    for pod in pods:
        assert pod["containers"][0]["volumeMounts"] == pods[0]["containers"][0]["volumeMounts"]
        assert pod["containers"][0]["securityContext"]["allowPrivilegeEscalation"] is False


def test_the_numbers_of_skypilots_task_fit_its_command():
    """(SkyPilot's own schema was tried by hand, see docs/clusters.md.)"""
    task = yaml.safe_load((CLUSTER / "skypilot.yaml").read_text())
    run = task["run"].replace("\\\n", " ")
    (command,) = (line for line in run.splitlines() if ENTRYPOINT in line)
    trainer = trained(shlex.split(command)).trainer
    assert trainer.nnodes == task["num_nodes"]
    assert task["resources"]["accelerators"].endswith(f":{trainer.n_gpus_per_node}")
    assert trainer.default_local_dir.startswith(next(iter(task["file_mounts"])))
    # The token comes from whoever launches, and no file holds it.
    assert task["secrets"]["RAY_AUTH_TOKEN"] == ""
    assert "export RAY_AUTH_MODE=token" in run


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        ("", 2, "usage: node.sh HEAD:PORT NODES TOKEN_FILE"),
        ("10.0.0.1:6379 2 token true", 2, "usage:"),
        ("10.0.0.1 2 token -- true", 2, "usage:"),
        ("10.0.0.1:6379 2 nowhere -- true", 1, "no token to be read in nowhere on"),
        ("10.0.0.1:6379 2 empty -- true", 1, "no token to be read in empty on"),
        ("10.0.0.1:6379 2 token --num-gpus 8 -- python 'a b'", 0, ""),
    ],
)
def test_a_node_says_what_is_wrong_with_its_line_before_it_starts_ray(tmp_path, arguments, code, said):
    (tmp_path / "token").write_text("secret")
    (tmp_path / "empty").touch()
    (tmp_path / "ray").write_text("#!/bin/sh\nprintf '<%s>' \"$@\"\n")
    (tmp_path / "ray").chmod(0o755)
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    environment.pop("SLURM_CPUS_ON_NODE", None)
    line = [CLUSTER / "node.sh", *shlex.split(arguments)]
    result = subprocess.run(line, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert (result.returncode, said in result.stderr) == (code, True), result.stderr
    started = "<symmetric-run><--address><10.0.0.1:6379><--min-nodes><2><--num-gpus><8><--><python><a b>"
    assert result.stdout == ("" if code else started)


def test_a_job_whose_run_cannot_be_asked_to_stop_waits_for_its_end(tmp_path):
    """As on a full disk. Slurm ends what the batch script leaves behind."""
    programs = {
        "python": f'case " $* " in *" --cfg "*) echo "{tmp_path}/a run";; *) echo "no room" >&2; exit 1;; esac',
        "ray": "mkdir $HOME/.ray && touch $HOME/.ray/auth_token",
        "scontrol": "echo localhost",
        "srun": "kill -USR1 $PPID; sleep 2; exit 7",
    }
    for name, script in programs.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{script}\n".replace("$HOME/", '"$HOME"/'))
        (tmp_path / name).chmod(0o755)
    slurm = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "localhost", "SLURM_JOB_NUM_NODES": "1"}
    environment = os.environ | slurm | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    line = ["bash", CLUSTER / "slurm.sbatch"]
    result = subprocess.run(line, env=environment, capture_output=True, text=True)
    assert "no room" in result.stderr
    assert "the job does not go back to the queue" in result.stdout
    assert result.returncode == 7
