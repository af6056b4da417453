"""The tables of a report: a summary of each run, and the settings in which the runs differ."""

import math
from collections.abc import Sequence
from statistics import fmean, median

from cppo_verl.analysis.report.config_differences import differences, method
from cppo_verl.analysis.report.curves import logged, product, series
from cppo_verl.analysis.report.runs import ReportedRun, shown
from cppo_verl.analysis.report.sections import MASKED, SHARE, STEP_SECONDS, benchmarks_of, effective_budget
from cppo_verl.analysis.text import MISSING, Cell, Table, number
from cppo_verl.artifacts.run_reader import Run
from cppo_verl.evaluation.statistics import select

LAST = 10
"""Number of last steps averaged in the summary's reward."""


def summary(runs: Sequence[ReportedRun]) -> Table:
    """One row per run."""
    benchmarks = benchmarks_of(runs)
    rows = [_row(item, benchmarks) for item in runs]
    return Table("summary-table", "Summary", list(rows[0]), [list(row.values()) for row in rows])


def _row(item: ReportedRun, benchmarks: Sequence[str]) -> dict[str, Cell]:
    run = item.run
    last_step = max(run.steps, default=0)
    score = select(run.accuracies(), benchmarks, run.t_stop) if benchmarks else None
    reward, masked, delta_b, time, testing = (
        series(run, metric)[1]
        for metric in (
            logged("critic/score/mean"),
            MASKED,
            effective_budget,
            STEP_SECONDS,
            logged("timing_s/testing"),
        )
    )
    return {
        "run": item.name,
        "method": shown(method(run)),
        "seed": MISSING if run.seed is None else shown(str(run.seed)),
        "steps": f"{last_step} of {run.t_stop}" if run.t_stop else str(last_step),
        "best": score and score.mean,
        "at step": MISSING if score is None else str(score.step),
        "last": score and score.last,
        "smoothed": score and score.smoothed,
        f"reward, last {LAST}": f"{fmean(reward[-LAST:]):.3f}" if reward else MISSING,
        "masked": fmean(masked) if masked else None,
        "of it by budget": by_budget_share(run) if item.has_two_constraints else None,
        "δ_b": number(fmean(delta_b), 3) if delta_b else MISSING,
        "time per step": duration(median(time)) if time else MISSING,
        "total": duration(math.fsum(time) + math.fsum(testing)) if time else MISSING,
    }


def by_budget_share(run: Run) -> float | None:
    """Of all tokens that the run masked, the share that the budget rejected; None if it masked nothing."""
    masked = math.fsum(series(run, logged(SHARE))[1])
    rejected = series(run, product(SHARE, "trust_region/budget_rejected_share"))[1]
    return math.fsum(rejected) / masked if masked > 0 else None


def duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def setting_differences(runs: Sequence[ReportedRun]) -> Table | None:
    """The settings in which the runs differ; None with fewer than two readable configs."""
    known = [item for item in runs if item.settings]
    if len(known) < 2:
        return None
    rows = [
        [shown(cell) for cell in (key, *values)]
        for key, values in differences([item.settings for item in known]).items()
    ]
    return Table("differences", "Settings that differ", ["setting", *(item.name for item in known)], rows)
