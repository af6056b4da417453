"""The gradient of every preset, composed as a user composes it, against loops written from its source."""

import math

import oracle
import pytest
import torch
from loss_batches import batch
from verl.trainer.ppo.core_algos import get_policy_loss_fn

from cppo_verl.analysis import replay

WIDTH = 40
RUN = {
    "trust_region": {"partition": "binary", "delta": 0.15, "delta_b": 0.02, "budget": "adaptive"},
    "max_response_length": WIDTH,
}
"""The thresholds of a run, which presets read unless they pin their own."""


def binary_tv(log_mu, log_pi):
    return abs(math.exp(log_pi) - math.exp(log_mu))


def binary_kl(log_mu, log_pi):
    mu, pi = math.exp(log_mu), math.exp(log_pi)
    return mu * (log_mu - log_pi) + (1 - mu) * math.log((1 - mu) / (1 - pi))


def cppo(tokens, distance=binary_tv, delta=0.15, floor=0.02, clamp=2.0, w_min=0.8, padded=None, soft=False, cap=20.0):
    """(8) to (11), (20) and (22) in the order of Algorithm 1; ``clamp`` None is no budget, 1 a fixed one."""
    div = [distance(m, p) for m, p, _ in tokens]
    last = (padded or len(tokens)) - 1
    delta_b = math.inf if clamp is None else min(max(oracle.quantile(div, 0.9), floor), clamp * floor)
    weights, big_s, big_w = [], 0.0, 0.0
    for t, ((log_mu, log_pi, adv), d) in enumerate(zip(tokens, div, strict=True)):
        w = 1 - (1 - w_min) * t / max(last, 1)
        budget = delta + delta_b * big_w if big_w else delta
        x = max(w * d / delta, (big_s + w * d) / budget)
        keep = 1.0 if adv * (log_pi - log_mu) <= 0 or x <= 1 else 1 / x if soft else 0.0
        weights.append(keep * min(math.exp(log_pi - log_mu), cap) * adv)
        big_s, big_w = big_s + w * d, big_w + w
    return weights


def trm(tokens, delta=math.inf, delta_avg=math.inf):
    div = [binary_kl(m, p) for m, p, _ in tokens]
    keep = max(div) <= delta and sum(div) <= delta_avg * len(div)
    return [keep * min(math.exp(p - m), 20.0) * a for m, p, a in tokens]


def grpo(tokens):
    """The mask of (2), without a second clip."""
    rho = [math.exp(p - m) for m, p, _ in tokens]
    return [r * a * (r <= 1.28 if a > 0 else r >= 0.8) for r, (_, _, a) in zip(rho, tokens, strict=True)]


def cispo(tokens):
    return [min(math.exp(p - m), 1.2) * a for m, p, a in tokens]


def minpro(tokens):
    smallest, weights = math.inf, []
    for log_mu, log_pi, adv in tokens:
        rho = math.exp(log_pi - log_mu)
        weights.append(min(rho * (smallest if weights else 1.0), 1.28) * adv)
        smallest = min(smallest, rho)
    return weights


def kpop(tokens):
    """Both directions of the Bernoulli KL at most 0.1."""
    keep = [max(binary_kl(m, p), binary_kl(p, m)) <= 0.1 for m, p, _ in tokens]
    return [k * min(math.exp(p - m), 20.0) * a for k, (m, p, a) in zip(keep, tokens, strict=True)]


def vaco(tokens):
    """A response whose mean |rho - 1| is above 2 loses the tokens with A sign(log rho) > 0."""
    rho = [math.exp(p - m) for m, p, _ in tokens]
    near = sum(abs(r - 1) for r in rho) <= 2.0 * len(rho)
    return [(near or a * (r - 1) <= 0) * min(r, 20.0) * a for r, (_, _, a) in zip(rho, tokens, strict=True)]


LOOPS = {
    "cppo": (cppo, {}),
    "cppo_fixed": (cppo, {"floor": 0.03, "clamp": 1.0}),
    "cppo_kl": (cppo, {"distance": binary_kl, "delta": 0.1, "floor": 0.002}),
    "cppo_no_budget": (cppo, {"clamp": None}),
    "cppo_no_weights": (cppo, {"w_min": 1.0}),
    "cppo_pr6731": (cppo, {"clamp": 5.0, "padded": WIDTH}),
    "cppo_sensitivity_w60": (cppo, {"w_min": 0.6}),
    "cppo_soft": (cppo, {"soft": True}),
    "cppo_unirl": (cppo, {"cap": math.exp(20)}),
    "dppo": (cppo, {"w_min": 1.0, "clamp": None}),
    "trm_avg": (trm, {"delta_avg": 0.002}),
    "trm_max": (trm, {"delta": 0.1}),
    "trm_max_avg": (trm, {"delta": 0.1, "delta_avg": 0.002}),
    "grpo": (grpo, {}),
    "cispo": (cispo, {}),
    "minpro": (minpro, {}),
    "kpop": (kpop, {}),
    "vaco": (vaco, {}),
}


def far_apart(seed=0, rows=24):
    """Responses without holes, from next to mu to ratios beyond every cap, at advantages of both signs."""
    data = batch(seed=seed, rows=rows, width=WIDTH, drift=1.5)
    data["response_mask"] = torch.arange(WIDTH) < data["response_mask"].sum(-1, keepdim=True)
    log_mu = torch.where(data["response_mask"], data["old_log_prob"].nan_to_num(-1, -1, -1), -1.0).clamp(-4, -0.02)
    log_pi = torch.where(data["response_mask"], data["log_prob"].detach().nan_to_num(-1, -1, -1), -1.0).clamp(-5, -0.02)
    log_pi[:4] = log_mu[:4] + 0.02 * (log_pi[:4] - log_mu[:4])
    log_mu[4::5, ::7] = -4.5
    advantages = data["advantages"].nan_to_num(0, 0, 0)[:, :1].expand(rows, WIDTH) + 0.1
    return data | {"old_log_prob": log_mu, "log_prob": log_pi.requires_grad_(), "advantages": advantages}


@pytest.mark.parametrize("name", LOOPS)
@pytest.mark.parametrize("seed", range(3))
def test_a_presets_gradient_is_that_of_the_loop(name, seed):
    data = far_apart(seed)
    actor = replay.setting(name, RUN).actor
    valid = data["response_mask"]
    actor.global_batch_info.update(global_batch_size=int(valid.any(-1).sum()), loss_scale_factor=WIDTH)
    actor.global_batch_info.update(dp_size=1, batch_num_tokens=int(valid.sum()))
    loss, _ = get_policy_loss_fn(actor.policy_loss.loss_mode)(
        **data, loss_agg_mode="seq-mean-token-sum-norm", config=actor, rollout_is_weights=None
    )
    loss.backward()
    loop, rule = LOOPS[name]
    wanted = torch.zeros(valid.shape, dtype=torch.float64)
    for row, length in enumerate(valid.sum(-1).tolist()):
        if length:
            columns = (data[key][row, :length].tolist() for key in ("old_log_prob", "log_prob", "advantages"))
            wanted[row, :length] = -torch.tensor(loop(list(zip(*columns, strict=True)), **rule), dtype=torch.float64)
    wanted /= valid.any(-1).sum() * WIDTH
    torch.testing.assert_close(data["log_prob"].grad.double(), wanted, rtol=1e-4, atol=1e-9)
    assert 0 < (wanted != 0).sum() < valid.sum() or name in ("cispo", "minpro", "cppo_soft")


def test_minpros_attenuation_survives_a_long_response():
    """8,000 ratios with heavy tails: a lower bound of 0.8 would lift nearly all tokens to it."""
    normal = torch.randn(3, 8000, generator=torch.Generator().manual_seed(0))
    log_ratio = (0.2 * normal[:1] / normal[1:].square().mean(0).sqrt()).clamp(-10, 3)  # Student's t, two degrees
    log_mu = torch.full_like(log_ratio, -4.0)
    data = {"old_log_prob": log_mu, "log_prob": (log_mu + log_ratio).requires_grad_()}
    data |= {"advantages": torch.ones_like(log_mu), "response_mask": torch.ones_like(log_mu, dtype=torch.bool)}
    actor = replay.setting("minpro", RUN).actor
    loss, _ = get_policy_loss_fn("prefix_ratio")(**data, config=actor, rollout_is_weights=None)
    loss.backward()
    weight = -data["log_prob"].grad * 8000
    smallest = torch.cat([torch.zeros(1, 1), log_ratio.cummin(-1).values[:, :-1]], -1)
    torch.testing.assert_close(weight, (log_ratio + smallest).exp().clamp_max(1.28), rtol=1e-3, atol=1e-6)
    assert (weight < 0.8).float().mean() > 0.95
    assert weight[0, -1000:].median() < 0.1
