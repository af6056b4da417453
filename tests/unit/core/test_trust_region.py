"""The trust region against the oracle, by hand numbers, and by the properties the paper states of it."""

import math
import random

import numpy as np
import oracle
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracle import batches, budgets, deltas, divergence_batches, full_batches, fuzz, lowest_weights

from cppo_verl.core import (
    adaptive_budget,
    build_trust_region,
    masked_quantile,
    position_weights,
    update_mask,
    violation,
)

MARGIN = 2e-6  # relative to max(1, S_t), in fp32
AWAY = torch.tensor(1.0)  # log_ratio = advantage = 1: the update moves rho away from one
EITHER_DTYPE = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
maybe_budgets = st.one_of(st.none(), budgets)


def ones(n):
    return torch.ones(n, dtype=torch.bool)


def one_response(*div, **setting):
    return build_trust_region(torch.tensor(div), ones(len(div)), **setting)


def kept(region, delta, gate="hard"):
    """M of tokens that all move away from one: the gate alone."""
    return update_mask(region, AWAY, AWAY, delta=delta, gate=gate)


def tensors(batch):
    return torch.tensor(batch.div), torch.tensor(batch.valid)


# --- by hand --------------------------------------------------------------------------------------------------


def test_worked_example():
    region = one_response(0.10, 0.05, 0.14, 0.02, delta=0.15, delta_b=0.02, w_min=0.8)
    torch.testing.assert_close(region.weights, torch.tensor([1, 14 / 15, 13 / 15, 0.8]))
    torch.testing.assert_close(region.weighted_divergence, torch.tensor([0.1, 0.7 / 15, 1.82 / 15, 0.016]))
    torch.testing.assert_close(region.threshold, torch.tensor([0.15, 0.07, 0.042, -0.062]))
    # x_3 = S_3 / (0.15 + 0.02 (1 + 14/15)) = 0.268 / 0.188667; x_4 = 0.284 / 0.206
    expected = torch.tensor([2 / 3, 0.146667 / 0.17, 0.268 / 0.188667, 0.284 / 0.206])
    torch.testing.assert_close(violation(region, 0.15), expected, rtol=1e-5, atol=0)
    assert kept(region, 0.15).tolist() == [1, 1, 0, 0]
    soft = torch.tensor([1, 1, 0.188667 / 0.268, 0.206 / 0.284])
    torch.testing.assert_close(kept(region, 0.15, "soft"), soft, rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    ("mask", "w_min", "expected"),
    [
        ([1], 0.5, [1]),
        ([1, 1], 0.5, [1, 0.5]),
        ([1, 1, 1], 0.5, [1, 0.75, 0.5]),
        ([0, 1, 0, 1, 1, 0], 0.5, [0, 1, 0, 0.75, 0.5, 0]),
        ([0, 0, 1, 0], 0.5, [0, 0, 1, 0]),
        ([0, 0], 0.5, [0, 0]),
        ([1, 1, 0], 1.0, [1, 1, 0]),
    ],
)
def test_position_weights(mask, w_min, expected):
    assert position_weights(torch.tensor(mask, dtype=torch.bool), w_min).tolist() == expected


def test_a_token_on_the_bar_is_kept():
    """Dyadic numbers, so that w D = c holds exactly: for delta at t = 1 and 2, for the prefix at t = 4."""
    region = one_response(0.25, 0.25, 0.0, 0.1875, 0.0625, delta=0.25, delta_b=0.1875, w_min=1.0)
    assert region.threshold.tolist() == [0.25, 0.1875, 0.125, 0.25, 0.25]
    region = one_response(0.25, 0.1875, 0.1875, 0.1875, 0.25, delta=0.25, delta_b=0.1875, w_min=1.0)
    assert region.threshold.tolist() == [0.25, 0.1875, 0.1875, 0.1875, 0.1875]
    assert violation(region, 0.25)[:4].tolist() == [1, 1, 1, 1]
    assert kept(region, 0.25).tolist() == [1, 1, 1, 1, 0]
    assert kept(region, 0.25, "soft")[:4].tolist() == [1, 1, 1, 1]


def test_a_blocked_token_still_spends_the_budget():
    region = one_response(1.0, 0.125, 0.125, delta=0.25, delta_b=0.25, w_min=1.0)
    assert region.threshold.tolist() == [0.25, -0.5, -0.375]
    assert kept(region, 0.25).tolist() == [0, 0, 0]


def test_credit_of_a_quiet_prefix_never_lifts_the_bar_above_delta():
    region = one_response(0.0, 0.0, 0.0, 0.3, delta=0.25, delta_b=0.25, w_min=1.0)
    assert region.threshold.tolist() == [0.25] * 4
    assert kept(region, 0.25).tolist() == [1, 1, 1, 0]


def test_lower_w_min_without_budget_helps_but_with_budget_can_block():
    """W_2 shrinks with w_min: the allowance falls from 0.19 to 0.188 while S_3 stays near 0.189."""
    setting = {"delta": 0.15, "delta_b": 0.02}
    assert kept(one_response(0.189, 0.0, 1e-4, w_min=1.0, **setting), 0.15)[2] == 1
    assert kept(one_response(0.189, 0.0, 1e-4, w_min=0.8, **setting), 0.15)[2] == 0


def test_an_infinite_divergence_closes_the_rest_of_the_response():
    region = one_response(0.01, math.inf, 0.01, delta=0.15, delta_b=0.02, w_min=0.8)
    for gate in ("hard", "soft"):
        assert kept(region, 0.15, gate).tolist() == [1, 0, 0]


def test_unknown_gate_is_named():
    with pytest.raises(ValueError, match="sharp"):
        update_mask(one_response(0.1, delta=0.15, delta_b=None, w_min=1.0), AWAY, AWAY, delta=0.15, gate="sharp")


@pytest.mark.parametrize("gate", ["hard", "soft", "sapo", "penalty"])
@pytest.mark.parametrize("budget", ["adaptive", "fixed", "none"])
def test_an_infinite_divergence_has_the_limit_of_large_ones_under_every_gate(gate, budget):
    def mask(large):
        div = torch.tensor([0.01, 0.02, large, 0.01], dtype=torch.float64)
        delta_b = {"adaptive": adaptive_budget(div, ones(4), 0.02), "fixed": 0.02, "none": None}[budget]
        region = build_trust_region(div, ones(4), delta=0.15, delta_b=delta_b, w_min=0.8)
        return torch.stack(
            [kept(region, 0.15, gate), update_mask(region, -AWAY, AWAY, delta=0.15, gate=gate)]  # away, towards one
        )

    limit = mask(1e300)
    assert limit[0, 2].abs() < 1e-9 or limit[0, 2] < -1e9
    limit = torch.where(limit.abs() > 1e9, limit.sign() * math.inf, limit)
    torch.testing.assert_close(mask(math.inf), limit, rtol=0, atol=1e-9)


@EITHER_DTYPE
def test_a_quantile_beside_an_infinite_value_is_finite_up_to_it_and_infinite_above(dtype):
    x = torch.tensor([0.1, 0.2, 0.3, math.inf], dtype=dtype)
    quantiles = [masked_quantile(x, ones(4), q).item() for q in (0.5, 2 / 3, 0.7, 0.9, 1)]
    assert quantiles == pytest.approx([0.25, 0.3, math.inf, math.inf, math.inf])
    assert adaptive_budget(x, ones(4), 0.02).item() == pytest.approx(0.04)


# --- against the oracle ---------------------------------------------------------------------------------------


@EITHER_DTYPE
@pytest.mark.parametrize("budget", ["none", "fixed", "adaptive"])
@given(batch=full_batches, delta=deltas, delta_b=budgets, w_min=lowest_weights, half=st.booleans())
@fuzz
def test_agrees_with_the_oracle(budget, dtype, batch, delta, delta_b, w_min, half):
    """Weights, w D, c, x and both masks; log-probabilities in the dtype of D or in bf16."""
    div, valid = torch.tensor(batch.div, dtype=dtype), torch.tensor(batch.valid)
    log_mu, log_pi, adv = (
        torch.tensor(x, dtype=torch.bfloat16 if half else dtype) for x in (batch.log_mu, batch.log_pi, batch.adv)
    )
    if budget == "adaptive":
        delta_b = adaptive_budget(div, valid, delta_b)
    region = build_trust_region(div, valid, delta=delta, delta_b=None if budget == "none" else delta_b, w_min=w_min)
    x = violation(region, delta)
    hard, soft = (update_mask(region, log_pi - log_mu, adv, delta=delta, gate=gate) for gate in ("hard", "soft"))

    for row, v in enumerate(batch.valid):
        d = batch.div[row]
        b = {"none": None, "fixed": delta_b, "adaptive": None}[budget]
        if budget == "adaptive":
            b = delta_b[row].item()
        w = oracle.position_weights(v, w_min)
        steps = zip(v, log_mu[row].tolist(), log_pi[row].tolist(), adv[row].tolist(), strict=True)
        away = [on and oracle.moves_away(m, p, a) for on, m, p, a in steps]

        def same(got, expected, row=row, v=v):
            expected = torch.tensor(expected, dtype=dtype)
            torch.testing.assert_close(got[row][v], expected[v], rtol=1e-5, atol=2e-5)

        same(region.weights, w)
        same(region.threshold, oracle.effective_threshold(d, v, w, delta, b))
        same(x, oracle.violation(d, v, w, delta, b))
        same(soft, oracle.soft_mask(d, v, w, delta, b, away))
        clear = torch.tensor(oracle.decided(d, v, w, delta, b, MARGIN))
        expected = torch.tensor(oracle.hard_mask(d, v, w, delta, b, away), dtype=dtype)
        assert torch.equal(hard[row][clear], expected[clear])

    off = ~valid
    assert not region.weights[off].any()
    assert not region.weighted_divergence[off].any()
    for gated in (hard, soft):
        assert gated.dtype == dtype
        assert gated.isfinite().all() and (gated >= 0).all() and (gated <= 1).all()


@given(batch=divergence_batches, delta=deltas, delta_b=maybe_budgets, w_min=lowest_weights)
@fuzz
def test_one_bar_is_the_same_as_two_constraints_and_as_a_violation_up_to_one(batch, delta, delta_b, w_min):
    """w D <= c, {w D <= delta and S_t <= delta + delta_b W_{t-1}} and x <= 1 are one set."""
    region = build_trust_region(*tensors(batch), delta=delta, delta_b=delta_b, w_min=w_min)
    bar, x = kept(region, delta).bool(), violation(region, delta)
    for row, (d, v) in enumerate(zip(batch.div, batch.valid, strict=True)):
        w = oracle.position_weights(v, w_min)
        clear = oracle.decided(d, v, w, delta, delta_b, MARGIN)
        for t, (token, prefix) in enumerate(oracle.two_constraints(d, v, w, delta, delta_b)):
            if clear[t] and min(abs(token), abs(prefix)) > MARGIN:
                assert bar[row, t] == (token >= 0 and prefix >= 0)
                assert bar[row, t] == (x[row, t] <= 1)


def test_64k_tokens_in_single_precision():
    """A prefix drift that hovers at the bar for 64k tokens: fp32 decides as the double-precision oracle does."""
    length, delta, delta_b, w_min = 1 << 16, 0.15625, 0.015625, 0.8  # dyadic: only the sums can round
    rng, drift = random.Random(0), 0.0
    valid = [rng.random() > 0.05 for _ in range(length)]
    w = oracle.position_weights(valid, w_min)
    div = []
    for w_t in w:
        d = max(0.0, delta_b + 0.2 * (0.14 - drift) + rng.gauss(0, 0.02)) if w_t else math.nan
        div.append(float(np.float32(d)))
        drift += w_t * (div[-1] - delta_b) if w_t else 0.0

    region = build_trust_region(torch.tensor(div), torch.tensor(valid), delta=delta, delta_b=delta_b, w_min=w_min)
    threshold = torch.tensor(oracle.effective_threshold(div, valid, w, delta, delta_b))
    error = (region.threshold - threshold)[valid].abs().max()
    assert error < 1e-5

    clear = torch.tensor(oracle.decided(div, valid, w, delta, delta_b, 0)) & (
        (region.weighted_divergence - region.threshold).abs() > 2e-5
    )
    hard = kept(region, delta)[clear].tolist()
    expected = torch.tensor(oracle.hard_mask(div, valid, w, delta, delta_b, [True] * length))[clear].tolist()
    assert hard == expected
    assert len(hard) > 0.99 * sum(valid)
    assert 0.1 < sum(hard) / len(hard) < 0.9


def test_double_precision_input_is_computed_in_double_precision():
    region = build_trust_region(torch.full((7,), 0.1).double(), ones(7), delta=0.15, delta_b=0.02, w_min=0.8)
    w = oracle.position_weights([True] * 7, 0.8)
    torch.testing.assert_close(region.weights, torch.tensor(w, dtype=torch.float64), rtol=1e-14, atol=0)


# --- properties -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gate", ["hard", "soft"])
@given(batch=full_batches, delta=deltas, delta_b=maybe_budgets, w_min=lowest_weights)
@fuzz
def test_an_update_towards_one_is_never_blocked(gate, batch, delta, delta_b, w_min):
    region = build_trust_region(*tensors(batch), delta=delta, delta_b=delta_b, w_min=w_min)
    ratio, adv = torch.tensor(batch.log_pi) - torch.tensor(batch.log_mu), torch.tensor(batch.adv)
    for direction in (adv, -ratio, torch.zeros(())):  # as drawn; always towards one; no advantage
        towards_one = torch.tensor(batch.valid) & (direction * torch.expm1(ratio) <= 0)
        assert (update_mask(region, ratio, direction, delta=delta, gate=gate)[towards_one] == 1).all()


@given(batch=full_batches, delta=deltas, delta_b=budgets, w_min=lowest_weights, adaptive=st.booleans())
@fuzz
def test_only_the_valid_tokens_matter(batch, delta, delta_b, w_min, adaptive):
    """Garbage, padding and holes change nothing: each row equals, bit for bit, its valid tokens alone."""

    def everything(div, valid, ratio, adv):
        b = adaptive_budget(div, valid, delta_b) if adaptive else delta_b
        region = build_trust_region(div, valid, delta=delta, delta_b=b, w_min=w_min)
        masks = [update_mask(region, ratio, adv, delta=delta, gate=gate) for gate in ("hard", "soft")]
        return [region.weights, region.weighted_divergence, region.threshold, violation(region, delta), *masks]

    (div, valid), adv = tensors(batch), torch.tensor(batch.adv)
    ratio = torch.tensor(batch.log_pi) - torch.tensor(batch.log_mu)
    padded = everything(div, valid, ratio, adv)
    for row, on in enumerate(valid):
        if on.any():
            alone = everything(div[row][on], ones(int(on.sum())), ratio[row][on], adv[row][on])
            for got, expected in zip(padded, alone, strict=True):
                assert torch.equal(got[row][on], expected)


@given(
    batch=divergence_batches,
    delta=deltas,
    delta_b=budgets,
    w_min=lowest_weights,
    scale=st.sampled_from([1.0, 1.1, 3.0]),
)
@fuzz
def test_a_larger_delta_or_budget_never_blocks_more(batch, delta, delta_b, w_min, scale):
    def gate(delta, delta_b, w_min=w_min):
        region = build_trust_region(*tensors(batch), delta=delta, delta_b=delta_b, w_min=w_min)
        return kept(region, delta)[torch.tensor(batch.valid)]

    base = gate(delta, delta_b)
    assert (base <= gate(scale * delta, delta_b)).all()
    assert (base <= gate(delta, scale * delta_b)).all()
    assert (base <= gate(delta, None)).all()
    assert (gate(delta, None) <= gate(delta, None, w_min / scale)).all()  # only without a prefix budget


@given(batch=divergence_batches, delta=deltas)
@fuzz
def test_dppo_is_unit_weight_and_no_budget(batch, delta):
    div, valid = tensors(batch)
    region = build_trust_region(div, valid, delta=delta, delta_b=None, w_min=1.0)
    assert torch.equal(kept(region, delta)[valid], (div <= delta).float()[valid])


def test_soft_gate_is_admissible():
    """g = 1 on [0, 1], non-increasing, x g(x) <= 1; each x is a response of one token."""
    x = torch.cat([torch.linspace(0, 3, 301), torch.logspace(0.5, 8, 50)]).unsqueeze(-1)
    region = build_trust_region(0.25 * x, torch.ones_like(x, dtype=torch.bool), delta=0.25, delta_b=0.02, w_min=0.8)
    assert torch.equal(violation(region, 0.25), x)
    g = kept(region, 0.25, "soft")
    assert (g[x <= 1] == 1).all()
    assert (g.diff(dim=0) <= 0).all()
    assert (x * g <= 1 + 1e-6).all()
    torch.testing.assert_close(g, 1 / x.clamp_min(1))


@pytest.mark.parametrize("gate", ["hard", "soft"])
@pytest.mark.parametrize("adaptive", [False, True])
def test_the_mask_carries_no_gradient(adaptive, gate):
    div, log_ratio, adv = (torch.tensor([[0.1, 0.2, 0.05]], requires_grad=True) for _ in range(3))
    mask = ones(3)[None]
    delta_b = adaptive_budget(div, mask, 0.02) if adaptive else 0.02
    region = build_trust_region(div, mask, delta=0.15, delta_b=delta_b, w_min=0.8)
    assert not any(x.requires_grad for x in (*region[:3], violation(region, 0.15)))
    assert not update_mask(region, log_ratio, adv, delta=0.15, gate=gate).requires_grad


def test_the_adaptive_budget_carries_no_gradient():
    div, mask = torch.tensor([[0.03, 0.03]], requires_grad=True), ones(2)[None]
    assert not adaptive_budget(div, mask, 0.02).requires_grad


# --- the adaptive budget --------------------------------------------------------------------------------------


@EITHER_DTYPE
@given(batch=batches(max_length=24), q=st.sampled_from([0.0, 0.5, 0.9, 1.0]))
@fuzz
def test_quantile_is_numpys(dtype, batch, q):
    got = masked_quantile(torch.tensor(batch.div, dtype=dtype), torch.tensor(batch.valid), q)
    assert got.shape == (2, 1)
    for value, d, v in zip(got[:, 0].tolist(), batch.div, batch.valid, strict=True):
        expected = np.quantile(np.array(d)[v], q) if any(v) else 0.0
        assert value == pytest.approx(expected, rel=1e-6, abs=1e-9)


@EITHER_DTYPE
@given(batch=batches(max_length=24), floor=st.sampled_from([0.015, 0.02, 0.3]))
@fuzz
def test_adaptive_budget_agrees_with_the_oracle(dtype, batch, floor):
    got = adaptive_budget(torch.tensor(batch.div, dtype=dtype), torch.tensor(batch.valid), floor)
    expected = [oracle.adaptive_budget(d, v, floor) for d, v in zip(batch.div, batch.valid, strict=True)]
    assert got[:, 0].tolist() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    ("div", "upper", "expected"),
    [
        ([0.0] * 11, 2.0, 0.02),  # below the floor
        ([0.5] * 11, 2.0, 0.04),  # above the ceiling
        ([0.5] * 11, 5.0, 0.1),
        ([0.0] * 9 + [0.03, 0.5], 2.0, 0.03),  # rank 9 of 0..10
        ([0.5, 0.0], 2.0, 0.04),  # 0.9 of the way from 0 to 0.5, clamped
        ([0.5, 0.0], 25.0, 0.45),
        ([0.025], 2.0, 0.025),
        ([0.0] * 8 + [0.02, 0.04], 2.0, 0.022),  # rank 8.1 of 0..9
        ([0.01] * 9 + [math.inf], 2.0, 0.04),
        ([math.inf] * 3, 2.0, 0.04),
        ([0.01] * 10 + [math.inf], 2.0, 0.02),  # rank 9 exactly: the infinite tail is not mixed in
    ],
)
def test_adaptive_budget_by_hand(div, upper, expected):
    assert adaptive_budget(torch.tensor(div), ones(len(div)), 0.02, upper).item() == pytest.approx(expected)


def test_adaptive_budget_of_an_empty_response_is_the_floor():
    div, mask = torch.tensor([[math.nan, 9.0], [0.03, 9.0]]), torch.tensor([[False, False], [True, False]])
    assert adaptive_budget(div, mask, 0.02)[:, 0].tolist() == pytest.approx([0.02, 0.03])


def test_each_response_has_its_own_budget():
    div = torch.tensor([[0.15, 0.05], [0.15, 0.05]])
    each = torch.tensor([[0.0], [0.1]])
    region = build_trust_region(div, torch.ones_like(div, dtype=torch.bool), delta=0.15, delta_b=each, w_min=1.0)
    torch.testing.assert_close(region.threshold, torch.tensor([[0.15, 0.0], [0.15, 0.1]]))
    assert region.delta_b.tolist() == [[0.0], [pytest.approx(0.1)]]
