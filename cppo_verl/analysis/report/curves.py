"""Panels of lines: one line per run, or a mean and its band for the seeds of one setting."""

import math
from collections.abc import Callable, Mapping, Sequence
from statistics import fmean

import numpy as np
import pandas as pd

from cppo_verl.analysis.positions import BIN_CENTRES
from cppo_verl.analysis.report.panels import Band, LinePanel, Missing, PhasePanel, Trace, Values
from cppo_verl.analysis.report.runs import Line, ReportedRun
from cppo_verl.artifacts.run_reader import Run, read_generations
from cppo_verl.core.metrics import POSITION_BINS
from cppo_verl.evaluation.statistics import Interval, interval_over_problems, interval_over_seeds

WINDOW = 10
"""Least number of logged steps in the running mean; a long run's window is 1/`STRETCHES` of its steps."""
STRETCHES = 25
POINTS = 500
"""Most points of a drawn line."""
INTERVALS = 12
"""Most validations per run whose saved answers are read, because files of long answers are large."""
TOP = 0.1
MARKER_SIZE = 6

Metric = Callable[[dict[str, float]], float | None]
"""Takes a step's logged metrics and returns the value to draw; None if the step has none."""


def logged(*names: str) -> Metric:
    """The first of these metrics that a step has."""
    return lambda values: next((values[name] for name in names if name in values), None)


def product(share: str, part: str) -> Metric:
    """The product of two shares; the second is a share of the first, and logged only where the first is not zero."""
    return lambda values: values[share] * values.get(part, 0.0) if share in values else None


def series(run: Run, metric: Metric) -> pd.Series:
    """The metric at the steps that have it."""
    found = {step: metric(values) for step, values in run.steps.items()}
    return pd.Series({step: value for step, value in found.items() if value is not None}, dtype=float)


def thinned(lines: pd.DataFrame) -> pd.DataFrame:
    """The same lines with at most about `POINTS` points: the lowest and highest of the first column per stretch."""
    if len(lines) <= POINTS:
        return lines
    first = lines.iloc[:, 0].to_numpy()
    parts = np.array_split(np.arange(len(lines)), POINTS // 2)
    extremes = {int(part[pick(first[part])]) for part in parts for pick in (np.argmin, np.argmax)}
    return lines.iloc[sorted(extremes | {0, len(lines) - 1})]


def _complete(lines: Sequence[Line], quantity: Callable[[ReportedRun], pd.Series]) -> dict[Line, list[pd.Series]]:
    """{line: the quantity by step in each of its runs}, of the lines whose runs all have it."""
    found = {line: [quantity(item) for item in line.runs] for line in lines}
    return {line: parts for line, parts in found.items() if all(map(len, parts))}


def _over_runs(parts: Sequence[pd.Series]) -> pd.DataFrame:
    """Mean, lowest and highest of the runs' values, at the steps that all of them have."""
    common = pd.concat(parts, axis=1, join="inner")
    return pd.DataFrame({"mean": common.mean(axis=1), "low": common.min(axis=1), "high": common.max(axis=1)})


def _left_out(lines: Sequence[Line], drawn: Mapping[Line, object], without: str) -> dict[str, object]:
    """Facts for a caption: the lines that are not drawn, and why."""
    return {"left_out": [line.label for line in lines if line not in drawn], "without": without}


def curve(
    name: str,
    title: str,
    lines: Sequence[Line],
    metric: Metric,
    without: str,
    *,
    facts: Mapping | None = None,
    **kwargs,
) -> LinePanel | Missing:
    """A metric over the steps, smoothed by a running mean.

    Args:
        without: why a run may lack the metric.
        kwargs: further fields of the panel.

    Returns:
        `Missing` if no run has it.
    """
    complete = _complete(lines, lambda item: series(item.run, metric))
    if not complete:
        return Missing(title, without)
    window = max(WINDOW, max(len(part) for parts in complete.values() for part in parts) // STRETCHES)
    several = any(len(parts) > 1 for parts in complete.values())
    faint = len(complete) <= 4 and not several
    traces, bands = [], []
    for line, parts in complete.items():
        if faint:
            each = thinned(parts[0].to_frame("each"))
            traces.append(Trace(line, each.index, each["each"], "each step"))
        drawn = thinned(_over_runs([part.rolling(window, min_periods=1).mean() for part in parts]))
        traces.append(Trace(line, drawn.index, drawn["mean"], marker_size=MARKER_SIZE if len(drawn) == 1 else 0))
        if len(parts) > 1:
            bands.append(Band(line, drawn.index, drawn["low"], drawn["high"]))
    reading = {"window": window, "faint": faint, "several": several}
    facts = {**(facts or {}), **reading, **_left_out(lines, complete, without)}
    return LinePanel(name=name, title=title, facts=facts, traces=traces, bands=bands, **kwargs)


def dumped(
    name: str, title: str, lines: Sequence[Line], quantity: str, without: str, log: bool = False
) -> LinePanel | Missing:
    """A quantity of `DumpSummary` over the steps that were dumped."""
    complete = _complete(
        lines, lambda item: pd.Series(getattr(item.dumped, quantity) if item.dumped else {}, dtype=float)
    )
    if not complete:
        return Missing(title, without)
    traces, bands = [], []
    for line, parts in complete.items():
        drawn = _over_runs(parts)
        traces.append(Trace(line, drawn.index, drawn["mean"], marker_size=MARKER_SIZE if len(drawn) <= 60 else 0))
        if len(parts) > 1:
            bands.append(Band(line, drawn.index, drawn["low"], drawn["high"]))
    facts = _left_out(lines, complete, without)
    return LinePanel(name=name, title=title, facts=facts, traces=traces, bands=bands, log=log)


def validation(lines: Sequence[Line], benchmarks: Sequence[str], name: str, title: str) -> LinePanel | Missing:
    """The unweighted mean accuracy on ``benchmarks``; for one benchmark, with intervals over its problems."""
    complete = _complete(lines, lambda item: _accuracy(item.run, benchmarks))
    if not complete:
        return Missing(title, "no run validated on it")
    over_seeds = any(len(parts) > 1 for parts in complete.values())
    over_problems, traces, bands, unread, notes = False, [], [], [], []
    for line, parts in complete.items():
        common = pd.concat(parts, axis=1, join="inner")
        mean = thinned(common.mean(axis=1).to_frame("mean"))["mean"]
        traces.append(Trace(line, mean.index, mean, marker_size=3 if len(mean) <= 40 else 0))
        intervals: dict[int, Interval] = {}
        if len(parts) > 1:
            intervals = {step: interval_over_seeds(values) for step, values in common.T.items()}
        elif len(benchmarks) == 1:
            intervals, skipped = _intervals(line.runs[0], benchmarks[0], common.index)
            notes += skipped
            over_problems |= bool(intervals)
            unread += [] if intervals else [line.label]
        if intervals:
            bands.append(Band(line, list(intervals), *zip(*intervals.values(), strict=True)))
    facts = {"over_problems": over_problems, "most_read": INTERVALS, "over_seeds": over_seeds, "unread": unread}
    return LinePanel(
        name=name,
        title=title,
        caption="validation",
        facts=facts | _left_out(lines, complete, "no validation"),
        notes=notes,
        traces=traces,
        bands=bands,
        percent=True,
    )


def _accuracy(run: Run, benchmarks: Sequence[str]) -> pd.Series:
    accuracies = pd.DataFrame.from_dict(run.accuracies(), orient="index")
    return accuracies.reindex(columns=benchmarks).dropna().mean(axis=1)


def _intervals(item: ReportedRun, benchmark: str, steps: pd.Index) -> tuple[dict[int, Interval], list[str]]:
    """{step: interval over problems} of some of the steps, from the first to the last; and what was skipped."""
    folder = item.run.generations
    if folder is None:
        return {}, []
    saved = [step for step in steps if (folder / f"{step}.jsonl").exists()]
    chosen = sorted({saved[round(i)] for i in np.linspace(0, len(saved) - 1, min(INTERVALS, len(saved)))})
    result, notes = {}, []
    for step in chosen:
        answers = read_generations(folder, step)
        notes += [f"{item.name}: {note}" for note in answers.notes]
        of_one = {name for name, _ in answers.correct} == {"all"}  # the dump does not say the data sources
        interval = interval_over_problems(list(answers.accuracy(None if of_one else benchmark).values()))
        if not math.isnan(interval.low):
            result[step] = interval
    return result, notes


def drift_by_position(lines: Sequence[Line]) -> LinePanel | Missing:
    """Mean D_t of the later updates by t / T, from the log or else from the token dump, with delta / w_t beside it."""
    names = [f"trust_region/later_updates/divergence/position_{b}" for b in range(POSITION_BINS)]
    found, from_dump = {}, []
    for line in lines:
        rows = []
        for item in line.runs:
            bins: Sequence[Values] = [series(item.run, logged(name)) for name in names]
            if not all(map(len, bins)) and item.dumped and item.dumped.by_position:
                bins = item.dumped.by_position
                from_dump.append(line.label)
            if all(map(len, bins)):
                rows.append([float(np.asarray(values, dtype=float).mean()) for values in bins])
        if len(rows) == len(line.runs):
            found[line] = np.mean(rows, axis=0)
    without = "neither logged nor dumped, as with one update per batch"
    title, facts = "Mean D_t by position, later updates", {"from_dump": list(dict.fromkeys(from_dump))}
    return _by_position("divergence_by_position", title, lines, found, without, facts)


def largest_by_position(lines: Sequence[Line]) -> LinePanel | Missing:
    """Mean of the largest tenth of D_t in each bin of positions."""
    found = {}
    for line in lines:
        parts = [item.dumped.by_position for item in line.runs if item.dumped and item.dumped.by_position]
        bins = [np.concatenate(values) for values in zip(*parts, strict=True)]
        if bins and all(map(len, bins)):
            found[line] = np.array([np.sort(x)[-max(1, round(TOP * len(x))) :].mean() for x in bins])
    title = "The largest tenth of D_t by position"
    return _by_position("largest_by_position", title, lines, found, "no dumped tokens of later updates", {})


def _by_position(
    name: str, title: str, lines: Sequence[Line], found: Mapping[Line, Values], without: str, facts: Mapping
) -> LinePanel | Missing:
    """A quantity in each bin of positions, with the threshold delta / w_t of each drawn run."""
    if not found:
        return Missing(title, without)
    traces = [Trace(line, BIN_CENTRES, values, marker_size=MARKER_SIZE) for line, values in found.items()]
    first: dict[tuple[float, float], Line] = {}  # each threshold once
    for line in found:
        if line.runs[0].thresholds:
            first.setdefault(line.runs[0].thresholds, line)
    x = np.linspace(0, 1, 33)
    traces += [Trace(line, x, delta / (1 - (1 - w_min) * x), "delta / w_t") for (delta, w_min), line in first.items()]
    facts = {**facts, "thresholds": bool(first), **_left_out(lines, found, without)}
    return LinePanel(name=name, title=title, facts=facts, traces=traces, log=True, over_positions=True)


PHASES = (
    "gen",
    "reward",
    "old_log_prob",
    "ref",
    "values",
    "adv",
    "update_critic",
    "update_actor",
    "dump_tokens",
    "update_weights",
    "save_checkpoint",
    "testing",
)
"""verl's timers in their order within a step; `dump_tokens` is ours, and a part of update_actor."""


def stacked_phases(lines: Sequence[Line]) -> PhasePanel | Missing:
    title = "Seconds per step, by phase"
    bars = {}
    for line in lines:
        runs = [phases(item.run) for item in line.runs]
        if any(runs):
            bars[line.label] = pd.DataFrame(runs, columns=[*PHASES, "rest"]).fillna(0.0).mean()
    if not bars:
        return Missing(title, "no run logged timing_s/step")
    return PhasePanel(name="phases", title=title, bars=pd.DataFrame(bars).T)


def phases(run: Run) -> dict[str, float]:
    """{phase: mean seconds per step}, with "rest" for what no timer covers; empty if the steps were not timed."""
    timed = [values for values in run.steps.values() if "timing_s/step" in values]
    if not timed:
        return {}
    mean = {name: fmean(values.get(f"timing_s/{name}", 0.0) for values in timed) for name in ("step", *PHASES)}
    mean["update_actor"] = max(0.0, mean["update_actor"] - mean["dump_tokens"])
    step = mean.pop("step")
    mean["rest"] = max(0.0, step - sum(seconds for name, seconds in mean.items() if name != "testing"))
    return mean


MEASURES = {
    "max_memory_allocated_gb": "Device memory, highest allocated",
    "max_memory_reserved_gb": "Device memory, highest reserved",
    "cpu_memory_used_gb": "Main memory in use",
}


def memory(lines: Sequence[Line]) -> list[LinePanel | Missing]:
    """A panel for each measure of memory that a run logged, for each of verl's workers."""
    keys = sorted({key for line in lines for item in line.runs for values in item.run.steps.values() for key in values})
    panels = []
    for key in keys:
        *who, measure = (part for part in key.split("/") if part != "perf")
        if measure in MEASURES and "perf" in key.split("/"):
            title = f"{MEASURES[measure]}, {' '.join(who) or 'trainer'} (GB)"
            name, without = "memory_" + "_".join((*who, measure)), f"{key} is not logged"
            panels.append(curve(name, title, lines, logged(key), without, caption="memory", facts={"key": key}))
    return panels or [Missing("Memory", "no run logged perf/max_memory_allocated_gb or the like")]
