"""A deliberate break for each assumption of the loss, and its check or metric in docs/silent-failures.md."""

import re
from pathlib import Path

import pytest
import torch
from loss_batches import DELTA, actor_config, batch, call

from cppo_verl.core import trust_region
from cppo_verl.plugin.step_metrics import pop_shares, step_shares

ROOT = Path(__file__).parents[3]
DOCUMENT = (ROOT / "docs" / "silent-failures.md").read_text()


def first_update(log_mu):
    """Mean D_t of an update whose pi is the policy that sampled; ``log_mu`` makes what was recorded of its logits."""
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(16, 32, 64, generator=generator)
    policy = logits.log_softmax(-1)
    sampled = policy.exp().flatten(0, 1).multinomial(1, generator=generator).view(16, 32, 1)
    data = {
        "log_prob": policy.gather(-1, sampled).squeeze(-1).requires_grad_(),
        "old_log_prob": log_mu(logits, sampled).squeeze(-1),
        "advantages": torch.ones(16, 32),
        "response_mask": torch.ones(16, 32, dtype=torch.bool),
    }
    _, sums = call(data, actor_config())
    return step_shares({key: [value] for key, value in sums.items()})["trust_region/first_update/divergence"]


def truncated(logits, sampled, k):
    kept = (logits >= logits.topk(k).values[..., -1:]).scatter(-1, sampled, True)
    return logits.masked_fill(~kept, -torch.inf)


BREAKS = {
    "sampled at another temperature": lambda z, y: (z / 0.7).log_softmax(-1).gather(-1, y),
    "another token's": lambda z, y: z.log_softmax(-1).gather(-1, y.roll(1, 1)),
    "shifted by a position": lambda z, y: z.log_softmax(-1).gather(-1, y).roll(1, 1),
    "of older weights": lambda z, y: (z + 0.3 * z.roll(7, -1)).log_softmax(-1).gather(-1, y),
    "truncated": lambda z, y: truncated(z, y, 8).log_softmax(-1).gather(-1, y),
}


@pytest.mark.parametrize("broken", BREAKS)
def test_a_mu_that_is_not_the_samplers_shows_at_the_first_update(broken):
    sound = first_update(lambda z, y: z.log_softmax(-1).gather(-1, y))
    assert sound < 1e-6
    assert first_update(BREAKS[broken]) > 0.02


def test_logits_recorded_as_log_probabilities_are_refused():
    with pytest.raises(ValueError, match="old_log_prob must be finite and not above zero"):
        first_update(lambda z, y: z.gather(-1, y))


def test_a_mask_that_is_not_applied_shows_in_its_share(monkeypatch):
    sound = pop_shares(call(batch(drift=3), actor_config())[1])
    monkeypatch.setattr(trust_region, "update_mask", lambda region, *_, **__: torch.ones_like(region.weights))
    broken = pop_shares(call(batch(drift=3), actor_config())[1])
    assert (
        broken["trust_region/masked_share"] == pytest.approx(0, abs=1e-6) and sound["trust_region/masked_share"] > 0.1
    )
    assert broken["trust_region/divergence"] == sound["trust_region/divergence"] > DELTA


def test_a_rank_that_lacks_the_mini_batchs_denominator_is_refused():
    config = actor_config()
    config.global_batch_info["dp_size"] = 2
    with pytest.raises(ValueError, match="batch_num_tokens is required when dp_size > 1"):
        call(batch(), config)


def test_turned_signs_change_the_places_of_the_two_groups():
    data = batch()
    sound = pop_shares(call(data, actor_config())[1])
    turned = pop_shares(call(data | {"advantages": -data["advantages"]}, actor_config())[1])
    for name in ("divergence", "divergence_p90"):
        pair = [f"trust_region/{group}/{name}" for group in ("positive", "negative")]
        assert [turned[key] for key in pair] == pytest.approx([sound[key] for key in reversed(pair)], rel=1e-4)
        assert sound[pair[0]] != pytest.approx(sound[pair[1]], rel=0.01)


@pytest.mark.parametrize("reference", sorted(set(re.findall(r"tests/[\w/.]+::\w+", DOCUMENT))))
def test_the_document_names_tests_that_exist(reference):
    file, _, name = reference.partition("::")
    assert f"def {name}(" in (ROOT / file).read_text()
