"""The loop's updates, against transformers' Qwen3 under verl's losses, one seed at a time."""

from dataclasses import replace

import pytest
import torch
from verl.trainer.ppo.core_algos import compute_grpo_outcome_advantage, get_policy_loss_fn

from cppo_verl.analysis import replay
from studies.trust_regions import export, loop, policy, rules, task

SEEDS = [1, 2]
SETTINGS = loop.Settings(horizon=8, updates=2, learning_rate=1e-2, prompts=6, samples=4)
# Of answers so short that policies which know nothing are right at times.
ONE_DIGIT = loop.Settings(horizon=1, updates=2, learning_rate=1e-2, steps=4, prompts=16)
# Thresholds at which each rule masks some of these tokens.
THRESHOLDS = {
    "none": {},
    "grpo": {"clip": 0.05},
    "cispo": {"clip_high": 0.05},
    "trm_avg": {"delta_avg": 1e-3},
    "dppo": {"delta": 0.01},
    "cppo": {"delta": 0.01, "delta_b": 0.002},
    "cppo_no_weights": {"delta": 0.01, "delta_b": 0.002},
    "cppo_no_budget": {"delta": 0.01},
}


def actor(method):
    return replay.setting(rules.text(method, THRESHOLDS[method]), rules.header(SETTINGS.horizon)).actor


@pytest.fixture(scope="module")
def parameters():
    """Policies that are right in half of their digits, so that the rewards of a short answer differ."""
    first = policy.initialise(policy.Shape(len(task.VOCABULARY)), SEEDS)
    generator = torch.Generator().manual_seed(0)
    return {name: p + 0.1 * torch.randn(p.shape, generator=generator) for name, p in first.items()}


@pytest.fixture(scope="module")
def batch(parameters):
    """Responses of policies that are close to ``parameters``, with rewards drawn at random."""
    generator = torch.Generator().manual_seed(1)
    mu = {name: p + 0.02 * torch.randn(p.shape, generator=generator) for name, p in parameters.items()}
    rolled = loop.roll_out(mu, SETTINGS, [torch.Generator().manual_seed(seed) for seed in SEEDS])
    rewards = (torch.rand(rolled.rewards.shape, generator=generator) < 0.4).float()
    rewards[0, :4] = 1.0  # a prompt without a signal
    groups = rewards.unflatten(1, (6, 4))
    advantages = (groups - groups.mean(-1, keepdim=True)) / (groups.std(-1, keepdim=True) + 1e-6)
    has_signal = (groups.std(-1, keepdim=True) > 0).expand_as(groups)
    return rolled._replace(rewards=rewards, advantages=advantages.flatten(1), has_signal=has_signal.flatten(1))


def in_transformers(parameters, batch, s, config):
    """Gradient {name: ...} of one seed, with the prompts without a signal removed by hand."""
    model, _ = export.qwen3({name: p[s] for name, p in parameters.items()}, longest=16)
    kept = batch.has_signal[s]
    ids = torch.cat([batch.prompts[s], batch.responses[s]], -1)[kept]
    log_pi = model(input_ids=ids).logits[:, task.ORDER - 1 : -1].log_softmax(-1)
    log_pi = log_pi.gather(-1, ids[:, task.ORDER :, None]).squeeze(-1)
    loss, _ = get_policy_loss_fn(config.policy_loss.loss_mode)(
        old_log_prob=batch.log_mu[s][kept],
        log_prob=log_pi,
        advantages=batch.advantages[s][kept].unsqueeze(-1).expand_as(log_pi),
        response_mask=torch.ones_like(log_pi),
        loss_agg_mode="token-mean",
        config=config,
    )
    loss.backward()
    return {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("method", THRESHOLDS)
def test_an_updates_gradient_is_that_of_verls_loss(parameters, batch, method):
    config = actor(method)
    trained = {name: p.clone().requires_grad_() for name, p in parameters.items()}
    _, measured = loop.update(trained, torch.optim.SGD(trained.values(), lr=0.0), batch, config, clip_grad=1e9)
    assert method == "none" or (measured["masked"] > 0).all()
    for s in range(len(SEEDS)):
        want = in_transformers(parameters, batch, s, config)
        got = export.state_dict({name: p.grad[s] for name, p in trained.items()})
        assert got.keys() == want.keys()
        for name, gradient in want.items():
            if name == "model.embed_tokens.weight":  # transformers never trains the padding token as an input
                other = torch.arange(len(gradient)) != task.VOCABULARY.index("<pad>")
                torch.testing.assert_close(got[name][other], gradient[other], rtol=1e-3, atol=1e-6)
            else:
                torch.testing.assert_close(got[name], gradient, rtol=1e-3, atol=1e-6)


def test_advantages_are_verls(parameters):
    rolled = loop.roll_out(parameters, ONE_DIGIT, [torch.Generator().manual_seed(seed) for seed in SEEDS])
    prompt = [i // ONE_DIGIT.samples for i in range(rolled.rewards.shape[1])]
    for rewards, advantages in zip(rolled.rewards, rolled.advantages, strict=True):
        assert 0 < rewards.sum() < len(rewards)
        want, _ = compute_grpo_outcome_advantage(
            rewards.unsqueeze(-1), torch.ones(len(rewards), 1), index=prompt, epsilon=1e-6
        )
        torch.testing.assert_close(advantages, want.squeeze(-1))


def test_a_mini_batch_without_a_signal_has_no_gradient(parameters, batch):
    silent = batch._replace(
        advantages=torch.zeros_like(batch.advantages), has_signal=torch.zeros_like(batch.has_signal)
    )
    trained = {name: p.clone().requires_grad_() for name, p in parameters.items()}
    loop.update(trained, torch.optim.SGD(trained.values(), lr=1.0), silent, actor("dppo"), clip_grad=1.0)
    assert all(torch.equal(trained[name], parameters[name]) for name in parameters)


def test_a_seed_trains_alike_whatever_stands_beside_it(parameters):
    together = loop.train(parameters, SEEDS, ONE_DIGIT, actor("cppo"))
    second = loop.train({name: p[1:] for name, p in parameters.items()}, SEEDS[1:], ONE_DIGIT, actor("cppo"))
    assert together[-1]["deviation"][1] > 0
    for step, alone in zip(together, second, strict=True):
        for name, value in alone.items():
            torch.testing.assert_close(step[name][1:], value, rtol=1e-3, atol=1e-5)


def test_a_stale_rollout_policy_is_that_of_the_batch_before(parameters, monkeypatch):
    used = []
    roll_out = loop.roll_out

    def watched(rollout, *others):
        used.append(rollout["0.q"].detach().clone())
        return roll_out(rollout, *others)

    monkeypatch.setattr(loop, "roll_out", watched)
    loop.train(parameters, SEEDS, ONE_DIGIT, actor("none"))
    fresh, used = used, []
    loop.train(parameters, SEEDS, replace(ONE_DIGIT, staleness=1), actor("none"))
    assert torch.equal(used[0], fresh[0])
    assert torch.equal(used[1], used[0])
    assert not torch.equal(used[2], used[1])
    assert not torch.equal(fresh[1], fresh[0])
