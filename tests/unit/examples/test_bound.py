"""The paper's bound, checked on problems small enough to enumerate."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracle import fuzz
from theory import (
    Region,
    coefficients,
    first_token_slack,
    linear_bound,
    linear_weights,
    pathwise_bound,
    prefix_bound,
    prefix_divergences,
    project,
    residual,
    terminal_bound,
    uniform_bound,
)

from cppo_verl.core import build_trust_region, position_weights

ROUNDING = 1 + 1e-9


def policy(rng, vocabulary, horizon, sharpness):
    rows = [sharpness * rng.normal(size=(vocabulary**t, vocabulary)) for t in range(horizon)]
    return [np.exp(x) / np.exp(x).sum(1, keepdims=True) for x in rows]


@st.composite
def problems(draw, longest=5):
    """mu, a policy to move to, a reward in [-1, 1], T."""
    vocabulary, horizon = draw(st.sampled_from([(2, 1), (2, 2), (2, longest), (3, 3), (3, 4), (4, 3)]))
    rng = np.random.default_rng(draw(st.integers(0, 10**6)))
    mu, target = (policy(rng, vocabulary, horizon, draw(st.sampled_from([0.1, 1.0, 3.0]))) for _ in range(2))
    # the worst rewards are at the corners
    reward = np.sign(rng.normal(size=vocabulary**horizon)) * draw(st.sampled_from([1.0, 0.5]))
    return mu, target, reward, horizon


THRESHOLDS = st.tuples(
    st.sampled_from([0.05, 0.15, 0.3]), st.sampled_from([0.005, 0.02, 0.1]), st.sampled_from([0.5, 0.8, 1.0])
)


@fuzz
@given(problems(longest=4))
def test_the_enumeration_is_the_oracles(problem):
    mu, pi, reward, horizon = problem
    vocabulary = mu[0].shape[1]
    improvement = surrogate = left_out = 0.0
    u = [0.0] * horizon
    for number, y in enumerate(itertools.product(range(vocabulary), repeat=horizon)):
        prefix, p_mu, p_pi, ratios, divergences = 0, 1.0, 1.0, [], []
        for t, token in enumerate(y):
            m, p = mu[t][prefix], pi[t][prefix]
            divergences.append(0.5 * sum(abs(a - b) for a, b in zip(m, p, strict=True)))
            ratios.append(p[token] / m[token])
            p_mu, p_pi = p_mu * m[token], p_pi * p[token]
            prefix = prefix * vocabulary + token
        improvement += (p_pi - p_mu) * reward[number]
        surrogate += p_mu * reward[number] * sum(r - 1 for r in ratios)
        left_out += (
            p_mu * reward[number] * sum((r - 1) * (1 - math.prod(ratios[t + 1 :])) for t, r in enumerate(ratios))
        )
        for t, d in enumerate(divergences):
            u[t] += p_mu * d
    got = residual(mu, pi, reward)
    assert got.improvement == pytest.approx(improvement, abs=1e-10)
    assert got.surrogate == pytest.approx(surrogate, abs=1e-10)
    assert got.residual == pytest.approx(left_out, abs=1e-9)
    assert got.u.tolist() == pytest.approx(u, abs=1e-10)
    assert abs(got.residual) <= got.worst * np.abs(reward).max() * ROUNDING + 1e-12


@fuzz
@given(problems())
def test_identity_1_and_bound_4(problem):
    mu, pi, reward, horizon = problem
    xi = np.abs(reward).max()
    got = residual(mu, pi, reward)
    assert got.improvement == pytest.approx(got.surrogate - got.residual, abs=1e-9)
    first = pathwise_bound(got.u, got.largest, xi)
    second = linear_bound(got.u, got.largest.max(), xi)
    assert abs(got.residual) <= first * ROUNDING + 1e-9
    assert first <= second * ROUNDING + 1e-12


@fuzz
@given(problems(), THRESHOLDS)
def test_theorem_1(problem, thresholds):
    mu, target, reward, horizon = problem
    delta, delta_b, w_min = thresholds
    xi = np.abs(reward).max()
    region = Region(linear_weights(horizon, w_min), delta, delta_b, budget="prefix")
    got = residual(mu, project(mu, target, region), reward)
    assert got.largest.max() <= delta / w_min * ROUNDING
    assert abs(got.residual) <= prefix_bound(horizon, delta_b, delta / w_min, xi) * ROUNDING + 1e-9


@fuzz
@given(problems(), THRESHOLDS)
def test_the_implemented_rule_and_its_slack_17(problem, thresholds):
    mu, target, reward, horizon = problem
    delta, delta_b, w_min = thresholds
    xi, lbar = np.abs(reward).max(), delta / w_min
    weights = linear_weights(horizon, w_min)
    pi = project(mu, target, Region(weights, delta, delta_b))
    got = residual(mu, pi, reward)
    most = prefix_bound(horizon, delta_b, lbar, xi) + first_token_slack(horizon, delta, lbar, xi)
    assert abs(got.residual) <= most * ROUNDING + 1e-9

    # On every path, what was projected into is what the loss calls feasible.
    vocabulary, divergence = mu[0].shape[1], prefix_divergences(mu, pi)
    paths = np.stack([np.repeat(d, vocabulary ** (horizon - 1 - t)) for t, d in enumerate(divergence)], axis=1)
    paths = torch.from_numpy(paths)
    mask = torch.ones_like(paths, dtype=torch.bool)
    of_loss = position_weights(mask.float(), w_min).double()
    torch.testing.assert_close(of_loss[0], torch.from_numpy(weights), rtol=0, atol=1e-6)
    feasible = build_trust_region(
        paths, mask, delta=delta, delta_b=torch.full((len(paths), 1), delta_b), weights=of_loss
    )
    assert (feasible.weighted_divergence <= feasible.threshold + 1e-6).all()


@fuzz
@given(problems(), THRESHOLDS)
def test_a_uniform_threshold_has_its_bound(problem, thresholds):
    mu, target, reward, horizon = problem
    delta = thresholds[0]
    xi = np.abs(reward).max()
    got = residual(mu, project(mu, target, Region(np.ones(horizon), delta)), reward)
    assert abs(got.residual) <= uniform_bound(horizon, delta, xi) * ROUNDING + 1e-9


@pytest.mark.parametrize(("horizon", "w_min", "delta", "delta_b"), [(8, 0.8, 0.15, 0.02), (100, 0.6, 0.2, 0.15)])
def test_the_ratio_of_the_bounds(horizon, w_min, delta, delta_b):
    ratio = prefix_bound(horizon, delta_b, delta / w_min) / uniform_bound(horizon, delta)
    assert ratio == pytest.approx(delta_b / (delta * w_min))
    assert (ratio < 1) == (delta_b < delta * w_min)


@fuzz
@given(st.integers(2, 200), st.floats(0.01, 1.0))
def test_the_linear_schedule_meets_the_theorems_condition(horizon, w_min):
    w = linear_weights(horizon, w_min)
    t = np.arange(1, horizon + 1)
    quotient = (horizon - t) / w
    assert (np.diff(quotient) < 0).all()
    assert -np.diff(quotient) == pytest.approx(w_min / (w[:-1] * w[1:]), rel=1e-9)


@fuzz
@given(st.integers(1, 50), st.floats(0.01, 0.5), st.floats(0.001, 0.1))
def test_the_bound_is_attained_and_the_terminal_average_is_looser(horizon, largest, delta_b):
    everywhere = np.full(horizon, delta_b)
    assert linear_bound(everywhere, largest) == pytest.approx(prefix_bound(horizon, delta_b, largest))
    # the same average, spent on the first token alone
    first = np.zeros(horizon)
    first[0] = (horizon - 1) * delta_b
    looser = terminal_bound(np.ones(horizon), delta_b, largest)
    assert linear_bound(first, largest) == pytest.approx(looser)
    assert looser == pytest.approx((2 - 2 / horizon) * prefix_bound(horizon, delta_b, largest))
    assert coefficients(horizon, largest)[-1] == 0


def test_without_its_condition_the_theorem_does_not_hold():
    # A weight that falls too fast: lambda_t / w_t rises at the second token, which the budget then hardly counts.
    delta_b, largest = 0.02, 1.0
    w, u = np.array([1.0, 0.01, 1.0]), np.array([0.0, 50 * 0.02, 0.0])
    assert (np.cumsum(w * u) <= delta_b * np.cumsum(w)).all()
    assert linear_bound(u, largest) > prefix_bound(3, delta_b, largest)


def test_the_picture_of_the_example(tmp_path):
    import runpy
    from pathlib import Path

    from PIL import Image

    example = runpy.run_path(str(Path(__file__).parents[3] / "examples" / "bound" / "draw.py"))
    curves = example["curves"](horizons=range(2, 6), seeds=2)
    for region in curves.values():
        assert all(0 < worst <= bound * ROUNDING for worst, bound in zip(region["worst"], region["bound"], strict=True))
    picture = example["draw"](range(2, 6), curves, tmp_path / "bound.png")
    with Image.open(picture) as image:
        assert image.width > 800
