"""Sums of a dump agree with sums token by token."""

import math
from statistics import fmean

import numpy as np
import pytest
from report_runs import data_of, drawn, dump, make, read

from cppo_verl.analysis.report import curves
from cppo_verl.analysis.report.dump_summary import summarise
from cppo_verl.analysis.report.page import page_values
from cppo_verl.artifacts.token_dump import read_tokens


def test_sums_of_the_dump_agree_with_sums_token_by_token(tmp_path):
    data, log_pi = dump(tmp_path)
    got = summarise(read_tokens(tmp_path))
    apart = size = surprise = tokens = 0.0
    bins = [[] for _ in range(8)]
    for row in range(24):
        mu, pi = data["rollout_log_probs"][row].tolist(), log_pi[row].tolist()
        kept = [t for t, valid in enumerate(data["response_mask"][row].tolist()) if valid]
        surprise -= sum(mu[t] for t in kept)
        tokens += len(kept)
        if row < 8:
            apart += sum(abs(pi[t] - mu[t]) for t in kept)
            size += sum(abs(mu[t]) for t in kept)
        else:
            for n, t in enumerate(kept, start=1):
                (place,) = [b for b in range(8) if b * len(kept) < 8 * n <= (b + 1) * len(kept)]
                bins[place].append(abs(math.exp(pi[t]) - math.exp(mu[t])))
    assert got.relative_error.to_dict() == {3: pytest.approx(apart / size, rel=1e-5)}
    assert got.entropy.to_dict() == {3: pytest.approx(surprise / tokens, rel=1e-5)}
    for b, wanted in enumerate(bins):
        np.testing.assert_allclose(np.sort(got.later["divergence"][got.later["bin"] == b]), sorted(wanted), atol=1e-6)
    make(tmp_path, answers=False)
    figures = drawn(page_values(read(tmp_path)))
    tops = [fmean(sorted(values)[-max(1, round(len(values) / 10)) :]) for values in bins]
    np.testing.assert_allclose([y for _, y in data_of(figures["largest_by_position"], "cppo")[0]], tops, rtol=1e-4)
    assert data_of(figures["relative_error"], "cppo")[0] == [[3, pytest.approx(apart / size, rel=1e-5)]]


def test_the_deviation_over_the_position_in_tokens_is_that_of_loops(tmp_path, monkeypatch):
    """Mean and largest over responses of each one's mean within a bin, and the largest tenth of a bin's tokens."""
    monkeypatch.setattr(curves, "TOKEN_BINS", 4)
    data, log_pi = dump(make(tmp_path, answers=False))
    longest = max(int(data["response_mask"][row].sum()) for row in range(8, 24))
    width = math.ceil(longest / 4)
    of_bin = {b: {} for b in range(4)}
    for row in range(8, 24):  # the rows of the first update are left out
        kept = [t for t, valid in enumerate(data["response_mask"][row].tolist()) if valid]
        for n, t in enumerate(kept):
            apart = abs(math.exp(log_pi[row][t]) - math.exp(data["rollout_log_probs"][row][t]))
            of_bin[n // width].setdefault(row, []).append(apart)
    figures = drawn(page_values(read(tmp_path)))
    points = data_of(figures["deviation_by_token"], "cppo")[0]
    assert [x for x, _ in points] == [b * width + (width + 1) / 2 for b in range(4)]
    means = [[fmean(values) for values in rows.values()] for rows in of_bin.values()]
    np.testing.assert_allclose([y for _, y in points], [fmean(row) for row in means], rtol=1e-4)
    (band,) = figures["deviation_by_token"].axes.collections
    corners = band.get_paths()[0].vertices
    tops = [max(y for x, y in corners if x == centre) for centre, _ in points]
    np.testing.assert_allclose(tops, [max(row) for row in means], rtol=1e-4)
    tokens = [sorted(value for values in rows.values() for value in values) for rows in of_bin.values()]
    largest = [fmean(values[-max(1, round(len(values) / 10)) :]) for values in tokens]
    np.testing.assert_allclose([y for _, y in data_of(figures["largest_by_token"], "cppo")[0]], largest, rtol=1e-4)
