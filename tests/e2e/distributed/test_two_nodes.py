"""verl's trainer on two nodes of this machine, started by the batch script for Slurm."""

import os
import re

import nodes
import pytest
from nodes import HELPERS
from trainer_run import QUICKSTART, link, metrics
from two_ranks import SETTINGS


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    cluster = nodes.Cluster(tmp_path_factory.mktemp("cluster"))
    yield cluster
    cluster.end()


@pytest.fixture(scope="module")
def job(cluster, interrupted, tmp_path_factory):
    """The first two steps of `on_policy` with a rank on each of two nodes."""
    output = tmp_path_factory.mktemp("two_nodes")
    link(interrupted, output)
    (output / "logs").mkdir()
    arguments = ["--config-dir", str(QUICKSTART.parent), "--config-name", "quickstart", f"output={output}", *SETTINGS]
    arguments += ["trainer.total_training_steps=2", "trainer.test_freq=-1", "trainer.save_freq=-1"]
    arguments += ["trainer.val_before_train=false", "trainer.nnodes=2", "trainer.n_gpus_per_node=1"]
    arguments += ["ray_kwargs.ray_init.num_cpus=null", "ray_kwargs.ray_init.num_gpus=null"]
    environment = {
        "VERL_FILE_LOGGER_PATH": str(output / "logs" / "metrics-0.jsonl"),
        "VERL_USE_EXTERNAL_MODULES": "probe",
        "PYTHONPATH": os.pathsep.join(filter(None, [str(HELPERS), os.environ.get("PYTHONPATH", "")])),
        "OMP_NUM_THREADS": "1",
    }
    job = cluster.sbatch(*arguments, environment=environment).finish()
    assert job.code == 0, job.text
    job.requeued = cluster.requeued()
    job.metrics = metrics(output, 0)
    return job


def test_two_nodes_give_the_losses_of_one(job, on_policy):
    one, two = metrics(on_policy.output, 0), job.metrics
    assert list(two) == [1, 2]
    for step in two:
        assert two[step]["critic/score/mean"] == pytest.approx(one[step]["critic/score/mean"], abs=1e-6)
        assert two[step]["response_length/mean"] == pytest.approx(one[step]["response_length/mean"], rel=1e-6)
        # How verl orders a batch, and so what shares a micro-batch, varies from run to run.
        for name in ("actor/pg_loss", "actor/grad_norm", "actor/kl_loss"):
            assert two[step][name] == pytest.approx(one[step][name], rel=1e-3, abs=1e-6), name
    assert two[1]["actor/grad_norm"] > 0.01
    assert two[1]["actor/pg_loss"] != two[2]["actor/pg_loss"]


def test_each_node_has_a_rank(job, cluster):
    # a driver's log names the address of what is on another node
    ranks = re.findall(r"\(WorkerDict pid=\d+(?:, ip=([\d.]+))?\)", job.text)
    assert set(ranks) == {"", cluster.nodes[1].address}


def test_a_finished_job_leaves_nothing_and_is_not_requeued(job):
    assert job.requeued == []
    assert job.survivors() == []
