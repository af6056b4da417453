"""Panels of lines: one line per run, or a mean and its band for the seeds of one setting."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from cppo_verl.analysis.html.page import caption
from cppo_verl.analysis.positions import BIN_CENTRES
from cppo_verl.analysis.report.panels import LinePanel, Missing, PhasePanel
from cppo_verl.analysis.report.runs import DELTA_B, Line, ReportedRun
from cppo_verl.artifacts.run_reader import read_generations
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
TOKEN_BINS = 16
"""Bins of equal width over the tokens of the longest dumped response."""
NO_LATER_TOKENS = "no dumped tokens of later updates"
NONE = pd.Series(dtype=float)

Lines = Sequence[Line]
Frames = dict[Line, pd.DataFrame]
Drawn = LinePanel | Missing
Quantity = Callable[[ReportedRun], pd.Series]
"""Takes a run and returns the values to draw, by step; empty if the run has none."""


def logged(*names: str) -> Quantity:
    """The first of these metrics that a step has."""
    return lambda item: item.log.reindex(columns=names).bfill(axis=1).iloc[:, 0].dropna()


def product(share: str, part: str) -> Quantity:
    """The product of two shares; the second is a share of the first, and logged only where the first is not zero."""
    return lambda item: item.log.reindex(columns=[share, part]).fillna({part: 0.0}).prod(axis=1, skipna=False).dropna()


SHARE = "trust_region/masked_share"
MASKED = logged(SHARE, "actor/pg_clipfrac")
STEP_SECONDS = logged("timing_s/step", "perf/time_per_step")


def effective_budget(item: ReportedRun) -> pd.Series:
    """The effective budget at the steps that have one; it is logged as zero if there is no budget."""
    return logged(DELTA_B)(item).loc[lambda values: values > 0]


def dumped(name: str) -> Quantity:
    """A quantity of `DumpSummary`, at the steps that were dumped."""
    return lambda item: getattr(item.dumped, name, NONE)


def relative_error(item: ReportedRun) -> pd.Series:
    """The relative log-probability error at every step; of an older run, at the steps that were dumped."""
    of_steps = logged("trust_region/first_update/relative_log_prob_error")(item)
    return of_steps if len(of_steps) else dumped("relative_error")(item)


def thinned(lines: pd.DataFrame) -> pd.DataFrame:
    """The same lines with at most about `POINTS` points: the lowest and highest of the first column per stretch."""
    if len(lines) <= POINTS:
        return lines
    first = lines.iloc[:, 0].to_numpy()
    parts = np.array_split(np.arange(len(lines)), POINTS // 2)
    extremes = {int(part[pick(first[part])]) for part in parts for pick in (np.argmin, np.argmax)}
    return lines.iloc[sorted(extremes | {0, len(lines) - 1})]


def _complete(lines: Lines, quantity: Quantity) -> dict[Line, list[pd.Series]]:
    """{line: the quantity by step in each of its runs}, of the lines whose runs all have it."""
    found = {line: [quantity(item) for item in line.runs] for line in lines}
    return {line: parts for line, parts in found.items() if all(map(len, parts))}


def _over_runs(parts: Sequence[pd.Series]) -> pd.DataFrame:
    """The mean of the runs' values at the steps that all of them have; of several runs the lowest and highest too."""
    common = pd.concat(parts, axis=1, join="inner")
    frame = pd.DataFrame({"mean": common.mean(axis=1)})
    return frame.assign(low=common.min(axis=1), high=common.max(axis=1)) if len(parts) > 1 else frame


def _panel(
    name: str, title: str, lines: Lines, drawn: Frames, without: str, facts: dict, text: str = "", **kwargs: Any
) -> Drawn:
    """A panel of the ``lines`` that are ``drawn``; the caption names the others and what they are ``without``.

    Args:
        facts: values for the caption, which is ``text`` in ``templates/captions.txt``, by default of the panel's name.
    """
    if not drawn:
        return Missing(title, without)
    facts = {**facts, "left_out": [line.label for line in lines if line not in drawn], "without": without}
    return LinePanel(name=name, title=title, lines=drawn, text=caption(text or name, **facts), **kwargs)


def curve(
    name: str, title: str, lines: Lines, quantity: Quantity | str, without: str = "", smooth: bool = True, **kwargs: Any
) -> Drawn:
    """A quantity over the steps.

    Args:
        quantity: or the name of a metric.
        without: why a run may lack it; by default that the metric is not logged.
        smooth: whether to draw its running mean.
        kwargs: further arguments of `_panel`.

    Returns:
        `Missing` if no run has it.
    """
    facts: dict = {}
    if isinstance(quantity, str):
        facts["metric"] = quantity
        quantity, without = logged(quantity), without or f"{quantity} is not logged"
    complete, window, faint = _complete(lines, quantity), 1, False
    if smooth:
        window = max([WINDOW, *(len(part) // STRETCHES for parts in complete.values() for part in parts)])
        several = any(len(parts) > 1 for parts in complete.values())
        faint = len(complete) <= 4 and not several
        facts |= {"window": window, "faint": faint, "several": several}
    drawn = {}
    for line, parts in complete.items():
        frame = _over_runs([part.rolling(window, min_periods=1).mean() for part in parts])
        drawn[line] = thinned(pd.DataFrame({"each": parts[0], **frame}) if faint else frame)
    return _panel(name, title, lines, drawn, without, facts, **kwargs)


def validation(lines: Lines, benchmarks: Sequence[str], name: str, title: str, notes: list[str]) -> Drawn:
    """The unweighted mean accuracy on ``benchmarks``; for one benchmark, with intervals over its problems.

    Adds to ``notes`` what was skipped of the saved answers.
    """
    complete = _complete(lines, lambda item: item.accuracies.reindex(columns=benchmarks).dropna().mean(axis=1))
    drawn, over_problems, unread = {}, False, []
    for line, parts in complete.items():
        common = pd.concat(parts, axis=1, join="inner")
        intervals: dict[int, Interval] = {}
        if len(parts) > 1:
            intervals = {step: interval_over_seeds(values) for step, values in common.T.items()}
        elif len(benchmarks) == 1:
            intervals = _intervals(line.runs[0], benchmarks[0], common.index, notes)
            over_problems |= bool(intervals)
            unread += [] if intervals else [line.label]
        bands = pd.DataFrame.from_dict(intervals, orient="index", columns=["low", "high"], dtype=float)
        drawn[line] = common.mean(axis=1).to_frame("mean").join(bands)
    over_seeds = any(len(parts) > 1 for parts in complete.values())
    facts = {"over_problems": over_problems, "most_read": INTERVALS, "over_seeds": over_seeds, "unread": unread}
    kwargs: dict = {"text": "validation", "percent": True, "points": 40}
    return _panel(name, title, lines, drawn, "no validation" if drawn else "no run validated on it", facts, **kwargs)


def _intervals(item: ReportedRun, benchmark: str, steps: pd.Index, notes: list[str]) -> dict[int, Interval]:
    """{step: interval over problems} of some of the steps, from the first to the last; notes what was skipped."""
    folder = item.run.generations
    if folder is None:
        return {}
    saved = [step for step in steps if (folder / f"{step}.jsonl").exists()]
    result = {}
    for step in sorted({saved[round(i)] for i in np.linspace(0, len(saved) - 1, min(INTERVALS, len(saved)))}):
        answers = read_generations(folder, step)
        notes += [f"{item.name}: {note}" for note in answers.notes]
        of_one = {name for name, _ in answers.correct} == {"all"}  # the dump does not say the data sources
        interval = interval_over_problems(list(answers.accuracy(None if of_one else benchmark).values()))
        if not math.isnan(interval.low):
            result[step] = interval
    return result


def drift_by_position(lines: Lines) -> Drawn:
    """Mean D_t of the later updates by t / T, from the log or else from the token dump, with delta / w_t beside it."""
    names = [f"trust_region/later_updates/divergence/position_{b}" for b in range(POSITION_BINS)]
    means, from_dump = {}, []
    for line in lines:
        parts = []
        for item in line.runs:
            part = item.log.reindex(columns=names).mean().set_axis(range(POSITION_BINS))
            if part.isna().any() and item.dumped and len(item.dumped.later):
                part = item.dumped.later.groupby("bin")["divergence"].mean()
                from_dump.append(line.label)
            parts.append(part)
        means[line] = pd.concat(parts, axis=1).mean(axis=1, skipna=False)
    without = "neither logged nor dumped, as with one update per batch"
    title, facts = "Mean D_t by position, later updates", {"from_dump": list(dict.fromkeys(from_dump))}
    return _by_position("divergence_by_position", title, means, without, facts)


def largest_by_position(lines: Lines) -> Drawn:
    """Mean of the largest tenth of D_t in each bin of positions."""
    means = {line: later.groupby("bin")["divergence"].agg(_mean_of_largest) for line, later in _later(lines).items()}
    title, without = "The largest tenth of D_t by position", NO_LATER_TOKENS
    return _by_position("largest_by_position", title, {line: means.get(line, NONE) for line in lines}, without, {})


def _by_position(name: str, title: str, values: Mapping[Line, pd.Series], without: str, facts: dict) -> Drawn:
    """A quantity by bin of positions, with the threshold delta / w_t of each drawn run; drawn are lines without NaN."""
    frames = {line: by_bin.reindex(range(POSITION_BINS)).to_frame("mean") for line, by_bin in values.items()}
    drawn = {line: frame.set_axis(BIN_CENTRES) for line, frame in frames.items() if frame.notna().all(axis=None)}
    first: dict[tuple[float, float], Line] = {}  # each threshold once
    for line in drawn:
        if line.runs[0].thresholds:
            first.setdefault(line.runs[0].thresholds, line)
    x = np.linspace(0, 1, 33)
    thresholds = {line: pd.Series(delta / (1 - (1 - w_min) * x), index=x) for (delta, w_min), line in first.items()}
    facts = {**facts, "thresholds": bool(thresholds)}
    kwargs: dict = {"thresholds": thresholds, "log": True, "x": "t / T", "points": POSITION_BINS}
    return _panel(name, title, list(values), drawn, without, facts, **kwargs)


def deviation_by_token(lines: Lines) -> list[Drawn]:
    """|pi - mu| of the later updates over the position t in tokens: the two statistics of the paper's Figure 2.

    A response's tokens in one bin of positions have a mean; drawn are the mean and the largest over the responses. A
    second panel has the mean of the largest tenth of the tokens.
    """
    means, largest = {}, {}
    for line, later in _later(lines).items():
        width = math.ceil(later["position"].max() / TOKEN_BINS)
        centre = (later["position"] - 1) // width * width + (width + 1) / 2
        of_response = later.groupby([centre, "response"])["difference"].mean().groupby(level=0)
        mean = of_response.mean()
        means[line] = pd.DataFrame({"mean": mean, "low": mean, "high": of_response.max()})
        largest[line] = later.groupby(centre)["difference"].agg(_mean_of_largest).to_frame("mean")
    kwargs: dict = {
        "without": NO_LATER_TOKENS,
        "facts": {"bins": TOKEN_BINS},
        "log": True,
        "x": "t",
        "points": TOKEN_BINS,
    }
    return [
        _panel("deviation_by_token", "|π − μ| by token", lines, means, **kwargs),
        _panel("largest_by_token", "The largest tenth of |π − μ| by token", lines, largest, **kwargs),
    ]


def _later(lines: Lines) -> Frames:
    """{line: the dumped tokens of its runs' later updates}, of the lines that have such."""
    found = {}
    for line in lines:
        dumps = [item.dumped.later for item in line.runs if item.dumped and len(item.dumped.later)]
        if dumps:
            # Responses of different runs have different numbers.
            numbered = (part.assign(response=part["response"] * len(dumps) + n) for n, part in enumerate(dumps))
            found[line] = pd.concat(numbered, ignore_index=True)
    return found


def _mean_of_largest(values: pd.Series) -> float:
    return values.nlargest(max(1, round(TOP * len(values)))).mean()


UPDATE_PHASES = ("update_critic", "update_actor", "dump_tokens", "update_weights")
PHASES = ["gen", "reward", "old_log_prob", "ref", "values", "adv", *UPDATE_PHASES, "save_checkpoint", "testing"]
"""verl's timers in their order within a step; `dump_tokens` is ours, and a part of update_actor."""


def stacked_phases(lines: Lines) -> PhasePanel | Missing:
    title = "Seconds per step, by phase"
    bars = {line.label: pd.DataFrame([phases(item) for item in line.runs]).mean() for line in lines}
    drawn = pd.DataFrame({label: seconds for label, seconds in bars.items() if len(seconds)}).T
    if drawn.empty:
        return Missing(title, "no run logged timing_s/step")
    return PhasePanel(name="phases", title=title, text=caption("phases"), bars=drawn)


def phases(item: ReportedRun) -> pd.Series:
    """Mean seconds per step of each phase, with "rest" for what no timer covers; empty if the steps were not timed."""
    seconds = item.log.reindex(columns=[f"timing_s/{name}" for name in ("step", *PHASES)])
    timed = seconds[seconds["timing_s/step"].notna()].set_axis(["step", *PHASES], axis=1)
    if timed.empty:
        return NONE
    mean = timed.fillna(0.0).mean()
    mean["update_actor"] = max(0.0, mean["update_actor"] - mean["dump_tokens"])
    mean["rest"] = max(0.0, mean["step"] - mean[PHASES].sum() + mean["testing"])
    return mean.drop("step")


MEASURES = {
    "max_memory_allocated_gb": "Device memory, highest allocated",
    "max_memory_reserved_gb": "Device memory, highest reserved",
    "cpu_memory_used_gb": "Main memory in use",
}


def memory(lines: Lines) -> list[Drawn]:
    """A panel for each measure of memory that a run logged, for each of verl's workers."""
    panels = []
    for key in sorted({key for line in lines for item in line.runs for key in item.log}):
        *who, measure = (part for part in key.split("/") if part != "perf")
        if measure in MEASURES and "perf" in key.split("/"):
            title = f"{MEASURES[measure]}, {' '.join(who) or 'trainer'} (GB)"
            name = "memory_" + "_".join((*who, measure))
            panels.append(curve(name, title, lines, key, text="memory"))
    return panels or [Missing("Memory", "no run logged perf/max_memory_allocated_gb or the like")]
