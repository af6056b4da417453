"""The tables and texts of `calibrate`, for its page and for the terminal."""

from itertools import chain, zip_longest

import numpy as np

from cppo_verl.analysis.calibrate.results import Results, overrides
from cppo_verl.analysis.calibrate.thresholds import Counts
from cppo_verl.analysis.html.page import caption
from cppo_verl.analysis.text import MISSING, Cell, Table, counted, listed, number, percent
from cppo_verl.evaluation.statistics import Interval

QUANTILES = (0.5, 0.9, 0.95, 0.99, 0.999, 1.0)


def page_values(method: str | None, results: Results, notes: list[str]) -> dict:
    """What the page and the terminal show, but for the figures.

    Args:
        method: the method asked for; None for the run's own.
    """
    sample = results.sample
    numbers = np.unique(sample.steps).tolist()
    return {
        "results": results,
        "overrides": overrides(method, results),
        "summary": (
            f"{counted(len(sample.responses), 'response')} to {counted(len(set(sample.prompts)), 'prompt')}, "
            f"{results.counts.tokens.sum():,.0f} tokens, of step{'s' * (len(numbers) > 1)} {listed(numbers)}; "
            f"D_t is {sample.rule.divergence}, the budget {sample.rule.budget}"
        ),
        "promise": caption("promise", results=results),
        "warnings": [caption(name, results=results) for name in results.warnings],
        "tables": [
            _proposal(results),
            _alternatives(results),
            _by_group("by_update", "By update of a batch, as proposed", "update", results, sample.updates),
            _by_group("by_step", "By step, as proposed", "step", results, sample.steps),
            _drift(results),
        ],
        "notes": notes,
    }


def _proposal(results: Results) -> Table:
    header = ["", "delta", "delta_b", "masked", "of it by the budget", "violating either"]
    rows: list[list[Cell]] = [
        [
            row.name,
            *map(number, row.thresholds),
            _between(row.counts.masked_share, row.masked),
            MISSING if row.thresholds.delta_b is None else _between(row.counts.budget_share, row.by_budget),
            row.counts.violating_share,
        ]
        for row in results.rows
    ]
    return Table("proposal", "Proposed thresholds and others", header, rows)


def _alternatives(results: Results) -> Table:
    """One threshold beside the other, each with what it masks."""
    width = 3 if results.has_budget else 2
    header: list[str] = []
    columns: list[list[list[Cell]]] = []
    for name, points in results.curves.items():
        header += [name, "masked", *(["by the budget"] if results.has_budget else [])]
        cells: list[list[Cell]] = [
            [number(getattr(row.thresholds, name)), row.counts.masked_share, row.counts.budget_share] for row in points
        ]
        columns.append([row[:width] for row in cells])
    blank: list[Cell] = [""] * width
    rows = [list(chain.from_iterable(parts)) for parts in zip_longest(*columns, fillvalue=blank)]
    return Table("alternatives", "What else could be chosen", header, rows)


def _by_group(name: str, title: str, group: str, results: Results, groups: np.ndarray) -> Table:
    def row(number: int, counts: Counts) -> list[Cell]:
        shares = (counts.masked_share, counts.budget_share, counts.violating_share)
        return [str(number), f"{counts.tokens.sum():,.0f}", *shares]

    header = [group, "tokens", "masked", "of it by the budget", "violating either"]
    return Table(name, title, header, [row(*item) for item in results.by(groups).items()])


def _drift(results: Results) -> Table:
    header = ["D_t", "mean", *("largest" if q == 1 else percent(q, 1 if q > 0.99 else 0) for q in QUANTILES)]
    rows = [
        [when, *(number(x, 2) for x in (divergence.mean(), *np.quantile(divergence, QUANTILES)))]
        for when, divergence in results.drift.items()
    ]
    return Table("drift", "Engine mismatch and policy drift", header, rows)


def _between(share: float | None, interval: Interval) -> str:
    if share is None:
        return MISSING
    return f"{percent(share)} [{100 * interval.low:.1f}, {100 * interval.high:.1f}]"
