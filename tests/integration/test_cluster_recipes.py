"""What the ways to several nodes run: every command that a page or a manifest shows composes to the run it names."""

import shlex

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
