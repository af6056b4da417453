"""The registered loss, called through verl's registry as verl calls it."""

import math
from itertools import chain

import numpy as np
import oracle
import pytest
import torch
from loss_batches import CAP, DELTA, DELTA_B, W_MIN, actor_config, batch, call
from torch.utils._python_dispatch import TorchDispatchMode
from verl.trainer.ppo.core_algos import agg_loss, get_policy_loss_fn
from verl.utils.metric import AggregationType, Metric
from verl.utils.py_functional import append_to_dict, rename_dict
from verl.workers.config import FSDPActorConfig

from cppo_verl.plugin.losses import loss_context
from cppo_verl.plugin.step_metrics import pop_shares, step_shares


def expected(data, gate="hard", budget="adaptive", kl=False):
    """Loss and gradient per token and the statistics, by the oracle, in double precision."""
    loss, grad, stats = [], [], []
    rows = zip(*(data[k].tolist() for k in ("old_log_prob", "log_prob", "advantages", "response_mask")), strict=True)
    for log_mu, log_pi, adv, valid in rows:
        div = [
            (_binary_kl(m, p) if kl else abs(math.exp(p) - math.exp(m))) if v else 0.0
            for m, p, v in zip(log_mu, log_pi, valid, strict=True)
        ]
        w = oracle.position_weights(valid, W_MIN)
        delta_b = {"fixed": DELTA_B, "none": None}.get(budget)
        if budget == "adaptive":
            delta_b = oracle.adaptive_budget(div, valid, DELTA_B)
        away = [v and oracle.moves_away(m, p, a) for m, p, a, v in zip(log_mu, log_pi, adv, valid, strict=True)]
        rule = oracle.hard_mask if gate == "hard" else oracle.soft_mask
        mask = rule(div, valid, w, DELTA, delta_b, away)
        value, derivative = oracle.surrogate(log_mu, log_pi, adv, mask, CAP)
        loss.append(value)
        grad.append(derivative)
        stats.append((div, valid, w, adv, mask, delta_b))
    return loss, grad, stats


def _binary_kl(log_mu, log_pi):
    mu, pi = math.exp(log_mu), math.exp(log_pi)
    return mu * (log_mu - log_pi) + ((1 - mu) * math.log((1 - mu) / (1 - pi)) if mu < 1 else 0.0)


@pytest.mark.parametrize("gate", ["hard", "soft"])
@pytest.mark.parametrize("budget", ["adaptive", "fixed", "none"])
@pytest.mark.parametrize("mode", ["token-mean", "seq-mean-token-sum", "seq-mean-token-mean"])
def test_loss_and_gradient_are_those_of_the_oracle(gate, budget, mode):
    data = batch()
    loss, _ = call(data, actor_config(gate=gate, budget=budget), mode)
    loss.backward()
    value, grad, _ = expected(data, gate, budget)
    mask = data["response_mask"].double()
    want = agg_loss(loss_mat=torch.tensor(value).double(), loss_mask=mask, loss_agg_mode=mode)
    assert loss.item() == pytest.approx(want.item(), rel=1e-5)
    leaf = torch.zeros_like(mask, requires_grad=True)
    agg_loss(loss_mat=torch.tensor(grad).double() * leaf, loss_mask=mask, loss_agg_mode=mode).backward()
    torch.testing.assert_close(data["log_prob"].grad.double(), leaf.grad, rtol=1e-5, atol=1e-8)


def test_kl_divergence_masks_as_the_oracle_does():
    data = batch(seed=3, drift=0.3)
    loss, _ = call(data, actor_config(divergence="binary_kl", budget="fixed"))
    loss.backward()
    _, grad, _ = expected(data, budget="fixed", kl=True)
    kept = data["log_prob"].grad != 0
    assert torch.equal(kept, torch.tensor(grad) != 0)
    assert 0 < kept.sum() < data["response_mask"].sum()


def test_half_precision_input_is_masked_as_its_fp32_value():
    data = batch()
    half = {k: v.detach().bfloat16() if v.is_floating_point() else v for k, v in data.items()}
    single = {k: v.float() if v.is_floating_point() else v for k, v in half.items()}
    losses = [call(d, actor_config())[0] for d in (half, single)]
    assert losses[0].dtype == torch.float32 and torch.equal(*losses)


def test_autocast_which_verls_engines_call_the_loss_under_changes_nothing():
    plain, under_autocast = batch(rows=30, width=300), batch(rows=30, width=300)
    loss, metrics = call(plain, actor_config())
    with torch.autocast("cpu", torch.bfloat16):
        same_loss, same_metrics = call(under_autocast, actor_config())
    loss.backward(), same_loss.backward()
    assert same_metrics == metrics and torch.equal(same_loss, loss)
    assert torch.equal(under_autocast["log_prob"].grad, plain["log_prob"].grad)


@pytest.mark.parametrize("tokens", [0, 100])
def test_a_batch_without_a_valid_token_has_loss_and_gradient_zero(tokens):
    data = batch()
    data["response_mask"] = torch.zeros_like(data["response_mask"])
    loss, metrics = call(data, actor_config(tokens=tokens, sequences=12))
    loss.backward()
    assert loss.item() == 0 and not data["log_prob"].grad.any()
    assert pop_shares(metrics) == {}


@pytest.mark.parametrize("field", ["log_prob", "old_log_prob", "advantages"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_non_finite_values_on_valid_tokens_are_named(field, value):
    data = batch()
    data[field] = data[field].detach().clone()
    data[field][2, 7] = value
    with pytest.raises(ValueError, match=rf"^{field} must be finite.*1 of \d+ valid.*{value} at response 2, column 7"):
        call(data, actor_config())


def test_log_probabilities_above_zero_are_refused_but_not_rounding():
    data = batch()
    data["log_prob"] = data["log_prob"].detach().clone()
    data["log_prob"][2, 7] = 1e-5
    call(data, actor_config())
    data["log_prob"][2, 7] = 0.01
    with pytest.raises(ValueError, match="log_prob must be finite and not above zero"):
        call(data, actor_config())


def test_unequal_shapes_and_importance_weights_are_refused():
    data = batch()
    with pytest.raises(
        ValueError, match=r"one shape \[B, L\], got old_log_prob \(12, 40\), log_prob .*mask \(12, 39\)"
    ):
        call(data | {"response_mask": data["response_mask"][:, 1:]}, actor_config())
    with pytest.raises(ValueError, match="rollout_is=null"):
        get_policy_loss_fn("cppo")(**data, config=actor_config(), rollout_is_weights=torch.ones(12, 40))


def test_verls_own_policy_loss_config_is_refused_with_the_override():
    config = FSDPActorConfig(strategy="fsdp2", rollout_n=1, ppo_micro_batch_size_per_gpu=1)
    with pytest.raises(TypeError, match=r"\+method=cppo"):
        call(batch(), config)


def step_metrics(data, ranks, micro_batches):
    """The metrics of one update, reduced by verl's own functions as its workers and trainer do.

    micro_batches: per rank, a list of row-index lists.
    """
    tokens, sequences = int(data["response_mask"].sum()), len(data["response_mask"])
    per_rank = []
    grad = torch.zeros_like(data["log_prob"])
    for rank in range(ranks):
        collected = {}
        for rows in micro_batches[rank]:
            part = {k: v[rows].detach() for k, v in data.items()}
            part["log_prob"].requires_grad_()
            loss, metrics = call(part, actor_config(tokens, sequences, dp_size=ranks))
            loss.backward()
            grad[rows] += part["log_prob"].grad / ranks  # FSDP averages over ranks
            append_to_dict(collected, Metric.from_dict(metrics, aggregation=AggregationType.MEAN))
        per_rank.append(collected)
    reduced = {key: Metric.aggregate_dp([rank[key] for rank in per_rank]) for key in per_rank[0]}
    return step_shares({key: [value] for key, value in rename_dict(reduced, "actor/").items()}), grad


SPLITS = {
    "one micro-batch": (1, [[range(12)]]),
    "four micro-batches": (1, [[range(0, 3), range(3, 6), range(6, 9), range(9, 12)]]),
    "micro-batches of unequal size": (1, [[range(0, 1), range(1, 8), range(8, 12)]]),
    "two ranks": (2, [[range(0, 3), range(3, 6)], [range(6, 9), range(9, 12)]]),
    "four ranks, unequal": (4, [[range(0, 1)], [range(1, 2)], [range(2, 4)], [range(4, 12)]]),
}


@pytest.mark.parametrize("split", SPLITS)
def test_metrics_and_gradient_do_not_depend_on_the_split(split):
    data = batch()
    ranks, parts = SPLITS[split]
    metrics, grad = step_metrics(data, ranks, [[list(rows) for rows in rank] for rank in parts])
    whole, whole_grad = step_metrics(data, *[1, [[list(range(12))]]])
    assert metrics == pytest.approx(whole, rel=1e-5)
    torch.testing.assert_close(grad, whole_grad, rtol=1e-6, atol=1e-9)


def test_metrics_are_those_of_the_oracle():
    data = batch(drift=0.8)
    metrics, _ = step_metrics(data, 1, [[list(range(12))]])
    _, _, stats = expected(data)
    stats = [row for row in stats if any(row[1])]
    for group, infix in ((lambda a: True, ""), (lambda a: a > 0, "positive/"), (lambda a: a < 0, "negative/")):
        tokens, responses = [], []
        for div, valid, w, adv, mask, delta_b in stats:
            row = [(d, w_t * d, m) for d, v, w_t, a, m in zip(div, valid, w, adv, mask, strict=True) if v and group(a)]
            tokens += row
            if row:  # a response's advantages are all alike here
                kept = [d for d, v in zip(div, valid, strict=True) if v]
                responses.append((delta_b, np.quantile(kept, 0.9), np.dot(w, div) / sum(w)))
        masked = [wd for _, wd, m in tokens if m == 0]
        want = {
            "masked_share": len(masked) / len(tokens),
            "budget_rejected_share": sum(wd <= DELTA for wd in masked) / len(masked),
            "token_rejected_share": sum(wd > DELTA for wd in masked) / len(masked),
            "divergence": np.mean([d for d, _, _ in tokens]),
            "effective_delta_b": np.mean([r[0] for r in responses]),
            "divergence_p90": np.mean([r[1] for r in responses]),
            "prefix_average": np.mean([r[2] for r in responses]),
        }
        got = {name: metrics[f"trust_region/{infix}{name}"] for name in want}
        assert got == pytest.approx(want, rel=1e-5)
        assert 0 < want["budget_rejected_share"] < 1
    log_mu, log_pi = (data[name][data["response_mask"].bool()].tolist() for name in ("old_log_prob", "log_prob"))
    error = sum(abs(pi - mu) for pi, mu in zip(log_pi, log_mu, strict=True)) / sum(map(abs, log_mu))
    assert metrics["trust_region/first_update/relative_log_prob_error"] == pytest.approx(error, rel=1e-5)


def test_metric_names_do_not_trip_verls_reduction_by_name():
    _, metrics = call(batch(), actor_config())
    assert not [key for key in chain(metrics, pop_shares(dict(metrics))) if "max" in key or "min" in key]


def test_a_top_k_divergence_without_the_trainer_is_refused():
    with pytest.raises(RuntimeError, match="divergence=topk_tv is measured in the forward pass"):
        call(batch(), actor_config(divergence="topk_tv"))


def test_the_loss_takes_the_measured_divergence_on_valid_tokens_alone():
    data = batch()
    mask = data["response_mask"]
    exact = (data["log_prob"].detach().exp() - data["old_log_prob"].exp()).abs()
    with loss_context(divergence=torch.where(mask, exact, torch.nan)):
        loss, metrics = call(data, actor_config(divergence="topk_tv"))
    want, want_metrics = call(data, actor_config())
    assert loss.item() == pytest.approx(want.item())
    assert metrics == pytest.approx(want_metrics)


@pytest.mark.parametrize("value", [math.nan, math.inf, -0.1])
def test_a_measured_divergence_that_is_none_is_refused_with_the_way_out(value):
    data = batch()
    divergence = (data["log_prob"].detach().exp() - data["old_log_prob"].exp()).abs()
    divergence[2, 7] = value
    message = (
        rf"^divergence must be finite and not below zero: 1 of \d+ .* {value}\d* at response 2, column 7.*=topk_tv"
    )
    with loss_context(divergence=divergence), pytest.raises(ValueError, match=message):
        call(data, actor_config(divergence="topk_kl"))


@pytest.mark.parametrize("scale", [None, 7])
@pytest.mark.parametrize(
    "mode", ["token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-sum-norm", "seq-mean-token-mean"]
)
def test_loss_and_gradient_are_averaged_as_agg_loss_does_with_the_numbers_of_the_whole_batch(mode, scale):
    data, config = batch(), actor_config(tokens=1000, sequences=50, dp_size=2)
    config.global_batch_info["loss_scale_factor"] = scale
    loss, _ = call(data, config, mode)
    loss.backward()
    value, grad, _ = expected(data)
    given = dict(loss_mask=data["response_mask"].double(), loss_agg_mode=mode, **config.global_batch_info)
    assert loss.item() == pytest.approx(agg_loss(loss_mat=torch.tensor(value).double(), **given).item(), rel=1e-5)
    leaf = torch.zeros_like(given["loss_mask"], requires_grad=True)
    agg_loss(loss_mat=torch.tensor(grad).double() * leaf, **given).backward()
    torch.testing.assert_close(data["log_prob"].grad.double(), leaf.grad, rtol=1e-5, atol=1e-8)


class Operations(TorchDispatchMode):
    """The names of the tensor operations inside, those of the backward pass too."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(str(function))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("mode", ["token-mean", "seq-mean-token-sum-norm"])
@pytest.mark.parametrize(("rows", "width"), [(6, 40), (24, 40), (6, 160)])
def test_forward_and_backward_take_at_most_100_operations_and_one_transfer(rows, width, mode, monkeypatch):
    """On an accelerator a small micro-batch costs its operations; one that waits for a value costs much more."""
    transfers, cpu = [], torch.Tensor.cpu
    monkeypatch.setattr(torch.Tensor, "cpu", lambda self: transfers.append(self.shape) or cpu(self))
    data = batch(rows=rows, width=width)
    config = actor_config(int(data["response_mask"].sum()), rows)
    with Operations() as operations:
        loss, _ = call(data, config, mode)
        loss.backward()
    assert len(operations.names) <= 100
    waiting = ("_local_scalar_dense", "nonzero", "masked_select", "equal")
    assert not [name for name in operations.names if name.split(".")[1] in waiting]
    assert len(transfers) == 1
