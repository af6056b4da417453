"""Makes the study's tables and pictures anew from its raw results.

    python -m studies.trust_regions.report

Rewrites the tables of the page between their markers, and the pictures beside it. What has not run is named there.
"""

import argparse
import re
from collections.abc import Callable, Iterable, Sequence
from itertools import product
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
from matplotlib import rc_context
from matplotlib.figure import Figure as Canvas

from cppo_verl.analysis.html.figures import SERIES, STYLE
from cppo_verl.evaluation.statistics import (
    Comparison,
    Interval,
    collapse,
    compare,
    interval_over_problems,
    interval_over_seeds,
)
from cppo_verl.evaluation.table import markdown
from studies.trust_regions import results
from studies.trust_regions.loop import POSITION_BINS
from studies.trust_regions.results import Cell, final_accuracy

HERE = Path(__file__).parent
PAGE = HERE.parents[1] / "docs" / "evidence.md"
HORIZONS, UPDATES, GRID = (16, 64, 192), (4, 16, 32), (1e-4, 3e-4, 1e-3)
CONDITIONS = tuple(product(HORIZONS, UPDATES))
NAMES = {
    "none": "no mask",
    "grpo": "GRPO",
    "cispo": "CISPO",
    "trm_avg": "TRM-Avg",
    "dppo": "DPPO",
    "cppo": "CPPO",
    "cppo_no_weights": "CPPO, no weights",
    "cppo_no_budget": "CPPO, no budget",
    "cppo_shuffled": "CPPO, shuffled weights",
}
COLOURS = dict(zip(NAMES, [SERIES[i] for i in (7, 4, 5, 2, 1, 0, 6, 3)] + ["#5f7f2f"], strict=True))
ARMS = {
    "share-0.15": "masked share 15 %",
    "share-paper": "the paper's thresholds",
    "bf16": "rollout in bfloat16",
    "stale": "rollout one batch old",
}
LARGE_ENOUGH = 0.02
"""The least difference of accuracies that the protocol calls one."""
ALPHA = 0.05
REACHED = 0.5
MISSING = "not run"


class Study(NamedTuple):
    grid: list[Cell]
    evaluation: list[Cell]
    trainer: list[Cell]

    @classmethod
    def load(cls, folder: Path) -> "Study":
        parts = ("grid", "evaluation", "trainer")
        return cls(*([results.read(file) for file in sorted((folder / part).glob("*.parquet"))] for part in parts))

    def find(self, method: str, horizon: int, updates: int, arm: str | None = None) -> Cell | None:
        """The evaluation of a method under a condition; the complete part if ``arm`` is None."""
        for cell in self.evaluation:
            settings = cell.about["settings"]
            what = cell.about["method"], settings["horizon"], settings["updates"], arm_of(cell)
            if what == (method, horizon, updates, arm):
                return cell
        return None


def arm_of(cell: Cell) -> str | None:
    settings = cell.about["settings"]
    if settings["rollout_dtype"] != results.MAIN_ARM["rollout"]:
        return "bf16"
    if settings["staleness"]:
        return "stale"
    share = cell.about["share"]
    return None if share == results.MAIN_ARM["share"] else f"share-{share}"


def masked_share(cell: Cell) -> float:
    """Share of all tokens that were trained on."""
    rows = cell.rows
    return float((rows["masked"] * rows["tokens"]).sum() / max(1, rows["tokens"].sum()))


def is_matched(cell: Cell) -> bool:
    """Whether the masked share came out within half to one and a half times the wanted one, if one was wanted."""
    share = cell.about["share"]
    if share == "paper" or cell.about["method"] == "none":
        return True
    return 0.5 * share <= masked_share(cell) <= 1.5 * share


def curves(cell: Cell) -> pd.DataFrame:
    """Accuracy, a row for each seed and a column for each step."""
    return cell.rows.pivot(index="seed", columns="step", values="accuracy")


def collapsed(cell: Cell) -> int:
    """Number of the cell's runs that collapsed."""
    return sum(collapse(curve.to_dict()) is not None for _, curve in curves(cell).iterrows())


def difference(one: Cell | None, other: Cell | None) -> Comparison | None:
    """Of the primary metrics, paired by seed."""
    if one is None or other is None:
        return None
    return compare(final_accuracy(one.rows).to_dict(), final_accuracy(other.rows).to_dict())


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's correction of a family of p-values."""
    adjusted = [0.0] * len(p_values)
    largest = 0.0
    for rank, index in enumerate(np.argsort(p_values)):
        largest = max(largest, min(1.0, p_values[index] * (len(p_values) - rank)))
        adjusted[index] = largest
    return adjusted


def wilson(count: int, total: int, z: float = 1.959964) -> Interval:
    """Wilson's 95 % interval of a rate."""
    rate, width = count / total, z**2 / total
    middle = (rate + width / 2) / (1 + width)
    half = z / (1 + width) * np.sqrt(rate * (1 - rate) / total + width / (4 * total))
    return Interval(max(0.0, float(middle - half)), min(1.0, float(middle + half)))


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    return markdown(list(header), [list(row) for row in rows])


def condition(horizon: int, updates: int) -> str:
    return f"T = {horizon}, {updates} updates"


def points(value: float) -> str:
    """A difference of accuracies in percentage points."""
    return f"{100 * value:+.1f}"


def family(study: Study, one: str, other: str) -> dict[tuple[int, int], tuple[Comparison, float]]:
    """{condition: (one method minus another, p after Holm's correction)} of the conditions that have run for both.

    The correction is that for all nine conditions from the first one on.
    """
    found = [difference(study.find(one, *c), study.find(other, *c)) for c in CONDITIONS]
    adjusted = holm([comparison.p_value if comparison else 1.0 for comparison in found])
    return {c: (comparison, p) for c, comparison, p in zip(CONDITIONS, found, adjusted, strict=True) if comparison}


def _bold_if_one(comparison: Comparison, p: float) -> str:
    """The difference with its interval, bold if it is what the protocol calls one."""
    shown = _with_interval(comparison)
    return f"**{shown}**" if p < ALPHA and abs(comparison.difference) >= LARGE_ENOUGH else shown


def primary(study: Study) -> str:
    """CPPO minus DPPO under the nine conditions, corrected as a family."""
    found = family(study, "cppo", "dppo")
    rows = []
    for c in CONDITIONS:
        cells = [study.find(method, *c) for method in ("cppo", "dppo")]
        if c not in found:
            rows.append([condition(*c), *[MISSING] * 5])
            continue
        counts = " / ".join(str(collapsed(cell)) for cell in cells)
        rows.append([condition(*c), *map(_score, cells), _bold_if_one(*found[c]), f"{found[c][1]:.3f}", counts])
    return table(["", NAMES["cppo"], NAMES["dppo"], "difference, 95 % interval", "p (Holm)", "collapsed"], rows)


def against(study: Study, others: Sequence[str]) -> str:
    """CPPO minus each of the others under the nine conditions; each other method is a family."""
    families = [family(study, "cppo", other) for other in others]
    return table(
        ["CPPO minus", *(NAMES[other] for other in others)],
        ([condition(*c), *(_bold_if_one(*f[c]) if c in f else MISSING for f in families)] for c in CONDITIONS),
    )


def all_methods(study: Study) -> str:
    """The primary metric of every method under every condition."""
    header = ["method", *(f"{t} / {u}" for t, u in CONDITIONS)]
    return table(header, ([NAMES[m], *(_score(study.find(m, *c)) for c in CONDITIONS)] for m in NAMES))


def _score(cell: Cell | None) -> str:
    if cell is None:
        return MISSING
    return f"{100 * final_accuracy(cell.rows).mean():.1f}" + ("" if is_matched(cell) else " *")


def secondary(study: Study) -> str:
    """The other metrics of every method, averaged over the conditions that have run."""
    rows = []
    for method in NAMES:
        cells = [cell for c in CONDITIONS if (cell := study.find(method, *c))]
        if not cells:
            rows.append([NAMES[method], *[MISSING] * 6])
            continue
        accuracy = [curves(cell) for cell in cells]
        best = np.mean([curve.max(axis=1).mean() for curve in accuracy])
        area = np.mean([curve.mean(axis=1).mean() for curve in accuracy])
        reached = np.concatenate([_first_reached(curve) for curve in accuracy])
        share, late = np.isfinite(reached).mean(), reached[np.isfinite(reached)]
        step = f"{np.median(late):.0f} ({share:.0%} of the runs)" if len(late) else "never"
        moved = np.mean([cell.rows["deviation"].mean() for cell in cells])
        masked = np.mean([masked_share(cell) for cell in cells])
        budget = np.mean([cell.rows["by_budget"].mean() for cell in cells])
        rows.append(
            [
                NAMES[method],
                f"{100 * best:.1f}",
                f"{100 * area:.1f}",
                step,
                f"{moved:.4f}",
                f"{masked:.1%}",
                f"{budget:.1%}",
            ]
        )
    header = [
        "method",
        "best of curve",
        "mean of curve",
        f"step at {REACHED:.0%}",
        "mean |pi - mu|",
        "masked",
        "by budget",
    ]
    return table(header, rows)


def _first_reached(curve: pd.DataFrame) -> np.ndarray:
    """The step from which the mean of five steps is at least `REACHED`, for each seed; infinite if there is none."""
    means = curve.T.rolling(5).mean().T
    hit = means >= REACHED
    return np.where(hit.any(axis=1), hit.to_numpy().argmax(axis=1) + 1.0, np.inf)


def rates(study: Study) -> str:
    """The learning rate that each method was given under each condition."""
    header = ["method", *(f"{t} / {u}" for t, u in CONDITIONS)]

    def rate(cell: Cell | None) -> str:
        return f"{cell.about['settings']['learning_rate']:g}" if cell else MISSING

    return table(header, ([NAMES[m], *(rate(study.find(m, *c)) for c in CONDITIONS)] for m in NAMES))


def thresholds(study: Study) -> str:
    """The thresholds that mask the wanted share under each condition."""
    rows = []
    for method, names in (("dppo", ["delta"]), ("cppo", ["delta", "delta_b"])):
        cells = [study.find(method, *c) for c in CONDITIONS]
        for name in names:
            values = (f"{cell.about['thresholds'][name]:g}" if cell else MISSING for cell in cells)
            rows.append([f"{NAMES[method]}, {name}", *values])
    return table(["", *(f"{t} / {u}" for t, u in CONDITIONS)], rows)


def collapses(study: Study) -> dict[str, dict[float, tuple[int, int]]]:
    """{method: {learning rate: (collapsed, runs)}} over grid and evaluation of the complete part."""
    counts: dict[str, dict[float, tuple[int, int]]] = {name: {} for name in NAMES}
    for cell in [*study.grid, *(c for c in study.evaluation if arm_of(c) is None)]:
        rate = cell.about["settings"]["learning_rate"]
        bad, runs = counts[cell.about["method"]].get(rate, (0, 0))
        counts[cell.about["method"]][rate] = bad + collapsed(cell), runs + cell.rows["seed"].nunique()
    return counts


def collapse_table(study: Study) -> str:
    rows = []
    for method, by_rate in collapses(study).items():
        row = [NAMES[method]]
        for rate in GRID:
            bad, runs = by_rate.get(rate, (0, 0))
            low, high = wilson(bad, runs) if runs else (0, 0)
            row.append(f"{bad} of {runs}, {low:.0%} to {high:.0%}" if runs else MISSING)
        rows.append(row)
    return table(["method", *(f"learning rate {rate:g}" for rate in GRID)], rows)


def arms(study: Study) -> str:
    """Each method minus DPPO in each arm at T = 64 with 16 updates; an arm is a family."""
    rows = []
    for arm, title in ARMS.items():
        cells = {method: cell for method in NAMES if (cell := study.find(method, 64, 16, arm))}
        found = {method: difference(cell, cells.get("dppo")) for method, cell in cells.items() if method != "dppo"}
        ran = {method: comparison for method, comparison in found.items() if comparison}
        adjusted = dict(zip(ran, holm([comparison.p_value for comparison in ran.values()]), strict=True))
        for method, cell in cells.items():
            shown = _bold_if_one(ran[method], adjusted[method]) if method in ran else ""
            counts = f"{collapsed(cell)} of {cell.rows['seed'].nunique()}"
            rows.append([title, NAMES[method], _score(cell), shown, f"{masked_share(cell):.2%}", counts])
    return table(
        ["arm", "method", "accuracy", "minus DPPO, 95 % interval", "masked", "collapsed"], rows or [[MISSING] * 6]
    )


def _with_interval(found: Comparison) -> str:
    return f"{points(found.difference)} [{points(found.interval.low)}, {points(found.interval.high)}]"


def contrasts(study: Study) -> str:
    """How CPPO minus DPPO depends on horizon and updates: paired by seed, averaged over the other axis."""
    rows = []
    axes: tuple[tuple[str, Callable, tuple], ...] = (
        (f"T = {HORIZONS[-1]} minus T = {HORIZONS[0]}", lambda end, other: (end, other), UPDATES),
        (f"{UPDATES[-1]} minus {UPDATES[0]} updates", lambda end, other: (other, end), HORIZONS),
    )
    for (title, at, others), (low, high) in zip(
        axes, ((HORIZONS[0], HORIZONS[-1]), (UPDATES[0], UPDATES[-1])), strict=True
    ):
        ends = [[_paired(study, *at(end, other)) for other in others] for end in (low, high)]
        if any(x is None for end in ends for x in end):
            rows.append([title, MISSING])
            continue
        values = np.mean(ends[1], 0) - np.mean(ends[0], 0)
        interval = interval_over_problems(values)
        rows.append([title, f"{points(values.mean())} [{points(interval.low)}, {points(interval.high)}]"])
    return table(["CPPO minus DPPO", "change of the difference, 95 % interval"], rows)


def _paired(study: Study, horizon: int, updates: int) -> np.ndarray | None:
    cells = [study.find(method, horizon, updates) for method in ("cppo", "dppo")]
    if None in cells:
        return None
    one, other = (final_accuracy(cell.rows) for cell in cells)
    return (one - other).to_numpy()


def instruments(study: Study) -> str:
    """The loop's runs beside those of verl's trainer, on the same seeds."""
    rows = []
    for cell in study.trainer:
        settings = cell.about["settings"]
        loop = study.find(cell.about["method"], settings["horizon"], settings["updates"])
        seeds = cell.rows["seed"].unique()
        same = loop._replace(rows=loop.rows[loop.rows["seed"].isin(seeds)]) if loop else None
        found = difference(cell, same)
        scores = [_score(same), _score(cell)]
        shares = [f"{masked_share(c):.1%}" if c else MISSING for c in (same, cell)]
        shown = _with_interval(found) if found else MISSING
        rows.append([NAMES[cell.about["method"]], str(len(seeds)), *scores, shown, *shares])
    header = ["method", "seeds", "loop", "trainer", "trainer minus loop, 95 % interval", "masked, loop", "trainer"]
    return table(header, rows or [[MISSING] * 7])


TABLES: dict[str, Callable[[Study], str]] = {
    "primary": primary,
    "contrasts": contrasts,
    "methods": all_methods,
    "secondary": secondary,
    "rates": rates,
    "thresholds": thresholds,
    "others": lambda study: against(study, ("none", "grpo", "cispo", "trm_avg")),
    "ablations": lambda study: against(study, ("cppo_no_weights", "cppo_no_budget", "cppo_shuffled")),
    "collapse": collapse_table,
    "arms": arms,
    "instruments": instruments,
}


def rewrite(page: str, study: Study) -> str:
    """The page with each ``<!-- table: NAME -->`` ... ``<!-- end -->`` filled anew.

    Raises:
        KeyError: there is no such table.
    """

    def filled(match: re.Match) -> str:
        return f"<!-- table: {match[1]} -->\n\n{TABLES[match[1]](study)}\n\n<!-- end -->"

    return re.sub(r"<!-- table: ([\w-]+) -->.*?<!-- end -->", filled, page, flags=re.DOTALL)


SHOWN = ("none", "grpo", "dppo", "cppo")


def horizons_run(study: Study) -> list[int]:
    """The horizons of which there is something to draw; all of them if there is nothing yet."""
    ran = {cell.about["settings"]["horizon"] for cell in study.evaluation if arm_of(cell) is None}
    return [horizon for horizon in HORIZONS if horizon in ran] or list(HORIZONS)


def draw_curves(study: Study) -> Canvas:
    """The mean over the seeds of five steps' accuracy, and its 95 % interval."""
    horizons = horizons_run(study)
    canvas = Canvas(figsize=(9, 0.8 + 2.1 * len(horizons)), layout="constrained")
    axes = canvas.subplots(len(horizons), len(UPDATES), sharex=True, sharey=True, squeeze=False)
    for (horizon, updates), ax in zip(product(horizons, UPDATES), axes.flat, strict=True):
        ax.set_title(condition(horizon, updates), fontsize=9)
        for method in SHOWN:
            if cell := study.find(method, horizon, updates):
                curve = curves(cell).T.rolling(5, min_periods=1).mean().T
                low, high = zip(*(interval_over_seeds(column) for _, column in curve.items()), strict=True)
                ax.plot(curve.columns, curve.mean(), color=COLOURS[method], label=NAMES[method])
                ax.fill_between(curve.columns, low, high, color=COLOURS[method], alpha=0.12, linewidth=0)
    for ax in axes[-1]:
        ax.set_xlabel("step (rollout batch)")
    for ax in axes[:, 0]:
        ax.set_ylabel("accuracy")
    handles, labels = axes.flat[0].get_legend_handles_labels()
    if handles:
        canvas.legend(handles, labels, loc="outside lower center", ncols=len(SHOWN))
    return canvas


def draw_effect(study: Study) -> Canvas:
    horizons = horizons_run(study)
    canvas = Canvas(figsize=(6, 3.6), layout="constrained")
    ax = canvas.subplots()
    for i, updates in enumerate(UPDATES):
        x, y, low, high = [], [], [], []
        for h, horizon in enumerate(horizons):
            if found := difference(study.find("cppo", horizon, updates), study.find("dppo", horizon, updates)):
                x.append(h + 0.12 * (i - 1))
                y.append(100 * found.difference)
                low.append(100 * (found.difference - found.interval.low))
                high.append(100 * (found.interval.high - found.difference))
        ax.errorbar(x, y, [low, high], fmt="o", color=SERIES[i], label=f"{updates} updates", capsize=3)
    ax.axhline(0, color=SERIES[7], linewidth=1)
    ax.set_xticks(range(len(horizons)), [str(horizon) for horizon in horizons])
    ax.set_xlim(-0.5, len(horizons) - 0.5)
    ax.set_xlabel("length of a response, tokens")
    ax.set_ylabel("CPPO minus DPPO, points")
    ax.set_title("Difference in accuracy at the same masked share, 95 % intervals over seeds")
    ax.legend()
    return canvas


def draw_collapse(study: Study) -> Canvas:
    canvas = Canvas(figsize=(7, 3.6), layout="constrained")
    ax = canvas.subplots()
    for i, rate in enumerate(GRID):
        for m, (_, by_rate) in enumerate(collapses(study).items()):
            bad, runs = by_rate.get(rate, (0, 0))
            if runs:
                low, high = wilson(bad, runs)
                error = [[100 * (bad / runs - low)], [100 * (high - bad / runs)]]
                x = m + 0.2 * (i - 1)
                ax.errorbar([x], [100 * bad / runs], error, fmt="o", color=SERIES[i], capsize=3)
        ax.plot([], [], "o", color=SERIES[i], label=f"learning rate {rate:g}")
    ax.set_xticks(range(len(NAMES)), [name.replace(", ", ",\n") for name in NAMES.values()], rotation=30, ha="right")
    ax.set_ylabel("collapsed runs, %")
    ax.set_title("Runs that collapsed, all conditions, 95 % intervals")
    ax.legend()
    return canvas


def draw_masked(study: Study) -> Canvas:
    horizons = horizons_run(study)
    canvas = Canvas(figsize=(9, 3.4), layout="constrained")
    axes = canvas.subplots(1, len(horizons), sharey=True, squeeze=False)[0]
    for ax, horizon in zip(axes, horizons, strict=True):
        ax.set_title(condition(horizon, 16), fontsize=9)
        for method in [name for name in NAMES if name != "none"]:
            if cell := study.find(method, horizon, 16):
                shares = [100 * cell.rows[f"masked_at_{b}"].mean() for b in range(POSITION_BINS)]
                centres = [horizon * (b + 0.5) / POSITION_BINS for b in range(POSITION_BINS)]
                ax.plot(centres, shares, marker=".", color=COLOURS[method], label=NAMES[method])
        ax.set_xlabel("position in the response")
    axes[0].set_ylabel("masked tokens, %")
    handles, labels = axes[0].get_legend_handles_labels()
    if handles:
        canvas.legend(handles, labels, loc="outside lower center", ncols=4)
    return canvas


PICTURES = {"curves": draw_curves, "effect": draw_effect, "collapse": draw_collapse, "masked": draw_masked}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--results", type=Path, default=HERE / "results", help="default: %(default)s")
    parser.add_argument("--page", type=Path, default=PAGE, help="default: %(default)s")
    args = parser.parse_args(argv)
    study = Study.load(args.results)
    args.page.write_text(rewrite(args.page.read_text(), study))
    folder = args.page.parent / "pictures"
    folder.mkdir(exist_ok=True)
    for name, draw in PICTURES.items():
        with rc_context(STYLE):
            draw(study).savefig(folder / f"evidence_{name}.png", dpi=150)
    counts = ", ".join(f"{len(part)} of the {name}" for name, part in study._asdict().items())
    print(f"{args.page}: cells {counts}")


if __name__ == "__main__":
    main()
