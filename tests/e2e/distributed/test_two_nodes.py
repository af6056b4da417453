"""verl's trainer on two nodes of this machine, started by the batch script for Slurm."""

import json
import os
import re
import subprocess
import sys

import nodes
import pytest
from nodes import HELPERS, ROOT


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    cluster = nodes.Cluster(tmp_path_factory.mktemp("cluster"))
    yield cluster
    cluster.end()


def write_data_and_model(folder):
    """A task and an untrained model, small enough for two runs of two steps."""
    import pandas
    import torch

    from cppo_verl.data.reasoning_gym import write_parquet
    from cppo_verl.testing import tiny_models

    numbers = {"min_numbers": 5, "max_numbers": 5, "min_value": 10, "max_value": 99, "max_decimals": 0}
    write_parquet("number_sorting", folder / "data", train_size=64, validation_size=16, seed=1, **numbers)
    rows = pandas.read_parquet(folder / "data" / "train.parquet")
    tokenizer = tiny_models.build_tokenizer(
        [prompt[0]["content"] for prompt in rows["prompt"]], [reward["ground_truth"] for reward in rows["reward_model"]]
    )
    torch.manual_seed(1)
    sizes = {"hidden_size": 96, "intermediate_size": 192, "num_hidden_layers": 3, "num_attention_heads": 3}
    model = tiny_models.build_model(tokenizer, num_key_value_heads=3, max_position_embeddings=128, **sizes)
    tiny_models.save(model, tokenizer, folder / "model", "made_by.json", {"made_by": __file__})


@pytest.fixture(scope="module")
def runs(cluster, tmp_path_factory):
    """Two updates of an untrained model: two ranks on one node, and one on each of two."""
    shared = tmp_path_factory.mktemp("shared")
    write_data_and_model(shared)

    def arguments(output):
        output.mkdir()
        for name in ("data", "model"):
            (output / name).symlink_to(shared / name)
        settings = ["--config-dir", str(ROOT / "examples" / "quickstart"), "--config-name", "quickstart"]
        settings += [f"output={output}", "trainer.total_training_steps=2", "trainer.test_freq=-1"]
        settings += ["trainer.save_freq=-1", "trainer.val_before_train=false", "trainer.logger=[console,file]"]
        # one update a step: how verl orders a batch, and so what shares a mini-batch, varies from run to run
        settings += ["data.train_batch_size=16", "actor_rollout_ref.actor.ppo_mini_batch_size=16"]
        settings += ["actor_rollout_ref.rollout.agent.default_agent_loop=seeded"]
        settings += ["reward.custom_reward_function.path=pkg://cppo_verl.testing.tiny_models"]
        return [*settings, "reward.custom_reward_function.name=share_of_digits"]

    def environment(output):
        paths = [str(HELPERS), os.environ.get("PYTHONPATH", "")]
        return {
            "VERL_FILE_LOGGER_PATH": str(output / "metrics.jsonl"),
            "VERL_USE_EXTERNAL_MODULES": "probe",
            "PYTHONPATH": os.pathsep.join(filter(None, paths)),
            "OMP_NUM_THREADS": "1",
        }

    one, two = shared / "one", shared / "two"
    here = [*arguments(one), "trainer.n_gpus_per_node=2", "ray_kwargs.ray_init.num_gpus=2"]
    subprocess.run(
        [sys.executable, "-m", "verl.trainer.main_ppo", *here], env=os.environ | environment(one), check=True
    )
    there = [*arguments(two), "trainer.nnodes=2", "trainer.n_gpus_per_node=1"]
    there += ["ray_kwargs.ray_init.num_cpus=null", "ray_kwargs.ray_init.num_gpus=null"]
    job = cluster.sbatch(*there, environment=environment(two)).finish()
    assert job.code == 0, job.text
    job.requeued = cluster.requeued()
    job.metrics = [
        [json.loads(line)["data"] for line in (output / "metrics.jsonl").read_text().splitlines()]
        for output in (one, two)
    ]
    return job


def test_two_nodes_give_the_losses_of_one(runs):
    one, two = runs.metrics
    assert len(one) == len(two) == 2
    for there, here in zip(one, two, strict=True):
        assert there["critic/score/mean"] == pytest.approx(here["critic/score/mean"], abs=1e-6)
        for name in ("actor/pg_loss", "actor/grad_norm", "response_length/mean"):
            assert there[name] == pytest.approx(here[name], rel=1e-5), name
    assert one[0]["actor/grad_norm"] > 0.01
    assert one[0]["actor/pg_loss"] != one[1]["actor/pg_loss"]


def test_each_node_has_a_rank(runs, cluster):
    # a driver's log names the address of what is on another node
    ranks = re.findall(r"\(WorkerDict pid=\d+(?:, ip=([\d.]+))?\)", runs.text)
    assert set(ranks) == {"", cluster.nodes[1].address}


def test_a_finished_job_leaves_nothing_and_is_not_requeued(runs):
    assert runs.requeued == []
    assert runs.survivors() == []
