"""The summary agrees with the log."""

from statistics import fmean, median

from report_runs import ACCURACY, SHARE, make, read

from cppo_verl.analysis.report.page import page_values


def test_the_summary_agrees_with_the_log(tmp_path):
    (run,) = read(make(tmp_path / "a", steps=30))
    table = page_values([run])["summary"]
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
