"""Thresholds along single responses agree with the oracle."""

import math
from collections import Counter

import numpy as np
import oracle
from report_runs import drawn, dump, make, read
from token_dumps import DELTA, DELTA_B, W_MIN, make_response, save

from cppo_verl.analysis.report import token_panels
from cppo_verl.analysis.report.drawing import draw
from cppo_verl.analysis.report.dump_summary import ChosenResponse, summarise
from cppo_verl.analysis.report.page import page_values
from cppo_verl.artifacts.token_dump import REASONS, read_tokens


def test_threshold_pictures_agree_with_the_oracle(tmp_path):
    make(tmp_path, answers=False)
    data, log_pi = dump(tmp_path)
    made = page_values(read(tmp_path))
    chosen = summarise(read_tokens(tmp_path)).chosen
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


def test_threshold_that_bounds_nothing_is_not_drawn(tmp_path):
    """A divergence without an upper bound may have an infinite delta."""
    folder = make(tmp_path, answers=False)
    config = folder / "hydra" / "config.yaml"
    config.write_text(config.read_text().replace("delta: 0.05", "delta: .inf"))
    (folder / "tokens").mkdir()
    infinite = np.full(40, np.inf, dtype=np.float32)
    method = {"loss_mode": "cppo", "delta": math.inf, "w_min": 0.8}
    save(folder / "tokens", 3, [make_response(i, threshold=infinite) for i in range(4)], method=method)
    made = page_values(read(folder))
    assert not [name for name in drawn(made) if name.startswith("thresholds_")]
    (by_position,) = [panel for panel in made["sections"]["divergence"] if panel.title.startswith("Mean D_t by pos")]
    assert by_position.thresholds == {}
