"""Evaluation statistics against enumeration."""

import itertools
import math
import tracemalloc
from statistics import fmean

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from oracle import fuzz

from cppo_verl.evaluation import statistics
from cppo_verl.evaluation.statistics import compare, interval_over_problems, interval_over_seeds, pass_at_k, select


@pytest.mark.parametrize(("n", "correct", "k"), [(5, 2, 1), (5, 2, 3), (6, 0, 2), (6, 6, 2), (7, 3, 7), (4, 1, 4)])
def test_pass_at_k_is_the_share_of_subsets_with_a_right_answer(n, correct, k):
    answers = [1] * correct + [0] * (n - correct)
    subsets = list(itertools.combinations(answers, k))
    assert pass_at_k(correct, n, k) == pytest.approx(sum(any(s) for s in subsets) / len(subsets))


def test_pass_at_k_refuses_impossible_counts():
    for correct, n, k in [(1, 4, 5), (5, 4, 2), (1, 4, 0)]:
        with pytest.raises(ValueError, match=f"got k={k}, n={n}, correct={correct}"):
            pass_at_k(correct, n, k)


def test_intervals_cover_the_truth_as_often_as_they_say():
    rng = np.random.default_rng(0)
    over_seeds = over_problems = 0
    for trial in range(100):
        low, high = interval_over_seeds(rng.normal(0.3, 0.02, size=3))
        over_seeds += low <= 0.3 <= high
        low, high = interval_over_problems(rng.binomial(16, 0.3, size=30) / 16, seed=trial)
        over_problems += low <= 0.3 <= high
    assert over_seeds == pytest.approx(95, abs=5)
    assert over_problems == pytest.approx(94, abs=5)  # the bootstrap's own shortfall at 30 problems


def test_draws_made_in_parts_are_those_of_the_whole(monkeypatch):
    accuracies = np.random.default_rng(0).random((2, 37))
    first, second = ({i: x for i, x in enumerate(row.tolist())} for row in accuracies)
    whole = compare(first, second), interval_over_problems(accuracies[0])
    drawn = np.random.default_rng(0).integers(0, 37, size=(statistics.RESAMPLES, 37))
    assert whole[1] == pytest.approx(np.quantile(accuracies[0][drawn].mean(-1), [0.025, 0.975]))
    monkeypatch.setattr(statistics, "VALUES_AT_ONCE", 37 * 101 + 5)
    assert (compare(first, second), interval_over_problems(accuracies[0])) == whole


def test_many_problems_take_little_memory():
    problems = 5_000
    tracemalloc.start()
    compare(dict.fromkeys(range(problems), 1.0), dict.fromkeys(range(problems), 0.5))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 300e6


def test_interval_over_seeds_of_three_by_hand():
    # t of two degrees of freedom at 97.5 %: 4.30265; standard deviation 0.02
    low, high = interval_over_seeds([0.30, 0.32, 0.34])
    assert (low, high) == pytest.approx((0.32 - 4.30265 * 0.02 / 3**0.5, 0.32 + 4.30265 * 0.02 / 3**0.5), abs=1e-6)
    assert all(map(math.isnan, interval_over_seeds([0.3])))
    assert all(map(math.isnan, interval_over_problems([0.3])))


def test_compare_agrees_with_the_enumeration_of_all_signs():
    first = dict(enumerate([0.9, 0.4, 0.5, 0.8, 0.3, 0.7]))
    second = dict(enumerate([0.6, 0.5, 0.2, 0.4, 0.3, 0.5])) | {99: 1.0}
    result = compare(first, second)
    differences = [first[i] - second[i] for i in first]
    observed = abs(sum(differences))
    signs = list(itertools.product([1, -1], repeat=6))
    exact = sum(abs(sum(s * d for s, d in zip(sign, differences, strict=True))) >= observed - 1e-12 for sign in signs)
    assert result.p_value == pytest.approx(exact / len(signs), abs=0.02)
    assert result.difference == pytest.approx(fmean(differences))
    assert result.problems == 6
    assert result.interval.low < result.difference < result.interval.high
    assert compare(first, {99: 1.0}) is None


@fuzz
@given(
    st.dictionaries(
        st.integers(0, 60),
        st.dictionaries(st.sampled_from("abc"), st.integers(0, 16).map(lambda n: n / 16), min_size=1),
    ),
    st.one_of(st.none(), st.integers(0, 60)),
)
def test_select_agrees_with_a_search_step_by_step(steps, t_stop):
    best = None
    curve = []
    for step in sorted(steps):
        if all(name in steps[step] for name in "ab") and (t_stop is None or step <= t_stop):
            mean = (steps[step]["a"] + steps[step]["b"]) / 2
            curve.append((step, mean))
            if best is None or mean > best[1]:
                best = (step, mean)
    got = select(steps, ["a", "b"], t_stop)
    if best is None:
        assert got is None
        return
    assert (got.step, got.mean) == best
    assert got.components == {name: steps[got.step][name] for name in "ab"}
    assert got.last == curve[-1][1]
    assert got.candidates == len(curve)
    means = [mean for _, mean in curve]
    windows = [means[i : i + 3] for i in range(len(means) - 2)] or [means]
    assert got.smoothed == pytest.approx(max(fmean(w) for w in windows))
