"""Metrics of the mask: sums that add up over micro-batches and ranks, and the shares made of them."""

from functools import lru_cache

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from cppo_verl.core.trust_region import TrustRegion, count

GROUPS = ("all", "positive", "negative")
TOKEN_SUMS = ("tokens", "masked", "budget_rejected", "divergence", "log_ratio")
RESPONSE_SUMS = ("responses", "effective_delta_b", "divergence_p90", "prefix_average")
SIGNS, ABOVE = np.array([0, 1, -1]), np.array([-1, 0, 0])
"""An advantage belongs to a group of `GROUPS` if its product with the group's sign is above this."""
POSITION_BINS = 8
POSITION_SUMS = ("tokens", "divergence")


@torch.no_grad()
def token_sums(
    region: TrustRegion,
    update_mask: Tensor,
    divergence: Tensor,
    log_ratio: Tensor,
    advantages: Tensor,
    valid: Tensor,
    delta: float,
) -> Tensor:
    """Sums over tokens, each of which belongs to the sign of its advantage; to "all" alone if that is zero.

    Args:
        region: the constraints of each token.
        update_mask: M_t, [B, L].
        divergence: D_t, [B, L], zero outside the mask.
        log_ratio: log rho_t, [B, L], zero outside the mask.
        advantages: A_t, [B, L], zero outside the mask.
        valid: the mask as 0 and 1 in their dtype, [B, L].
        delta: token threshold.

    Returns:
        [15]: per name of TOKEN_SUMS a sum per group of `GROUPS`.
    """
    groups = torch.stack([valid, advantages, -advantages]).gt_(0).flatten(1)
    masked = 1 - update_mask
    # The token threshold comes first: what w_t D_t <= delta would have let pass, the budget rejected.
    budget_rejected = torch.le(region.weighted_divergence, delta, out=torch.empty_like(valid)).mul_(masked)
    sums = (groups @ x.flatten() for x in (masked, budget_rejected, divergence, log_ratio))
    return torch.cat([groups.sum(1), *sums])


@torch.no_grad()
def response_columns(region: TrustRegion, advantages: Tensor, length: Tensor, p90: Tensor) -> Tensor:
    """What `response_sums` needs of each response.

    Args:
        region: the constraints of each token.
        advantages: A_t, [B, L], zero outside the mask.
        length: number of valid tokens, [B, 1].
        p90: 0.9-quantile of D_t, [B, 1].

    Returns:
        [B, 6].
    """
    delta_b = torch.zeros_like(p90) if region.delta_b is None else region.delta_b
    summed = (region.weighted_divergence, region.weights, advantages)
    return torch.cat([length, delta_b, p90, *(x.sum(-1, keepdim=True) for x in summed)], 1)


def response_sums(columns: np.ndarray) -> np.ndarray:
    """Sums over responses, each of which belongs to the sign of its advantages' sum; to "all" alone if that is zero.

    Args:
        columns: `response_columns` on the host.

    Returns:
        [4, 3]: a row per name of RESPONSE_SUMS, a column per group of `GROUPS`.
    """
    columns = columns[columns[:, 0] > 0]
    values, weight, advantage = columns[:, :4], columns[:, 4], columns[:, 5:]
    values[:, 0] = 1
    values[:, 3] /= weight
    return values.T @ (advantage * SIGNS > ABOVE)


@torch.no_grad()
def position_sums(divergence: Tensor, valid: Tensor, counted: tuple[Tensor, Tensor] | None = None) -> Tensor:
    """Number of tokens and sum of D_t by position in the response.

    Bin b holds the valid tokens t = 1..T of a response with b T < POSITION_BINS t <= (b + 1) T.

    Args:
        divergence: D_t, [B, L], zero outside the mask.
        valid: the mask as 0.0 and 1.0, [B, L].
        counted: `count` of it, if the caller has it already.

    Returns:
        [2, POSITION_BINS]: the numbers, the sums.
    """
    t, length = count(valid) if counted is None else counted
    last = (length * _borders(length.device)).floor_()
    # The sum before the token that follows the last one of each bin.
    before = pad(divergence, (1, 0)).cumsum_(-1)
    sums = before.gather(-1, torch.searchsorted(t, last, right=True))
    return torch.stack([last, sums]).diff().sum(1)


@lru_cache
def _borders(device: torch.device) -> Tensor:
    """Of the position bins, as shares of a response."""
    return torch.linspace(0, 1, POSITION_BINS + 1, device=device)


def shares(sums: dict[str, float]) -> dict[str, float]:
    """Metrics of one group, made of its sums.

    A share of nothing is left out, not reported as zero: the token metrics of a group without tokens, the rejection
    shares where none was masked, the response metrics of a group without responses.

    Args:
        sums: {name of TOKEN_SUMS and RESPONSE_SUMS: value}, which may all be scaled by one common factor.

    Returns:
        {name: value}.
    """
    metrics: dict[str, float] = {}
    if sums["tokens"] > 0:
        metrics["masked_share"] = sums["masked"] / sums["tokens"]
        metrics["divergence"] = sums["divergence"] / sums["tokens"]
    if sums["masked"] > 0:
        metrics["budget_rejected_share"] = sums["budget_rejected"] / sums["masked"]
        # Sums of non-integers (soft gates) round; that must not make a share negative.
        metrics["token_rejected_share"] = max(0.0, 1 - metrics["budget_rejected_share"])
    if sums["responses"] > 0:
        for name in RESPONSE_SUMS[1:]:
            metrics[name] = sums[name] / sums["responses"]
    return metrics
