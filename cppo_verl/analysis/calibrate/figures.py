"""The figures of `calibrate`, drawn from its results."""

from typing import Any

import numpy as np
from matplotlib.ticker import MaxNLocator, PercentFormatter

from cppo_verl.analysis.calibrate.page import Results
from cppo_verl.analysis.html.figures import BLUE, GREEN, GREY, INK, ORANGE, PURPLE, Figure
from cppo_verl.analysis.html.page import caption

BY_TOKEN: dict[str, Any] = {"color": ORANGE, "label": "by delta"}
BY_BUDGET: dict[str, Any] = {"color": BLUE, "label": "by the prefix budget"}


def draw(results: Results) -> list[Figure]:
    return [
        *(_masked_by_threshold(results, name) for name in results.curves),
        _mismatch_and_drift(results),
        _masked_by_update(results),
    ]


def _masked_by_threshold(results: Results, name: str) -> Figure:
    (fixed,) = [f", {other} = {x:g}" for other, x in results.proposed.given.items() if other != name] or [""]
    figure = Figure(f"masked_by_{name}", f"Masked share against {name}{fixed}", caption(f"masked_by_{name}"))
    points, axes = results.curves[name], figure.axes
    x = [getattr(row.thresholds, name) for row in points]
    total, by_token = np.array([(row.shares.masked, row.shares.by_token) for row in points]).T
    axes.fill_between(x, 0, by_token, alpha=0.45, lw=0, **BY_TOKEN)
    if results.has_budget:
        axes.fill_between(x, by_token, total, alpha=0.45, lw=0, **BY_BUDGET)
    ends = np.array([row.masked for row in points]).T
    axes.errorbar(x, total, abs(ends - total), color=BLUE if fixed else ORANGE, lw=1.5, elinewidth=0.8, marker="o")
    axes.axvline(getattr(results.proposed, name), color=GREY, ls="--", lw=1)
    axes.axhline(results.wanted, color=GREY, ls=":", lw=1)
    axes.set(xscale="log", xlabel=name, ylabel="tokens masked", ylim=(0, None))
    return _finished(figure)


def _mismatch_and_drift(results: Results) -> Figure:
    figure = Figure("mismatch_and_drift", "D_t: engine mismatch and policy drift", caption("mismatch_and_drift"))
    axes, drift = figure.axes, results.drift
    everything = np.concatenate(list(drift.values()))
    largest = max(list(drift.values())[-1].max(), results.proposed.delta)
    smallest = everything[everything > 0].min(initial=largest)
    levels = np.geomspace(max(smallest, 1e-9), largest * 1.2, 300)
    for (when, values), color in zip(drift.items(), (PURPLE, GREEN), strict=False):
        above = 1 - np.searchsorted(np.sort(values), levels, side="right") / len(values)
        axes.plot(levels, np.where(above > 0, above, np.nan), color=color, label=when)
    for name, value in results.proposed.given.items():
        axes.axvline(value, color=GREY, ls="--", lw=1)
        axes.text(value, 0.98, f"{name} ", rotation=90, ha="right", va="top", fontsize="small", color=INK)
    axes.set(xscale="log", xlabel="D_t", ylabel="tokens above", ylim=(0, 1))
    return _finished(figure)


def _masked_by_update(results: Results) -> Figure:
    figure = Figure("masked_by_update", "Masked share by update of a batch", caption("masked_by_update"))
    parts, axes = results.by("update"), figure.axes
    total, by_token = np.array([(x.masked, x.by_token) for x in parts.values()]).T
    axes.bar(list(parts), by_token, **BY_TOKEN)
    if results.has_budget:
        axes.bar(list(parts), total - by_token, bottom=by_token, **BY_BUDGET)
    axes.axhline(results.wanted, color=GREY, ls=":", lw=1)
    axes.set(xlabel="update", ylabel="tokens masked")
    axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True, steps=[1, 2, 2.5, 5, 10]))
    return _finished(figure)


def _finished(figure: Figure) -> Figure:
    figure.axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    figure.legend()
    return figure
