import os
import subprocess
import sys

import pytest
import torch

from cppo_verl.cli import main
from cppo_verl.doctor.checks import Report, _device

COMMAND = [
    "+method=cppo",
    "+platform=cpu",
    "data.train_files=train.parquet",
    "data.val_files=test.parquet",
    "actor_rollout_ref.model.path=Qwen/Qwen3-0.6B",
]


@pytest.fixture
def doctor(capsys):
    def run(*arguments):
        code = main(["doctor", "--no-ray", *arguments])
        return code, capsys.readouterr().out

    return run


def test_a_sound_environment_and_command(doctor):
    code, out = doctor(*COMMAND)
    assert code == 0, out
    assert "registered: policy losses, trainers, top-K rollout, hydra groups, platform cpu, FSDP2 engine on cpu" in out
    assert "divergence=binary_tv top_k=20 ratio_cap=20.0 delta=0.15 delta_b=0.02 budget=adaptive" in out
    assert "the rollout engine's own log-probabilities (processed_logprobs, temperature 1.0, top_p 1, top_k -1)" in out
    assert "vLLM's kernels          loaded" in out
    assert "FAIL" not in out


def test_what_the_top_k_capture_costs(doctor):
    code, out = doctor(*COMMAND, "divergence=topk_tv", "data.train_batch_size=64", "actor_rollout_ref.rollout.n=8")
    assert code == 0, out
    # 64 x 8 x 512 x 120 bytes
    assert "mu's 20 most likely tokens: 120 bytes a response token, at most 31.5 MB a step of 512 responses" in out


@pytest.mark.process
@pytest.mark.parametrize(
    ("overrides", "finding"),
    [
        (["algorithm.rollout_correction.bypass_mode=false"], "set algorithm.rollout_correction.bypass_mode=true"),
        (["actor_rollout_ref.actor.policy_loss.w_min=2"], "w_min=2 is not permitted: a number in (0, 1]"),
        (["data.train_files=/nowhere/train.parquet"], "data.train_files=/nowhere/train.parquet does not exist"),
        (["actor_rollout_ref.model.pth=x"], "Could not override 'actor_rollout_ref.model.pth'"),
        (["trainer.device=cuda"], "cuda, but this environment runs on cpu: add +platform=cpu to the command"),
    ],
)
def test_what_would_break_a_run_is_found(doctor, overrides, finding):
    code, out = doctor(*COMMAND, *overrides)
    assert code == 1
    assert finding in out


def test_a_command_without_the_method_is_not_cppo(doctor):
    code, out = doctor("+platform=cpu")
    assert code == 1
    assert "add +method=cppo to the command" in out


@pytest.mark.process
def test_a_system_library_that_vllm_lacks_is_named(tmp_path):
    (tmp_path / "libnuma.so.1").touch()  # the loader finds this one first, and cannot use it
    command = [sys.executable, "-m", "cppo_verl", "doctor", "--no-ray"]
    result = subprocess.run(
        command, env=os.environ | {"LD_LIBRARY_PATH": str(tmp_path)}, capture_output=True, text=True
    )
    assert result.returncode == 1
    (failure,) = [line for line in result.stdout.splitlines() if line.startswith("FAIL")]
    assert f"{tmp_path}/libnuma.so.1: file too short: install the system library libnuma1" in failure


def test_a_gpu_platform_without_a_gpu_is_warned_of(capsys):
    from verl.plugin.platform import PlatformRegistry

    if torch.cuda.device_count():
        pytest.skip("this machine has one")
    _device(Report(), PlatformRegistry.get("nvidia")())
    out = capsys.readouterr().out
    assert out.startswith("warn  device ")
    assert "cuda (nvidia), 0 visible here: to train on this machine see its driver and CUDA_VISIBLE_DEVICES" in out


@pytest.mark.trainer
def test_a_ray_worker_is_asked_too(capsys):
    assert main(["doctor"]) == 0
    assert "a Ray worker" in capsys.readouterr().out
