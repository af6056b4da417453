"""The runs of a report: their names, configs and token dumps, and which of them are drawn as one line."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import pandas as pd

from cppo_verl.analysis.html.figures import SERIES
from cppo_verl.analysis.report.config_differences import settings
from cppo_verl.analysis.report.dump_summary import DumpSummary, summarise
from cppo_verl.artifacts.run_reader import Run
from cppo_verl.artifacts.token_dump import read_tokens

STYLES = ("-", (0, (5, 2)), (0, (1, 1.5)), (0, (5, 1.5, 1, 1.5)))
"""Line styles of matplotlib; the next one is used when the colours begin again."""
LEGEND_LENGTH = 26
"""Most characters of a name in a legend."""
NO_DUMP = "no token dump; trust_region.dump.every=10 writes one"
SEEDS = ("seed", "experiment_name")
"""Last parts of the keys in which runs of one setting may differ."""
LOSS = "actor_rollout_ref.actor.policy_loss"
OLD_DELTA_B, DELTA_B = "trust_region/delta_b", "trust_region/effective_delta_b"
"""The metric's name in older versions, and now."""


@dataclass(frozen=True, eq=False)
class ReportedRun:
    """A run with what a report needs of its files."""

    run: Run
    name: str
    """Unique in the report."""
    settings: dict[str, str]
    """{key: value} of its config; empty without a readable one."""
    dumped: DumpSummary | None
    notes: Sequence[str]
    """What was skipped of this run."""

    @cached_property
    def log(self) -> pd.DataFrame:
        """The logged metrics [steps, metrics]; NaN where a step lacks one."""
        return _frame(self.run.steps)

    @cached_property
    def accuracies(self) -> pd.DataFrame:
        """Avg@n [steps, benchmarks] of the validations."""
        return _frame(self.run.accuracies())

    @property
    def has_two_constraints(self) -> bool:
        """Whether its loss is CPPO's: TRM and prefix ratios reject tokens by other rules, under the same metrics."""
        return self.settings.get(f"{LOSS}.loss_mode", "cppo") == "cppo"

    @property
    def thresholds(self) -> tuple[float, float] | None:
        """delta and w_min; None if its loss has none, delta bounds nothing, or the config is not readable."""
        values = [self.settings.get(f"{LOSS}.{key}", "") for key in ("delta", "w_min")]
        try:
            delta, w_min = map(float, values)
        except ValueError:
            return None
        return (delta, w_min) if self.settings.get(f"{LOSS}.loss_mode") == "cppo" and math.isfinite(delta) else None


@dataclass(frozen=True, eq=False)
class Line:
    """Runs that are drawn as one line: a single run, or several that differ only in their seeds."""

    label: str
    """Its name in legends, shortened."""
    runs: Sequence[ReportedRun]
    color: str
    style: object


def _frame(by_step: dict[int, dict[str, float]]) -> pd.DataFrame:
    return pd.DataFrame(list(by_step.values()), index=list(by_step), dtype=float)


def shown(text: str) -> str:
    """Text from data as a page and a picture can hold it; a file's name may contain anything."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)


def reported(runs: Sequence[Run]) -> list[ReportedRun]:
    """Read configs and dumps, one run after the other: all dumps at once could exceed the memory."""
    return [_reported(run, shown(name)) for run, name in zip(runs, unique_names(runs), strict=True)]


def _reported(run: Run, name: str) -> ReportedRun:
    notes, dumped = list(run.notes), None
    logged = set().union(*run.steps.values())
    if OLD_DELTA_B in logged and DELTA_B not in logged:
        notes.append(
            f"an older version logged this run, with {OLD_DELTA_B} in the place of {DELTA_B}: the figure and the "
            "summary of δ_b lack it"
        )
    if run.path.is_dir():
        try:
            dump = read_tokens(run.path)
            notes += dump.notes
            last = max(run.steps)
            if later := sorted({response.step for response in dump.responses if response.step > last}):
                dump.responses = [response for response in dump.responses if response.step <= last]
                notes.append(
                    f"tokens dumped at step {', '.join(map(str, later))} are left out: the metrics end at step {last}; "
                    "the step still runs, or an attempt that was given up has left them"
                )
            dumped = summarise(dump) if dump.responses else None
        except FileNotFoundError:
            pass
    if dumped is None:
        notes.append(NO_DUMP)
    return ReportedRun(run, name, settings(run), dumped, notes)


def unique_names(runs: Sequence[Run]) -> list[str]:
    """Labels; where several runs share one, with the name of their folder, or its path if that is not enough."""
    folders = [(run.path if run.path.is_dir() else run.path.parent).resolve().name for run in runs]
    choices = [
        (x.label, f"{x.label} ({folder})", f"{x.label} ({x.path})") for x, folder in zip(runs, folders, strict=True)
    ]
    counts = [Counter(names) for names in zip(*choices, strict=True)]
    return [
        next((name for name, count in zip(names, counts, strict=True) if count[name] == 1), names[-1])
        for names in choices
    ]


def lines(runs: Sequence[ReportedRun]) -> list[Line]:
    """One line per run, or per group of runs with one label that differ only in their seeds."""
    groups: dict[object, list[ReportedRun]] = {}
    for item in runs:
        same = frozenset((key, x) for key, x in item.settings.items() if key.rpartition(".")[2] not in SEEDS)
        groups.setdefault((item.run.label, same) if item.settings else item.name, []).append(item)
    count = Counter(group[0].run.label for group in groups.values())
    names = []
    for group in groups.values():
        label = group[0].run.label
        name = shown(label) if count[label] == 1 else group[0].name
        names.append(name + (f" ({len(group)} runs)" if len(group) > 1 else ""))
    return [
        Line(label, group, SERIES[number % len(SERIES)], STYLES[number // len(SERIES) % len(STYLES)])
        for number, (label, group) in enumerate(zip(legend_labels(names), groups.values(), strict=True))
    ]


def legend_labels(names: Sequence[str]) -> list[str]:
    """The names, shortened and yet distinct."""
    labels: list[str] = []
    for number, name in enumerate(names, start=1):
        half = LEGEND_LENGTH // 2
        label = name if len(name) <= LEGEND_LENGTH else f"{name[:half]}…{name[-half + 1 :]}"
        label = f" {label}" if label.startswith("_") else label  # matplotlib hides labels that begin with _
        labels.append(f"{label} #{number}" if label in labels else label)
    return labels
