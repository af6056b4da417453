"""Statistics of evaluations: Avg@n, pass@k, intervals, paired comparisons, and the paper's choice of a step.

Accuracies are in [0, 1]; the tables turn them into per cent. Intervals are at 95 %.
"""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

LEVEL = 0.95
RESAMPLES = 9999


class Interval(NamedTuple):
    low: float
    high: float


class Selection(NamedTuple):
    """A run's score by the paper's rule: the validation with the best mean, and its components."""

    step: int
    mean: float
    components: dict[str, float]
    last_step: int
    last: float
    """Mean of the last validation, which no selection has inflated."""
    smoothed: float
    """Best moving average of three validations, which one lucky one cannot lift far."""
    candidates: int
    """Validations that the best was chosen among."""


class Comparison(NamedTuple):
    """Of two methods on the same problems: difference of Avg@n, its interval over problems, and the two-sided
    p-value of a sign-flip permutation test."""

    difference: float
    interval: Interval
    p_value: float
    problems: int


def select(
    steps: Mapping[int, Mapping[str, float]], benchmarks: Sequence[str], t_stop: int | None = None
) -> Selection | None:
    """Choose the step with the best unweighted mean over ``benchmarks`` on [0, t_stop], the first of equals.

    Args:
        steps: {step: {benchmark: accuracy}}; a step that lacks one of the benchmarks is no candidate.

    Returns:
        None where no step has all benchmarks.
    """
    means = {
        step: math.fsum(values[name] for name in benchmarks) / len(benchmarks)
        for step, values in sorted(steps.items())
        if (t_stop is None or step <= t_stop) and all(name in values for name in benchmarks)
    }
    if not means:
        return None
    best = max(means, key=lambda step: (means[step], -step))
    curve = list(means.values())
    windows = [curve[i : i + 3] for i in range(max(1, len(curve) - 2))]
    return Selection(
        step=best,
        mean=means[best],
        components={name: steps[best][name] for name in benchmarks},
        last_step=max(means),
        last=means[max(means)],
        smoothed=max(math.fsum(window) / len(window) for window in windows),
        candidates=len(means),
    )


def pass_at_k(correct: int, n: int, k: int) -> float:
    """Unbiased estimate of the chance that one of k samples is right, from n samples of which ``correct`` are."""
    if not 1 <= k <= n or not 0 <= correct <= n:
        raise ValueError(f"need 1 <= k <= n and 0 <= correct <= n, got k={k}, n={n}, correct={correct}")
    return 1 - math.comb(n - correct, k) / math.comb(n, k)


def interval_over_problems(accuracies: Sequence[float], seed: int = 0) -> Interval:
    """Bootstrap interval of the mean of one accuracy per problem: what another draw of problems would give."""
    values = np.asarray(accuracies, dtype=float)
    if len(values) < 2:
        return Interval(math.nan, math.nan)
    draws = np.random.default_rng(seed).integers(0, len(values), size=(RESAMPLES, len(values)))
    means = values[draws].mean(-1)
    return Interval(*np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2]).tolist())


def interval_over_seeds(scores: Sequence[float]) -> Interval:
    """Student's t interval of the mean over training runs; without one for a single run."""
    from scipy import stats

    if len(scores) < 2:
        return Interval(math.nan, math.nan)
    half = stats.t.ppf((1 + LEVEL) / 2, len(scores) - 1) * np.std(scores, ddof=1) / math.sqrt(len(scores))
    return Interval(float(np.mean(scores) - half), float(np.mean(scores) + half))


def compare(first: Mapping, second: Mapping, seed: int = 0) -> Comparison | None:
    """Paired comparison of two {problem: accuracy}, on the problems that both have; None if none."""
    common = sorted(first.keys() & second.keys(), key=str)
    if not common:
        return None
    differences = np.array([first[key] - second[key] for key in common])
    observed = abs(differences.mean())
    signs = np.random.default_rng(seed).choice([-1.0, 1.0], size=(RESAMPLES, len(differences)))
    # The observed signs count as one of the draws; rounding must not make it rarer than itself.
    as_far = np.abs((signs * differences).mean(-1)) >= observed - 1e-12
    return Comparison(
        float(differences.mean()),
        interval_over_problems(differences, seed),
        float((as_far.sum() + 1) / (RESAMPLES + 1)),
        len(common),
    )
