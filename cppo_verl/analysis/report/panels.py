"""The figures of a report as data: what `curves` and `token_panels` compute, and `drawing` draws."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import pandas as pd

from cppo_verl.analysis.report.runs import Line


@dataclass(frozen=True)
class Missing:
    """Placeholder for a figure without data."""

    title: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class Panel:
    """A figure to draw; its fields are those of `cppo_verl.analysis.html.figures.Figure`."""

    name: str
    title: str
    text: str


@dataclass(frozen=True, kw_only=True)
class LinePanel(Panel):
    lines: Mapping[Line, pd.DataFrame]
    """{line: columns "mean", and where there are such "each" (step, drawn faint), "low" and "high" (a band, which need
    not have all of the points)}."""
    thresholds: Mapping[Line, pd.Series] = field(default_factory=dict)
    """{line: delta / w_t of its runs}."""
    log: bool = False
    percent: bool = False
    x: str = "step"
    """What the index is: "step", "t / T" or "t"."""
    points: int = 1
    """Up to this number of points, each is marked."""


@dataclass(frozen=True, kw_only=True)
class PhasePanel(Panel):
    """Stacked bars: seconds per step of each phase, one bar per line."""

    bars: pd.DataFrame
    """Seconds [lines, phases]."""


@dataclass(frozen=True, kw_only=True)
class TokenPanel(Panel):
    """w_t D_t of the tokens of one response against the thresholds."""

    delta: float
    tokens: pd.DataFrame
    """Columns "t", "weighted", "threshold" and "reason" of the tokens to draw, in order."""
    total: int
    """Number of generated tokens, which are not all drawn of a long response."""
    texts: Sequence[str]
    """The generated tokens as text; empty without a tokenizer."""
