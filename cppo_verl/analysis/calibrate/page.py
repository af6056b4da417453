"""What the page of `calibrate` and the terminal show: what proposed thresholds and others would have masked."""

from dataclasses import dataclass
from functools import cached_property
from itertools import chain, zip_longest

import numpy as np
import pandas as pd

from cppo_verl.analysis import replay
from cppo_verl.analysis.calibrate.thresholds import Sample, Shares, Thresholds, intervals, others, recorded
from cppo_verl.analysis.html.page import caption
from cppo_verl.analysis.text import MISSING, Cell, Table, counted, listed, number, percent
from cppo_verl.evaluation.statistics import Interval

PAPER = {"tv": Thresholds(0.15, 0.02), "kl": Thresholds(0.1, 0.002)}
"""The paper's thresholds for base models, and for the KL variant."""
NOTICEABLE = 0.1
"""Engine mismatch is warned of if it takes more than this part of the wanted share, or of delta_b."""
QUANTILES = (0.5, 0.9, 0.95, 0.99, 0.999, 1.0)
"""Of D_t, in the table of engine mismatch and policy drift."""


@dataclass(frozen=True)
class Row:
    name: str
    thresholds: Thresholds
    shares: Shares
    masked: Interval
    by_budget: Interval


@dataclass(frozen=True)
class Results:
    """What the tables, the figures and the texts are made from."""

    sample: Sample
    wanted: float
    """The masked share asked for."""
    proposed: Thresholds

    @cached_property
    def rows(self) -> list[Row]:
        """The proposal first, then the run's own thresholds if its decisions were recorded, then the paper's."""
        rows = [self._row("proposed", self.proposed)]
        own = recorded(self.sample.responses)
        if own is not None:
            method = self.sample.header["method"]
            budget = None if method.get("budget", "none") == "none" else method.get("delta_b")
            rows.append(self._row("the run's own", Thresholds(method.get("delta"), budget), own))
        paper = PAPER[self.sample.rule.divergence.rpartition("_")[2]]
        rows.append(self._row("the paper's", paper if self.has_budget else paper._replace(delta_b=None)))
        return rows

    @cached_property
    def curves(self) -> dict[str, list[Row]]:
        """{threshold: what its other values mask, with the other threshold as proposed}."""
        return {
            name: [self._row(name, thresholds) for thresholds in others(self.sample, self.proposed, name)]
            for name in self.proposed.given
        }

    @cached_property
    def drift(self) -> dict[str, np.ndarray]:
        """D_t at the first update, which is engine mismatch, and at later ones; without those that the dump lacks."""
        found: dict[str, list[np.ndarray]] = {"first update": [], "later updates": []}
        for response, decided in zip(self.sample.responses, self.sample.decisions(self.proposed), strict=True):
            when = "later updates" if response.update else "first update"
            found[when].append(np.asarray(decided.divergence, dtype=float)[response.mask])
        return {when: np.concatenate(parts) for when, parts in found.items() if parts}

    def by(self, level: str) -> dict[int, Shares]:
        """{step or update: what the proposal masks of it}."""
        return {group: Shares.of(part) for group, part in self.sample.at(self.proposed).groupby(level=level)}

    @property
    def has_budget(self) -> bool:
        return self.proposed.delta_b is not None

    @property
    def first_update(self) -> Shares | None:
        """What the proposal masks at the first update; None if the dump has none."""
        return self.by("update").get(0)

    @property
    def mismatch_spends(self) -> tuple[float, float]:
        """Mean and P90 of D_t at the first update, as parts of the proposed delta_b; zeros without either."""
        delta_b, first = self.proposed.delta_b, self.drift.get("first update")
        if first is None or delta_b is None:
            return 0.0, 0.0
        return first.mean() / delta_b, np.quantile(first, 0.9) / delta_b

    @property
    def warnings(self) -> list[str]:
        """Names of the captions that warn of the proposal."""
        first, (delta, delta_b) = self.first_update, self.proposed
        masks = first is not None and first.masked > NOTICEABLE * self.wanted
        apply = {
            "mismatch_masks": masks,
            # Engine mismatch may mask little and still use up much of the budget.
            "mismatch_spends": not masks and self.mismatch_spends[0] > NOTICEABLE,
            # delta alone already bounds what the prefix budget would.
            "budget_is_idle": delta_b is not None and delta_b >= delta * self.sample.rule.w_min,
        }
        return [name for name, applies in apply.items() if applies]

    def _row(self, name: str, thresholds: Thresholds, counts: pd.DataFrame | None = None) -> Row:
        counts = self.sample.at(thresholds) if counts is None else counts
        return Row(name, thresholds, Shares.of(counts), *intervals(counts))


def page_values(results: Results, notes: list[str]) -> dict:
    """What the page and the terminal show, but for the figures."""
    sample, proposed = results.sample, results.rows[0]
    steps = list(results.by("step"))
    return {
        "results": results,
        "overrides": _overrides(results),
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
    if np.isnan(interval.low):
        return percent(share)
    return f"{percent(share)} [{100 * interval.low:.1f}, {100 * interval.high:.1f}]"


def _overrides(results: Results) -> str:
    """The hydra overrides that set the proposal.

    These are ``trust_region.delta`` and ``trust_region.delta_b``, unless the method's config pins its own thresholds:
    then they are the keys of the loss.
    """
    values, setting, header = results.proposed.given, results.sample.setting, results.sample.header
    if setting.label == replay.run_setting(header).label:
        shared = all(header["trust_region"].get(name) == header["method"][name] for name in values)
    else:
        try:
            replay.setting(" ".join([setting.label, *(f"trust_region.{n}={x:g}" for n, x in values.items())]), header)
            shared = True
        except ValueError:  # the method pins one of them
            shared = False
    prefix = "trust_region" if shared else "actor_rollout_ref.actor.policy_loss"
    return " ".join(f"{prefix}.{name}={value:g}" for name, value in values.items())
