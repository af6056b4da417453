"""What a cluster's nodes are asked for; tests/integration/test_cluster.py asks them."""

import pytest
import torch
from commands import GRPO
from safetensors.torch import save_file

from cppo_verl.doctor.checks import Report, _cpus
from cppo_verl.doctor.cluster import LEAST_FREE, _check_slots, _checkpoint_share


def test_a_checkpoint_takes_twelve_bytes_a_parameter_split_over_the_nodes(tmp_path):
    save_file({"a": torch.zeros(3, 4), "b": torch.zeros(2)}, tmp_path / "model-1.safetensors")
    save_file({"c": torch.zeros(10)}, tmp_path / "model-2.safetensors")
    assert _checkpoint_share(str(tmp_path), 2) == 12 * 24 // 2
    assert _checkpoint_share("Qwen/Qwen3-8B", 2) == LEAST_FREE


@pytest.mark.parametrize("content", [b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", b""])
def test_weights_that_are_none_are_named(content, tmp_path):
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=r"/model.safetensors is cut off, or a pointer of Git LFS: download it again"):
        _checkpoint_share(str(tmp_path), 1)


SEPARATE = ["trainer.v1.trainer_mode=cppo_separate_async", "actor_rollout_ref.rollout.nnodes=1"]


@pytest.mark.parametrize(
    ("cpus", "gpus", "overrides", "failed"),
    [
        (64, 8, [], []),
        (29, 8, [], []),  # 2 x 24 with the GPUs, 8 units of storage and their controller make 57
        (28, 8, [], ["CPUs"]),
        (33, 8, ["trainer.nnodes=1"], []),
        (32, 8, ["trainer.nnodes=1"], ["CPUs"]),
        (64, 4, [], ["GPUs", "CPUs"]),
        (64, 8, SEPARATE, ["GPUs"]),
        (64, 16, SEPARATE, []),
    ],
)
def test_what_verl_reserves_in_ray_must_be_there(compose, capsys, cpus, gpus, overrides, failed):
    config = compose(*GRPO, "+method=cppo", "trainer.nnodes=2", *overrides)
    number = 1 if "trainer.nnodes=1" in overrides else 2
    nodes = [{"NodeManagerAddress": f"10.0.0.{i}", "Resources": {"CPU": cpus, "GPU": gpus}} for i in range(number)]
    _check_slots(Report(), nodes, config)
    lines = [line.split()[:2] for line in capsys.readouterr().out.splitlines()]
    assert [subject for finding, subject in lines if finding == "FAIL"] == failed


@pytest.mark.parametrize("cpus", [32, 33])
def test_too_few_cpus_for_a_ray_of_the_commands_own_are_warned_of(compose, capsys, cpus):
    _cpus(Report(), compose(*GRPO, "+method=cppo", f"ray_kwargs.ray_init.num_cpus={cpus}"))
    warned = "here are 32: add ray_kwargs.ray_init.num_cpus=33 to the command"
    assert (warned in capsys.readouterr().out) is (cpus == 32)
