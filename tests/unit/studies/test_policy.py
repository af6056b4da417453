import pytest
import torch

from studies.trust_regions import export, policy, task

SEEDS = [1, 2, 3]
LENGTH = 12


@pytest.fixture
def parameters():
    drawn = policy.initialise(policy.Shape(len(task.VOCABULARY)), SEEDS)
    # Away from one, where a forgotten weight of a norm would not show.
    return {
        name: p + 0.2 * torch.randn(p.shape, generator=torch.Generator().manual_seed(0)) for name, p in drawn.items()
    }


@pytest.fixture
def prompts():
    return torch.stack([task.prompts(5, torch.Generator().manual_seed(seed)) for seed in SEEDS])


@pytest.fixture
def sampled(parameters, prompts):
    return policy.generate(parameters, prompts, torch.rand(len(SEEDS), 5, LENGTH))


def test_each_seeds_model_is_transformers_qwen3(parameters, prompts, sampled):
    responses, _ = sampled
    got = policy.log_probs(parameters, prompts, responses)
    for s in range(len(SEEDS)):
        model, _ = export.qwen3({name: p[s] for name, p in parameters.items()}, longest=32)
        ids = torch.cat([prompts[s], responses[s]], -1)
        logits = model(input_ids=ids).logits[:, task.ORDER - 1 : -1]
        want = logits.log_softmax(-1).gather(-1, responses[s].unsqueeze(-1)).squeeze(-1)
        torch.testing.assert_close(got[s], want, rtol=1e-4, atol=1e-5)


def test_sampling_records_the_log_probabilities_that_training_sees(parameters, prompts, sampled):
    responses, log_mu = sampled
    torch.testing.assert_close(policy.log_probs(parameters, prompts, responses), log_mu, rtol=1e-4, atol=1e-5)


def test_tokens_are_sampled_from_the_policy(parameters):
    prompt = torch.tensor([[[1, 2, 3, 4]]]).expand(len(SEEDS), 4000, 4)
    uniforms = torch.rand(len(SEEDS), 4000, 1, generator=torch.Generator().manual_seed(0))
    responses, _ = policy.generate(parameters, prompt, uniforms)
    p = policy.forward(parameters, prompt[:, :1], from_position=3).softmax(-1)[:, 0, 0]
    for s in range(len(SEEDS)):
        counts = torch.bincount(responses[s].flatten(), minlength=len(task.VOCABULARY)) / 4000
        assert (counts - p[s]).abs().max() < 5 * 0.5 / 4000**0.5


def test_a_bfloat16_policy_records_its_own_log_probabilities(parameters, prompts):
    half = {name: p.to(torch.bfloat16) for name, p in parameters.items()}
    uniforms = torch.rand(len(SEEDS), 5, LENGTH, generator=torch.Generator().manual_seed(0))
    responses, log_mu = policy.generate(half, prompts, uniforms)
    difference = (policy.log_probs(parameters, prompts, responses) - log_mu).abs()
    assert 1e-4 < difference.mean() < 0.1
