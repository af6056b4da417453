"""A run with thresholds that `calibrate` proposed, which finds no room for its last checkpoint."""

import math
import re
import subprocess
import sys
from collections import Counter

import pytest
import torch
from trainer_run import SHORT, Run, link, metrics

from cppo_verl.analysis.calibrate.thresholds import intervals, recorded
from cppo_verl.artifacts.token_dump import read_tokens


@pytest.fixture(scope="module")
def proposal(quickstart, tmp_path_factory):
    """What `calibrate` prints of the quickstart for several times the share that it masked: larger shares are known
    better, and the quickstart's own thresholds would miss this one by far."""
    page = tmp_path_factory.mktemp("page") / "calibrate.html"
    command = [sys.executable, "-m", "cppo_verl", "calibrate", str(quickstart.output), "--masked-share", "0.3"]
    result = subprocess.run([*command, "--output", str(page)], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def calibrated(interrupted, proposal, tmp_path_factory):
    """The quickstart with the proposed thresholds and fused kernels; its checkpoint of the last step finds no room."""
    output = tmp_path_factory.mktemp("calibrated")
    link(interrupted, output)
    pasted = re.search(r"^trust_region\.delta=\S+ trust_region\.delta_b=\S+$", proposal, re.M)[0].split()
    changed = ["trainer.total_training_steps=7", "trainer.save_freq=5", "trainer.test_freq=-1"]
    changed += ["trainer.val_before_train=false", "trainer.logger=[console,file]"]
    # The other backend, triton, needs a GPU.
    changed += [
        f"actor_rollout_ref.model.{x}" for x in ("use_fused_kernels=true", "fused_kernel_options.impl_backend=torch")
    ]
    return Run(output, *SHORT, *changed, *pasted, probe="full:7").finish()


def test_calibrated_thresholds_mask_the_promised_share(quickstart, proposal, calibrated):
    promised, *ends = re.search(r"masks (\S+)% of .* interval (\S+)% to (\S+)%", proposal).groups()

    def steps_of_the_dump(output):
        """Masked share of each step that dumps, and how many tokens its updates saw."""
        tokens = Counter()
        for response in read_tokens(output).responses:
            tokens[response.step] += int(response.mask.sum())
        return {step: (metrics(output, 0)[step]["trust_region/masked_share"], n) for step, n in tokens.items()}

    def pooled(shares):
        return sum(share * n for share, n in shares.values()) / sum(n for _, n in shares.values())

    given, before = steps_of_the_dump(calibrated.output), steps_of_the_dump(quickstart.output)
    assert sorted(given) == sorted(before) == [2, 4, 6]
    interval, _ = intervals(recorded(read_tokens(calibrated.output).responses))
    # Both shares are estimates. Four standard errors of their difference, each a quarter of its interval: three are too
    # few once in some hundred runs.
    low, high = (float(end) / 100 for end in ends)
    allowed = math.hypot(high - low, interval.high - interval.low)
    assert abs(pooled(given) - float(promised) / 100) < allowed
    assert abs(pooled(before) - float(promised) / 100) > allowed


def test_fused_kernels_leave_the_policy_and_its_divergence_alone(calibrated):
    for values in metrics(calibrated.output, 0).values():
        assert values["trust_region/first_update/divergence"] < 1e-6
        assert values["trust_region/later_updates/divergence"] > 1e-3


def test_a_checkpoint_without_room_ends_the_run_and_spares_the_one_before(calibrated):
    assert calibrated.code == 1
    folder = calibrated.output / "checkpoints"
    said = rf"on [\d.]+: the checkpoint of step 7 could not be written to {folder} .*; that of step 5 is whole"
    assert re.search(said, calibrated.text)
    assert (folder / "latest_checkpointed_iteration.txt").read_text() == "5"
    weights = torch.load(folder / "global_step_5" / "actor" / "model_world_size_1_rank_0.pt", weights_only=False)
    assert sum(tensor.numel() for tensor in weights.values()) > 250_000
    assert calibrated.survivors() == []
