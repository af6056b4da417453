"""What a report takes from a run's token dump: sums by step and position, and a few responses to draw."""

from dataclasses import dataclass

import numpy as np
import pandas as pd

from cppo_verl.analysis.positions import position_bins
from cppo_verl.artifacts.token_dump import CODE, Response, TokenDump

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
    sums, divergences, bins = [], [np.empty(0)], [np.empty(0, dtype=int)]
    for response in dump.responses:
        mask, first = response.mask, response.update == 0
        log_mu, log_pi = response.log_mu[mask].astype(float), response.log_pi[mask].astype(float)
        error = (np.abs(log_pi - log_mu).sum(), np.abs(log_mu).sum()) if first else (0.0, 0.0)
        sums.append((response.step, *error, -log_mu.sum(), len(log_mu)))
        if not first:
            divergences.append(response.divergence[mask])
            bins.append(position_bins(response))
    by_step = pd.DataFrame(sums, columns=["step", "error", "size", "surprise", "tokens"]).groupby("step").sum()
    return DumpSummary(
        relative_error=(by_step["error"] / by_step["size"]).dropna(),
        entropy=(by_step["surprise"] / by_step["tokens"]).dropna(),
        by_position=pd.Series(np.concatenate(divergences), index=np.concatenate(bins)),
        chosen=_chosen(dump),
    )


def _chosen(dump: TokenDump) -> list[ChosenResponse]:
    """The response with the most tokens masked by each constraint, and of those without, the one closest to a mask."""
    best: dict[str, tuple[float, Response]] = {}
    for response in dump.responses:
        weighted, threshold, reason = response.weighted_divergence, response.threshold, response.reason
        if weighted is None or threshold is None or reason is None or not response.mask.any():
            continue
        if token_threshold(dump.headers[response.step]) is None:
            continue
        counts: dict[str, float] = {kind: n for kind in ("budget", "token") if (n := int((reason == CODE[kind]).sum()))}
        for kind, count in (counts or {"kept": float((weighted - threshold)[response.mask].max())}).items():
            if kind not in best or count > best[kind][0]:
                best[kind] = (count, response)
    chosen: dict[int, ChosenResponse] = {}  # one response may be the first of two kinds
    for kind in KINDS:
        if kind in best:
            response = best[kind][1]
            chosen.setdefault(id(response), ChosenResponse(kind, response, dump.headers[response.step]))
    return list(chosen.values())


def token_threshold(header: dict) -> float | None:
    """delta of the method in a dump's header; None if it has none."""
    method = header.get("method")
    delta = method.get("delta") if isinstance(method, dict) else None
    return float(delta) if isinstance(delta, int | float) else None
