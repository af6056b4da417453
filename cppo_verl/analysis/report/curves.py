"""Panels from what runs logged: one line per run, or a mean and its band for the seeds of one setting."""

import math
from collections.abc import Callable, Mapping, Sequence
from statistics import fmean

import numpy as np

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

Metric = Callable[[dict[str, float]], float | None]
"""Takes a step's logged metrics and returns the value to draw; None if the step has none."""


def logged(*names: str) -> Metric:
    """The first of these metrics that a step has."""
    return lambda values: next((values[name] for name in names if name in values), None)


def product(share: str, part: str) -> Metric:
    """The product of two shares; the second is a share of the first, and logged only where the first is not zero."""
    return lambda values: values[share] * values.get(part, 0.0) if share in values else None


def series(run: Run, metric: Metric) -> tuple[list[int], list[float]]:
    """The steps that have the metric, and its values."""
    points = {step: value for step, values in run.steps.items() if (value := metric(values)) is not None}
    return list(points), list(points.values())


def running_mean(values: Sequence[float], window: int) -> list[float]:
    """The mean of the last ``window`` values at each point."""
    return [fmean(values[max(0, i + 1 - window) : i + 1]) for i in range(len(values))]


def thinned(x: Sequence[float], *columns: Sequence[float], points: int = POINTS) -> list[np.ndarray]:
    """The same lines with at most about ``points`` points: the lowest and highest of the first column per stretch.

    Returns:
        x and the columns at the kept points; all points if there are no more.
    """
    arrays = [np.asarray(values, dtype=float) for values in (x, *columns)]
    if len(x) > points:
        parts = np.array_split(np.arange(len(x)), points // 2)
        extremes = {int(part[pick(arrays[1][part])]) for part in parts for pick in (np.argmin, np.argmax)}
        kept = sorted(extremes | {0, len(x) - 1})
        arrays = [array[kept] for array in arrays]
    return arrays


def trace(line: Line, x: Values, y: Values, marker: str = "", marker_size: float | None = None) -> Trace:
    return Trace(line.label, line.color, line.style, x, y, marker=marker, marker_size=marker_size)


def left_out(labels: Sequence[str], without: str) -> dict[str, object]:
    """Facts for a caption: the lines that are not drawn, and why."""
    return {"left_out": list(labels), "without": without}


def curve(
    name: str,
    title: str,
    lines: Sequence[Line],
    metric: Metric,
    *,
    without: str,
    caption: str = "",
    facts: Mapping[str, object] | None = None,
    log: bool = False,
    percent: bool = False,
) -> LinePanel | Missing:
    """A metric over the steps, smoothed by a running mean.

    Args:
        without: why a run may lack the metric.

    Returns:
        `Missing` if no run has it.
    """
    found = {line: [series(item.run, metric) for item in line.runs] for line in lines}
    complete = {line: parts for line, parts in found.items() if all(x for x, _ in parts)}
    if not complete:
        return Missing(title, without)
    window = max(WINDOW, max(len(x) for parts in complete.values() for x, _ in parts) // STRETCHES)
    several = any(len(parts) > 1 for parts in complete.values())
    faint = len(complete) <= 4 and not several
    traces, bands = [], []
    for line, parts in complete.items():
        if faint:
            each_x, each_y = thinned(*parts[0])
            traces.append(Trace("", line.color, "-", each_x, each_y, role="each step"))
        common, over_runs = _over_runs(parts, window)
        x, mean, low, high = thinned(common, *over_runs)
        traces.append(trace(line, x, mean, "o" if len(x) == 1 else ""))
        if len(parts) > 1:
            bands.append(Band(line.color, x, low, high))
    reading = {"window": window, "faint": faint, "several": several}
    missing = left_out([line.label for line in lines if line not in complete], without)
    return LinePanel(
        name=name,
        title=title,
        caption=caption,
        facts={**(facts or {}), **reading, **missing},
        traces=traces,
        bands=bands,
        log=log,
        percent=percent,
    )


def _over_runs(parts: Sequence[tuple[list[int], list[float]]], window: int) -> tuple[list[int], list[list[float]]]:
    """Mean, lowest and highest of the runs' smoothed values, at the steps that all of them have."""
    at = [dict(zip(x, running_mean(y, window), strict=True)) for x, y in parts]
    common = [step for step in parts[0][0] if all(step in values for values in at)]
    columns = [[values[step] for values in at] for step in common]
    return common, [[reduce(column) for column in columns] for reduce in (fmean, min, max)]


def validation(lines: Sequence[Line], benchmarks: Sequence[str], name: str, title: str) -> LinePanel | Missing:
    """The unweighted mean accuracy on ``benchmarks``; for one benchmark, with intervals over its problems."""
    found = {line: [_accuracy(item.run, benchmarks) for item in line.runs] for line in lines}
    complete = {line: curves for line, curves in found.items() if all(curves)}
    if not complete:
        return Missing(title, "no run validated on it")
    traces, bands, unread, notes = [], [], [], []
    for line, curves in complete.items():
        common = [step for step in curves[0] if all(step in values for values in curves)]
        x, mean = thinned(common, [fmean(values[step] for values in curves) for step in common])
        traces.append(trace(line, x, mean, "o" if len(x) <= 40 else "", 3))
        intervals: dict[int, Interval] = {}
        if len(curves) > 1:
            intervals = {step: interval_over_seeds([values[step] for values in curves]) for step in common}
        elif len(benchmarks) == 1:
            intervals, skipped = _intervals(line.runs[0], benchmarks[0], common)
            notes += skipped
            unread += [] if intervals else [line.label]
        if intervals:
            low, high = zip(*intervals.values(), strict=True)
            bands.append(Band(line.color, list(intervals), low, high))
    facts = {
        "over_problems": len(benchmarks) == 1
        and any(len(line.runs) == 1 and line.label not in unread for line in complete),
        "most_read": INTERVALS,
        "over_seeds": any(len(line.runs) > 1 for line in complete),
        "unread": unread,
    }
    missing = left_out([line.label for line in lines if line not in complete], "no validation")
    return LinePanel(
        name=name,
        title=title,
        caption="validation",
        facts={**facts, **missing},
        notes=notes,
        traces=traces,
        bands=bands,
        percent=True,
    )


def _accuracy(run: Run, benchmarks: Sequence[str]) -> dict[int, float]:
    return {
        step: fmean(values[name] for name in benchmarks)
        for step, values in run.accuracies().items()
        if all(name in values for name in benchmarks)
    }


def _intervals(item: ReportedRun, benchmark: str, steps: Sequence[int]) -> tuple[dict[int, Interval], list[str]]:
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
    title = "Mean D_t by position, later updates"
    names = [f"trust_region/later_updates/divergence/position_{b}" for b in range(POSITION_BINS)]
    found, from_dump = {}, []
    for line in lines:
        rows = []
        for item in line.runs:
            bins: Sequence[Values] = [series(item.run, logged(name))[1] for name in names]
            if not all(bins) and item.dumped and item.dumped.by_position:
                bins = item.dumped.by_position
                from_dump.append(line.label)
            if all(map(len, bins)):
                rows.append([float(np.mean(values, dtype=float)) for values in bins])
        if len(rows) == len(line.runs):
            found[line] = np.mean(rows, axis=0)
    facts = {"from_dump": list(dict.fromkeys(from_dump))}
    without = "neither logged nor dumped, as with one update per batch"
    return by_position("divergence_by_position", title, lines, found, without, facts)


def by_position(
    name: str,
    title: str,
    lines: Sequence[Line],
    found: Mapping[Line, Values],
    without: str,
    facts: Mapping[str, object] | None = None,
) -> LinePanel | Missing:
    """A quantity in each bin of positions, with the threshold delta / w_t of each drawn run."""
    if not found:
        return Missing(title, without)
    traces = [trace(line, BIN_CENTRES, values, "o") for line, values in found.items()]
    colors: dict[tuple[float, float], str] = {}  # each threshold once
    for line in found:
        if line.runs[0].thresholds:
            colors.setdefault(line.runs[0].thresholds, line.color)
    x = np.linspace(0, 1, 33)
    for (delta, w_min), color in colors.items():
        traces.append(Trace("", color, "--", x.tolist(), delta / (1 - (1 - w_min) * x), role="delta / w_t"))
    missing = left_out([line.label for line in lines if line not in found], without)
    return LinePanel(
        name=name,
        title=title,
        facts={**(facts or {}), "thresholds": bool(colors), **missing},
        traces=traces,
        log=True,
        over_positions=True,
    )


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
            bars[line.label] = {p: fmean(seconds.get(p, 0.0) for seconds in runs) for p in (*PHASES, "rest")}
    if not bars:
        return Missing(title, "no run logged timing_s/step")
    return PhasePanel(name="phases", title=title, bars=bars)


def phases(run: Run) -> dict[str, float]:
    """{phase: mean seconds per step}, with "rest" for what no timer covers; empty if the steps were not timed."""
    timed = [values for values in run.steps.values() if "timing_s/step" in values]
    if not timed:
        return {}
    total = {name: sum(values.get(f"timing_s/{name}", 0.0) for values in timed) for name in PHASES}
    total["update_actor"] = max(0.0, total["update_actor"] - total["dump_tokens"])
    step = sum(values["timing_s/step"] for values in timed)
    total["rest"] = max(0.0, step - sum(seconds for name, seconds in total.items() if name != "testing"))
    return {name: seconds / len(timed) for name, seconds in total.items()}


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
            panels.append(curve(name, title, lines, logged(key), without=without, caption="memory", facts={"key": key}))
    return panels or [Missing("Memory", "no run logged perf/max_memory_allocated_gb or the like")]
