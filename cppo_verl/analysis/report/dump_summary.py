"""What a report takes from a run's token dump: sums by step and position, and a few responses to draw."""

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
    """Summary of one run's dump."""

    relative_error: pd.Series
    """By step: sum of |log pi - log mu| over sum of |log mu|, over the tokens of the batch's first update."""
    entropy: pd.Series
    """By step: mean of -log mu, an unbiased estimate of mu's entropy."""
    by_position: pd.Series
    """D_t of the later updates' tokens, indexed by the bin of their position."""
    chosen: list[ChosenResponse]


def summarise(dump: TokenDump) -> DumpSummary:
    sums, divergences, bins = [], [np.empty(0, np.float32)], [np.empty(0, np.int8)]
    for response in dump.responses:
        mask, first = response.mask, response.update == 0
        log_mu, log_pi = response.log_mu[mask].astype(float), response.log_pi[mask].astype(float)
        error = (np.abs(log_pi - log_mu).sum(), np.abs(log_mu).sum()) if first else (0.0, 0.0)
        sums.append((response.step, *error, -log_mu.sum(), len(log_mu)))
        if not first:
            divergences.append(response.divergence[mask])
            bins.append(position_bins(response).astype(np.int8))
    by_step = pd.DataFrame(sums, columns=["step", "error", "size", "surprise", "tokens"]).groupby("step").sum()
    return DumpSummary(
        relative_error=(by_step["error"] / by_step["size"]).dropna(),
        entropy=(by_step["surprise"] / by_step["tokens"]).dropna(),
        by_position=pd.Series(np.concatenate(divergences), index=np.concatenate(bins)),
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
    """delta of the method in a dump's header; None if it has none."""
    method = header.get("method")
    delta = method.get("delta") if isinstance(method, dict) else None
    return float(delta) if isinstance(delta, int | float) else None
