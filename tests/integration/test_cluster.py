"""The ways to several nodes, with Ray on two nodes of this machine and a program in the trainer's place.

tests/e2e/distributed/test_two_nodes.py trains there.
"""

import json
import signal
import sys
import sysconfig
from pathlib import Path

import nodes
import psutil
import pytest
from nodes import ROOT, sh

SITE_PACKAGES = Path(sysconfig.get_path("purelib"))
RAYLET = str(SITE_PACKAGES / "ray/core/src/ray/raylet/raylet")
ENTRYPOINT = str(ROOT / "recipes" / "cluster" / "entrypoint.sh")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    cluster = nodes.Cluster(tmp_path_factory.mktemp("cluster"))
    yield cluster
    cluster.end()


def arguments(folder):
    """Of a training command, all files of which are there."""
    folder.mkdir(exist_ok=True)
    settings = ["+method=cppo", "+platform=cpu", "trainer.nnodes=2", "trainer.n_gpus_per_node=1"]
    settings += [f"{key}={folder}" for key in ("data.train_files", "data.val_files", "actor_rollout_ref.model.path")]
    return [*settings, "trainer.logger=[console]", f"trainer.default_local_dir={folder}"]


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


# --- Slurm: a session on both nodes, and the warning of a preempting scheduler ----------------------------------


@pytest.fixture(scope="module")
def session(cluster, tmp_path_factory):
    folder = tmp_path_factory.mktemp("session")
    full = folder / "full"
    full.mkdir()
    (folder / "hello.py").write_text("print('hello in place of the trainer')")
    environment = {
        "IN_PLACE_OF_THE_TRAINER": str(nodes.HELPERS / "cluster_session.py"),
        "OTHER": str(environment_of_a_node(folder / "other", "0.0.9")),
        "WITHOUT": str(environment_of_a_node(folder / "without", None)),
        "FULL": str(full / "checkpoints"),
        "HELLO": str(folder / "hello.py"),
    }
    run = folder / "run"
    command = arguments(run)
    (run / "stop").write_text("yesterday's")
    # before the nodes' Ray starts, as a mount of a node is a copy
    for node in cluster.nodes:
        sh(*node.on("mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(full)))
    job = cluster.sbatch(*command, environment=environment)
    job.read_until("the session waits for a request to stop")
    job.found = json.loads((run / "found.json").read_text())
    token_file = Path(job.found["token file"])
    job.token = token_file.read_text()
    job.modes = [path.stat().st_mode & 0o777 for path in (token_file, *token_file.parents[:2])]
    job.command_lines = [word for process in psutil.process_iter() for word in command_line(process)]
    job.process.send_signal(signal.SIGUSR1)
    job.finish()
    job.requeued = cluster.requeued()
    job.files = sorted(path.name for path in run.iterdir())
    job.logs = b"".join(node.logs() for node in cluster.nodes)
    return job


def command_line(process):
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def test_a_slurm_job_has_ray_on_all_nodes_with_the_jobs_environment(session, cluster):
    assert session.found["nodes"] == [[node.name, node.address] for node in cluster.nodes]
    assert session.found["slots"] == 2
    assert session.found["marks"] == [session.mark] * 2


def test_every_node_is_checked_before_the_run(session, cluster):
    before, _, _ = session.text.partition("the session waits")
    for node in cluster.nodes:
        assert f"{node.name} {node.address}" in before
    assert before.count("the same versions as here, the plug-in registered") == 2


def test_the_warning_of_slurm_ends_the_run_after_its_step_and_requeues_the_job(session):
    assert "stopped after step 1 of 2: the warning of Slurm; the same command continues" in session.text
    assert session.code == 143
    assert session.requeued == ["requeue 7"]


def test_a_request_from_before_the_job_is_removed(session):
    assert session.found["left over"] == []


def test_a_job_leaves_no_process_and_no_token(session):
    assert session.survivors() == []
    assert session.files == ["found.json", "stopped"]


def test_the_dashboard_listens_on_loopback_alone(session):
    assert session.found["dashboard"] == ["127.0.0.1"]


def test_drivers_and_nodes_without_the_token_are_refused(session):
    for who in ("stranger", "nobody", "intruder"):
        assert session.found[who]["code"] != 0, who
    assert "InvalidAuthToken" in session.found["stranger"]["output"]
    assert "no authentication token was found" in session.found["nobody"]["output"]
    assert len(session.found["nodes"]) == 2


def test_the_token_is_in_a_file_of_its_owner_alone(session):
    assert len(session.token) == 64
    assert session.modes == [0o600, 0o700, 0o700]


def test_the_token_is_on_no_command_line_and_in_no_log(session):
    assert not any(session.token in word for word in session.command_lines)
    assert len(session.logs) > 10_000
    assert session.token.encode() not in session.logs
    assert session.token not in session.text


def test_a_ray_job_runs_the_same_entrypoint(session):
    job = session.found["job"]
    assert job["code"] == 0, job["output"]
    assert job["output"].count("the same versions as here, the plug-in registered") == 2
    assert "hello in place of the trainer" in job["output"]


def test_the_cluster_check_names_each_node_and_the_remedy_and_starts_nothing(session, cluster):
    refused = session.found["refused"]
    assert refused["code"] == 1
    assert "hello in place of the trainer" not in refused["output"]
    lines = [line for line in refused["output"].splitlines() if line.startswith("FAIL")]
    first, second = ([line for line in lines if f"{node.address}  " in line] for node in cluster.nodes)
    for text in (
        "data.train_files=/nowhere/train.parquet does not exist there",
        "actor_rollout_ref.model.path=no-one/no-model is neither cached there nor to be had from the hub",
        "a checkpoint takes 1.0 GiB: make room, or name another folder",
        "wandb has no API key there: set WANDB_API_KEY, or WANDB_MODE=offline",
    ):
        assert sum(text in line for line in first) == 3, refused["output"]  # three of the four are there
        assert sum(text in line for line in second) == 1, refused["output"]
    for text in (
        "cppo-verl is 0.0.9, here it is 0.1.0: install the same for",
        "cppo-verl is not installed, here it is 0.1.0",
        "the plug-in does not load (ModuleNotFoundError: No module named 'cppo_verl')",
    ):
        assert sum(text in line for line in first) == 1, refused["output"]
    assert any("4 of 5 have joined Ray" in line for line in lines), refused["output"]
    assert any("trainer.nnodes=5 trainer.n_gpus_per_node=1, but in Ray" in line for line in lines)


# --- Slurm: where nothing runs -----------------------------------------------------------------------------------


def test_a_mistake_in_the_arguments_shows_before_anything_starts(cluster, tmp_path):
    job = cluster.sbatch(*arguments(tmp_path / "run"), "trainer.nnods=2", srun=f"touch {tmp_path}/started").finish()
    assert job.code == 1
    assert "Could not override 'trainer.nnods'" in job.text
    assert not (tmp_path / "started").exists()


def test_a_job_whose_ray_did_not_start_fails(cluster, tmp_path):
    """`ray symmetric-run` ends with 0 where `ray start` has failed."""
    job = cluster.sbatch(*arguments(tmp_path / "run"), srun="exit 0").finish()
    assert job.code == 1
    assert "Ray did not start, or ended before the run did" in job.text
    assert cluster.requeued() == []
    assert list((tmp_path / "run").iterdir()) == []


def test_the_runs_own_exit_code_is_the_jobs(cluster, tmp_path):
    assert cluster.sbatch(*arguments(tmp_path / "run"), srun="exit 7").finish().code == 7


def test_a_run_that_fails_after_the_warning_is_not_queued_again(cluster, tmp_path):
    job = cluster.sbatch(*arguments(tmp_path / "run"), srun="kill -USR1 $PPID; sleep 5; exit 7").finish()
    assert (job.code, cluster.requeued()) == (7, [])
    assert "the job does not go back to the queue" in job.text


# --- hosts by hand, and a dead node ------------------------------------------------------------------------------


WAITS = """
import time
import ray
from cppo_verl.plugin.health import Watch

class Server:
    pass

ray.init()
server = ray.remote(Server).options(name="vllm_server_1_0", resources={{"node:{}": 0.1}}).remote()
ray.get(server.__ray_ready__.remote())
with Watch(lambda: None, None, lambda: "the same command continues", lambda: False, None):
    print("the run waits", flush=True)
    time.sleep(1000)  # as the trainer does for responses from a dead node
"""


def test_a_dead_node_is_named_and_ends_the_run_within_a_minute(cluster, tmp_path):
    (tmp_path / "waits.py").write_text(WAITS.format(cluster.nodes[1].address))
    waits = {"IN_PLACE_OF_THE_TRAINER": str(tmp_path / "waits.py")}
    head, other = cluster.by_hand(ENTRYPOINT, *arguments(tmp_path / "run"), environment=waits)
    head.read_until("the run waits")
    (run,) = (p for p in psutil.process_iter() if str(tmp_path / "waits.py") in command_line(p))
    address = cluster.nodes[1].address
    (raylet,) = (p for p in psutil.process_iter() if {RAYLET, f"--node_ip_address={address}"} <= set(command_line(p)))
    raylet.kill()
    run.wait(60)
    head.read_until("has died")
    assert f"on node2, {address}) has died: The actor died because its node has died" in head.text
    assert "; the run ends; the same command continues" in head.text
    for program in (head.finish(), other.finish()):
        assert program.survivors() == []
    assert head.code != 0
