"""What a report takes from a run's token dump: sums by step and position, and a few responses to draw."""

from collections import defaultdict
from dataclasses import dataclass, field

import numpy as np

from cppo_verl.analysis.positions import position_bins
from cppo_verl.artifacts.token_dump import CODE, Response, TokenDump
from cppo_verl.core.metrics import POSITION_BINS

KINDS = {"budget": "masked by the budget", "token": "masked by the token threshold", "kept": "not masked at all"}
"""Why a response is drawn."""


@dataclass(frozen=True, eq=False)
class ChosenResponse:
    kind: str
    """One of `KINDS`."""
    response: Response
    header: dict
    """Of its file."""


@dataclass
class DumpSummary:
    """Summary of one run's dump."""

    relative_error: dict[int, float] = field(default_factory=dict)
    """{step: sum of |log pi - log mu| over sum of |log mu|}, over the tokens of the batch's first update."""
    entropy: dict[int, float] = field(default_factory=dict)
    """{step: mean of -log mu}, an unbiased estimate of mu's entropy."""
    by_position: list[np.ndarray] = field(default_factory=list)
    """D_t of the later updates' tokens in each of `POSITION_BINS`; empty if there are none."""
    chosen: list[ChosenResponse] = field(default_factory=list)


def summarise(dump: TokenDump) -> DumpSummary:
    summary = DumpSummary(chosen=_chosen(dump))
    sums: dict[int, np.ndarray] = defaultdict(lambda: np.zeros(4))
    bins: list[list[np.ndarray]] = [[] for _ in range(POSITION_BINS)]
    for response in dump.responses:
        mask = response.mask
        log_mu, log_pi = response.log_mu[mask].astype(float), response.log_pi[mask].astype(float)
        first = response.update == 0
        error = np.abs(log_pi - log_mu).sum() if first else 0.0
        sums[response.step] += (error, np.abs(log_mu).sum() if first else 0.0, -log_mu.sum(), len(log_mu))
        if not first:
            places = position_bins(response)
            for b in range(POSITION_BINS):
                bins[b].append(response.divergence[mask][places == b])
    for step, (error, size, surprise, tokens) in sorted(sums.items()):
        if size > 0:
            summary.relative_error[step] = error / size
        if tokens > 0:
            summary.entropy[step] = surprise / tokens
    if any(map(len, bins)):
        summary.by_position = [np.concatenate(values) for values in bins]
    return summary


def _chosen(dump: TokenDump) -> list[ChosenResponse]:
    """The response with the most tokens masked by each constraint, and of those without, the one closest to a mask."""
    best: dict[str, tuple[float, Response]] = {}
    for response in dump.responses:
        weighted, threshold, reason = response.weighted_divergence, response.threshold, response.reason
        if weighted is None or threshold is None or reason is None or not response.mask.any():
            continue
        if token_threshold(dump.headers[response.step]) is None:
            continue
        counts: dict[str, float] = {kind: int((reason == CODE[kind]).sum()) for kind in ("budget", "token")}
        if not any(counts.values()):
            counts = {"kept": float((weighted - threshold)[response.mask].max())}
        for kind, count in counts.items():
            if (kind == "kept" or count > 0) and (kind not in best or count > best[kind][0]):
                best[kind] = (count, response)
    chosen: list[ChosenResponse] = []
    for kind in KINDS:
        if kind in best and all(best[kind][1] is not other.response for other in chosen):
            response = best[kind][1]
            chosen.append(ChosenResponse(kind, response, dump.headers[response.step]))
    return chosen


def token_threshold(header: dict) -> float | None:
    """delta of the method in a dump's header; None if it has none."""
    method = header.get("method")
    delta = method.get("delta") if isinstance(method, dict) else None
    return float(delta) if isinstance(delta, int | float) else None
