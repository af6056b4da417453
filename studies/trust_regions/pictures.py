"""The pictures of the study's report. A horizon that has not run is left out."""

from itertools import product

from matplotlib.figure import Figure as Canvas

from cppo_verl.analysis.html.figures import SERIES
from cppo_verl.evaluation.statistics import interval_over_seeds
from studies.trust_regions.loop import POSITION_BINS
from studies.trust_regions.measures import (
    GRID,
    HORIZONS,
    MATCHED_AGAIN,
    NAMES,
    UPDATES,
    Study,
    arm_of,
    collapses,
    condition,
    curves,
    difference,
    is_matched,
    mean_over_tokens,
    wilson,
)

COLOURS = dict(zip(NAMES, [SERIES[i] for i in (7, 4, 5, 2, 1, 0, 6, 3)] + ["#5f7f2f"], strict=True))
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
    """CPPO minus DPPO, also the one matched again; hollow where one of them did not mask about the wanted share."""
    columns: list[tuple[int, str | None]] = [(horizon, None) for horizon in horizons_run(study)]
    if any(arm_of(cell) == MATCHED_AGAIN for cell in study.evaluation):
        columns.append((HORIZONS[-1], MATCHED_AGAIN))
    canvas = Canvas(figsize=(6, 3.6), layout="constrained")
    ax = canvas.subplots()
    for i, updates in enumerate(UPDATES):
        ax.plot([], [], "o", color=SERIES[i], label=f"{updates} updates")
        for h, (horizon, arm) in enumerate(columns):
            cells = study.find("cppo", horizon, updates), study.find("dppo", horizon, updates, arm)
            if found := difference(*cells):
                low, high = found.difference - found.interval.low, found.interval.high - found.difference
                matched = all(is_matched(cell) for cell in cells if cell)
                ax.errorbar(
                    [h + 0.12 * (i - 1)],
                    [100 * found.difference],
                    [[100 * low], [100 * high]],
                    fmt="o",
                    color=SERIES[i],
                    markerfacecolor=SERIES[i] if matched else "white",
                    capsize=3,
                )
    ax.axhline(0, color=SERIES[7], linewidth=1)
    ax.set_xticks(
        range(len(columns)), [f"{horizon}, matched again" if arm else f"{horizon}" for horizon, arm in columns]
    )
    ax.set_xlim(-0.5, len(columns) - 0.5)
    ax.set_xlabel("length of a response, tokens")
    ax.set_ylabel("CPPO minus DPPO, points")
    ax.set_title("Difference in accuracy, 95 % intervals over seeds\n(hollow: masked shares not matched)")
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
                shares = [100 * mean_over_tokens(cell, f"masked_at_{b}") for b in range(POSITION_BINS)]
                centres = [horizon * (b + 0.5) / POSITION_BINS for b in range(POSITION_BINS)]
                ax.plot(centres, shares, marker=".", color=COLOURS[method], label=NAMES[method])
        ax.set_xlabel("position in the response")
    axes[0].set_ylabel("masked tokens, %")
    axes[0].set_ylim(bottom=0)
    handles, labels = axes[0].get_legend_handles_labels()
    if handles:
        canvas.legend(handles, labels, loc="outside lower center", ncols=4)
    return canvas


PICTURES = {"curves": draw_curves, "effect": draw_effect, "collapse": draw_collapse, "masked": draw_masked}
