"""The report: what is drawn and said against the log, the dump and the oracle; damaged and hostile runs; the page."""

import json
import math
import re
import xml.etree.ElementTree as ElementTree
from collections import Counter
from statistics import fmean, median

import numpy as np
import oracle
import pytest
from browser import DESKTOP, PHONE, fits, opened
from matplotlib.colors import to_hex
from run_folders import answer, write
from scipy import stats
from token_dumps import CPPO, DELTA, DELTA_B, W_MIN, batch, damaged, make_response, save, train, writer
from verl.utils import tensordict_utils as tu

from cppo_verl.analysis.report import curves, token_panels
from cppo_verl.analysis.report.config_differences import differences, overrides, settings
from cppo_verl.analysis.report.drawing import draw
from cppo_verl.analysis.report.dump_summary import ChosenResponse, summarise
from cppo_verl.analysis.report.page import report
from cppo_verl.analysis.report.runs import legend_labels, unique_names
from cppo_verl.artifacts.run_reader import read_runs
from cppo_verl.artifacts.token_dump import REASONS, read_tokens
from cppo_verl.cli import main

ACCURACY = "val-core/sorting/acc/mean@4"
SHARE = "trust_region/masked_share"


def metrics(step, seed=0, budget=True):
    """What a step of a method with a trust region logs, in verl's and the plug-in's names."""
    g = np.random.default_rng([seed, step])
    names = [
        "critic/score/mean",
        "response_length/mean",
        SHARE,
        *(f"trust_region/{sign}/masked_share" for sign in ("positive", "negative")),
        *(f"trust_region/{when}_update{s}/divergence" for when, s in (("first", ""), ("later", "s"))),
        *(f"trust_region/later_updates/divergence/position_{b}" for b in range(8)),
        *(f"actor/perf/{name}" for name in ("max_memory_allocated_gb", "cpu_memory_used_gb")),
        *(f"timing_s/{name}" for name in ("gen", "update_actor", "dump_tokens")),
    ]
    values = dict(zip(names, g.uniform(0.1, 0.9, len(names)).tolist(), strict=True))
    values["timing_s/dump_tokens"] *= 0.1
    values["timing_s/step"] = values["timing_s/gen"] + values["timing_s/update_actor"] + 0.25
    if step % 4:  # else nothing of it was masked, which leaves the shares out
        values["trust_region/budget_rejected_share"] = 0.75 if budget else 0.0
        values["trust_region/token_rejected_share"] = 0.25 if budget else 1.0
    values["trust_region/effective_delta_b"] = 0.01 + 0.001 * step if budget else 0.0
    if step % 5 == 0:
        values |= {ACCURACY: float(g.integers(0, 17)) / 16, "timing_s/testing": 2.0}
    return values


def make(folder, method="cppo", seed=1, steps=12, config="", answers=True, budget=True):
    """A run's folder as the quickstart leaves it, without the trainer."""
    rows = [{"step": step, "data": metrics(step, seed, budget)} for step in range(steps + 1)]
    del rows[0]["data"][SHARE]  # the validation before the first step
    write(folder / "logs" / "metrics-0.jsonl", *map(json.dumps, rows))
    loss = f"loss_mode: cppo, delta: 0.05, w_min: 0.8, mask: {'budget' if budget else 'none'}"
    write(
        folder / "hydra" / "config.yaml",
        f"data: {{seed: {seed}}}\noutput: {folder}",
        "trainer: {total_training_steps: 20, default_local_dir: '${output}/c'}",
        f"actor_rollout_ref: {{actor: {{policy_loss: {{{loss}}}}}}}",
        config,
    )
    write(
        folder / "hydra" / "hydra.yaml",
        f"hydra: {{runtime: {{output_dir: {folder}, choices: {{method: {method}}}}}}}",
    )
    write(folder / "hydra" / "overrides.yaml", f"- method={method}", f"- data.seed={seed}")
    for step in range(0, steps + 1, 5) if answers else ():
        lines = [answer(f"u{p}", i, f"problem {p}", float((p + i + step) % 3 == 0)) for p in range(6) for i in range(4)]
        write(folder / "validation" / f"{step}.jsonl", *lines)
        write(folder / "validation" / f"{step}.sources.json", json.dumps({f"u{p}": "sorting" for p in range(6)}))
    return folder


def dump(folder, step=3, method=None):
    """24 responses in three updates, and what their batch was made of."""
    method = method or CPPO()
    data, log_pi = batch()
    rows = [row for row in range(24) if row != 5]
    records = train(method, data, log_pi, rows)
    header = {"loss_mode": "cppo", "delta": DELTA, "w_min": W_MIN}
    keys = {row: f"prompt{row // 4}_{row % 4}_0" for row in rows}
    writer(folder / "tokens", method=header).write(step, None, records, keys, tu.index_select_tensor_dict(data, rows))
    return data, log_pi


def read(*folders):
    return [run for folder in folders for run in read_runs(folder)]


def drawn(made):
    return {panel.name: draw(panel) for section in made.sections for panel in section.panels}


def data_of(figure, label):
    """The labelled line's points, and those of the faint one that was drawn before it."""
    lines = figure.axes.lines
    at = next(i for i, line in enumerate(lines) if line.get_label() == label)
    mean = lines[at].get_xydata().tolist()
    faint = lines[at - 1].get_xydata().tolist() if at and lines[at - 1].get_gid() == "each step" else None
    return mean, faint


def means_of_ten(points):
    return [[x, fmean(y for _, y in points[max(0, i - 9) : i + 1])] for i, (x, _) in enumerate(points)]


# --- figures of the log ---------------------------------------------------------------------------------------


def test_curves_are_the_logged_numbers(tmp_path):
    runs = [make(tmp_path / "a", "cppo", 1), make(tmp_path / "b", "dppo", 2, steps=30, budget=False)]
    figures = drawn(report(read(*runs)))
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
    assert "no prefix budget: dppo" in figures["delta_b"].text()
    assert [line.get_label() for line in figures["delta_b"].axes.lines if line.get_gid() is None] == ["cppo"]


def test_shaded_is_the_interval_over_problems(tmp_path):
    (run,) = read(make(tmp_path / "a"))
    figure = drawn(report([run]))["validation"]
    (band,) = figure.axes.collections
    corners = band.get_paths()[0].vertices
    for step in (0, 5, 10):
        low, high = (f(y for x, y in corners if x == step) for f in (min, max))
        averages = [fmean(float((p + i + step) % 3 == 0) for i in range(4)) for p in range(6)]
        g = np.random.default_rng(1)
        means = [g.choice(averages, 6).mean() for _ in range(4000)]
        np.testing.assert_allclose((low, high), np.quantile(means, (0.025, 0.975)), atol=0.02)
    assert "95% interval over problems" in figure.text()


def test_seeds_of_one_setting_are_one_line_with_a_band(tmp_path):
    folders = [make(tmp_path / str(seed), seed=seed, steps=10 + seed) for seed in (1, 2, 3)]
    other = make(tmp_path / "other", seed=1, config="lr: 1.0")
    made = report(read(*folders, other))
    assert [line.name for line in made.lines] == ["cppo (1) (3 runs)", "cppo (other)"]
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


def test_a_long_line_keeps_its_extremes_and_true_values():
    g = np.random.default_rng(0)
    x, y = np.arange(1000), g.normal(size=1000)
    y[[123, 777]] = 50, -50
    thin_x, thin_y = curves.thinned(x, y)
    assert len(thin_x) <= 502 and {50, -50} < set(thin_y)
    assert (thin_x[0], thin_x[-1]) == (0, 999) and (np.diff(thin_x) > 0).all()
    np.testing.assert_array_equal(thin_y, y[thin_x.astype(int)])
    short = curves.thinned(x[:500], y[:500])
    np.testing.assert_array_equal(short[1], y[:500])


def test_phases_add_up_to_the_step(tmp_path):
    (run,) = read(make(tmp_path / "a"))
    seconds = curves.phases(run)
    rows = list(run.steps.values())
    assert seconds["gen"] == pytest.approx(fmean(r["timing_s/gen"] for r in rows))
    assert sum(seconds.values()) - seconds["testing"] == pytest.approx(fmean(r["timing_s/step"] for r in rows))
    assert seconds["testing"] == pytest.approx(3 * 2.0 / 13)
    figure = drawn(report([run]))["phases"]
    widths = {bars.get_label(): bars[0].get_width() for bars in figure.axes.containers}
    assert widths == pytest.approx({name: value for name, value in seconds.items() if value > 0})


def test_a_run_keeps_its_colour_and_more_than_eight_their_style(tmp_path):
    folders = [make(tmp_path / f"run{i}", f"method{i}", answers=False) for i in range(10)]
    made = report(read(*folders))
    styles = [(line.color, str(line.style)) for line in made.lines]
    assert len(set(styles)) == 10 and styles[0][0] == styles[8][0]
    for name in ("reward", "masked", "validation", "divergence_by_position"):
        lines = drawn(made)[name].axes.lines
        assert {line.get_label(): to_hex(line.get_color()) for line in lines if line.get_gid() is None} == {
            line.label: line.color for line in made.lines
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


# --- figures of the dump --------------------------------------------------------------------------------------


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
    assert got.relative_error == {3: pytest.approx(apart / size, rel=1e-5)}
    assert got.entropy == {3: pytest.approx(surprise / tokens, rel=1e-5)}
    for values, wanted in zip(got.by_position, bins, strict=True):
        np.testing.assert_allclose(np.sort(values), sorted(wanted), atol=1e-6)
    make(tmp_path, answers=False)
    figures = drawn(report(read(tmp_path)))
    tops = [fmean(sorted(values)[-max(1, round(len(values) / 10)) :]) for values in bins]
    np.testing.assert_allclose([y for _, y in data_of(figures["largest_by_position"], "cppo")[0]], tops, rtol=1e-4)
    assert data_of(figures["relative_error"], "cppo")[0] == [[3, pytest.approx(apart / size, rel=1e-5)]]


def test_threshold_pictures_agree_with_the_oracle(tmp_path):
    make(tmp_path, answers=False)
    data, log_pi = dump(tmp_path)
    made = report(read(tmp_path))
    chosen = made.runs[0].dumped.chosen
    assert [one.kind for one in chosen] == ["budget", "token", "kept"]
    counts = {r.key: Counter(REASONS[code] for code in r.reason) for r in read_tokens(tmp_path).responses}
    for kind, item in ((one.kind, one.response) for one in chosen):
        row = int(item.score)
        valid = data["response_mask"][row].bool().tolist()
        mu, pi = data["rollout_log_probs"][row].tolist(), log_pi[row].tolist()
        adv = data["advantages"][row].tolist()
        div = [abs(math.exp(p) - math.exp(m)) if v else 0.0 for m, p, v in zip(mu, pi, valid, strict=True)]
        w = oracle.position_weights(valid, W_MIN)
        delta_b = oracle.adaptive_budget(div, valid, DELTA_B)
        c = oracle.effective_threshold(div, valid, w, DELTA, delta_b)
        kept = [t for t, v in enumerate(valid) if v]
        axes = drawn(made)[f"thresholds_1_{kind}"].axes
        (line,) = [line for line in axes.lines if line.get_label() == "effective threshold c_t"]
        np.testing.assert_allclose(line.get_ydata(), [c[t] for t in kept], atol=1e-5)
        bars = {round(b.get_x() + b.get_width() / 2): b.get_height() for group in axes.containers for b in group}
        heights = [bars[n] for n in range(1, len(kept) + 1)]
        np.testing.assert_allclose(heights, [w[t] * div[t] for t in kept], atol=1e-6)
        (delta,) = [line for line in axes.lines if line.get_label() == "token threshold δ"]
        assert set(delta.get_ydata()) == {DELTA}
        away = [oracle.moves_away(m, p, a) for m, p, a in zip(mu, pi, adv, strict=True)]
        masked = oracle.hard_mask(div, valid, w, DELTA, delta_b, away)
        marked = sorted(
            int(x) for mark in axes.lines if mark.get_gid() in ("budget", "token") for x in mark.get_xdata()
        )
        assert marked == [n for n, t in enumerate(kept, start=1) if not masked[t]]
        if kind != "kept":
            assert counts[item.key][kind] == max(count[kind] for count in counts.values()) > 0
        else:
            assert marked == []


def test_a_long_response_is_drawn_with_its_masked_and_largest_tokens(tmp_path):
    length = 8000
    g = np.random.default_rng(0)
    weighted = g.uniform(0, 0.01, length).astype(np.float32)
    reason = np.full(length, REASONS.index("kept"), dtype=np.uint8)
    reason[[100, 5000]], weighted[7000] = REASONS.index("budget"), 0.5
    one = make_response(0, length, weighted_divergence=weighted, reason=reason, mask=np.ones(length, bool))
    chosen = ChosenResponse("budget", one, {"method": {"delta": 0.05}})
    figure = draw(token_panels.response_panel("x", "run", chosen, []))
    bars = {b.get_x() + b.get_width() / 2: b.get_height() for group in figure.axes.containers for b in group}
    assert len(bars) == token_panels.BARS
    assert any(abs(x - 7001) < 1 and y == weighted[7000] for x, y in bars.items())
    marked = [x for line in figure.axes.lines if line.get_gid() == "budget" for x in line.get_xdata()]
    assert marked == [101, 5001]
    assert len(figure.svg()) < 150_000


# --- what is said ---------------------------------------------------------------------------------------------


def test_configs_differ_where_they_differ(tmp_path, monkeypatch):
    monkeypatch.setenv("SECRET", "hunter2")
    more = "key: ${oc.env:SECRET}\nvia: ${key}\nhere: ${now:%Y}\nself: {a: '${self}'}\n"
    runs = read(
        make(tmp_path / "a", "cppo", 1, config=more + "lists: {x: [1, 2], y: null}\nonly: {there: true}"),
        make(tmp_path / "b", "dppo", 2, config=more + "lists: {x: [1, 3], y: null}", budget=False),
    )
    flat = [settings(run) for run in runs]
    assert differences(flat) == {
        "actor_rollout_ref.actor.policy_loss.mask": ["budget", "none"],
        "data.seed": ["1", "2"],
        "lists.x": ["[1, 2]", "[1, 3]"],
        "only.there": ["true", "–"],
    }
    assert flat[0]["trainer.default_local_dir"] == "<run>/c"
    assert flat[0]["key"] == flat[0]["via"] == "${oc.env:SECRET}" and flat[0]["here"] == "${now:%Y}"
    assert "hunter2" not in str(flat)
    table = report(runs).differences
    assert table.header == ["setting", "cppo", "dppo"] and ["data.seed", "1", "2"] in table.rows
    assert overrides(runs[0]) == report(runs[:1]).overrides == ["method=cppo", "data.seed=1"]


def test_the_summary_agrees_with_the_log(tmp_path):
    (run,) = read(make(tmp_path / "a", steps=30))
    table = report([run]).summary
    got = dict(zip(table.header, table.cells()[0], strict=True))
    rows = list(run.steps.values())
    # asked for 20 steps: later validations do not count
    scores = {step: values[ACCURACY] for step, values in run.steps.items() if ACCURACY in values and step <= 20}
    best = max(scores, key=lambda step: (scores[step], -step))
    assert (got["best"], got["at step"]) == (f"{100 * scores[best]:.1f}%", str(best))
    assert got["last"] == f"{100 * scores[20]:.1f}%"
    curve = list(scores.values())
    assert got["smoothed"] == f"{100 * max(fmean(curve[i : i + 3]) for i in range(3)):.1f}%"
    assert got["reward, last 10"] == f"{fmean(r['critic/score/mean'] for r in rows[-10:]):.3f}"
    masked = [(r[SHARE], r.get("trust_region/budget_rejected_share", 0)) for r in rows if SHARE in r]
    assert got["masked"] == f"{100 * fmean(share for share, _ in masked):.1f}%"
    by_budget = sum(a * b for a, b in masked) / sum(a for a, _ in masked)
    assert got["of it by budget"] == f"{100 * by_budget:.1f}%"
    assert got["δ_b"] == f"{fmean(r['trust_region/effective_delta_b'] for r in rows):.3g}"
    assert got["time per step"] == f"{median(r['timing_s/step'] for r in rows):.1f} s"
    total = sum(r["timing_s/step"] + r.get("timing_s/testing", 0) for r in rows)
    assert got["total"] == f"{total:.1f} s" and got["seed"] == "1" and got["steps"] == "30 of 20"


@pytest.mark.process
def test_damaged_runs_are_reported_as_far_as_they_go(tmp_path, capsys):
    whole = make(tmp_path / "whole")
    dump(whole)
    damaged(whole / "tokens" / "step-000003.parquet", lambda x: x[: len(x) // 2])
    save(whole / "tokens", 4, [make_response(0, 10)])  # without a threshold to draw
    cut = make(tmp_path / "cut", steps=8, answers=False)
    log = cut / "logs" / "metrics-0.jsonl"
    text = log.read_text().replace(f'"{SHARE}": 0.', f'"{SHARE}": NaN, "x": 0.', 1)
    log.write_text(text[:-40])
    damaged(cut / "hydra" / "config.yaml", lambda x: x[:10])
    one = write(tmp_path / "one" / "metrics.jsonl", json.dumps({"step": 7, "data": {"critic/score/mean": 0.5}}))
    gaps = write(
        tmp_path / "gaps" / "metrics.jsonl",
        *(json.dumps({"step": step, "data": metrics(step)}) for step in (1, 2, 50, 51)),
    )
    page = tmp_path / "page.html"
    arguments = [str(path) for path in (whole, cut, one, gaps, tmp_path / "nowhere")]
    assert main(["report", *arguments, "--output", str(page)]) == 0
    err, text = capsys.readouterr().err, page.read_text()
    for note in (
        "skipped: no run at",
        "step-000003.parquet: not readable, skipped",
        "the last is cut off: a run killed, or still being written",
        "that are not finite were skipped",
        "hydra: not readable",
        "metrics (one): no token dump; trust_region.dump.every=10 writes one",
    ):
        assert note in err and note in text, note
    assert "Without a readable config: cut, metrics (one), metrics (gaps)" in re.sub(r"\s+", " ", text)
    assert re.search(r"Left out, no validation: cut|Left out, no validation: metrics \(one\)", text)


def test_nothing_to_report_on(tmp_path, capsys):
    assert main(["report", str(tmp_path), "--output", str(tmp_path / "page.html")]) == 2
    assert "no metrics of verl's file logger" in capsys.readouterr().err
    assert not (tmp_path / "page.html").exists()


def test_only_an_earlier_report_is_replaced(tmp_path, capsys):
    folder = write(tmp_path / "m.jsonl", json.dumps({"step": 7, "data": {"critic/score/mean": 0.5}}))
    page = tmp_path / "page.html"
    page.write_text("mine")
    assert main(["report", str(folder), "--output", str(page)]) == 2
    assert page.read_text() == "mine" and "name another" in capsys.readouterr().err
    assert main(["report", str(folder), "--output", str(tmp_path)]) == 2
    page.unlink()
    for _ in range(2):
        assert main(["report", f"mine={folder}", "--output", str(page), "--figures", str(tmp_path / "f")]) == 0
    assert "Training report: mine" in page.read_text() and (tmp_path / "f" / "reward.png").exists()


# --- the page -------------------------------------------------------------------------------------------------

HOSTILE = ("$x$ ^{", "<b>&'\"", "\u202eעברית", "a\x07\udcff")


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """Runs with names that nobody should give, and one with a dump."""
    root = tmp_path_factory.mktemp("report")
    for i, name in enumerate(HOSTILE):
        folder = make(root / f"run{i}", "m", seed=i, config=f"lr: {i}\ntext: \"<script>alert('1')</script>{i}\"")
        folder.rename(root / name)
    dump(root / HOSTILE[0])
    output = root / "out" / "report.html"
    assert main(["report", *(str(root / name) for name in HOSTILE), "--output", str(output)]) == 0
    return output


@pytest.mark.process
def test_every_figure_is_on_the_page_and_in_two_files(page):
    text = page.read_text()
    files = {file.name for file in page.with_name("report_figures").iterdir()}
    names = re.findall(r'<figure id="([a-z0-9_]+)"', text)
    assert len(names) == len(set(names)) > 20
    assert files == {f"{name}.{kind}" for name in names for kind in ("png", "svg")}
    for name in names:
        ElementTree.parse(page.parent / "report_figures" / f"{name}.svg")
        assert (page.parent / "report_figures" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert text.count("<svg ") == len(names)


@pytest.mark.process
def test_what_data_says_is_text(page):
    text = page.read_text()
    assert "<script" not in text and "<b>" not in text and "\x07" not in text
    assert "&lt;script&gt;alert(&#39;1&#39;)&lt;/script&gt;0" in text
    assert "m ($x$ ^{)" in text and "m (&lt;b&gt;&amp;" in text


@pytest.mark.process
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("viewport", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_the_page_in_a_browser(page, browser, viewport, scheme):
    with opened(browser, page, viewport, scheme) as view:
        assert fits(view)
        assert view.title().startswith("Training report: m (")
        ink = view.evaluate("getComputedStyle(document.querySelector('svg text')).fill")
        body = view.evaluate("getComputedStyle(document.body).color")
        assert ink == body
        for link in view.query_selector_all("nav a"):
            assert view.query_selector(link.get_attribute("href")) is not None
        box = view.query_selector("#reward svg").bounding_box()
        assert 250 < box["width"] <= viewport["width"]
