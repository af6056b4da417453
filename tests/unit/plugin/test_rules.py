"""The rules beside CPPO's own, against formulas written from their sources."""

import math

import oracle
import pytest
import torch
from loss_batches import actor_config, batch, call
from verl.trainer.ppo.core_algos import get_policy_loss_fn
from verl.workers.config import FSDPActorConfig

from cppo_verl.core import position_weights, shuffled_weights
from cppo_verl.plugin.config import PrefixRatioLossConfig, TRMLossConfig


def loss_and_gradient(loss_mode, policy_loss, data, **actor):
    config = FSDPActorConfig(
        strategy="fsdp2", rollout_n=1, ppo_micro_batch_size_per_gpu=1, policy_loss=policy_loss, **actor
    )
    data["log_prob"].grad = None
    loss, metrics = get_policy_loss_fn(loss_mode)(**data, config=config, rollout_is_weights=None)
    loss.backward()
    return loss.item(), data["log_prob"].grad, metrics


def rows(data):
    """Per response: its row and the (column, log mu, log pi, A) of its valid tokens."""
    for i, valid in enumerate(data["response_mask"].tolist()):
        columns = [t for t, v in enumerate(valid) if v]
        yield i, [(t, *(data[k][i, t].item() for k in ("old_log_prob", "log_prob", "advantages"))) for t in columns]


def gradient_of(data, weight):
    """Gradient of the token-mean of -weight_t log pi_t."""
    grad = torch.zeros_like(data["log_prob"], dtype=torch.float64)
    for i, tokens in rows(data):
        for (t, *_), w in zip(tokens, weight(tokens), strict=True):
            grad[i, t] = -w
    return (grad / data["response_mask"].sum()).float()


def binary_kl(log_mu, log_pi):
    mu, pi = math.exp(log_mu), math.exp(log_pi)
    return mu * (log_mu - log_pi) + (1 - mu) * math.log((1 - mu) / (1 - pi))


@pytest.mark.parametrize(("delta", "delta_avg"), [(0.1, None), (None, 0.02), (0.1, 0.02)])
def test_trm_keeps_or_drops_whole_responses(delta, delta_avg):
    data = batch(drift=0.3)
    data["old_log_prob"] = data["old_log_prob"].clamp_max(-0.01).nan_to_num()

    def weight(tokens):
        div = [binary_kl(m, p) for _, m, p, _ in tokens]
        keep = (delta is None or max(div, default=0) <= delta) and (
            delta_avg is None or sum(div) <= delta_avg * len(div)
        )
        return [keep * math.exp(p - m) * a for _, m, p, a in tokens]

    _, grad, _ = loss_and_gradient("trm", TRMLossConfig(delta=delta, delta_avg=delta_avg), data)
    want = gradient_of(data, weight)
    torch.testing.assert_close(grad, want, rtol=1e-4, atol=1e-7)
    kept = (want != 0).any(-1)
    assert 0 < kept.sum() < len(kept) - 1


@pytest.mark.parametrize("ratio", ["minimum", "mean"])
def test_prefix_ratios_are_clipped_without_gradient(ratio):
    data = batch(drift=0.2)

    def weight(tokens):
        log_ratios, weights = [], []
        for _, m, p, a in tokens:
            log_ratios.append(p - m)
            if ratio == "minimum":
                r = math.exp(log_ratios[-1] + (min(log_ratios[:-1]) if len(log_ratios) > 1 else 0.0))
            else:
                r = math.exp(sum(log_ratios) / len(log_ratios))
            weights.append(min(max(r, 0.8), 1.28) * a)
        return weights

    clip = dict(clip_ratio_low=0.2, clip_ratio_high=0.28)
    _, grad, metrics = loss_and_gradient("prefix_ratio", PrefixRatioLossConfig(ratio=ratio), data, **clip)
    torch.testing.assert_close(grad, gradient_of(data, weight), rtol=1e-4, atol=1e-7)
    assert 0 < metrics["actor/trust_region/all/masked"] < metrics["actor/trust_region/all/tokens"]


def test_drpo_is_the_gradient_of_its_quadratic_penalty():
    """A rho - |A| (pi - mu)^2 / (2 delta mu), arXiv 2606.09821, differentiated by autograd."""
    data, delta = batch(drift=0.3), 0.15
    _, grad, _ = loss_and_gradient(
        "cppo", actor_config(delta=delta, w_min=1.0, budget="none", gate="penalty").policy_loss, data
    )
    mask = data["response_mask"]
    log_mu, adv = (torch.where(mask, data[k], 0.0).double() for k in ("old_log_prob", "advantages"))
    log_pi = torch.where(mask, data["log_prob"].detach(), 0.0).double().requires_grad_()
    mu, pi = log_mu.exp(), log_pi.exp()
    objective = adv * pi / mu - adv.abs() * (pi - mu) ** 2 / (2 * delta * mu)
    (-(objective * mask).sum() / mask.sum()).backward()
    torch.testing.assert_close(grad.double(), log_pi.grad, rtol=1e-4, atol=1e-7)


def test_sapo_gate_on_the_violation():
    data = batch(drift=0.3)
    tau, delta = 2.0, 0.15
    rule = actor_config(gate="sapo", tau=tau, budget="fixed").policy_loss
    _, grad, _ = loss_and_gradient("cppo", rule, data)

    def weight(tokens):
        div = [abs(math.exp(p) - math.exp(m)) for _, m, p, _ in tokens]
        valid = [True] * len(div)
        x = oracle.violation(div, valid, oracle.position_weights(valid, 0.8), delta, 0.02)
        out = []
        for (_, m, p, a), x_t in zip(tokens, x, strict=True):
            s = 1 / (1 + math.exp(-tau * x_t))
            out.append((4 * s * (1 - s) if oracle.moves_away(m, p, a) else 1.0) * math.exp(p - m) * a)
        return out

    torch.testing.assert_close(grad, gradient_of(data, weight), rtol=1e-4, atol=1e-7)


def test_shuffled_weights_are_the_same_multiset_in_another_order():
    mask = batch()["response_mask"]
    linear = position_weights(mask, 0.6)
    shuffled = shuffled_weights(mask, 0.6, generator=torch.Generator().manual_seed(0))
    assert not shuffled[~mask].any()
    torch.testing.assert_close(shuffled.sort(-1).values, linear.sort(-1).values)
    assert not torch.equal(shuffled, linear)
    # every position is as likely as any other to get the last weight
    one = torch.ones(4000, 5, dtype=torch.bool)
    where = shuffled_weights(one, 0.5, generator=torch.Generator().manual_seed(0)).argmin(-1).bincount(minlength=5)
    assert (where - 800).abs().max() < 120


def test_horizon_and_budget_clamp_of_the_pull_request():
    mask = torch.ones(1, 4, dtype=torch.bool)
    torch.testing.assert_close(position_weights(mask, 0.8, horizon=11), torch.tensor([[1.0, 0.98, 0.96, 0.94]]))
    data = batch(drift=1.5)
    budgets = [
        call(data, actor_config(budget_clamp=c))[1]["actor/trust_region/all/effective_delta_b"] for c in (1.0, 2.0, 5.0)
    ]
    assert budgets[0] < budgets[1] < budgets[2]


def test_masked_methods_differ_in_the_mask_alone():
    """Where two masks agree the gradients are the same number, whichever rule decided."""
    data = batch(drift=0.5)
    rules = [
        ("cppo", actor_config().policy_loss),
        ("cppo", actor_config(w_min=1.0, budget="none").policy_loss),
        ("trm", TRMLossConfig(divergence="binary_tv", delta=0.3, delta_avg=None)),
    ]
    grads = [loss_and_gradient(mode, rule, data)[1].clone() for mode, rule in rules]
    for i, a in enumerate(grads):
        for b in grads[i + 1 :]:
            both = (a != 0) & (b != 0)
            assert both.any()
            assert torch.equal(a[both], b[both])
            assert ((a != 0) != (b != 0)).any()
