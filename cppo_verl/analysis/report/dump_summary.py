"""What a report takes from a run's token dump: sums by step and position, and a few responses to draw."""

import math
from dataclasses import dataclass
from operator import itemgetter

import numpy as np
import pandas as pd

from cppo_verl.analysis.positions import position_bins
from cppo_verl.artifacts.token_dump import Response, TokenDump

KINDS = {"budget": "masked by the budget", "token": "masked by the token threshold", "kept": "not masked at all"}
"""Why a response is drawn."""


@dataclass(frozen=True, eq=False)
class ChosenResponse:
    kind: str
    """One of `KINDS`."""
    response: Response
    header: dict
    """Of its file."""


@dataclass(frozen=True, eq=False)
class DumpSummary:
    relative_error: pd.Series
    """By step: sum of |log pi - log mu| over sum of |log mu|, over the tokens of the batch's first update."""
    entropy: pd.Series
    """By step: mean of -log mu, an unbiased estimate of mu's entropy."""
    later: pd.DataFrame
    """Tokens of the later updates: "divergence", "difference" (|pi - mu|), "position" t, its "bin", and "response", a
    number."""
    chosen: list[ChosenResponse]


def summarise(dump: TokenDump) -> DumpSummary:
    sums, later = (
        [],
        [pd.DataFrame(columns=["divergence", "difference", "position", "bin", "response"], dtype=np.float32)],
    )
    for number, response in enumerate(dump.responses):
        mask, first = response.mask, response.update == 0
        log_mu, log_pi = response.log_mu[mask].astype(float), response.log_pi[mask].astype(float)
        error = (np.abs(log_pi - log_mu).sum(), np.abs(log_mu).sum()) if first else (0.0, 0.0)
        sums.append((response.step, *error, -log_mu.sum(), len(log_mu)))
        if not first:
            values = {
                "divergence": response.divergence[mask],
                "difference": np.abs(np.exp(log_pi) - np.exp(log_mu)).astype(np.float32),
                "position": response.position[mask],
                "bin": position_bins(response).astype(np.int8),
                "response": np.int32(number),
            }
            later.append(pd.DataFrame(values))
    by_step = pd.DataFrame(sums, columns=["step", "error", "size", "surprise", "tokens"]).groupby("step").sum()
    return DumpSummary(
        relative_error=(by_step["error"] / by_step["size"]).dropna(),
        entropy=(by_step["surprise"] / by_step["tokens"]).dropna(),
        later=pd.concat(later[1:] or later, ignore_index=True),
        chosen=_chosen(dump),
    )


def _chosen(dump: TokenDump) -> list[ChosenResponse]:
    """The response with the most tokens masked by each constraint, and of those without, the one closest to a mask."""
    drawable = [
        (r, r.weighted_divergence - r.threshold)
        for r in dump.responses
        if r.weighted_divergence is not None and r.threshold is not None and r.reason is not None and r.mask.any()
        if token_threshold(dump.headers[r.step]) is not None
    ]
    best: dict[int, tuple[str, Response]] = {}  # one response may have the most tokens of both
    for kind in ("budget", "token"):
        response = max((r for r, _ in drawable), key=lambda r: r.has_reason(kind).sum(), default=None)
        if response is not None and response.has_reason(kind).any():
            best.setdefault(id(response), (kind, response))
    kept = [(excess[r.mask].max(), r) for r, excess in drawable if not r.has_reason("budget", "token").any()]
    if kept:
        _, response = max(kept, key=itemgetter(0))
        best[id(response)] = ("kept", response)
    return [ChosenResponse(kind, response, dump.headers[response.step]) for kind, response in best.values()]


def token_threshold(header: dict) -> float | None:
    """delta of the method in a dump's header; None if it has none, or one that bounds nothing."""
    method = header.get("method")
    delta = method.get("delta") if isinstance(method, dict) else None
    return float(delta) if isinstance(delta, int | float) and math.isfinite(delta) else None
