"""verl's asynchronous trainers with a top-K divergence."""

import numpy as np
import pytest
import torch
from documented import overrides, shown
from trainer_run import BRIEF, Run, link, metrics
from transformers import AutoModelForCausalLM

from cppo_verl.artifacts.token_dump import read_tokens
from cppo_verl.core import top_k_divergence


@pytest.mark.parametrize("mode, phase", [("colocate_async", "update"), ("separate_async", "checkpoint")])
def test_stale_responses_get_the_divergences_of_two_checkpoints(interrupted, mode, phase, tmp_path):
    """The asynchronous trainers train step 2 on responses of the initial weights: at its first update mu is the
    model on disk and pi the checkpoint of step 1. A SIGTERM in a part of step 2 ends them in order."""
    link(interrupted, tmp_path)
    (example,) = (command for command in shown("examples/README.md", "quickstart/run.py") if mode in str(command))
    command = [*overrides(example), *BRIEF, "method=trm_max_avg", "divergence=topk_kl"]
    command += ["actor_rollout_ref.actor.policy_loss.top_k=5"]
    # All prompts take part: which of them have answers of both kinds is drawn anew in each run.
    command += ["trainer.total_training_steps=50", "actor_rollout_ref.actor.policy_loss.mask_std_0=false"]
    command += ["trainer.save_freq=1", "trainer.max_actor_ckpt_to_keep=null"]
    command += ["actor_rollout_ref.actor.checkpoint.save_contents=[model,hf_model]"]
    command += ["trust_region.dump.every=1", "trust_region.dump.responses=1000"]
    if mode == "colocate_async":
        command += ["trainer.n_gpus_per_node=2", "ray_kwargs.ray_init.num_gpus=2"]
        command += ["actor_rollout_ref.actor.use_dynamic_bsz=true"]
        command += ["actor_rollout_ref.rollout.log_prob_use_dynamic_bsz=true"]
        command += ["actor_rollout_ref.actor.ppo_max_token_len_per_gpu=512"]
        command += ["actor_rollout_ref.rollout.log_prob_max_token_len_per_gpu=512"]
    else:
        # Of 16 prompts, where the example's batch of 32 has eight mini-batches.
        command += ["trainer.v1.separate_async.parameter_sync_step=4"]
    run = Run(tmp_path, *command, probe=f"dump:{tmp_path / 'dump'},{phase}:2").until(phase)
    assert run.ask_to_stop().finish().code == 143, run.text
    assert run.survivors() == []
    steps = metrics(tmp_path, 0)
    assert f"stopped after step {max(steps)} of 50: SIGTERM; the same command continues" in run.text
    assert (tmp_path / "checkpoints" / "latest_checkpointed_iteration.txt").read_text() == str(max(steps))
    for values in steps.values():
        stale = values["training/off_policy/trajectory_staleness/mean"] > 0
        assert (values["trust_region/first_update/divergence"] > 1e-4) == stale
        assert values["trust_region/later_updates/divergence"] > 1e-4
    assert steps[2]["training/off_policy/trajectory_staleness/min"] == 1
    tokens = read_tokens(tmp_path)
    assert tokens.notes == [] and sorted(tokens.headers) == sorted(steps)
    for step, values in steps.items():
        of_step = [r.divergence[r.mask] for r in tokens.responses if r.step == step]
        assert np.concatenate(of_step).mean() == pytest.approx(values["trust_region/divergence"], rel=1e-4)

    mu, pi = (
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        for folder in (
            interrupted.output / "model",
            tmp_path / "checkpoints" / "global_step_1" / "actor" / "huggingface",
        )
    )
    compared = 0
    for path in (tmp_path / "dump").iterdir():
        dump, end = torch.load(path), 0
        names = ("input_ids", "prompts", "responses", "response_mask", "divergence")
        for ids, prompt, response, mask, divergence in zip(*(dump[name] for name in names), strict=True):
            begin, end = end, end + len(ids)
            predicting = slice(len(prompt) - 1, len(ids) - 1)
            with torch.no_grad():
                log_mu, log_pi = (net(ids[None]).logits[0, predicting].log_softmax(-1) for net in (mu, pi))
            seen = dump["logits"][begin:end][predicting].log_softmax(-1)
            # Logits of other updates are of other weights.
            if not torch.allclose(seen, log_pi, atol=1e-4) or not mask.all():
                continue
            want = top_k_divergence(log_pi, log_mu, response, 5, "kl")
            if want.max() > 1e-3:
                torch.testing.assert_close(divergence, want, rtol=1e-3, atol=2e-5)
                compared += 1
    assert compared >= 16  # of the 32 responses of the first update
