"""The tables and texts of `calibrate`, for its page and for the terminal."""

from itertools import chain, zip_longest

import numpy as np

from cppo_verl.analysis.calibrate.results import Results, overrides
from cppo_verl.analysis.html.page import caption
from cppo_verl.analysis.text import MISSING, Cell, Table, counted, listed, number, percent
from cppo_verl.evaluation.statistics import Interval

QUANTILES = (0.5, 0.9, 0.95, 0.99, 0.999, 1.0)


def page_values(method: str | None, results: Results, notes: list[str]) -> dict:
    """What the page and the terminal show, but for the figures.

    Args:
        method: the method asked for; None for the run's own.
    """
    sample, proposed = results.sample, results.rows[0]
    steps = list(results.by("step"))
    return {
        "results": results,
        "overrides": overrides(method, results),
        "summary": (
            f"{counted(len(sample.responses), 'response')} to {counted(sample.prompts, 'prompt')}, "
            f"{proposed.shares.tokens:,.0f} tokens, of step{'s' * (len(steps) > 1)} {listed(steps)}; "
            f"D_t is {sample.rule.divergence}, the budget {sample.rule.budget}"
        ),
        "promise": caption("promise", results=results),
        "warnings": [caption(name, results=results) for name in results.warnings],
        "tables": [
            _proposal(results),
            _alternatives(results),
            _by_group("by_update", "By update of a batch, as proposed", "update", results),
            _by_group("by_step", "By step, as proposed", "step", results),
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
            _between(row.shares.masked, row.masked),
            MISSING if row.thresholds.delta_b is None else _between(row.shares.by_budget, row.by_budget),
            row.shares.violating,
        ]
        for row in results.rows
    ]
    return Table("proposal", "Proposed thresholds and others", header, rows)


def _alternatives(results: Results) -> Table:
    """One threshold beside the other, each with what it masks."""
    width = 3 if results.has_budget else 2
    header = [cell for name in results.curves for cell in (name, "masked", "by the budget")[:width]]
    columns: list[list[tuple[Cell, ...]]] = [
        [(number(getattr(row.thresholds, name)), row.shares.masked, row.shares.by_budget)[:width] for row in points]
        for name, points in results.curves.items()
    ]
    rows = [list(chain(*parts)) for parts in zip_longest(*columns, fillvalue=("",) * width)]
    return Table("alternatives", "What else could be chosen", header, rows)


def _by_group(name: str, title: str, group: str, results: Results) -> Table:
    header = [group, "tokens", "masked", "of it by the budget", "violating either"]
    rows: list[list[Cell]] = [
        [str(number), f"{x.tokens:,.0f}", x.masked, x.by_budget, x.violating] for number, x in results.by(group).items()
    ]
    return Table(name, title, header, rows)


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
