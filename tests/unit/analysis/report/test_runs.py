"""Names, lines and colours of runs."""

import json
import math
from statistics import fmean

import numpy as np
import pytest
from matplotlib.colors import to_hex
from report_runs import ACCURACY, data_of, drawn, dump, make, means_of_ten, read
from scipy import stats

from cppo_verl.analysis.report.page import page_values
from cppo_verl.analysis.report.runs import NO_DUMP, legend_labels, lines, reported, unique_names


def test_seeds_of_one_setting_are_one_line_with_a_band(tmp_path):
    folders = [make(tmp_path / str(seed), seed=seed, steps=10 + seed) for seed in (1, 2, 3)]
    other = make(tmp_path / "other", seed=1, config="lr: 1.0")
    runs = read(*folders, other)
    made = page_values(runs)
    assert [line.label for line in lines(reported(runs))] == ["cppo (1) (3 runs)", "cppo (other)"]
    figures = drawn(made)
    logs = [[json.loads(t) for t in (f / "logs" / "metrics-0.jsonl").read_text().splitlines()] for f in folders]
    smoothed = [means_of_ten([[r["step"], r["data"]["critic/score/mean"]] for r in log]) for log in logs]
    points, _ = data_of(figures["reward"], "cppo (1) (3 runs)")
    assert [x for x, _ in points] == list(range(12))
    low_and_high = figures["reward"].axes.collections[0].get_paths()[0].vertices
    for step, value in points:
        values = [rows[int(step)][1] for rows in smoothed]
        assert value == pytest.approx(fmean(values))
        edges = [y for x, y in low_and_high if x == step]
        assert (min(edges), max(edges)) == pytest.approx((min(values), max(values)))
    accuracies = [[r["data"][ACCURACY] for r in log if ACCURACY in r["data"]] for log in logs]
    band = figures["validation"].axes.collections[0].get_paths()[0].vertices
    values = [a[1] for a in accuracies]
    half = stats.t.ppf(0.975, 2) * np.std(values, ddof=1) / math.sqrt(3)
    assert max(y for x, y in band if x == 5) == pytest.approx(fmean(values) + half)


def test_a_run_keeps_its_colour_and_more_than_eight_their_style(tmp_path):
    folders = [make(tmp_path / f"run{i}", f"method{i}", answers=False) for i in range(10)]
    runs = read(*folders)
    made, expected = page_values(runs), lines(reported(runs))
    styles = [(line.color, str(line.style)) for line in expected]
    assert len(set(styles)) == 10 and styles[0][0] == styles[8][0]
    for name in ("reward", "masked", "validation", "divergence_by_position"):
        shown = [line for line in drawn(made)[name].axes.lines if line.get_gid() is None]
        assert {line.get_label(): to_hex(line.get_color()) for line in shown} == {
            line.label: line.color for line in expected
        }


def test_names_tell_runs_apart(tmp_path):
    runs = read(*(make(tmp_path / name, answers=False) for name in ("a/x", "a/y", "b/x")), make(tmp_path / "z", "dppo"))
    assert unique_names(runs) == [
        f"cppo ({tmp_path}/a/x)",
        "cppo (y)",
        f"cppo ({tmp_path}/b/x)",
        "dppo",
    ]
    labels = legend_labels(["x" * 40 + "a", "x" * 40 + "b", "x" * 40 + "a", "_hidden"])
    assert len(set(labels)) == 4 and not labels[3].startswith("_")


def test_a_run_of_an_older_version_is_named_with_what_the_report_lacks(tmp_path):
    folder = make(tmp_path / "old", answers=False)
    log = folder / "logs" / "metrics-0.jsonl"
    log.write_text(log.read_text().replace("trust_region/effective_delta_b", "trust_region/delta_b"))
    made = page_values(read(folder))
    (note,) = [note for note in made["notes"] if "older version" in note]
    assert note == (
        "cppo: an older version logged this run, with trust_region/delta_b in the place of "
        "trust_region/effective_delta_b: the figure and the summary of δ_b lack it"
    )
    assert "delta_b" not in drawn(made)
    assert page_values(read(make(tmp_path / "new", answers=False)))["notes"] == ["cppo: " + NO_DUMP]


def test_tokens_of_an_attempt_that_was_given_up_are_left_out(tmp_path):
    """Its metrics are, and a run that goes on from an earlier checkpoint writes over its dumps one by one."""
    for step in (3, 9):
        dump(make(tmp_path, steps=5, answers=False), step)
    (item,) = reported(read(tmp_path))
    assert list(item.dumped.entropy.index) == list(item.dumped.relative_error.index) == [3]
    assert "tokens dumped at step 9 are left out: the metrics end at step 5" in " ".join(item.notes)


def test_making_and_drawing_a_report_does_not_change_the_runs(tmp_path):
    dump(make(tmp_path / "a"))
    runs = read(tmp_path / "a")
    notes = [list(item.notes) for item in runs]
    first = page_values(runs)
    figures = [figure.text for figure in drawn(first).values()]
    assert [item.notes for item in runs] == notes
    again = page_values(runs)
    assert again["notes"] == first["notes"]
    assert figures == [figure.text for figure in drawn(again).values()]
