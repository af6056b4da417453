"""Metrics of the mask: sums that add up over micro-batches and ranks, and the shares made of them."""

import torch
from torch import Tensor

from cppo_verl.core.trust_region import TrustRegion

GROUPS = ("all", "positive", "negative")
TOKEN_SUMS = ("tokens", "masked", "budget_rejected", "divergence", "log_ratio")
RESPONSE_SUMS = ("responses", "effective_delta_b", "divergence_p90", "prefix_average")
POSITION_BINS = 8
POSITION_SUMS = ("tokens", "divergence")


@torch.no_grad()
def mask_sums(
    region: TrustRegion,
    update_mask: Tensor,
    divergence: Tensor,
    log_ratio: Tensor,
    advantages: Tensor,
    valid: Tensor,
    delta: float,
    p90: Tensor,
) -> Tensor:
    """Sums over the batch that the step's metrics are made of.

    A token belongs to the sign of its advantage, a response to the sign of its advantages' sum; those of advantage zero
    count in "all" only.

    Args:
        region: the constraints of each token.
        update_mask: M_t, [B, L].
        divergence: D_t, [B, L], zero outside the mask.
        log_ratio: log rho_t, [B, L], zero outside the mask.
        advantages: A_t, [B, L], zero outside the mask.
        valid: the mask as 0 and 1 in their dtype, [B, L].
        delta: token threshold.
        p90: 0.9-quantile of D_t per response, [B, 1].

    Returns:
        Sums, [3, 9]: a row per group of `GROUPS`, a column per name of TOKEN_SUMS + RESPONSE_SUMS.
    """
    # The token threshold comes first: what w_t D_t <= delta would have let pass, the budget rejected.
    below = (region.weighted_divergence <= delta).to(valid.dtype)
    tokens, kept, below, kept_below, divergence_sum, log_ratio_sum = _sums_by_sign(
        (valid, update_mask, below, below * update_mask, divergence, log_ratio), valid, advantages.sign()
    )
    token_sums = (tokens, tokens - kept, below - kept_below, divergence_sum, log_ratio_sum)

    weight = region.weights.sum(-1)
    responses = valid.sum(-1).clamp_max_(1)
    delta_b = torch.zeros_like(weight) if region.delta_b is None else region.delta_b.squeeze(-1)
    prefix_average = region.weighted_divergence.sum(-1) / weight.clamp_min(torch.finfo(weight.dtype).tiny)
    response_sums = _sums_by_sign(
        (responses, delta_b, p90.squeeze(-1), prefix_average), responses, advantages.sum(-1).sign()
    )
    return torch.stack([*token_sums, *response_sums], dim=1)


@torch.no_grad()
def position_sums(divergence: Tensor, valid: Tensor) -> Tensor:
    """Number of tokens and sum of D_t by position in the response.

    Bin b holds the valid tokens t = 1..T of a response with b T < POSITION_BINS t <= (b + 1) T.

    Args:
        divergence: D_t, [B, L], zero outside the mask.
        valid: the mask as 0.0 and 1.0, [B, L].

    Returns:
        [2, POSITION_BINS]: the numbers, the sums.
    """
    count = valid.cumsum(-1)
    share = torch.arange(1, POSITION_BINS + 1, device=valid.device) / POSITION_BINS
    last = (count[:, -1:] * share).floor()
    # Where the last token of each bin stands; a response without tokens has sums of zero anywhere.
    column = torch.searchsorted(count, last).clamp_max_(valid.shape[-1] - 1)
    upto = divergence.cumsum(-1).gather(-1, column).where(last > 0, 0)
    zero = upto.new_zeros((len(upto), 1))
    return torch.stack([last.diff(dim=-1, prepend=zero).sum(0), upto.diff(dim=-1, prepend=zero).sum(0)])


def _sums_by_sign(columns: tuple[Tensor, ...], valid: Tensor, sign: Tensor) -> Tensor:
    """Sum of each column over the valid entries, over those of sign 1 and of sign -1: [columns, 3].

    A dot product with a 0-1 vector costs a third of masking and summing. ``sign`` is 0 where not valid.
    """
    valid, sign = valid.flatten(), sign.flatten()
    nonzero = sign.abs()
    dots = torch.stack([torch.dot(x.flatten(), y) for x in columns for y in (valid, nonzero, sign)]).view(-1, 3)
    total, unsigned, signed = dots.unbind(1)
    return torch.stack([total, (unsigned + signed) / 2, (unsigned - signed) / 2], dim=1)


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
