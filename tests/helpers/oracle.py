"""The oracle: CPPO as literal double-precision loops over one response.

Written from the formulas only, with plain floats, and importing nothing of the package it judges. A response is
a list of D (or log-probabilities, advantages) with a parallel list of booleans, `valid`; positions where it is
false hold anything, take no part and come back as 0. Equation numbers are those of arXiv 2606.10968. The inputs
on which the package is compared with it, as hypothesis strategies, stand at the end.
"""

import math
from typing import NamedTuple

from hypothesis import settings
from hypothesis import strategies as st


def _lists_over(valid, values):
    """Scatter `values`, one per valid position in order, to full length; 0 elsewhere."""
    out, k = [], 0
    for v in valid:
        out.append(float(values[k]) if v else 0.0)
        k += int(v)
    return out


def position_weights(valid, w_min):
    """(9): w_t = 1 - (1 - w_min) (t - 1) / (T - 1), t counting valid positions only; w_1 = 1 when T = 1."""
    total = sum(1 for v in valid if v)
    return _lists_over(
        valid, [1.0 if total == 1 else 1.0 - (1.0 - w_min) * (t - 1) / (total - 1) for t in range(1, total + 1)]
    )


def quantile(values, q):
    """Linear interpolation between the two order statistics around rank q (n - 1)."""
    ordered = sorted(values)
    rank = q * (len(ordered) - 1)
    below = math.floor(rank)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (rank - below) * (ordered[above] - ordered[below])


def adaptive_budget(div, valid, delta_b_min):
    """(22): clamp(P90(D_1..D_T), delta_b_min, 2 delta_b_min); an empty response has the lower end."""
    kept = [d for d, v in zip(div, valid, strict=True) if v]
    if not kept:
        return delta_b_min
    return min(max(quantile(kept, 0.9), delta_b_min), 2.0 * delta_b_min)


def prefix_sums(div, valid, w):
    """Per position (S_{t-1}, W_{t-1}, S_t, W_t), over every valid token, masked or not."""
    out, big_s, big_w = [], 0.0, 0.0
    for d, v, w_t in zip(div, valid, w, strict=True):
        s_before, w_before = big_s, big_w
        if v:
            big_s += w_t * d
            big_w += w_t
        out.append((s_before, w_before, big_s, big_w))
    return out


def effective_threshold(div, valid, w, delta, delta_b):
    """(8): c_t = min(delta, delta + delta_b W_{t-1} - S_{t-1}); no budget (None): delta. 0 off the response."""
    out = []
    for v, (s_before, w_before, _, _) in zip(valid, prefix_sums(div, valid, w), strict=True):
        c = delta if delta_b is None else min(delta, delta + delta_b * w_before - s_before)
        out.append(c if v else 0.0)
    return out


def two_constraints(div, valid, w, delta, delta_b):
    """The slack of each constraint of the feasible set: delta - w_t D_t, and delta + delta_b W_{t-1} - S_t."""
    out = []
    for d, v, w_t, (_, w_before, s, _) in zip(div, valid, w, prefix_sums(div, valid, w), strict=True):
        prefix = math.inf if delta_b is None else delta + delta_b * w_before - s
        out.append((delta - w_t * d, prefix) if v else (delta, delta))
    return out


def violation(div, valid, w, delta, delta_b):
    """(19): x_t = max(w_t D_t / delta, S_t / (delta + delta_b W_{t-1})); no budget (None): the first alone."""
    out = []
    for d, v, w_t, (_, w_before, s, _) in zip(div, valid, w, prefix_sums(div, valid, w), strict=True):
        x = w_t * d / delta if v else 0.0
        if v and delta_b is not None:
            x = max(x, s / (delta + delta_b * w_before))
        out.append(x)
    return out


def hard_gate(x):
    return 1.0 if x <= 1.0 else 0.0


def soft_gate(x):
    """(20): g(x) = min(1, 1 / x)."""
    return 1.0 if x <= 1.0 else 1.0 / x


def moves_away(log_mu, log_pi, adv):
    """Whether the update moves rho away from one: A (rho - 1) > 0."""
    return adv * math.expm1(log_pi - log_mu) > 0.0


def hard_mask(div, valid, w, delta, delta_b, away):
    """(10): M_t = 1 if A_t (rho_t - 1) <= 0 or w_t D_t <= c_t, else 0; 0 off the response."""
    out = []
    c = effective_threshold(div, valid, w, delta, delta_b)
    for d, v, w_t, c_t, a in zip(div, valid, w, c, away, strict=True):
        out.append((1.0 if not a or w_t * d <= c_t else 0.0) if v else 0.0)
    return out


def soft_mask(div, valid, w, delta, delta_b, away):
    """(20): M_t = 1 if A_t (rho_t - 1) <= 0 else g(x_t); 0 off the response."""
    x = violation(div, valid, w, delta, delta_b)
    return [(soft_gate(x_t) if a else 1.0) if v else 0.0 for v, x_t, a in zip(valid, x, away, strict=True)]


def decided(div, valid, w, delta, delta_b, margin):
    """Valid tokens whose |w_t D_t - c_t| exceeds the rounding error of the sums: margin max(1, S_t)."""
    c = effective_threshold(div, valid, w, delta, delta_b)
    sums = prefix_sums(div, valid, w)
    return [
        v and abs(w_t * d - c_t) > margin * max(1.0, s)
        for d, v, w_t, c_t, (_, _, s, _) in zip(div, valid, w, c, sums, strict=True)
    ]


def surrogate(log_mu, log_pi, adv, mask, cap=math.inf):
    """(11) as a loss, per token, and its derivative by log pi_t: -M_t rho_t A_t and -M_t min(rho_t, cap) A_t."""
    value, grad = [], []
    for m, p, a, gate in zip(log_mu, log_pi, adv, mask, strict=True):
        rho = min(math.exp(p - m), cap) if gate else 0.0
        value.append(-gate * rho * a if gate else 0.0)
        grad.append(-gate * rho * a if gate else 0.0)
    return value, grad


# --- divergences of two categorical distributions, on an explicit partition of the vocabulary -----------------


def partition(mu, y, k):
    """Categories as lists of tokens: the k likeliest tokens of mu, y, and all the others (k = 0: binary)."""
    likeliest = sorted(range(len(mu)), key=lambda token: -mu[token])[:k]
    singles = likeliest if y in likeliest else [*likeliest, y]
    others = [token for token in range(len(mu)) if token not in singles]
    return [[token] for token in singles] + ([others] if others else [])


def masses(probs, cells):
    return [math.fsum(probs[token] for token in cell) for cell in cells]


def total_variation(mu, pi, cells):
    """Half the L1 distance of the cell masses."""
    return 0.5 * math.fsum(abs(p - m) for m, p in zip(masses(mu, cells), masses(pi, cells), strict=True))


def kl(mu, pi, cells):
    """KL(mu || pi) of the cell masses; 0 log 0 = 0."""
    return math.fsum(m * math.log(m / p) for m, p in zip(masses(mu, cells), masses(pi, cells), strict=True) if m > 0.0)


def exact_cells(mu):
    return [[token] for token in range(len(mu))]


# --- inputs ---------------------------------------------------------------------------------------------------

fuzz = settings(max_examples=40, deadline=None, derandomize=True)

garbage = st.sampled_from([math.nan, math.inf, -math.inf, 3e38, -3e38])
divergences = st.one_of(
    st.sampled_from([0.0, 0.02, 0.05, 0.15, 0.2, 1.0, 10.0]),  # ties, exact thresholds, jumps
    st.floats(0, 0.0625, width=32),
    st.floats(0, 1, width=32),
)
log_probs = st.one_of(
    st.sampled_from([0.0, -(2.0**-20), -0.5, -20.0, -60.0]), st.integers(0, 3 << 10).map(lambda n: -n / 1024)
)
advantages = st.one_of(st.sampled_from([0.0, 1.0, -1.0, 1e4, -1e4]), st.integers(-3000, 3000).map(lambda n: n / 1000))
deltas = st.sampled_from([0.05, 0.15, 0.2, 1.0])
budgets = st.sampled_from([0.0, 0.015, 0.02, 0.03, 0.1])
lowest_weights = st.sampled_from([0.01, 0.6, 0.8, 1.0])


class Batch(NamedTuple):
    """Responses of one padded length, each field a list of rows; the last three are None where nothing needs them."""

    valid: list
    div: list
    log_mu: list | None = None
    log_pi: list | None = None
    adv: list | None = None


@st.composite
def masks(draw, length):
    """All, none, a padded prefix, or any pattern of holes."""
    valid_tokens = draw(st.integers(0, length))
    holes = st.lists(st.booleans(), min_size=length, max_size=length)
    return draw(st.one_of(st.just([i < valid_tokens for i in range(length)]), holes))


@st.composite
def batches(draw, *fields, max_length=10, junk=garbage):
    """Two responses with a row of D and of each strategy in `fields`; positions off the mask hold `junk`."""
    length = draw(st.integers(1, max_length))
    valid = [draw(masks(length)) for _ in range(2)]
    return Batch(valid, *([[draw(f if v else junk) for v in row] for row in valid] for f in (divergences, *fields)))


divergence_batches = batches()
full_batches = batches(log_probs, log_probs, advantages)
