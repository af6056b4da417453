"""Statistics of evaluations: pass@k, confidence intervals, paired comparisons, and the paper's choice of a step.

Accuracies are in [0, 1]; the tables print per cent. Intervals are at 95 %.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

LEVEL = 0.95
"""Confidence level of every interval."""
RESAMPLES = 9999
VALUES_AT_ONCE = 4_000_000
"""Values drawn at once, 64 MB with their places."""
COLLAPSE_SHARE = 0.5
"""A run has collapsed whose accuracy falls below this share of its best and stays there."""


class Interval(NamedTuple):
    low: float
    high: float


class Selection(NamedTuple):
    """A run's score by the paper's rule: the validation with the best mean over benchmarks."""

    step: int
    mean: float
    components: dict[str, float]
    """{benchmark: accuracy} at that step."""
    last: float
    """Mean of the last validation, which no choice has inflated."""
    smoothed: float
    """Best moving average of three validations; a single lucky one cannot lift it far."""
    candidates: int
    """Number of validations that the best was chosen from."""
    collapsed: int | None
    """The step of `collapse`."""


class Comparison(NamedTuple):
    """Two methods on the same problems."""

    difference: float
    """Of the mean accuracies."""
    interval: Interval
    """Of the difference, over problems."""
    p_value: float
    """Two-sided, of a sign-flip permutation test."""
    problems: int


def collapse(means: Mapping[int, float], share: float = COLLAPSE_SHARE) -> int | None:
    """Return the step from which on a run has collapsed, or None.

    Ours, as the paper prints "collapse" without a rule: from that validation on, of which there are two at least, all
    means lie below ``share`` of the best one before it. ``means`` is {step: accuracy}, in the order of the steps.
    """
    curve = list(means.values())
    for i, step in enumerate(means):
        if 1 <= i <= len(curve) - 2 and max(curve[i:]) < share * max(curve[:i]):
            return step
    return None


def select(
    steps: Mapping[int, Mapping[str, float]],
    benchmarks: Sequence[str],
    t_stop: int | None = None,
    collapse_share: float = COLLAPSE_SHARE,
) -> Selection | None:
    """Choose the step in [0, t_stop] with the best unweighted mean over ``benchmarks``, the earliest step among ties.

    ``steps`` is {step: {benchmark: accuracy}}. Only a step with all benchmarks can be chosen; None if there is none.
    ``collapse_share`` is that of `collapse`.
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
        last=curve[-1],
        smoothed=max(math.fsum(window) / len(window) for window in windows),
        candidates=len(means),
        collapsed=collapse(means, collapse_share),
    )


def pass_at_k(correct: int, n: int, k: int) -> float:
    """Estimate without bias the chance that one of k samples is right, from n samples of which ``correct`` are."""
    if not 1 <= k <= n or not 0 <= correct <= n:
        raise ValueError(f"need 1 <= k <= n and 0 <= correct <= n, got k={k}, n={n}, correct={correct}")
    return 1 - math.comb(n - correct, k) / math.comb(n, k)


def interval_over_problems(accuracies: Sequence[float] | np.ndarray, seed: int = 0) -> Interval:
    """Return the bootstrap interval of the mean accuracy under another draw of problems; NaN for fewer than two."""
    values = np.asarray(accuracies, dtype=float)
    if len(values) < 2:
        return Interval(math.nan, math.nan)
    rng = np.random.default_rng(seed)
    means = _resampled(len(values), lambda size: values[rng.integers(0, len(values), size)])
    return Interval(*np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2]).tolist())


def _resampled(count: int, draw: Callable[[tuple[int, int]], np.ndarray]) -> np.ndarray:
    """Means of `RESAMPLES` draws of ``count`` values, [RESAMPLES].

    The draws are made in parts, which are the same as the whole: of 100,000 problems this would take 16 GB.

    Args:
        draw: returns so many draws of so many values, [draws, count].
    """
    rows = max(1, VALUES_AT_ONCE // count)
    sizes = [(min(rows, RESAMPLES - begin), count) for begin in range(0, RESAMPLES, rows)]
    return np.concatenate([draw(size).mean(-1) for size in sizes])


def interval_over_seeds(scores: Sequence[float]) -> Interval:
    """Return Student's t interval of the mean over training runs; NaN for a single run."""
    from scipy import stats

    if len(scores) < 2:
        return Interval(math.nan, math.nan)
    half = stats.t.ppf((1 + LEVEL) / 2, len(scores) - 1) * np.std(scores, ddof=1) / math.sqrt(len(scores))
    return Interval(float(np.mean(scores) - half), float(np.mean(scores) + half))


def compare(first: Mapping, second: Mapping) -> Comparison | None:
    """Compare two {problem: accuracy} on the problems that both have; None if there is none."""
    common = sorted(first.keys() & second.keys(), key=str)
    if not common:
        return None
    differences = np.array([first[key] - second[key] for key in common])
    observed = abs(differences.mean())
    rng = np.random.default_rng(0)
    means = _resampled(len(common), lambda size: rng.choice([-1.0, 1.0], size) * differences)
    # The observed signs are one of the draws, hence + 1. The tolerance counts a draw that ties but for rounding.
    as_far = np.abs(means) >= observed - 1e-12
    p_value = float((as_far.sum() + 1) / (RESAMPLES + 1))
    return Comparison(float(differences.mean()), interval_over_problems(differences), p_value, len(common))
