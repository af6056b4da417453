"""The paper's bound on what the surrogate leaves out, by exact enumeration of small problems.

A policy over V tokens and T positions is a list of T arrays: ``policy[t]`` holds, for each of the V^t prefixes in
lexicographic order, the distribution of the next token, shape [V^t, V]. A reward is an array [V^T], |R| <= xi.
Positions count from 1 in the formulas and from 0 in the lists. All is fp64; V^T beyond some millions does not fit.
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


def terminal_average_bound(horizon: int, delta_b: float, largest: float, xi: float = 1.0) -> float:
    """With the average over the T - 1 positions that matter bounded at the end only, as TRM-Avg bounds it: all of
    it may be spent on the first token, which is looser than `prefix_bound` by 2 - 2 / T."""
    return 4 * xi * largest * (horizon - 1) * (horizon - 1) * delta_b


def project(mu: Policy, target: Policy, region: "Region") -> list[np.ndarray]:
    """Move mu towards ``target`` at every prefix as far as ``region`` permits.

    Returns:
        A policy with D_t <= region(t, S_{t-1}) on every path, equal where it binds; S_t sums w_j D_j over j <= t with
        the region's weights.
    """
    spent, policy = np.zeros(1), []
    for t, (m, q) in enumerate(zip(mu, target, strict=True)):
        full = 0.5 * np.abs(q - m).sum(1)
        most = np.array([max(0.0, region(t + 1, s)) for s in spent])
        share = np.minimum(1.0, np.divide(most, full, out=np.ones_like(full), where=full > 0))
        policy.append(m + share[:, None] * (q - m))
        spent = np.repeat(spent + region.weights[t] * share * full, m.shape[1])
    return policy


class Region:
    """A trust region: a token threshold, position weights, and a prefix budget where delta_b is given.

    Called with a position t = 1..T and the weighted sum S_{t-1} of the divergences before it on a path, it returns the
    largest permitted D_t.

    Args:
        weights: w_t, [T]; ones for the uniform region.
        delta: token threshold.
        delta_b: prefix-average threshold; None for no budget.
        slack: the implemented rule (8), whose budget has the token threshold on top; without it Theorem 1's.
    """

    def __init__(self, weights: np.ndarray, delta: float, delta_b: float | None = None, slack: bool = True):
        self.weights, self.delta, self.delta_b, self.slack = weights, delta, delta_b, slack
        self.sums = weights.cumsum()

    def __call__(self, t: int, spent: float) -> float:
        threshold = self.delta
        if self.delta_b is not None and (self.slack or t < len(self.weights)):
            before = self.sums[t - 2] if t > 1 else 0.0
            budget = self.delta + self.delta_b * before if self.slack else self.delta_b * self.sums[t - 1]
            threshold = min(threshold, budget - spent)
        return threshold / self.weights[t - 1]


def linear_weights(horizon: int, w_min: float) -> np.ndarray:
    """(9), [T]."""
    return np.linspace(1.0, w_min, horizon)
