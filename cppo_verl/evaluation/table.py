"""Score many runs as the paper does, in one table."""

import argparse
import csv
import io
import math
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from statistics import fmean
from typing import TextIO

from cppo_verl.artifacts.run_reader import Run, labelled, read_generations, read_runs
from cppo_verl.evaluation import paper_results
from cppo_verl.evaluation.comparability import unequal
from cppo_verl.evaluation.settings import settings_of
from cppo_verl.evaluation.statistics import (
    COLLAPSE_SHARE,
    Interval,
    Selection,
    compare,
    interval_over_seeds,
    select,
)

NOT_RUN = "not run"
ALL = "all"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    runs = "a run's folder or metrics file, or a folder of runs"
    parser.add_argument("runs", nargs="*", metavar="[LABEL=]RUN", help=runs)
    parser.add_argument("--benchmarks", help="data sources, comma-separated; default: all that the runs validated on")
    parser.add_argument("--t-stop", type=int, help="last step that counts; default: each run's total_training_steps")
    models = [*paper_results.MODELS, ALL]
    paper = "the paper's rows of this model beside the runs; all: Table 1, a run in the column of its recipe's scale"
    parser.add_argument("--paper", choices=models, help=paper)
    settings = "the runs' settings instead of their scores, beside those that the paper prints of the model of --paper"
    parser.add_argument("--settings", action="store_true", help=settings)
    collapse = (
        "a run has collapsed that ends with two validations or more below this share of its best, all of them up to "
        "t-stop; 0: never (default: %(default)s)"
    )
    parser.add_argument("--collapse-share", type=float, default=COLLAPSE_SHARE, help=collapse)
    parser.add_argument("--compare", nargs=2, metavar=("A", "B"), help="two labels, compared on the same problems")
    parser.add_argument("--format", choices=sorted(FORMATS), default="markdown")


def run(args: argparse.Namespace) -> int:
    """Print the table, and on stderr what was skipped and what to be wary of; return 1 if there is nothing to print."""
    if not 0 <= args.collapse_share <= 1:
        print(f"--collapse-share={args.collapse_share} is no share: give a number from 0 to 1", file=sys.stderr)
        return 1
    runs = []
    for text in args.runs:
        try:
            runs += read_runs(*labelled(text))
        except FileNotFoundError as error:
            print(f"skipped: {error}", file=sys.stderr)
    for item in runs:
        for note in item.notes:
            print(f"{item.path}: {note}", file=sys.stderr)
    if args.settings:
        if args.runs and not runs:
            print("no run to read the settings of", file=sys.stderr)
            return 1
        models = paper_results.MODELS if args.paper == ALL else [args.paper] if args.paper else []
        print(FORMATS[args.format](*settings_of(runs, models)))
        return 0
    if args.paper == ALL:
        return matrix(runs, args)
    benchmarks = args.benchmarks.split(",") if args.benchmarks else _benchmarks(runs, args.paper)
    groups = score(runs, benchmarks, args.t_stop, args.collapse_share)
    if not groups and not args.paper:
        print(f"no run has a validation on {', '.join(benchmarks) or 'anything'}", file=sys.stderr)
        return 1
    beside = sys.stdout if args.format == "markdown" else sys.stderr  # other programs read the other formats
    for line in unequal([item for scored in groups.values() for item, _ in scored]):
        print(line, file=beside)
    print(FORMATS[args.format](*rows_of(groups, benchmarks, args.paper)))
    for warning in warnings(groups):
        print(warning, file=sys.stderr)
    if args.compare:
        return compare_labels(groups, benchmarks, beside, *args.compare)
    return 0


Scored = list[tuple[Run, Selection]]


def score(
    runs: Sequence[Run], benchmarks: Sequence[str], t_stop: int | None, collapse_share: float
) -> dict[str, Scored]:
    """Return {label: its runs with their scores}; a run without a validation on all benchmarks is named and skipped."""
    groups = defaultdict(list)
    for item in runs:
        last = item.t_stop if t_stop is None else t_stop
        if benchmarks and (selection := select(item.accuracies(), benchmarks, last, collapse_share)):
            groups[item.label].append((item, selection))
        else:
            has = ", ".join(_benchmarks([item], None)) or "none"
            steps = "" if last is None else f" up to {last}"
            skipped = f"left out, no step{steps} validated on {', '.join(benchmarks)} (it has {has})"
            print(f"{item.path}: {skipped}", file=sys.stderr)
    return dict(groups)


def rows_of(
    groups: dict[str, Scored], benchmarks: Sequence[str], model: str | None
) -> tuple[list[str], list[list[str]]]:
    """Return header and rows: one method per row, in per cent, with an interval if there are several runs.

    A method whose runs have all collapsed has no scores, as in the paper's Table 1.
    """
    header = ["method", "runs", *benchmarks, "mean", "step", "last", "smoothed"]
    printed = paper_results.TABLE[model] if model else {}
    if model:
        header += [f"paper {name}" for name in (*paper_results.BENCHMARKS, "mean")]
    rows = []
    for label in [*printed, *(label for label in groups if label not in printed)]:
        scored = groups.get(label, [])
        cells = [str(len(scored)), *scores(scored, benchmarks)]
        if scored and all(s.collapsed is not None for _, s in scored):
            cells += ["/".join(str(s.collapsed) for _, s in scored), percent(fmean(s.last for _, s in scored)), ""]
        elif scored:
            cells += ["/".join(str(s.step) for _, s in scored)]
            cells += [percent(fmean(s.last for _, s in scored)), percent(fmean(s.smoothed for _, s in scored))]
        else:
            cells += ["", "", ""]
        rows.append([label, *cells, *(as_printed(printed, label) if model else ())])
    return header, rows


def scores(scored: Scored, benchmarks: Sequence[str]) -> list[str]:
    """The cells of a method's benchmarks and their mean."""
    if not scored:
        return [NOT_RUN] * (len(benchmarks) + 1)
    if all(s.collapsed is not None for _, s in scored):
        return ["collapse"] * (len(benchmarks) + 1)
    means = [s.mean for _, s in scored]
    components = [percent(fmean(s.components[name] for _, s in scored)) for name in benchmarks]
    return [*components, percent(fmean(means), interval_over_seeds(means))]


def as_printed(rows: Mapping[str, tuple[float, ...] | None], label: str) -> list[str]:
    """The paper's cells of a method, empty where it has no such row."""
    values = rows.get(label, ())
    return ["collapse"] * 4 if values is paper_results.COLLAPSE else [f"{v:.2f}" for v in values] or [""] * 4


def matrix(runs: Sequence[Run], args: argparse.Namespace) -> int:
    """Print Table 1: a row per method, and per model the runs' benchmarks and mean, and the paper's mean.

    A run belongs to the model that its recipe's scale names; another run is named and left out.
    """
    if args.compare:
        print(f"--compare needs the runs of one model: --paper {' or '.join(paper_results.MODELS)}", file=sys.stderr)
        return 1
    for item in runs:
        if item.scale not in paper_results.MODELS:
            print(f"{item.path}: left out, its recipe's scale is {item.scale}, no model of Table 1", file=sys.stderr)
    benchmarks = args.benchmarks.split(",") if args.benchmarks else list(paper_results.BENCHMARKS)
    by_model = {}
    for model in paper_results.MODELS:
        of_model = [replace(item, label=_without_scale(item)) for item in runs if item.scale == model]
        groups = by_model[model] = score(of_model, benchmarks, args.t_stop, args.collapse_share)
        for line in unequal([item for scored in groups.values() for item, _ in scored]):
            print(f"{model}: {line}", file=sys.stdout if args.format == "markdown" else sys.stderr)
        for warning in warnings(groups):
            print(f"{model}: {warning}", file=sys.stderr)
    header = ["method", *(f"{m} {x}" for m in by_model for x in (*benchmarks, "mean", "paper mean"))]
    printed = paper_results.TABLE[paper_results.MODELS[0]]
    rows = []
    for label in dict.fromkeys([*printed, *(label for groups in by_model.values() for label in groups)]):
        cells = [label]
        for model, groups in by_model.items():
            cells += [*scores(groups.get(label, []), benchmarks), as_printed(paper_results.TABLE[model], label)[-1]]
        rows.append(cells)
    print(FORMATS[args.format](header, rows))
    return 0


def _without_scale(item: Run) -> str:
    """A run's label without the model, which a sweep over models puts into it."""
    return ",".join(part for part in item.label.split(",") if part != f"scale={item.scale}") or item.label


def warnings(groups: dict[str, Scored]) -> list[str]:
    """Return one line per method whose best score or interval could mislead."""
    lines = []
    for label, scored in groups.items():
        gap = fmean(s.mean - s.last for _, s in scored)
        if gap > 0.005:
            candidates = max(s.candidates for _, s in scored)
            lines.append(
                f"{label}: the best of {candidates} validations is {100 * gap:.1f} points above the last one; a best "
                "of a noisy curve is inflated: compare the columns last and smoothed"
            )
        collapsed = [str(s.collapsed) for _, s in scored if s.collapsed is not None]
        if 0 < len(collapsed) < len(scored):
            lines.append(
                f"{label}: {len(collapsed)} of its {len(scored)} runs collapsed (step {', '.join(collapsed)}); "
                "their best scores count in the mean"
            )
        seeds = [item.seed for item, _ in scored]
        if len(seeds) > 1 and len(set(seeds)) < len(seeds):
            lines.append(f"{label}: its {len(seeds)} runs have data.seed {seeds}: the interval is not over seeds")
    return lines


def compare_labels(groups: dict[str, Scored], benchmarks: Sequence[str], file: TextIO, a: str, b: str) -> int:
    """Print the paired comparison per benchmark and over all to ``file``; return 1 for an unknown label."""
    for label in (a, b):
        if label not in groups:
            print(f"no scored run is labelled {label!r}: there are {', '.join(groups)}", file=sys.stderr)
            return 1
    first, second = (_accuracies(groups[label]) for label in (a, b))
    for name in (*benchmarks, None) if len(benchmarks) > 1 else (None,):
        one, other = ({k: v for k, v in x.items() if name is None or k[0] == name} for x in (first, second))
        found = "no problem that both have answers to (trainer.validation_data_dir keeps them)"
        if result := compare(one, other):
            points, low, high = (100 * x for x in (result.difference, *result.interval))
            found = f"{points:+.2f} points [{low:+.2f}, {high:+.2f}] over {result.problems} problems, "
            found += f"p = {result.p_value:.3f}"
        print(f"{a} - {b}, {name or 'all problems'}: {found}", file=file)
    return 0


def _accuracies(scored: Scored) -> dict[tuple[str, str], float]:
    """Return {(benchmark, problem): Avg@n at the selected step, mean over runs}."""
    values = defaultdict(list)
    for item, selection in scored:
        try:
            answers = read_generations(item.generations or item.path, selection.step)
        except (FileNotFoundError, NotADirectoryError) as error:
            print(f"{item.path}: {error}", file=sys.stderr)
            continue
        for note in answers.notes:
            print(f"{item.path}: {note}", file=sys.stderr)
        for problem, accuracy in answers.accuracy().items():
            values[problem].append(accuracy)
    return {problem: fmean(accuracies) for problem, accuracies in values.items()}


def _benchmarks(runs: Sequence[Run], model: str | None) -> list[str]:
    if model:
        return list(paper_results.BENCHMARKS)
    return sorted({name for item in runs for values in item.accuracies().values() for name in values})


def percent(value: float, interval: Interval | None = None) -> str:
    """Return an accuracy in [0, 1] as per cent, with its interval unless that is NaN."""
    if interval is None or math.isnan(interval.low):
        return f"{100 * value:.2f}"
    return f"{100 * value:.2f} [{100 * interval.low:.2f}, {100 * interval.high:.2f}]"


def markdown(header: list[str], rows: list[list[str]]) -> str:
    # A name may hold a line's end, which would end its row.
    header, *rows = [[" ".join(cell.split("\n")).replace("|", "\\|") for cell in row] for row in [header, *rows]]
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]

    def line(cells: list[str]) -> str:
        return "| " + " | ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)) + " |"

    return "\n".join([line(header), "|" + "|".join("-" * (w + 2) for w in widths) + "|", *map(line, rows)])


def comma_separated(header: list[str], rows: list[list[str]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([header, *rows])
    return text.getvalue().rstrip("\n")


def latex(header: list[str], rows: list[list[str]]) -> str:
    def line(cells: list[str]) -> str:
        special = {c: "\\" + c for c in "&%$#_{}"} | {"~": r"\textasciitilde{}", "\\": r"\textbackslash{}"}
        special["^"] = r"\textasciicircum{}"
        return " & ".join("".join(special.get(c, c) for c in cell) for cell in cells) + r" \\"

    head = [r"\begin{tabular}{l" + "r" * (len(header) - 1) + "}", r"\toprule", line(header), r"\midrule"]
    return "\n".join([*head, *map(line, rows), r"\bottomrule", r"\end{tabular}"])


FORMATS = {"markdown": markdown, "csv": comma_separated, "latex": latex}
