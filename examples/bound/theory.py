"""The paper's bound on what the surrogate leaves out, by exact enumeration of small problems.

A policy over V tokens and T positions is a list of T arrays: ``policy[t]`` holds, for each of the V^t prefixes in
lexicographic order, the distribution of the next token, shape [V^t, V]. A reward is an array [V^T], |R| <= xi.
Positions count from 1 in the formulas and from 0 in the lists. All is fp64; V^T beyond some millions does not fit.

Equation numbers are the paper's. "Our derivation" marks what we proved ourselves from its definitions, because the
paper's own proof or wording was not at hand.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

Policy = Sequence[np.ndarray]


class Residual(NamedTuple):
    """The two sides of (1), J(pi) - J(mu) = surrogate - residual, and what bounds the residual."""

    improvement: float
    """J(pi) - J(mu)."""
    surrogate: float
    """L'(pi) = E_mu[R sum_t (rho_t - 1)]."""
    residual: float
    """Delta = E_mu[R sum_t (rho_t - 1)(1 - rho_{t+1:T})]."""
    worst: float
    """The largest |Delta| that a reward in [-1, 1] can make: E_mu|sum_t (rho_t - 1)(1 - rho_{t+1:T})|."""
    u: np.ndarray
    """u_t = E_mu[D_t], [T], D_t the exact TV."""
    largest: np.ndarray
    """l_t = max of D_t over the prefixes that mu reaches, [T]."""


def residual(mu: Policy, pi: Policy, reward: np.ndarray) -> Residual:
    """Enumerate all V^T responses. mu must be positive wherever pi is."""
    horizon, vocabulary = len(mu), mu[0].shape[1]
    shape = [vocabulary] * horizon

    def along(policy: Policy, t: int) -> np.ndarray:
        """Probability of each response's token t, [V^T]."""
        return np.broadcast_to(policy[t].reshape(shape[: t + 1] + [1] * (horizon - t - 1)), shape).ravel()

    mu_t = [along(mu, t) for t in range(horizon)]
    ratio = [np.divide(along(pi, t), m, out=np.ones_like(m), where=m > 0) for t, m in enumerate(mu_t)]
    probability = np.prod(mu_t, axis=0)
    surrogate = sum(r - 1 for r in ratio)
    rest, left_out = np.ones_like(probability), np.zeros_like(probability)
    for r in reversed(ratio):
        left_out += (r - 1) * (1 - rest)
        rest = rest * r
    divergence, reach = prefix_divergences(mu, pi), prefix_probabilities(mu)
    return Residual(
        improvement=float(np.prod([along(pi, t) for t in range(horizon)], axis=0) @ reward - probability @ reward),
        surrogate=float((probability * surrogate) @ reward),
        residual=float((probability * left_out) @ reward),
        worst=float(probability @ np.abs(left_out)),
        u=np.array([p @ d for p, d in zip(reach, divergence, strict=True)]),
        largest=np.array([d[p > 0].max() for p, d in zip(reach, divergence, strict=True)]),
    )


def prefix_divergences(mu: Policy, pi: Policy) -> list[np.ndarray]:
    """D_t, the exact TV, of every prefix: T arrays [V^t]."""
    return [0.5 * np.abs(p - m).sum(1) for m, p in zip(mu, pi, strict=True)]


def prefix_probabilities(mu: Policy) -> list[np.ndarray]:
    """How likely mu reaches every prefix: T arrays [V^t]."""
    reach = [np.ones(1)]
    for step in mu[:-1]:
        reach.append((reach[-1][:, None] * step).ravel())
    return reach


def pathwise_bound(u: np.ndarray, l: np.ndarray, xi: float = 1.0) -> float:  # noqa: E741  the paper's l_t
    """First bound of (4), 4 xi sum_{t<T} u_t sum_{j>t} l_j, for D_t <= l_t on every path."""
    tails = l[::-1].cumsum()[::-1] - l
    return float(4 * xi * (u * tails).sum())


def linear_bound(u: np.ndarray, largest: float, xi: float = 1.0) -> float:
    """Second bound of (4), sum_t lambda_t u_t with lambda_t = 4 xi lbar (T - t)."""
    return float(coefficients(len(u), largest, xi) @ u)


def coefficients(horizon: int, largest: float, xi: float = 1.0) -> np.ndarray:
    """lambda_t of (4), [T]; ``largest`` is lbar."""
    return 4 * xi * largest * (horizon - np.arange(1, horizon + 1))


def uniform_bound(horizon: int, delta: float, xi: float = 1.0) -> float:
    """What a uniform token threshold gives: 2 xi T (T - 1) delta^2."""
    return 2 * xi * horizon * (horizon - 1) * delta**2


def prefix_bound(horizon: int, delta_b: float, largest: float, xi: float = 1.0) -> float:
    """Theorem 1 (6): 2 xi T (T - 1) lbar delta_b, lbar <= delta / w_min."""
    return 2 * xi * horizon * (horizon - 1) * largest * delta_b


def first_token_slack(horizon: int, delta: float, largest: float, xi: float = 1.0) -> float:
    """(17): what the implemented rule, whose budget starts at delta instead of zero, adds at most (w_1 = 1)."""
    return 4 * xi * largest * (horizon - 1) * delta


def corollary_bound(horizon: int, delta: float, delta_b: float, xi: float = 1.0) -> float:
    """Corollary 6 (15): Theorem 1 with c_t = w_t delta, so that lbar = delta for any weights that meet its condition.
    It is delta_b / delta of `uniform_bound`."""
    return prefix_bound(horizon, delta_b, delta, xi)


def budget_bound(weights: np.ndarray, delta_b: float, largest: float, xi: float = 1.0) -> float:
    """The largest sum_t lambda_t u_t for any positive weights under sum_{j<=m} w_j u_j <= delta_b W_m, m < T.

    It is delta_b sum_{t<T} w_t max_{t<=s<T} lambda_s / w_s, by summation by parts with the smallest non-increasing
    sequence above lambda_t / w_t (our derivation). Where lambda_t / w_t itself does not increase, this is Lemma 3 (13)
    as we read it, delta_b sum_t lambda_t, and with it Theorem 1.
    """
    quotient = (coefficients(len(weights), largest, xi) / weights)[:-1]
    return float(delta_b * (weights[:-1] * np.maximum.accumulate(quotient[::-1])[::-1]).sum())


def terminal_bound(weights: np.ndarray, delta_b: float, largest: float, xi: float = 1.0) -> float:
    """(18)'s C_terminal(w): the same with the average bounded at m = T - 1 only, as TRM-Avg bounds it.

    All may be spent where lambda_t / w_t is largest (our derivation). It is never below `budget_bound`; where
    lambda_t / w_t does not increase it equals it iff w_t is proportional to T - t. For w = 1 the quotient is 2 - 2 / T.
    """
    quotient = (coefficients(len(weights), largest, xi) / weights)[:-1]
    return float(delta_b * weights[:-1].sum() * quotient.max(initial=0))


def suffix_bound(l: np.ndarray) -> np.ndarray:  # noqa: E741
    """B.9: what comes after token t has a TV of at most 1 - prod_{j>t} (1 - l_j) between pi and mu, [T].

    Our derivation: of two coupled samplers that have not differed yet, token j differs with probability D_j <= l_j.
    """
    return 1 - np.append(np.cumprod(1 - l[:0:-1])[::-1], 1.0)


def product_bound(u: np.ndarray, l: np.ndarray, xi: float = 1.0) -> float:  # noqa: E741
    """B.9's form of (4), 4 xi sum_{t<T} u_t (1 - prod_{j>t} (1 - l_j)); never above `pathwise_bound`."""
    return float(4 * xi * (u * suffix_bound(l)).sum())


def suffix_divergences(mu: Policy, pi: Policy) -> list[np.ndarray]:
    """TV between what mu and pi write after every prefix of t = 1..T tokens: T arrays [V^t], zero for t = T."""
    result: list[np.ndarray] = []
    rest_mu = rest_pi = np.ones((mu[-1].size, 1))
    for m, p in zip(reversed(mu), reversed(pi), strict=True):
        result.append(0.5 * np.abs(rest_pi - rest_mu).sum(1))
        rest_mu, rest_pi = _prepended(m, rest_mu), _prepended(p, rest_pi)
    return result[::-1]


def _prepended(step: np.ndarray, rest: np.ndarray) -> np.ndarray:
    """From the suffixes' probabilities [V^t, N] and the token before them [V^(t-1), V]: [V^(t-1), V N]."""
    return (step.reshape(-1, 1) * rest).reshape(len(step), -1)


def mixture(mu: Policy, pi: Policy, gates: Sequence[np.ndarray]) -> list[np.ndarray]:
    """C.2's policy (21) as we read it: (1 - g_t) mu + g_t pi, g_t in [0, 1] a number for each prefix.

    The TV is homogeneous: its divergence from mu is g_t D_t.
    """
    return [m + g[:, None] * (p - m) for m, p, g in zip(mu, pi, gates, strict=True)]


def soft_gates(mu: Policy, pi: Policy, region: "Region") -> tuple[list[np.ndarray], list[np.ndarray]]:
    """(19, 20): g_t = min(1, 1 / x_t) with x_t = max(w_t D_t / delta, S_t / B_t), B_t the region's allowance, and S_t,
    the sum before the gate: T arrays [V^t] each.

    The gated divergences keep the token threshold. Their own prefix sum may exceed B_t, but not
    B_t (1 + log max(1, S_t / B_t)) (our derivation).
    """
    spent, gates, sums = np.zeros(1), [], []
    for t, divergence in enumerate(prefix_divergences(mu, pi), 1):
        weighted = region.weights[t - 1] * divergence
        sums.append(spent + weighted)
        gates.append(1 / np.maximum(1, np.maximum(weighted / region.threshold[t - 1], sums[-1] / region.allowance(t))))
        spent = np.repeat(sums[-1], mu[0].shape[1])
    return gates, sums


def project(mu: Policy, target: Policy, region: "Region") -> list[np.ndarray]:
    """Move mu towards ``target`` at every prefix as far as ``region`` permits.

    Returns:
        A policy with D_t <= region(t, S_{t-1}) on every path, equal where it binds; S_t sums w_j D_j over j <= t with
        the region's weights.
    """
    spent, gates = np.zeros(1), []
    for t, full in enumerate(prefix_divergences(mu, target), 1):
        most = np.maximum(0.0, region(t, spent))
        gates.append(np.minimum(1.0, np.divide(most, full, out=np.ones_like(full), where=full > 0)))
        spent = np.repeat(spent + region.weights[t - 1] * gates[-1] * full, mu[0].shape[1])
    return mixture(mu, target, gates)


class Region:
    """A trust region: a token threshold, position weights, and a prefix budget where delta_b is given.

    Called with a position t = 1..T and the weighted sum S_{t-1} of the divergences before it on a path, it returns the
    largest permitted D_t.

    Args:
        weights: w_t, [T]; ones for the uniform region.
        threshold: c_t, what w_t D_t may be, a number or [T].
        delta_b: prefix-average threshold; None for no budget.
        budget: what S_t may be: "implemented" is the rule (8), delta + delta_b W_{t-1} with delta = c_1; "prefix" is
            Theorem 1's, delta_b W_t for t < T; "terminal" bounds S_{T-1} alone by delta_b W_{T-1}.
    """

    def __init__(
        self,
        weights: np.ndarray,
        threshold: float | np.ndarray,
        delta_b: float | None = None,
        budget: str = "implemented",
    ):
        self.weights, self.threshold = weights, np.broadcast_to(threshold, weights.shape)
        self.delta_b, self.budget = delta_b, budget
        self.sums = np.append(0.0, weights.cumsum())

    def __call__(self, t: int, spent: np.ndarray) -> np.ndarray:
        return np.minimum(self.threshold[t - 1], self.allowance(t) - spent) / self.weights[t - 1]

    def allowance(self, t: int) -> float:
        """What S_t may be."""
        last = len(self.weights) - 1
        if self.delta_b is None or (self.budget != "implemented" and t > last):
            return np.inf
        if self.budget == "implemented":
            return self.threshold[0] + self.delta_b * self.sums[t - 1]
        return self.delta_b * self.sums[t if self.budget == "prefix" else last]


def linear_weights(horizon: int, w_min: float) -> np.ndarray:
    """(9), [T]."""
    return np.linspace(1.0, w_min, horizon)
