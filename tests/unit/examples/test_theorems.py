"""Lemma 3, Corollary 6 with (15) and (18), B.9 and C.2, by enumeration and linear programs.

A check takes the formulas as a namespace, so that a mutation can put a wrong one in the place of one of them.
"""

from types import SimpleNamespace

import numpy as np
import pytest
import theory
from scipy.optimize import linprog

ROUNDING = 1 + 1e-9
THRESHOLDS = [(0.05, 0.02), (0.15, 0.02), (0.3, 0.1)]


def policy(rng, vocabulary, horizon, sharpness):
    rows = [sharpness * rng.normal(size=(vocabulary**t, vocabulary)) for t in range(horizon)]
    return [np.exp(x) / np.exp(x).sum(1, keepdims=True) for x in rows]


def problems():
    """(mu, pi, T, the generator) of small problems, some of them sharp."""
    for vocabulary, horizon in [(2, 2), (2, 5), (3, 4), (4, 3)]:
        for seed in range(4):
            rng = np.random.default_rng(seed)
            yield (*(policy(rng, vocabulary, horizon, (0.3, 1.0, 3.0)[seed % 3]) for _ in range(2)), horizon, rng)


def schedules(horizon, rng):
    """Position weights: some meet the theorem's condition, some do not."""
    t = np.arange(1, horizon + 1)
    yield np.ones(horizon)
    yield theory.linear_weights(horizon, 0.8)
    yield np.maximum(horizon - t, 0.5) / (horizon - 1)  # proportional to T - t but for the last, which bounds nothing
    yield rng.uniform(0.2, 1.0, size=horizon)


def meets_the_condition(weights):
    quotient = (len(weights) - np.arange(1, len(weights) + 1)) / weights
    return (np.diff(quotient) <= 1e-12).all()


def most(weights, delta_b, largest, rows):
    """The largest sum_t lambda_t u_t with u >= 0 and sum_{j<=m} w_j u_j <= delta_b W_m for m in ``rows``."""
    horizon = len(weights)
    sums = np.tril(np.ones((horizon, horizon))) * weights
    objective = -4 * largest * (horizon - np.arange(1, horizon + 1))
    found = linprog(objective[:-1], A_ub=sums[rows, :-1], b_ub=delta_b * weights.cumsum()[rows])
    assert found.success
    return -found.fun


def lemma_3(formulas):
    """(13): under the prefix constraints sum_t lambda_t u_t <= delta_b sum_t lambda_t, attained by u_t = delta_b."""
    for horizon in (2, 5, 9):
        rng = np.random.default_rng(horizon)
        for weights in schedules(horizon, rng):
            bound = formulas.budget_bound(weights, 0.02, 0.3)
            assert bound == pytest.approx(most(weights, 0.02, 0.3, np.arange(horizon - 1)), rel=1e-6)
            if meets_the_condition(weights):
                everywhere = np.full(horizon, 0.02)
                assert bound == pytest.approx(formulas.linear_bound(everywhere, 0.3))
                assert bound == pytest.approx(formulas.prefix_bound(horizon, 0.02, 0.3))


def corollary_6(formulas):
    """(15): with c_t = w_t delta the bound is delta_b / delta of the uniform one, for all weights of the condition."""
    for mu, target, horizon, rng in problems():
        for weights in filter(meets_the_condition, schedules(horizon, rng)):
            for delta, delta_b in THRESHOLDS:
                region = theory.Region(weights, weights * delta, delta_b, budget="prefix")
                pi = theory.project(mu, target, region)
                got = formulas.residual(mu, pi, np.ones(len(mu[-1]) * mu[0].shape[1]))
                bound = formulas.corollary_bound(horizon, delta, delta_b)
                assert got.largest.max() <= delta * ROUNDING
                assert got.worst <= bound * ROUNDING
                assert bound == pytest.approx(delta_b / delta * formulas.uniform_bound(horizon, delta))
                # What the surrogate of the enumeration leaves out is at most this for u of the constraints, and for no
                # smaller bound: u_t = delta_b attains it.
                assert bound == pytest.approx(most(weights, delta_b, delta, np.arange(horizon - 1)), rel=1e-6)


def inequality_18(formulas):
    """C_terminal(w) >= C_CPPO(w), equal iff w_t is proportional to T - t where the condition holds."""
    for horizon in (2, 5, 9):
        rng = np.random.default_rng(horizon)
        t = np.arange(1, horizon + 1)
        for weights in schedules(horizon, rng):
            terminal = formulas.terminal_bound(weights, 0.02, 0.3)
            every_prefix = formulas.budget_bound(weights, 0.02, 0.3)
            assert terminal == pytest.approx(most(weights, 0.02, 0.3, [horizon - 2]), rel=1e-6)
            assert terminal >= every_prefix / ROUNDING
            if meets_the_condition(weights):
                proportional = np.ptp((weights / np.maximum(horizon - t, 1))[:-1]) < 1e-12
                assert (terminal == pytest.approx(every_prefix)) == proportional
        assert formulas.terminal_bound(np.ones(horizon), 0.02, 0.3) == pytest.approx(
            (2 - 2 / horizon) * formulas.prefix_bound(horizon, 0.02, 0.3)
        )


def product_form(formulas):
    """B.9: what follows token t has a TV of at most 1 - prod_{j>t} (1 - l_j), which makes the bound tighter."""
    tight = 0
    for mu, pi, _, _ in problems():
        got = theory.residual(mu, pi, np.ones(len(mu[-1]) * mu[0].shape[1]))
        suffix = formulas.suffix_bound(got.largest)
        for t, divergence in enumerate(theory.suffix_divergences(mu, pi)):
            assert (divergence <= suffix[t] + 1e-9).all()
            tight += (divergence > 0.9 * suffix[t]).any() and suffix[t] > 0.05
        bound = formulas.product_bound(got.u, got.largest)
        assert got.worst <= bound * ROUNDING + 1e-12
        assert bound <= formulas.pathwise_bound(got.u, got.largest) * ROUNDING
    # Two tokens, certain to differ or not: the bound is attained.
    certain = [np.array([[1.0, 0.0]]), np.array([[0.5, 0.5], [0.5, 0.5]])]
    other = [np.array([[1.0, 0.0]]), np.array([[0.8, 0.2], [0.5, 0.5]])]
    assert theory.suffix_divergences(certain, other)[0][0] == pytest.approx(0.3)
    assert formulas.suffix_bound(np.array([0.0, 0.3])).tolist() == pytest.approx([0.3, 0.0])
    assert formulas.suffix_bound(np.array([0.1, 0.2, 0.5])).tolist() == pytest.approx([0.6, 0.5, 0.0])
    assert tight


def soft_mixture(formulas):
    """C.2: the mixture's divergence is g_t D_t, so that g of (20) restores the token threshold on every path."""
    for mu, pi, horizon, rng in problems():
        full = theory.prefix_divergences(mu, pi)
        gates = [rng.uniform(size=len(d)) for d in full]
        mixed = formulas.mixture(mu, pi, gates)
        for step, g, d in zip(theory.prefix_divergences(mu, mixed), gates, full, strict=True):
            assert step == pytest.approx(g * d, abs=1e-12)
        assert all(np.allclose(step.sum(1), 1) and (step >= 0).all() for step in mixed)
        for delta, delta_b in THRESHOLDS:
            weights = theory.linear_weights(horizon, 0.8)
            region = theory.Region(weights, delta, delta_b)
            gates, sums = formulas.soft_gates(mu, pi, region)
            spent = np.zeros(1)
            for t, (g, d, before) in enumerate(zip(gates, full, sums, strict=True), 1):
                assert (weights[t - 1] * g * d <= delta * ROUNDING).all()
                x = np.maximum(weights[t - 1] * d / delta, before / region.allowance(t))
                assert g == pytest.approx(np.minimum(1, 1 / np.maximum(x, 1e-300)))
                spent = spent + weights[t - 1] * g * d
                allowed = region.allowance(t)
                assert (spent <= allowed * (1 + np.log(np.maximum(1, before / allowed))) * ROUNDING).all()
                spent = np.repeat(spent, mu[0].shape[1])


CHECKS = [lemma_3, corollary_6, inequality_18, product_form, soft_mixture]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_it_holds(check):
    check(theory)


def scaled(name, factor):
    return lambda *args, **kwargs: factor * np.asarray(getattr(theory, name)(*args, **kwargs))


MUTATIONS = [
    (lemma_3, "budget_bound", scaled("budget_bound", 0.99)),
    (lemma_3, "budget_bound", lambda w, delta_b, lbar: delta_b * theory.coefficients(len(w), lbar).sum()),
    (lemma_3, "linear_bound", scaled("linear_bound", 0.99)),
    (
        corollary_6,
        "corollary_bound",
        lambda horizon, delta, delta_b: theory.prefix_bound(horizon, delta_b, delta / 0.8),
    ),
    (corollary_6, "corollary_bound", lambda horizon, delta, delta_b: theory.uniform_bound(horizon, delta_b)),
    (inequality_18, "terminal_bound", lambda w, delta_b, lbar: theory.budget_bound(w, delta_b, lbar)),
    (inequality_18, "terminal_bound", lambda w, delta_b, lbar: 2 * theory.prefix_bound(len(w), delta_b, lbar)),
    (product_form, "suffix_bound", lambda largest: 1 - np.append(np.cumprod(1 - largest[::-1])[::-1][1:] * 1.02, 1.0)),
    (product_form, "suffix_bound", lambda largest: largest[::-1].cumsum()[::-1] - largest),
    (product_form, "product_bound", scaled("product_bound", 0.1)),
    (product_form, "product_bound", lambda u, largest: 1.01 * theory.pathwise_bound(u, largest)),
    (soft_mixture, "mixture", lambda mu, pi, gates: theory.mixture(mu, pi, [np.sqrt(g) for g in gates])),
    (soft_mixture, "mixture", lambda mu, pi, gates: theory.mixture(pi, mu, gates)),
    (
        soft_mixture,
        "soft_gates",
        lambda mu, pi, region: ([np.ones(len(p)) for p in pi], theory.soft_gates(mu, pi, region)[1]),
    ),
]


@pytest.mark.parametrize(("check", "name", "wrong"), MUTATIONS)
def test_a_broken_formula_is_noticed(check, name, wrong):
    broken = SimpleNamespace(**vars(theory) | {name: wrong})
    with pytest.raises(AssertionError):
        check(broken)
