"""The tables of a report: a summary of each run, and the settings in which the runs differ."""

from collections.abc import Sequence

from cppo_verl.analysis.report.config_differences import differences, method
from cppo_verl.analysis.report.curves import logged, product, series
from cppo_verl.analysis.report.runs import DELTA_B, ReportedRun, shown
from cppo_verl.analysis.text import MISSING, Cell, Table, number
from cppo_verl.artifacts.run_reader import Run
from cppo_verl.evaluation.statistics import select

SHARE = "trust_region/masked_share"
MASKED = logged(SHARE, "actor/pg_clipfrac")
STEP_SECONDS = logged("timing_s/step", "perf/time_per_step")
LAST = 10
"""Number of last steps averaged in the summary's reward."""


def effective_budget(values: dict[str, float]) -> float | None:
    """The logged effective budget, which is zero if there is no budget."""
    return values.get(DELTA_B) or None


def benchmarks_of(runs: Sequence[ReportedRun]) -> list[str]:
    """Everything that any run validated on."""
    return sorted({name for item in runs for values in item.run.accuracies().values() for name in values})


def summary(runs: Sequence[ReportedRun]) -> Table:
    """One row per run."""
    benchmarks = benchmarks_of(runs)
    rows = [_row(item, benchmarks) for item in runs]
    return Table("summary-table", "Summary", list(rows[0]), [list(row.values()) for row in rows])


def _row(item: ReportedRun, benchmarks: Sequence[str]) -> dict[str, Cell]:
    run = item.run
    last_step = max(run.steps, default=0)
    score = select(run.accuracies(), benchmarks, run.t_stop) if benchmarks else None
    reward, masked = series(run, logged("critic/score/mean")), series(run, MASKED)
    delta_b, time = series(run, effective_budget), series(run, STEP_SECONDS)
    return {
        "run": item.name,
        "method": shown(method(run)),
        "seed": MISSING if run.seed is None else shown(str(run.seed)),
        "steps": f"{last_step} of {run.t_stop}" if run.t_stop else str(last_step),
        "best": score and score.mean,
        "at step": MISSING if score is None else str(score.step),
        "last": score and score.last,
        "smoothed": score and score.smoothed,
        f"reward, last {LAST}": f"{reward.tail(LAST).mean():.3f}" if len(reward) else MISSING,
        "masked": float(masked.mean()) if len(masked) else None,
        "of it by budget": by_budget_share(run) if item.has_two_constraints else None,
        "δ_b": number(delta_b.mean(), 3) if len(delta_b) else MISSING,
        "time per step": duration(time.median()) if len(time) else MISSING,
        "total": duration(time.sum() + series(run, logged("timing_s/testing")).sum()) if len(time) else MISSING,
    }


def by_budget_share(run: Run) -> float | None:
    """Of all tokens that the run masked, the share that the budget rejected; None if it masked nothing."""
    masked = series(run, logged(SHARE)).sum()
    rejected = series(run, product(SHARE, "trust_region/budget_rejected_share")).sum()
    return rejected / masked if masked > 0 else None


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
