"""The doctor's whole answer about an environment and a command, processes that it starts included."""

import os
import re
import subprocess
import sys

import pytest
from documented import ROOT

from cppo_verl.cli import main
from cppo_verl.doctor.checks import _installed

COMMAND = [
    "+method=cppo",
    "+platform=cpu",
    "data.train_files=s3://data/train.parquet",
    "data.val_files=s3://data/test.parquet",
    "actor_rollout_ref.model.path=Qwen/Qwen3-0.6B",
]


@pytest.fixture
def doctor(capsys):
    def run(*arguments):
        code = main(["doctor", "--no-ray", *arguments])
        return code, capsys.readouterr().out

    return run


def test_a_sound_environment_and_command_pass(doctor):
    code, out = doctor(*COMMAND)
    assert code == 0, out
    assert "registered: policy losses, trainers, top-K rollout, hydra groups, platform cpu, FSDP2 engine on cpu" in out
    assert "ratio_cap=20.0 divergence=binary_tv top_k=20 delta=0.15 delta_b=0.02 budget=adaptive" in out
    assert "the rollout engine's own log-probabilities (processed_logprobs, temperature 1.0, top_p 1, top_k -1)" in out
    assert "vLLM's kernels          loaded" in out
    assert "FAIL" not in out


def test_the_size_of_the_top_k_capture_is_reported(doctor):
    code, out = doctor(*COMMAND, "divergence=topk_tv", "data.train_batch_size=64", "actor_rollout_ref.rollout.n=8")
    assert code == 0, out
    # 64 x 8 x 512 x 120 bytes
    assert "mu's 20 most likely tokens: 120 bytes a response token, at most 31.5 MB a step of 512 responses" in out


@pytest.mark.parametrize(
    ("overrides", "finding"),
    [
        (["algorithm.rollout_correction.bypass_mode=false"], "set algorithm.rollout_correction.bypass_mode=true"),
        (["actor_rollout_ref.actor.policy_loss.w_min=2"], "w_min=2 is not permitted: a number in (0, 1]"),
        (["data.train_files=/nowhere/train.parquet"], "data.train_files=/nowhere/train.parquet does not exist"),
        (["data.val_files=[data/none.parquet]"], "data.val_files=data/none.parquet does not exist on this machine"),
        (["actor_rollout_ref.model.pth=x"], "Could not override 'actor_rollout_ref.model.pth'"),
        (["--", "-m", "trainer.nnodes=1,2"], "-m asks for several runs: leave it out, and give each key one"),
        (["hydra.mode=MULTIRUN"], "hydra.mode=MULTIRUN asks for several runs: leave it out, and give each key one"),
        (["--", "--help"], "--help would print something and train nothing: give a training command's arguments"),
        (["actor_rollout_ref.rollout.name=???"], "Missing mandatory value: actor_rollout_ref.rollout.name"),
        (["trainer.device=cuda"], "cuda, but this environment runs on cpu: add +platform=cpu to the command"),
    ],
)
def test_a_setting_that_would_break_a_run_fails_with_the_way_out(doctor, overrides, finding):
    code, out = doctor(*COMMAND, *overrides)
    assert code == 1
    assert finding in out


def test_an_unknown_platform_is_named():
    command = [sys.executable, "-m", "cppo_verl", "doctor", "--no-ray"]
    result = subprocess.run(command, env=os.environ | {"VERL_PLATFORM": "cup"}, capture_output=True, text=True)
    assert result.returncode == 1
    assert "FAIL  device                  VERL_PLATFORM=cup: Unknown platform 'cup'. Registered:" in result.stdout


def test_a_command_without_a_method_fails(doctor):
    code, out = doctor("+platform=cpu")
    assert code == 1
    assert "add +method=cppo to the command" in out


@pytest.mark.parametrize(
    ("engine", "finding", "code"),
    [
        ("sglang", "warn  sglang +1; not yet run with", 0),
        ("vllm", "FAIL  sglang +not installed: install it on every", 1),
    ],
)
def test_a_run_with_sglang_needs_it_and_no_vllm(engine, finding, code, doctor, monkeypatch):
    def installed(name):
        return {engine: "1"}.get(name) if name in ("vllm", "sglang") else _installed(name)

    monkeypatch.setattr("cppo_verl.doctor.checks._installed", installed)
    ended, out = doctor(*COMMAND, "actor_rollout_ref.rollout.name=sglang", "actor_rollout_ref.rollout.temperature=0.7")
    assert ended == code, out
    assert re.search(finding, out) and not re.search("^.{4}  vllm ", out, re.M)
    assert "the rollout engine's own log-probabilities (sglang, temperature 0.7, top_p 1, top_k -1)" in out


def test_a_system_library_that_vllm_lacks_is_named(tmp_path):
    (tmp_path / "libnuma.so.1").touch()  # the loader finds this one first, and cannot use it
    command = [sys.executable, "-m", "cppo_verl", "doctor", "--no-ray"]
    result = subprocess.run(
        command, env=os.environ | {"LD_LIBRARY_PATH": str(tmp_path)}, capture_output=True, text=True
    )
    assert result.returncode == 1
    (failure,) = [line for line in result.stdout.splitlines() if line.startswith("FAIL")]
    assert f"{tmp_path}/libnuma.so.1: file too short: install the system library libnuma1" in failure


def test_a_ray_worker_is_asked_too(capsys, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")  # a cluster's, which --cluster asks
    assert main(["doctor"]) == 0
    assert re.search("ok    a Ray worker +the same versions as here, the plug-in registered", capsys.readouterr().out)


def test_a_runtime_environment_that_ray_refuses_is_named(capsys):
    assert main(["doctor", *COMMAND, "++ray_kwargs.ray_init.runtime_env={working_dir: /nowhere}"]) == 1
    (failure,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("FAIL")]
    assert "/nowhere" in failure and "see ray_kwargs.ray_init.runtime_env" in failure


def test_a_worker_that_another_python_starts_is_told_what_it_lacks(tmp_path):
    """As where verl's workers are started by `uv run`, on a lock file without the plug-in."""
    (tmp_path / "cppo_verl.py").write_text(
        "raise ModuleNotFoundError(\"No module named 'cppo_verl'\", name='cppo_verl')"
    )
    python = f"env PYTHONPATH={tmp_path} UV_RUN_RECURSION_DEPTH=1 {sys.executable}"
    runtime_env = f"++ray_kwargs.ray_init.runtime_env={{py_executable: '{python}'}}"
    command = [sys.executable, "-m", "cppo_verl", "doctor", "+method=cppo", "+platform=cpu", runtime_env]
    # Ray puts a driver's working directory before what a worker has of its own.
    here = {"cwd": tmp_path.parent, "env": os.environ | {"PYTHONPATH": str(ROOT)}}
    result = subprocess.run(command, **here, capture_output=True, text=True)
    assert result.returncode == 1
    (failure,) = [line for line in result.stdout.splitlines() if "a Ray worker" in line]
    assert failure.startswith("FAIL")
    assert "the plug-in does not load (ModuleNotFoundError: No module named 'cppo_verl'): install it for" in failure
    assert "by `uv add` in the project, or by `uv pip install --no-deps`" in failure
