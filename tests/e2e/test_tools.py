"""The tool example with a top-K divergence: two steps of four updates on responses of several turns, each call with
the logits saved; validation before."""

import re

import pytest
import torch
from documented import ROOT
from trainer_run import BRIEF, Run, metrics
from transformers import AutoModelForCausalLM, AutoTokenizer

from cppo_verl.core import binary_divergence, partition_divergence, top_k_divergence


@pytest.fixture(scope="module")
def tools(tmp_path_factory):
    output = tmp_path_factory.mktemp("tools")
    return Run(
        output,
        *BRIEF,
        "trainer.total_training_steps=2",
        "trainer.val_before_train=true",
        "data.val_max_samples=4",
        "divergence=topk_tv",
        "actor_rollout_ref.actor.policy_loss.top_k=5",
        script=ROOT / "examples" / "tools" / "run.py",
        probe=f"dump:{output / 'dump'}",
    ).finish()


def test_the_tool_example_ends_with_a_conversation(tools):
    assert tools.code == 0, tools.text
    assert tools.survivors() == []
    assert re.search(r"calls a response +0\.\d+ -> ", tools.text)
    assert "<tool_response>" in tools.text.rpartition("one of step 2:")[2]
    log = (tools.output / "logs" / "train-0.log").read_text()
    assert "mu's 5 most likely tokens: 30 bytes a response token, at most 0.2 MB a step of 128 responses" in log


def test_metrics_tell_engine_mismatch_from_policy_drift(tools):
    for values in (metrics(tools.output, 0)[step] for step in (1, 2)):
        # unchanged weights: two engines in fp32
        assert values["trust_region/first_update/divergence"] < 2e-6
        assert values["trust_region/later_updates/divergence"] > 1e-3
        positions = [values[f"trust_region/later_updates/divergence/position_{b}"] for b in range(8)]
        assert max(positions) < 1
        assert min(positions) > 0
        assert 2 < values["num_turns/mean"] < 6


def test_divergences_agree_with_both_policies_full_distributions(tools):
    dumps = [torch.load(path) for path in sorted((tools.output / "dump").iterdir())]
    assert len(dumps) == 8
    mu = AutoModelForCausalLM.from_pretrained(tools.output / "model", dtype=torch.float32)
    coarser = finer = interior = 0
    for update, dump in enumerate(dumps[:4]):  # of the first step, generated with the weights on disk
        end = 0
        assert (torch.cat(dump["divergence"]).max() < 1e-5) == (update == 0)
        names = ("input_ids", "prompts", "responses", "response_mask", "rollout_log_probs", "divergence")
        for row in zip(*(dump[name] for name in names), strict=True):
            ids, prompt, response, mask, log_mu_sampled, divergence = row
            begin, end = end, end + len(ids)
            predicting = slice(len(prompt) - 1, len(ids) - 1)
            valid = mask.bool()
            with torch.no_grad():
                log_mu = mu(ids[None]).logits[0, predicting].log_softmax(-1)[valid]
            log_pi = dump["logits"][begin:end][predicting].log_softmax(-1)[valid]
            sampled = response[valid]
            assert (divergence[~valid] == 0).all()
            interior += int((~valid).sum())
            torch.testing.assert_close(
                log_mu.gather(-1, sampled[:, None])[:, 0], log_mu_sampled[valid], rtol=1e-5, atol=1e-5
            )
            # The tokens' order in mu may differ between engines where two are equally likely to fp32.
            want = top_k_divergence(log_pi, log_mu, sampled, 5, "tv")
            torch.testing.assert_close(divergence[valid], want, rtol=0, atol=1e-5)
            binary = binary_divergence(*(x.gather(-1, sampled[:, None])[:, 0] for x in (log_pi, log_mu)), "tv")
            exact = partition_divergence(log_pi, log_mu, "tv")
            assert (binary <= divergence[valid] + 1e-5).all()
            assert (divergence[valid] <= exact + 1e-5).all()
            coarser += int((divergence[valid] > binary + 1e-4).sum())
            finer += int((exact > divergence[valid] + 1e-4).sum())
    # neither bound is met by all being equal, and the responses do hold tool output
    assert min(coarser, finer, interior) > 100


def test_tool_output_inside_responses_is_not_trained_on(tools):
    tokenizer = AutoTokenizer.from_pretrained(tools.output / "model")
    turn = r"\n<\|im_start\|>user\n<tool_response>\n.*\n</tool_response><\|im_end\|>\n<\|im_start\|>assistant\n"
    called = guessed = 0
    for path in (tools.output / "dump").iterdir():
        dump = torch.load(path)
        names = ("responses", "response_mask", "divergence")
        for response, mask, divergence in zip(*(dump[name] for name in names), strict=True):
            assert (divergence[mask == 0] == 0).all()
            if (mask == 1).all():
                guessed += 1
                continue
            if mask[-1] == 1:  # not cut at its longest while the tool spoke
                assert re.fullmatch(f"(?:{turn})+", tokenizer.decode(response[mask == 0]))
            called += 1
    assert min(called, guessed) > 10
