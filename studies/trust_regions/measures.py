"""What the study's report shows: its cells, what is measured on each, and comparisons paired by seed."""

from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy import stats

from cppo_verl.evaluation.statistics import Comparison, Interval, collapse, compare
from studies.trust_regions import results
from studies.trust_regions.results import Cell, final_accuracy

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
LARGE_ENOUGH = 0.02
"""The least difference of accuracies that the protocol calls one."""
ALPHA = 0.05
MATCHED_AGAIN = "share-0.03"
"""The arm in which DPPO's thresholds, for 3 % of the pilots' tokens, are to mask the wanted 5 %: the protocol's second
deviation."""
REACHED = 0.5
"""The accuracy whose first step is told."""


class Study(NamedTuple):
    grid: list[Cell]
    evaluation: list[Cell]
    trainer: list[Cell]
    rates: Sequence[Cell] = ()
    """Other methods at CPPO's learning rate: the protocol's third deviation. Nothing else counts them."""

    @classmethod
    def load(cls, folder: Path) -> "Study":
        parts = ("grid", "evaluation", "trainer", "rates")
        return cls(*([results.read(file) for file in sorted((folder / part).glob("*.parquet"))] for part in parts))

    def find(self, method: str, horizon: int, updates: int, arm: str | None = None) -> Cell | None:
        """The evaluation of a method under a condition; the complete part if ``arm`` is None."""
        for cell in self.evaluation:
            settings = cell.about["settings"]
            what = cell.about["method"], settings["horizon"], settings["updates"], arm_of(cell)
            if what == (method, horizon, updates, arm):
                return cell
        return None


def condition(horizon: int, updates: int) -> str:
    return f"T = {horizon}, {updates} updates"


def arm_of(cell: Cell) -> str | None:
    settings = cell.about["settings"]
    if settings["rollout_dtype"] != results.MAIN_ARM["rollout"]:
        return "bf16"
    if settings["staleness"]:
        return "stale"
    share = cell.about["share"]
    return None if share == results.MAIN_ARM["share"] else f"share-{share}"


def mean_over_tokens(cell: Cell, column: str) -> float:
    """Mean of a column of means over all tokens that were trained on, as a later step of a run has fewer."""
    rows = cell.rows
    return float((rows[column] * rows["tokens"]).sum() / max(1, rows["tokens"].sum()))


def masked_share(cell: Cell) -> float:
    """Share of all tokens that were trained on."""
    return mean_over_tokens(cell, "masked")


def is_matched(cell: Cell) -> bool:
    """Whether the masked share came out within half to one and a half times the wanted one, if one was wanted."""
    share = results.MAIN_ARM["share"] if arm_of(cell) == MATCHED_AGAIN else cell.about["share"]
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


def first_reached(curve: pd.DataFrame) -> np.ndarray:
    """The step from which the mean of five steps is at least `REACHED`, for each seed; infinite if there is none."""
    means = curve.T.rolling(5).mean().T
    hit = means >= REACHED
    return np.where(hit.any(axis=1), hit.to_numpy().argmax(axis=1) + 1.0, np.inf)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's correction of a family of p-values."""
    adjusted = [0.0] * len(p_values)
    largest = 0.0
    for rank, index in enumerate(np.argsort(p_values)):
        largest = max(largest, min(1.0, p_values[index] * (len(p_values) - rank)))
        adjusted[index] = largest
    return adjusted


def wilson(count: int, total: int) -> Interval:
    """Wilson's 95 % interval of a rate."""
    found = stats.binomtest(count, total).proportion_ci(method="wilson")
    return Interval(float(found.low), float(found.high))


def family(
    study: Study,
    one: str,
    other: str,
    conditions: Sequence[tuple[int, int]] = CONDITIONS,
    arm: str | None = None,
) -> dict[tuple[int, int], tuple[Comparison, float]]:
    """{condition: (one method minus another, p after Holm's correction)} of the conditions that have run for both.

    The correction is that for all ``conditions`` from the first one on. The other method's cells are those of ``arm``.
    """
    found = [difference(study.find(one, *c), study.find(other, *c, arm)) for c in conditions]
    adjusted = holm([comparison.p_value if comparison else 1.0 for comparison in found])
    return {c: (comparison, p) for c, comparison, p in zip(conditions, found, adjusted, strict=True) if comparison}


def collapses(study: Study) -> dict[str, dict[float, tuple[int, int]]]:
    """{method: {learning rate: (collapsed, runs)}} over grid and evaluation of the complete part."""
    counts: dict[str, dict[float, tuple[int, int]]] = {name: {} for name in NAMES}
    for cell in [*study.grid, *(c for c in study.evaluation if arm_of(c) is None)]:
        rate = cell.about["settings"]["learning_rate"]
        bad, runs = counts[cell.about["method"]].get(rate, (0, 0))
        counts[cell.about["method"]][rate] = bad + collapsed(cell), runs + cell.rows["seed"].nunique()
    return counts


def lost_updates(study: Study, method: str) -> tuple[int, int]:
    """How many of the method's updates had a gradient that is not finite, and how many it made, in the loop."""
    cells = [cell for cell in [*study.grid, *study.evaluation] if cell.about["method"] == method]
    made = sum(len(cell.rows) * cell.about["settings"]["updates"] for cell in cells)
    return sum(int(cell.rows["not_finite"].sum()) for cell in cells), made


def paired(study: Study, horizon: int, updates: int) -> np.ndarray | None:
    """CPPO minus DPPO for each seed; None if one of them has not run."""
    cells = [study.find(method, horizon, updates) for method in ("cppo", "dppo")]
    if None in cells:
        return None
    one, other = (final_accuracy(cell.rows) for cell in cells)
    return (one - other).to_numpy()
