"""Panels from what runs logged agree with the log."""

import json
from statistics import fmean

import numpy as np
import pandas as pd
import pytest
from report_runs import ACCURACY, SHARE, data_of, drawn, dump, make, means_of_ten, read
from token_dumps import make_response, save

from cppo_verl.analysis.report import curves
from cppo_verl.analysis.report.page import page_values
from cppo_verl.analysis.report.runs import reported


def test_curves_are_the_logged_numbers(tmp_path):
    runs = [make(tmp_path / "a", "cppo", 1), make(tmp_path / "b", "dppo", 2, steps=30, budget=False)]
    figures = drawn(page_values(read(*runs)))
    for folder, label in zip(runs, ("cppo", "dppo"), strict=True):
        log = [json.loads(text) for text in (folder / "logs" / "metrics-0.jsonl").read_text().splitlines()]
        for name, key in (
            ("reward", "critic/score/mean"),
            ("response_length", "response_length/mean"),
            ("masked", SHARE),
            ("masked_positive", "trust_region/positive/masked_share"),
            ("divergence_first_update", "trust_region/first_update/divergence"),
            ("time", "timing_s/step"),
            ("memory_actor_max_memory_allocated_gb", "actor/perf/max_memory_allocated_gb"),
        ):
            points = [[row["step"], row["data"][key]] for row in log if key in row["data"]]
            mean, faint = data_of(figures[name], label)
            assert faint == points
            np.testing.assert_allclose(mean, means_of_ten(points), rtol=1e-12)
        for name, part in (("masked_by_budget", "budget"), ("masked_by_token", "token")):
            key = f"trust_region/{part}_rejected_share"
            points = [
                [row["step"], row["data"][SHARE] * row["data"].get(key, 0)] for row in log if SHARE in row["data"]
            ]
            np.testing.assert_allclose(data_of(figures[name], label)[1], points, rtol=1e-12)
        points = [[row["step"], row["data"][ACCURACY]] for row in log if ACCURACY in row["data"]]
        assert data_of(figures["validation"], label)[0] == points
        positions = [
            fmean(row["data"][f"trust_region/later_updates/divergence/position_{b}"] for row in log) for b in range(8)
        ]
        np.testing.assert_allclose([y for _, y in data_of(figures["divergence_by_position"], label)[0]], positions)
    (dashed,) = [line for line in figures["divergence_by_position"].axes.lines if line.get_gid() == "delta / w_t"]
    for x, y in dashed.get_xydata():
        assert y == pytest.approx(0.05 / (1 - 0.2 * x))
    assert "no prefix budget: dppo" in figures["delta_b"].text
    assert [line.get_label() for line in figures["delta_b"].axes.lines if line.get_gid() is None] == ["cppo"]


def test_shaded_is_the_interval_over_problems(tmp_path):
    (run,) = read(make(tmp_path / "a"))
    figure = drawn(page_values([run]))["validation"]
    (band,) = figure.axes.collections
    corners = band.get_paths()[0].vertices
    for step in (0, 5, 10):
        low, high = (f(y for x, y in corners if x == step) for f in (min, max))
        averages = [fmean(float((p + i + step) % 3 == 0) for i in range(4)) for p in range(6)]
        g = np.random.default_rng(1)
        means = [g.choice(averages, 6).mean() for _ in range(4000)]
        np.testing.assert_allclose((low, high), np.quantile(means, (0.025, 0.975)), atol=0.02)
    assert "95% interval over problems" in figure.text


def test_a_long_line_keeps_its_extremes_and_true_values():
    g = np.random.default_rng(0)
    line = pd.DataFrame({"y": g.normal(size=1000)})
    line.loc[[123, 777], "y"] = 50, -50
    thin = curves.thinned(line)
    assert len(thin) <= 502 and {50, -50} < set(thin["y"])
    assert (thin.index[0], thin.index[-1]) == (0, 999) and (np.diff(thin.index) > 0).all()
    pd.testing.assert_frame_equal(thin, line.loc[thin.index])
    pd.testing.assert_frame_equal(curves.thinned(line[:500]), line[:500])


def test_phases_add_up_to_the_step(tmp_path):
    (run,) = read(make(tmp_path / "a"))
    seconds = curves.phases(*reported([run])).to_dict()
    rows = list(run.steps.values())
    assert seconds["gen"] == pytest.approx(fmean(r["timing_s/gen"] for r in rows))
    assert sum(seconds.values()) - seconds["testing"] == pytest.approx(fmean(r["timing_s/step"] for r in rows))
    assert seconds["testing"] == pytest.approx(3 * 2.0 / 13)
    figure = drawn(page_values([run]))["phases"]
    widths = {bars.get_label(): bars[0].get_width() for bars in figure.axes.containers}
    assert widths == pytest.approx({name: value for name, value in seconds.items() if value > 0})


def test_the_band_of_many_validations_is_one_area(tmp_path):
    """Of these only `INTERVALS` are read."""
    (run,) = read(make(tmp_path / "a", steps=100))
    figure = drawn(page_values([run]))["validation"]
    (band,) = figure.axes.collections
    (area,) = band.get_paths()
    assert {x for x, _ in area.vertices} >= {0, 100} and len({x for x, _ in area.vertices}) == curves.INTERVALS
    assert not np.isnan(figure.axes.lines[0].get_ydata()).any()


def test_a_budget_at_some_steps_only_is_drawn_at_these(tmp_path):
    folder = make(tmp_path / "a", answers=False)
    log = folder / "logs" / "metrics-0.jsonl"
    rows = [json.loads(text) for text in log.read_text().splitlines()]
    for row in rows[:5]:
        row["data"]["trust_region/effective_delta_b"] = 0.0
    log.write_text("\n".join(map(json.dumps, rows)))
    _, faint = data_of(drawn(page_values(read(folder)))["delta_b"], "cppo")
    assert faint == [[row["step"], row["data"]["trust_region/effective_delta_b"]] for row in rows[5:]]


def test_the_logged_relative_error_goes_before_that_of_the_dump(tmp_path):
    folder = make(tmp_path / "a", answers=False)
    dump(folder)
    log = folder / "logs" / "metrics-0.jsonl"
    rows = [json.loads(text) for text in log.read_text().splitlines()]
    points = [[row["step"], 0.001 * (row["step"] + 1)] for row in rows]
    for row, (_, error) in zip(rows, points, strict=True):
        row["data"]["trust_region/first_update/relative_log_prob_error"] = error
    log.write_text("\n".join(map(json.dumps, rows)))
    assert data_of(drawn(page_values(read(folder)))["relative_error"], "cppo")[0] == points


def test_a_dump_of_first_updates_alone_has_no_divergence_by_position(tmp_path):
    folder = make(tmp_path / "a", answers=False)
    (folder / "tokens").mkdir()
    save(folder / "tokens", 3, [make_response(0, 10)])
    assert "largest_by_position" not in drawn(page_values(read(folder)))
