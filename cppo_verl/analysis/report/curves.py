"""Figures of what runs logged: a line a run, or a line and its band for the seeds of one setting."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import NamedTuple

import numpy as np
from matplotlib.ticker import LogFormatterSciNotation, LogLocator, MaxNLocator, PercentFormatter

from cppo_verl.analysis.html.figures import SERIES, Figure, plain
from cppo_verl.artifacts.run_reader import Run, read_generations
from cppo_verl.core.metrics import POSITION_BINS
from cppo_verl.evaluation.statistics import interval_over_problems, interval_over_seeds

WINDOW = 10
"""Logged steps of the running mean, at least; of a long run one in `STRETCHES`."""
STRETCHES = 25
WIDTH = 4.7
"""Inches of a figure; three stand side by side."""
POINTS = 500
"""That a line is drawn with, at most."""
INTERVALS = 12
"""Validations of a run whose saved answers are read, at most: those of long answers are large."""
STYLES = ("-", (0, (5, 2)), (0, (1, 1.5)), (0, (5, 1.5, 1, 1.5)))
SHORT = 26
"""Characters of a name in a legend."""

Metric = Callable[[dict[str, float]], float | None]
"""A step's value from what was logged at it."""


class Absent(NamedTuple):
    """A figure that there is not."""

    title: str
    reason: str


@dataclass(frozen=True, eq=False)
class Line:
    """Runs that are drawn as one: a single run, or several that differ in their seeds alone."""

    name: str
    short: str
    """As a legend shows it."""
    runs: tuple[Run, ...]
    color: str
    style: object
    """matplotlib's; another one where the colours begin again."""

    @property
    def look(self) -> dict:
        return {"color": self.color, "linestyle": self.style, "linewidth": 1.5}


def lines(named: Sequence[tuple[str, Sequence[Run]]]) -> list[Line]:
    """Each with the colour that it keeps through all figures."""
    result, used = [], set()
    for number, (name, runs) in enumerate(named):
        short = name if len(name) <= SHORT else f"{name[: SHORT // 2]}…{name[-SHORT // 2 + 1 :]}"
        short = f" {short}" if short.startswith("_") else short  # matplotlib leaves those out of a legend
        short = short if short not in used else f"{short} #{number + 1}"
        used.add(short)
        style = STYLES[number // len(SERIES) % len(STYLES)]
        result.append(Line(name, short, tuple(runs), SERIES[number % len(SERIES)], style))
    return result


def logged(*names: str) -> Metric:
    """The first of these metrics that a step has."""
    return lambda values: next((values[name] for name in names if name in values), None)


def product(share: str, part: str) -> Metric:
    """Of two shares; the second is of the first, and logged only where there is any."""
    return lambda values: values[share] * values.get(part, 0.0) if share in values else None


def series(run: Run, metric: Metric) -> tuple[list[int], list[float]]:
    points = [(step, metric(values)) for step, values in run.steps.items()]
    points = [(step, value) for step, value in points if value is not None]
    return [step for step, _ in points], [value for _, value in points]


def running_mean(values: Sequence[float], window: int) -> list[float]:
    """Mean of the last ``window`` values at each point."""
    return [fmean(values[max(0, i + 1 - window) : i + 1]) for i in range(len(values))]


def thinned(x: Sequence[float], *columns: Sequence[float], points: int = POINTS) -> list[np.ndarray]:
    """The same line with no more than about ``points``: of each stretch, where the first column is lowest and highest.

    Returns:
        x and the columns at the kept points, which are all where there are no more.
    """
    arrays = [np.asarray(values, dtype=float) for values in (x, *columns)]
    if len(x) > points:
        parts = np.array_split(np.arange(len(x)), points // 2)
        kept = {part[pick(arrays[1][part])] for part in parts for pick in (np.argmin, np.argmax)}
        kept = sorted(kept | {0, len(x) - 1})
        arrays = [array[kept] for array in arrays]
    return arrays


def curve(
    name: str,
    title: str,
    caption: str,
    drawn: Sequence[Line],
    metric: Metric,
    *,
    without: str,
    log: bool = False,
    percent: bool = False,
) -> Figure | Absent:
    """A metric over the steps.

    Args:
        without: why a run may not have it, after "not logged by ...".

    Returns:
        Why there is no figure, if no run has the metric.
    """
    found = [(line, [series(run, metric) for run in line.runs]) for line in drawn]
    missing = [line.short for line, parts in found if not all(x for x, _ in parts)]
    found = [(line, parts) for line, parts in found if line.short not in missing]
    if not found:
        return Absent(title, without)
    figure = panel(name, title, caption, len(found))
    axes = figure.axes
    window = max(WINDOW, max(len(x) for _, parts in found for x, _ in parts) // STRETCHES)
    faint = len(found) <= 4 and all(len(line.runs) == 1 for line, _ in found)
    for line, parts in found:
        if len(parts) == 1:
            ((x, y),) = parts
            if faint:
                axes.plot(*thinned(x, y), color=line.color, alpha=0.3, linewidth=0.8, gid="each step")
            mean = running_mean(y, window)
            axes.plot(*thinned(x, mean), label=plain(line.short), marker="o" if len(x) == 1 else "", **line.look)
        else:
            x, (mean, low, high) = _over_runs(parts, window)
            thin, mean, low, high = thinned(x, mean, low, high)
            axes.fill_between(thin, low, high, color=line.color, alpha=0.15, linewidth=0)
            axes.plot(thin, mean, label=plain(line.short), marker="o" if len(x) == 1 else "", **line.look)
    figure.caption += f" Line: mean of the last {window} steps" + ("; faint: each step." if faint else ".")
    if any(len(line.runs) > 1 for line, _ in found):
        figure.caption += " Band: from the lowest to the highest run of the same settings; line: their mean."
    return finished(figure, found, missing, without, log=log, percent=percent)


def _over_runs(parts: list[tuple[list[int], list[float]]], window: int) -> tuple[list[int], list[list[float]]]:
    """Mean, lowest and highest of the runs' smoothed values at the steps that all of them have."""
    at = [dict(zip(x, running_mean(y, window), strict=True)) for x, y in parts]
    common = [step for step in parts[0][0] if all(step in values for values in at)]
    columns = [[values[step] for values in at] for step in common]
    return common, [list(map(reduce, columns)) for reduce in (fmean, min, max)]


def validation(drawn: Sequence[Line], benchmarks: Sequence[str], name: str, title: str) -> Figure | Absent:
    """Unweighted mean of the accuracy on ``benchmarks``; of one benchmark, with intervals over its problems."""
    found, missing = [], []
    for line in drawn:
        curves = [_accuracy(run, benchmarks) for run in line.runs]
        if all(curves):
            found.append((line, curves))
        else:
            missing.append(line.short)
    if not found:
        return Absent(title, "no run validated on it")
    figure = panel(name, title, "", len(found))
    unread = []
    for line, curves in found:
        common = [step for step in curves[0] if all(step in values for values in curves)]
        y = [fmean(values[step] for values in curves) for step in common]
        x, mean = thinned(common, y)
        figure.axes.plot(
            x, mean, label=plain(line.short), marker="o" if len(x) <= 40 else "", markersize=3, **line.look
        )
        if len(curves) > 1:
            bands = {step: interval_over_seeds([values[step] for values in curves]) for step in common}
        elif len(benchmarks) == 1:
            bands = _intervals(line.runs[0], benchmarks[0], common)
            unread += [] if bands else [line.short]
        else:
            bands = {}
        if bands:
            low, high = ([getattr(band, end) for band in bands.values()] for end in ("low", "high"))
            figure.axes.fill_between(list(bands), low, high, color=line.color, alpha=0.15, linewidth=0)
    figure.caption = "Avg@n: share of right answers to the validation's problems."
    if len(benchmarks) == 1 and any(len(line.runs) == 1 and line.short not in unread for line, _ in found):
        figure.caption += (
            " Shaded: 95 % interval over problems, resampled from the saved answers"
            f" (of {INTERVALS} validations at most)."
        )
    if any(len(line.runs) > 1 for line, _ in found):
        figure.caption += " Mean over runs of the same settings; shaded: 95 % interval over them."
    if unread:
        figure.caption += f" Without saved answers (trainer.validation_data_dir): {', '.join(unread)}."
    return finished(figure, found, missing, "no validation", percent=True)


def _accuracy(run: Run, benchmarks: Sequence[str]) -> dict[int, float]:
    return {
        step: fmean(values[name] for name in benchmarks)
        for step, values in run.accuracies().items()
        if all(name in values for name in benchmarks)
    }


def _intervals(run: Run, benchmark: str, steps: Sequence[int]) -> dict[int, tuple]:
    """{step: interval over problems}, of some of the steps, from the first to the last."""
    if run.generations is None:
        return {}
    saved = [step for step in steps if (run.generations / f"{step}.jsonl").exists()]
    chosen = sorted({saved[round(i)] for i in np.linspace(0, len(saved) - 1, min(INTERVALS, len(saved)))})
    result = {}
    for step in chosen:
        answers = read_generations(run.generations, step)
        run.notes += [note for note in answers.notes if note not in run.notes]
        of_one = {name for name, _ in answers.correct} == {"all"}  # no sources beside them
        accuracy = answers.accuracy(None if of_one else benchmark)
        interval = interval_over_problems(list(accuracy.values()))
        if not math.isnan(interval.low):
            result[step] = interval
    return result


def drift_by_position(
    drawn: Sequence[Line], dumped: dict[int, Sequence[np.ndarray]], thresholds: dict[int, dict]
) -> Figure | Absent:
    """Mean D_t of the later updates by t / T, delta / w_t beside it.

    Args:
        dumped: {id of a run: its dumped tokens' D_t by position}, for runs that did not log it.
        thresholds: {id of a run: its delta and w_min}.
    """
    title = "Mean D_t by position, later updates"
    names = [f"trust_region/later_updates/divergence/position_{b}" for b in range(POSITION_BINS)]
    found, missing, from_dump = [], [], []
    for line in drawn:
        rows = []
        for run in line.runs:
            bins = [series(run, logged(name))[1] for name in names]
            if not all(bins) and dumped.get(id(run)):
                bins = dumped[id(run)]
                from_dump.append(line.short)
            if all(map(len, bins)):
                rows.append([float(np.mean(values, dtype=float)) for values in bins])
        if len(rows) == len(line.runs):
            found.append((line, rows))
        else:
            missing.append(line.short)
    without = "neither logged nor dumped, as with one update a batch"
    if not found:
        return Absent(title, without)
    caption = "Divergence between rollout and current policy along the response, over all steps of the run."
    figure = panel("divergence_by_position", title, caption, len(found))
    for line, rows in found:
        figure.axes.plot(BIN_CENTRES, np.mean(rows, axis=0), label=plain(line.short), marker="o", **line.look)
    if from_dump:
        figure.caption += f" From the dump's tokens, as the log has none: {', '.join(dict.fromkeys(from_dump))}."
    threshold_lines(figure, found, thresholds)
    return finished(figure, found, missing, without, log=True, positions=True)


BIN_CENTRES = [(b + 0.5) / POSITION_BINS for b in range(POSITION_BINS)]


def threshold_lines(figure: Figure, found: Sequence[tuple[Line, object]], thresholds: dict[int, dict]) -> None:
    """delta / w_t of the lines' runs, each value once."""
    seen = set()
    for line, _ in found:
        region = thresholds.get(id(line.runs[0]))
        if region and (region["delta"], region["w_min"]) not in seen:
            seen.add((region["delta"], region["w_min"]))
            x = np.linspace(0, 1, 33)
            y = region["delta"] / (1 - (1 - region["w_min"]) * x)
            figure.axes.plot(x, y, color=line.color, linestyle="--", linewidth=1, gid="delta / w_t")
    if seen:
        figure.caption += " Dashed: δ / w_t, the D_t from which on the token threshold masks."


def stacked_phases(drawn: Sequence[Line]) -> Figure | Absent:
    """Mean seconds a step of each phase."""
    title = "Seconds a step, by phase"
    found = [(line, np.mean([list(_ordered(run).values()) for run in line.runs], axis=0)) for line in drawn]
    found = [(line, values) for line, values in found if values.sum() > 0]
    if not found:
        return Absent(title, "no run logged timing_s/step")
    caption = (
        "Mean over the run's steps; what comes at some steps only, as testing and save_checkpoint, is spread over all. "
        "rest: of the step, in none of verl's timers."
    )
    figure = Figure("phases", title, caption, WIDTH, 1.7 + 0.3 * len(found))
    names = list(_ordered(drawn[0].runs[0]))
    left = np.zeros(len(found))
    for number, phase in enumerate(names):
        width = np.array([values[number] for _, values in found])
        if width.max() > 0:
            seen = width.max() > 0.005 * max(values.sum() for _, values in found)
            color, label = SERIES[number % len(SERIES)], phase if seen else None
            figure.axes.barh(range(len(found)), width, left=left, color=color, label=label, height=0.7)
        left += width
    figure.axes.set_axisbelow(True)
    figure.axes.set_yticks(range(len(found)), [plain(line.short) for line, _ in found])
    figure.axes.set_ylim(len(found) - 0.4, -0.6)
    figure.axes.set_xlabel("seconds")
    figure.axes.grid(visible=False, axis="y")
    figure.legend(loc="outside lower center", ncols=3)
    return figure


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
"""Of verl's steps, in their order; `dump_tokens` is ours, a part of update_actor."""


def _ordered(run: Run) -> dict[str, float]:
    return phases(run) or dict.fromkeys((*PHASES, "rest"), 0.0)


def phases(run: Run) -> dict[str, float]:
    """{phase: mean seconds a step}, with what verl's timers leave out as "rest"; empty if steps were not timed."""
    timed = [values for values in run.steps.values() if "timing_s/step" in values]
    if not timed:
        return {}
    total = {name: sum(values.get(f"timing_s/{name}", 0.0) for values in timed) for name in PHASES}
    total["update_actor"] = max(0.0, total["update_actor"] - total["dump_tokens"])
    step = sum(values["timing_s/step"] for values in timed)
    total["rest"] = max(0.0, step - sum(seconds for name, seconds in total.items() if name != "testing"))
    return {name: seconds / len(timed) for name, seconds in total.items()}


def memory(drawn: Sequence[Line]) -> list[Figure | Absent]:
    """A figure of each measure of memory that a run logged, of each of verl's workers."""
    keys = sorted({key for line in drawn for run in line.runs for values in run.steps.values() for key in values})
    keys = [key for key in keys if key.split("/")[-1] in MEASURES and "perf" in key.split("/")]
    figures = []
    for key in keys:
        *who, measure = (part for part in key.split("/") if part != "perf")
        title = f"{MEASURES[measure]}, {' '.join(who) or 'trainer'} (GB)"
        name = "memory_" + "_".join((*who, measure))
        figures.append(curve(name, title, f"verl's {key}.", drawn, logged(key), without=f"{key} is not logged"))
    return figures or [Absent("Memory", "no run logged perf/max_memory_allocated_gb or the like")]


MEASURES = {
    "max_memory_allocated_gb": "Device memory, highest allocated",
    "max_memory_reserved_gb": "Device memory, highest reserved",
    "cpu_memory_used_gb": "Main memory in use",
}


def panel(name: str, title: str, caption: str, entries: int) -> Figure:
    return Figure(name, title, caption, WIDTH, 2.9 + 0.2 * (math.ceil(entries / 2) if entries > 1 else 0))


def finished(
    figure: Figure,
    found: Sequence[tuple[Line, object]],
    missing: Sequence[str],
    without: str,
    log: bool = False,
    percent: bool = False,
    positions: bool = False,
) -> Figure:
    axes = figure.axes
    if log and any((np.asarray(drawn.get_ydata()) > 0).any() for drawn in axes.lines):
        axes.set_yscale("log", nonpositive="mask")
        axes.yaxis.set_minor_locator(LogLocator(subs=(2, 5)))
        axes.yaxis.set_minor_formatter(LogFormatterSciNotation(minor_thresholds=(2, 1)))
    if percent:
        axes.yaxis.set_major_formatter(PercentFormatter(1))
    if positions:
        axes.set(xlabel="t / T", xlim=(0, 1))
    else:
        axes.set_xlabel("step")
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, steps=[1, 2, 5, 10]))
    if len(found) > 1:
        narrow = max(len(line.short) for line, _ in found) <= 12
        figure.legend(loc="outside lower center", ncols=3 if narrow else 2)
    if missing:
        figure.caption += f" Left out, {without}: {', '.join(missing)}."
    return figure
