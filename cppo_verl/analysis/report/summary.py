"""The tables of a report: a summary of each run, and the settings in which the runs differ."""

from collections.abc import Sequence

import pandas as pd

from cppo_verl.analysis.report.curves import MASKED, SHARE, STEP_SECONDS, effective_budget, logged, product
from cppo_verl.analysis.report.runs import ReportedRun, shown
from cppo_verl.analysis.text import MISSING, Cell, Table, number
from cppo_verl.artifacts.run_reader import METHOD
from cppo_verl.evaluation.statistics import select

LAST = 10
"""Number of last steps averaged in the summary's reward."""


def benchmarks_of(runs: Sequence[ReportedRun]) -> list[str]:
    """Everything that any run validated on."""
    return sorted({name for item in runs for name in item.accuracies})


def summary(runs: Sequence[ReportedRun]) -> Table:
    """One row per run."""
    benchmarks = benchmarks_of(runs)
    rows = [_row(item, benchmarks) for item in runs]
    return Table("summary-table", "Summary", list(rows[0]), [list(row.values()) for row in rows])


def _row(item: ReportedRun, benchmarks: Sequence[str]) -> dict[str, Cell]:
    run = item.run
    last_step = max(run.steps, default=0)
    score = select(run.accuracies(), benchmarks, run.t_stop) if benchmarks else None
    reward, masked, time = logged("critic/score/mean")(item), MASKED(item), STEP_SECONDS(item)
    delta_b = effective_budget(item)
    return {
        "run": item.name,
        "method": shown(str(run.saved("hydra.yaml").get(METHOD) or MISSING)),
        "seed": MISSING if run.seed is None else shown(str(run.seed)),
        "steps": f"{last_step} of {run.t_stop}" if run.t_stop else str(last_step),
        "best": score and score.mean,
        "at step": MISSING if score is None else str(score.step),
        "last": score and score.last,
        "smoothed": score and score.smoothed,
        f"reward, last {LAST}": f"{reward.tail(LAST).mean():.3f}" if len(reward) else MISSING,
        "masked": float(masked.mean()) if len(masked) else None,
        "of it by budget": by_budget_share(item) if item.has_two_constraints else None,
        "δ_b": number(delta_b.mean(), 3) if len(delta_b) else MISSING,
        "time per step": duration(time.median()) if len(time) else MISSING,
        "total": duration(time.sum() + logged("timing_s/testing")(item).sum()) if len(time) else MISSING,
    }


def by_budget_share(item: ReportedRun) -> float | None:
    """Of all tokens that the run masked, the share that the budget rejected; None if it masked nothing."""
    masked = logged(SHARE)(item).sum()
    rejected = product(SHARE, "trust_region/budget_rejected_share")(item).sum()
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
    values = pd.DataFrame([item.settings for item in known]).T.sort_index().fillna(MISSING)
    changed = values[values.nunique(axis=1) > 1]
    rows = [[shown(cell) for cell in row] for row in changed.reset_index().to_numpy().tolist()]
    return Table("differences", "Settings that differ", ["setting", *(item.name for item in known)], rows)
