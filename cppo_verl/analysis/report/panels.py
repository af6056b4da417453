"""The figures of a report as data: what `curves` and `token_panels` compute, and `drawing` draws."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import pandas as pd

from cppo_verl.analysis.report.runs import Line
from cppo_verl.artifacts.token_dump import Response

Values = Sequence[float] | np.ndarray


@dataclass(frozen=True)
class Missing:
    """Placeholder for a figure without data."""

    title: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class Panel:
    """A figure to draw."""

    name: str
    """The name of its files and its anchor in the page."""
    title: str
    caption: str = ""
    """The name of its text in ``templates/captions.txt``, if that is not the panel's own."""
    facts: Mapping[str, object] = field(default_factory=dict)
    """Values for that text."""
    notes: Sequence[str] = ()
    """What was skipped while its data were read."""


@dataclass(frozen=True)
class Trace:
    """A line through points; it looks as ``line`` does in all figures."""

    line: Line
    x: Values
    y: Values
    role: str = "mean"
    """What it shows: "mean", "each step" or "delta / w_t"."""
    marker_size: float = 0
    """Of the points; 0 for none."""


@dataclass(frozen=True)
class Band:
    """The area between two lines."""

    line: Line
    x: Values
    low: Values
    high: Values


@dataclass(frozen=True, kw_only=True)
class LinePanel(Panel):
    traces: Sequence[Trace]
    bands: Sequence[Band] = ()
    log: bool = False
    percent: bool = False
    over_positions: bool = False
    """Whether x is t / T rather than the step."""


@dataclass(frozen=True, kw_only=True)
class PhasePanel(Panel):
    """Stacked bars: seconds per step of each phase, one bar per line."""

    bars: pd.DataFrame
    """Seconds [lines, phases]."""


@dataclass(frozen=True, kw_only=True)
class TokenPanel(Panel):
    """w_t D_t of the tokens of one response against the thresholds."""

    response: Response
    delta: float
    drawn: np.ndarray
    """Which of the generated tokens are drawn, as positions among them."""
    texts: Sequence[str]
    """The generated tokens as text; empty without a tokenizer."""
