"""The acceptance scripts of tests/gpu, as far as they run without a GPU."""

import importlib.util
import json
import math
import os
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from commands import start_up
from documented import ROOT
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from verl.trainer.ppo.core_algos import get_policy_loss_fn
from verl.utils.config import omega_conf_to_dataclass
from verl.workers.config import FSDPActorConfig

from cppo_verl.doctor.checks import compose_command
from cppo_verl.plugin.config import CPPOLossConfig
from cppo_verl.plugin.losses import ABSOLUTE_SUMS, SUM_NAMES

SMALL = ["--device", "cpu", "--lengths", "64", "1024", "--positions", "70", "--vocabulary", "3000", "--repeats", "1"]


def script(name):
    specification = importlib.util.spec_from_file_location(f"gpu_{name}", ROOT / "tests" / "gpu" / f"{name}.py")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def core():
    return script("core")


def cells(lines):
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]


# --- tier one: torch alone ------------------------------------------------------------------------------------------


def test_the_maths_is_accepted_on_the_cpu_where_verl_is_not_installed(tmp_path):
    (tmp_path / "verl.py").write_text("raise ImportError('hidden by the test')\n")
    command = [sys.executable, str(ROOT / "tests" / "gpu" / "core.py"), *SMALL]
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    title, _, *table = ended.stdout.splitlines()
    assert title.startswith("CPU, torch ")
    rows = cells(table)
    assert rows[0][:4] == ["what", "of", "found", "bound"] and {len(row) for row in rows} == {5}
    # Two dtypes: four rows for each of two lengths, and four for the logits.
    assert [row[4] for row in rows].count("ok") == 2 * (2 * 4 + 4)
    # The loss issues as many operations on short responses as on long ones.
    assert len({row[2] for row in rows if row[0] == "loss: tensor operations"}) == 1


@pytest.mark.parametrize("fault", ["divergence", "gradient", "threshold"])
def test_a_fault_of_the_device_is_a_row_out_of_its_bound(core, fault, monkeypatch, capsys):
    def broken(function):
        # In fp32 alone: the reference is fp64.
        return lambda x, *args, **kwargs: function(x, *args, **kwargs) * (1.001 if x.dtype == torch.float32 else 1)

    module, name = {
        "divergence": (core, "binary_divergence"),
        "gradient": (core.surrogate, "surrogate_weight"),
        "threshold": (core.trust_region, "adaptive_budget"),
    }[fault]
    monkeypatch.setattr(module, name, broken(getattr(module, name)))
    assert core.main(SMALL) == 1
    failed = [row[0] for row in cells(capsys.readouterr().out.splitlines()) if row and row[-1] == "FAIL"]
    wanted = {"divergence": "D_t, largest error", "gradient": "gradient, largest relative error"}
    assert wanted.get(fault, "c_t, largest error over max(1, S_t)") in failed


def test_a_machine_without_a_gpu_is_told_so(core, capsys):
    if torch.cuda.is_available():
        pytest.skip("this machine has one")
    assert core.main([]) == 2
    assert "finds no CUDA device" in capsys.readouterr().err


@pytest.mark.parametrize("loss_mode", ["cppo", "dppo_tv"])
def test_the_losses_of_the_script_are_those_of_training(core, loss_mode):
    log_pi, log_mu, advantages, mask = inputs = core.batch(8, 300, torch.float32, torch.device("cpu"))
    loss, reported = core.step(getattr(core, loss_mode), inputs)
    gradient, log_pi.grad = log_pi.grad.clone(), None
    cppo = {"policy_loss": CPPOLossConfig(delta=core.DELTA, delta_b=core.DELTA_B, w_min=core.W_MIN)}
    dppo = {"clip_ratio_low": core.DELTA, "clip_ratio_high": core.DELTA, "clip_ratio_c": core.CAP}
    config = FSDPActorConfig(
        strategy="fsdp2", rollout_n=1, ppo_micro_batch_size_per_gpu=1, **(cppo if loss_mode == "cppo" else dppo)
    )
    config.global_batch_info.update(dp_size=1, batch_num_tokens=int(mask.sum()))
    wanted, values = get_policy_loss_fn(loss_mode)(
        old_log_prob=log_mu, log_prob=log_pi, advantages=advantages, response_mask=mask, config=config
    )
    wanted.backward()
    torch.testing.assert_close(loss, wanted.detach(), rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(gradient, log_pi.grad, rtol=1e-5, atol=1e-9)
    if loss_mode == "cppo":
        names = [name for name in SUM_NAMES if name not in ABSOLUTE_SUMS]
        assert reported == pytest.approx([values[name] for name in names], rel=1e-6)
    else:
        names = ("actor/pg_clipfrac", "actor/ppo_kl", "actor/pg_clipfrac_lower")
        assert reported == pytest.approx([values[name] for name in names], rel=1e-5)


@pytest.fixture
def accelerator():
    """Tensors without values on a device that is not the CPU.

    An operation on tensors of two devices, or one whose result depends on values, for which the host of an accelerator
    waits, raises an error.
    """
    with FakeTensorMode():
        yield torch.device("meta")


def test_on_an_accelerator_the_host_waits_for_the_losss_metrics_and_for_nothing_before(core, accelerator):
    log_pi, log_mu, advantages = (torch.empty(4, 1024, device=accelerator) for _ in range(3))
    mask = torch.empty(4, 1024, device=accelerator, dtype=torch.bool)
    *_, weight, reported = core.decide(log_pi, log_mu, advantages, mask)
    assert {weight.device, reported.device} == {accelerator}
    config = FSDPActorConfig(
        strategy="fsdp2", rollout_n=1, ppo_micro_batch_size_per_gpu=1, policy_loss=CPPOLossConfig()
    )
    trained = get_policy_loss_fn("cppo")
    for call in (
        lambda: core.cppo(log_pi, log_mu, advantages, mask),
        lambda: trained(old_log_prob=log_mu, log_prob=log_pi, advantages=advantages, response_mask=mask, config=config),
    ):
        with pytest.raises(RuntimeError, match="numpy") as waited:
            call()
        assert re.search(r"reported\)?\.cpu\(\)\.numpy\(\)", str(waited.traceback[-1].statement))


def test_on_an_accelerator_the_host_does_not_wait_for_the_logits(core, accelerator):
    logits = torch.empty(2048, 151_936, device=accelerator, dtype=torch.bfloat16)
    ids = torch.empty(2048, 21, device=accelerator, dtype=torch.int64)
    log_mu = torch.empty(2048, 21, device=accelerator)
    assert core.look(logits, ids, log_mu[:, 0], log_mu, log_mu[:, 0] > 0).device == accelerator


def test_two_devices_or_a_look_at_a_value_would_be_noticed(accelerator):
    x = torch.empty(4, device=accelerator)
    with pytest.raises(RuntimeError, match="device"):
        x + torch.arange(4)
    with pytest.raises(DataDependentOutputException):
        x.sum().item()


# --- tier two: the stack --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stack():
    return script("stack")


RUN = ROOT / "examples" / "analysis" / "run"


@pytest.mark.parametrize("divergence", ["binary_tv", "topk_tv"])
def test_both_runs_of_the_stack_pass_verls_checks_and_ours(stack, divergence, tmp_path):
    config = compose_command(stack.command(tmp_path / "a", divergence, 20, own=[]))
    start_up(config)
    rollout, actor = config.actor_rollout_ref.rollout, config.actor_rollout_ref.actor
    assert (config.actor_rollout_ref.model.path, rollout.name, actor.strategy) == ("Qwen/Qwen3-0.6B", "vllm", "fsdp2")
    assert (config.trainer.nnodes, config.trainer.n_gpus_per_node, config.trainer.total_training_steps) == (1, 1, 20)
    assert omega_conf_to_dataclass(actor.policy_loss).divergence == divergence
    assert config.trainer.default_local_dir == str(tmp_path / "a" / "checkpoints")
    assert config.data.train_files == str(stack.DATA.absolute() / "train.parquet")


def test_what_a_run_has_left_behind_is_its_column(stack):
    """On the run that the repository ships: its numbers by hand, from the lines of its log."""
    lines = [json.loads(line)["data"] for line in (RUN / "logs" / "metrics-0.jsonl").read_text().splitlines()]
    steps = [values for values in lines if "timing_s/step" in values]
    found = stack.found(RUN)
    assert found["steps"] == len(steps) == 30
    assert found["s a step"] == np.median([values["timing_s/step"] for values in steps[1:]])
    assert found["reward, last step"] == steps[-1]["critic/score/mean"]
    # The tokens of a step but for its prompts, of 256 responses.
    seconds = [256 * values["response_length/mean"] / values["timing_s/gen"] for values in steps[1:]]
    assert found["response tokens a second of generation"] == pytest.approx(np.median(seconds))
    assert 0 < found["first update: share of the prefix budget"] < 1e-3


def test_the_table_judges_both_runs_by_their_bounds(stack):
    sound = {
        "steps": 20,
        "first update: mean D_t": 0.002,
        "first update: share of the prefix budget": 0.2,
        "first update: share of tokens outside": 0.0,
        "masked share": 0.01,
        "grad norm, largest": 0.4,
        "s a step": 10.0,
        "s of it generation": 5.0,
    }
    text, failed = stack.table(sound, sound | {"s a step": 11.0}, steps=20)
    assert not failed and "FAIL" not in text
    assert "| s a step, top-K over binary | | 1.100 | | |" in text
    assert len({line.count("|") for line in text.splitlines()}) == 1
    for what, value in (("steps", 19), ("first update: mean D_t", math.nan), ("grad norm, largest", 0.0)):
        text, failed = stack.table(sound, sound | {what: value}, steps=20)
        assert failed and [line.split("|")[1].strip() for line in text.splitlines() if "FAIL" in line] == [what]


def test_the_stack_asks_for_a_gpu_and_an_empty_folder(stack, tmp_path, capsys):
    if not torch.cuda.is_available():
        assert stack.main(["--output", str(tmp_path / "new")]) == 2
        assert "finds no CUDA device" in capsys.readouterr().err
    (tmp_path / "file").touch()
    assert stack.main(["--output", str(tmp_path)]) == 2
    assert "is not empty: give another --output" in capsys.readouterr().err
