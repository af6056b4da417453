"""Draws the panels of a report."""

import math

import numpy as np
from matplotlib.ticker import LogFormatterSciNotation, LogLocator, MaxNLocator, PercentFormatter

from cppo_verl.analysis.html.figures import BLUE, GREEN, GREY, ORANGE, PURPLE, RED, SERIES, Figure, plain
from cppo_verl.analysis.report.panels import LinePanel, Panel, PhasePanel, TokenPanel
from cppo_verl.artifacts.token_dump import CODE

WIDTH = 4.7
"""Inches per figure; three stand side by side."""
NAMED_TOKENS = 32
"""Up to this length of a response, its tokens are written below the bars."""
OUTSIDE = "outside lower center"
_LINES: dict = {
    "each step": {"linestyle": "-", "linewidth": 0.8, "alpha": 0.3},
    "delta / w_t": {"linestyle": "--", "linewidth": 1},
}
_BARS = {
    "kept": (GREY, "within the region"),
    "towards_one": (BLUE, "kept, moves towards one"),
    "token": (RED, "masked: above δ"),
    "budget": (ORANGE, "masked: above c_t"),
}


def draw(panel: Panel) -> Figure:
    if isinstance(panel, LinePanel):
        return _lines(panel)
    if isinstance(panel, PhasePanel):
        return _phases(panel)
    assert isinstance(panel, TokenPanel)
    return _tokens(panel)


def _figure(panel: Panel, height: float) -> Figure:
    return Figure(panel.name, plain(panel.title), panel.caption, panel.facts, WIDTH, height)


def _lines(panel: LinePanel) -> Figure:
    labels = [trace.line.label for trace in panel.traces if trace.role == "mean"]
    figure = _figure(panel, 2.9 + 0.2 * (math.ceil(len(labels) / 2) if len(labels) > 1 else 0))
    axes = figure.axes
    for band in panel.bands:
        axes.fill_between(band.x, band.low, band.high, color=band.line.color, alpha=0.15, linewidth=0)
    for trace in panel.traces:
        look: dict = {
            "color": trace.line.color,
            "markersize": trace.marker_size,
            "marker": "o" if trace.marker_size else "",
        }
        if trace.role == "mean":
            look |= {"linestyle": trace.line.style, "linewidth": 1.5, "label": plain(trace.line.label)}
        else:
            look |= {"gid": trace.role, **_LINES[trace.role]}
        axes.plot(trace.x, trace.y, **look)
    if panel.log and any((np.asarray(trace.y) > 0).any() for trace in panel.traces):
        axes.set_yscale("log", nonpositive="mask")
        axes.yaxis.set_minor_locator(LogLocator(subs=(2, 5)))
        axes.yaxis.set_minor_formatter(LogFormatterSciNotation(minor_thresholds=(2, 1)))
    if panel.percent:
        axes.yaxis.set_major_formatter(PercentFormatter(1))
    if panel.over_positions:
        axes.set(xlabel="t / T", xlim=(0, 1))
    else:
        axes.set_xlabel("step")
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, steps=[1, 2, 5, 10]))
    if len(labels) > 1:
        figure.legend(loc=OUTSIDE, ncols=3 if max(map(len, labels)) <= 12 else 2)
    return figure


def _phases(panel: PhasePanel) -> Figure:
    figure = _figure(panel, 1.7 + 0.3 * len(panel.bars))
    axes, rows = figure.axes, range(len(panel.bars))
    longest, left = panel.bars.sum(axis=1).max(), np.zeros(len(panel.bars))
    for number, (phase, width) in enumerate(panel.bars.items()):
        if width.max() > 0:
            label = phase if width.max() > 0.005 * longest else None
            axes.barh(rows, width, left=left, color=SERIES[number % len(SERIES)], label=label, height=0.7)
        left += width.to_numpy()
    axes.set_axisbelow(True)
    axes.set_yticks(rows, [plain(name) for name in panel.bars.index])
    axes.set_ylim(len(panel.bars) - 0.4, -0.6)
    axes.set_xlabel("seconds")
    axes.grid(visible=False, axis="y")
    figure.legend(loc=OUTSIDE, ncols=3)
    return figure


def _tokens(panel: TokenPanel) -> Figure:
    figure = _figure(panel, 3.6)
    axes, response, delta, drawn = figure.axes, panel.response, panel.delta, panel.drawn
    assert response.weighted_divergence is not None and response.threshold is not None and response.reason is not None
    mask = response.mask
    weighted, threshold, reason = response.weighted_divergence[mask], response.threshold[mask], response.reason[mask]
    t, total = response.position[mask], int(mask.sum())
    axes.set_axisbelow(True)
    width = 0.8 if len(drawn) == total else total / len(drawn)
    for cause, (color, label) in _BARS.items():
        at = drawn[reason[drawn] == CODE[cause]]
        if not len(at):
            continue
        axes.bar(t[at], weighted[at], width=width, color=color, label=label, linewidth=0)
        if cause in ("budget", "token"):  # marked at the top as well, as the bar may be too low to be seen
            edge, mark = axes.get_xaxis_transform(), "v" if total <= NAMED_TOKENS else "|"
            axes.plot(t[at], np.full(len(at), 1.0), mark, color=color, clip_on=False, transform=edge, gid=cause)
    axes.axhline(delta, color=PURPLE, linestyle="--", linewidth=1.2, label="token threshold δ")
    shown = np.sort(drawn)
    axes.step(t[shown], threshold[shown], where="mid", color=GREEN, linewidth=1.4, label="effective threshold c_t")
    axes.set(xlabel="t", xlim=(0.4, total + 0.6))
    low, high = min(0.0, float(threshold[shown].min())), max(float(weighted[shown].max()), delta)
    # A bar far above all others would flatten them, so it extends beyond the axes.
    axes.set_ylim(max(1.1 * low, -2 * delta), min(1.1 * high, 4 * delta))
    if panel.texts and total <= NAMED_TOKENS:
        axes.set_xticks(t, [plain(text[:12]) for text in panel.texts], rotation=60, ha="right", fontsize=7)
        axes.set_xlabel("")
    figure.legend(loc=OUTSIDE, ncols=2)
    return figure
