"""What the mask did, as sums that add up over micro-batches and ranks, and the shares made of them."""

import torch
from torch import Tensor

from cppo_verl.trust_region import TrustRegion, masked_quantile

GROUPS = ("all", "positive", "negative")
TOKEN_SUMS = ("tokens", "masked", "budget_rejected", "divergence", "log_ratio")
RESPONSE_SUMS = ("responses", "delta_b", "divergence_p90", "prefix_average")


@torch.no_grad()
def mask_sums(
    region: TrustRegion,
    update_mask: Tensor,
    divergence: Tensor,
    log_ratio: Tensor,
    advantages: Tensor,
    mask: Tensor,
    delta: float,
) -> Tensor:
    """Sums over the batch, shape [3, 9]: groups GROUPS by advantage sign, columns TOKEN_SUMS + RESPONSE_SUMS.

    A token belongs to the sign of its advantage, a response to the sign of its advantages' sum; those
    of advantage zero count in "all" only. All per-token tensors have shape [B, L].
    """
    masked = 1 - update_mask
    # The token threshold comes first: what w_t D_t <= delta would have let pass, the budget rejected.
    budget_rejected = masked * (region.weighted_divergence <= delta)
    per_token = torch.stack([torch.ones_like(masked), masked, budget_rejected, divergence, log_ratio], dim=-1)

    weight = region.weights.sum(-1)
    delta_b = torch.zeros_like(weight) if region.delta_b is None else region.delta_b.squeeze(-1)
    per_response = torch.stack(
        [
            torch.ones_like(weight),
            delta_b,
            masked_quantile(divergence, mask, 0.9).squeeze(-1),
            region.weighted_divergence.sum(-1) / weight.clamp_min(torch.finfo(weight.dtype).tiny),
        ],
        dim=-1,
    )
    response_sign = torch.where(mask, advantages, 0.0).sum(-1)
    rows = []
    for select in (torch.ones_like, lambda a: a > 0, lambda a: a < 0):
        tokens = mask & select(advantages).bool()
        responses = mask.any(-1) & select(response_sign).bool()
        rows.append(
            torch.cat(
                [
                    torch.where(tokens.unsqueeze(-1), per_token, 0.0).flatten(0, -2).sum(0),
                    torch.where(responses.unsqueeze(-1), per_response, 0.0).flatten(0, -2).sum(0),
                ]
            )
        )
    return torch.stack(rows)


def shares(sums: dict[str, float]) -> dict[str, float]:
    """Metrics of one group from its sums, which may all be scaled by one common factor.

    Returns the token metrics if the group has tokens, the rejection shares if any was masked and the
    response metrics if it has responses: a share of nothing is left out, not reported as zero.
    """
    metrics = {}
    if sums["tokens"] > 0:
        metrics["masked_share"] = sums["masked"] / sums["tokens"]
        metrics["divergence"] = sums["divergence"] / sums["tokens"]
    if sums["masked"] > 0:
        metrics["budget_rejected_share"] = sums["budget_rejected"] / sums["masked"]
        metrics["token_rejected_share"] = 1 - metrics["budget_rejected_share"]
    if sums["responses"] > 0:
        for name in RESPONSE_SUMS[1:]:
            metrics[name] = sums[name] / sums["responses"]
    return metrics
