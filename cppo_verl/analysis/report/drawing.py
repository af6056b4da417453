"""Draws the panels of a report."""

import math
from functools import singledispatch

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
_BARS = {
    "kept": (GREY, "within the region"),
    "towards_one": (BLUE, "kept, moves towards one"),
    "token": (RED, "masked: above δ"),
    "budget": (ORANGE, "masked: above c_t"),
}


@singledispatch
def draw(panel: Panel) -> Figure:
    raise TypeError(f"no drawing of a {type(panel).__name__}")


def _figure(panel: Panel, height: float) -> Figure:
    return Figure(panel.name, plain(panel.title), panel.text, WIDTH, height)


@draw.register
def _lines(panel: LinePanel) -> Figure:
    labels = [line.label for line in panel.lines]
    figure = _figure(panel, 2.9 + 0.2 * (math.ceil(len(labels) / 2) if len(labels) > 1 else 0))
    axes = figure.axes
    for line, frame in panel.lines.items():
        if "low" in frame:
            band = frame.dropna(subset="low")
            axes.fill_between(band.index, band["low"], band["high"], color=line.color, alpha=0.15, linewidth=0)
        if "each" in frame:
            axes.plot(frame["each"], color=line.color, linewidth=0.8, alpha=0.3, gid="each step")
        marks: dict = {"marker": "o", "markersize": 4} if len(frame) <= panel.points else {}
        look: dict = {"color": line.color, "linestyle": line.style, "linewidth": 1.5, "label": plain(line.label)}
        axes.plot(frame["mean"], **look, **marks)
    for line, threshold in panel.thresholds.items():
        axes.plot(threshold, color=line.color, linestyle="--", linewidth=1, gid="delta / w_t")
    if panel.log and any((frame["mean"] > 0).any() for frame in panel.lines.values()):
        axes.set_yscale("log", nonpositive="mask")
        axes.yaxis.set_minor_locator(LogLocator(subs=(2, 5)))
        axes.yaxis.set_minor_formatter(LogFormatterSciNotation(minor_thresholds=(2, 1)))
    if panel.percent:
        axes.yaxis.set_major_formatter(PercentFormatter(1))
    axes.set_xlabel(panel.x)
    if panel.x == "t / T":
        axes.set_xlim(0, 1)
    else:
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, steps=[1, 2, 5, 10]))
    if len(labels) > 1:
        figure.legend(loc=OUTSIDE, ncols=3 if max(map(len, labels)) <= 12 else 2)
    return figure


@draw.register
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


@draw.register
def _tokens(panel: TokenPanel) -> Figure:
    figure = _figure(panel, 3.6)
    axes, tokens, delta, total = figure.axes, panel.tokens, panel.delta, panel.total
    axes.set_axisbelow(True)
    for cause, (color, label) in _BARS.items():
        of_cause = tokens[tokens["reason"] == CODE[cause]]
        if of_cause.empty:
            continue
        width = total / len(tokens) * (0.8 if len(tokens) == total else 1)
        axes.bar(of_cause["t"], of_cause["weighted"], width=width, color=color, label=label, linewidth=0)
        if cause in ("budget", "token"):  # marked at the top as well, as the bar may be too low to be seen
            edge, mark = axes.get_xaxis_transform(), "v" if total <= NAMED_TOKENS else "|"
            top = np.ones(len(of_cause))
            axes.plot(of_cause["t"], top, mark, color=color, clip_on=False, transform=edge, gid=cause)
    axes.axhline(delta, color=PURPLE, linestyle="--", linewidth=1.2, label="token threshold δ")
    effective: dict = {"color": GREEN, "linewidth": 1.4, "label": "effective threshold c_t"}
    axes.step(tokens["t"], tokens["threshold"], where="mid", **effective)
    axes.set(xlabel="t", xlim=(0.4, total + 0.6))
    low, high = min(0.0, tokens["threshold"].min()), max(tokens["weighted"].max(), delta)
    # A bar far above all others would flatten them, so it extends beyond the axes.
    axes.set_ylim(max(1.1 * low, -2 * delta), min(1.1 * high, 4 * delta))
    if panel.texts and total <= NAMED_TOKENS:
        axes.set_xticks(tokens["t"], [plain(text[:12]) for text in panel.texts], rotation=60, ha="right", fontsize=7)
        axes.set_xlabel("")
    figure.legend(loc=OUTSIDE, ncols=2)
    return figure
