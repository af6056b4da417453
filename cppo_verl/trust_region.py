"""The two coupled constraints of CPPO, in the order of the paper (arXiv 2606.10968).

Every function takes per-token tensors of shape [..., L] and a boolean ``mask`` of the same shape
that is true on the T valid tokens of a response. Tokens outside the mask (padding, tool output)
have w = D = 0 and do not advance t, wherever they stand. Nothing here carries a gradient.
"""

from typing import Literal, NamedTuple

import torch
from torch import Tensor


class TrustRegion(NamedTuple):
    """What the two constraints say about each token, before the update's direction is known."""

    weighted_divergence: Tensor
    """w_t D_t, [..., L]."""
    weights: Tensor
    """w_t (9), [..., L]."""
    threshold: Tensor
    """Effective threshold c_t (8), [..., L]."""
    delta_b: Tensor | None
    """Prefix-average threshold in force, [..., 1]; None without a prefix budget."""


def position_weights(mask: Tensor, w_min: float, dtype: torch.dtype = torch.float32) -> Tensor:
    """w_t = 1 - (1 - w_min)(t - 1)/(T - 1), and w_1 = 1 when T = 1 (9)."""
    t = mask.cumsum(-1).to(dtype)
    steps = (t[..., -1:] - 1).clamp_min(1)
    return torch.where(mask, 1 - (1 - w_min) * ((t - 1) / steps), 0.0)


@torch.no_grad()
def adaptive_budget(divergence: Tensor, mask: Tensor, delta_b_min: float, upper: float = 2.0) -> Tensor:
    """delta_b(y) = clamp(P90(D_1..D_T), delta_b_min, upper * delta_b_min) per response (22).

    Returns:
        Shape [..., 1]; delta_b_min for an empty response.
    """
    return masked_quantile(divergence, mask, 0.9).clamp(delta_b_min, upper * delta_b_min)


@torch.no_grad()
def masked_quantile(x: Tensor, mask: Tensor, q: float) -> Tensor:
    """q-quantile over the valid tokens of each response, with linear interpolation between ranks.

    Returns:
        Shape [..., 1]; 0 for an empty response.
    """
    ordered = torch.where(mask, x, torch.inf).sort(-1).values
    rank = q * (mask.sum(-1, keepdim=True) - 1).clamp_min(0).to(torch.float64)
    low, high = (ordered.gather(-1, r.long()) for r in (rank.floor(), rank.ceil()))
    # lerp of two infinities is nan; equal neighbours need no interpolation.
    value = torch.where(low == high, low, low.lerp(high, (rank - rank.floor()).to(x.dtype)))
    return torch.where(mask.any(-1, keepdim=True), value, 0.0)


@torch.no_grad()
def trust_region(
    divergence: Tensor,
    mask: Tensor,
    *,
    delta: float,
    delta_b: Tensor | float | None,
    w_min: float,
) -> TrustRegion:
    """Effective threshold c_t = min(delta, delta + delta_b W_{t-1} - S_{t-1}) (8).

    DPPO is the limit w_min = 1, delta_b = None.

    Args:
        divergence: D_t >= 0 in fp32 or fp64; values outside the mask are ignored.
        mask: true on valid tokens.
        delta: token-level threshold.
        delta_b: prefix-average threshold, one number or one per response [..., 1]; None for no
            prefix budget, which leaves c_t = delta.
        w_min: weight of the last token, in (0, 1].
    """
    w = position_weights(mask, w_min, divergence.dtype)
    wd = torch.where(mask, w * divergence, 0.0)
    if delta_b is None:
        return TrustRegion(wd, w, torch.full_like(wd, delta), None)
    delta_b = torch.as_tensor(delta_b, dtype=wd.dtype, device=wd.device).expand(*wd.shape[:-1], 1)
    # S_{t-1} - delta_b W_{t-1} as one sum of centred terms: the difference of two long sums would
    # lose the digits that decide at 64k tokens.
    drift = exclusive_cumsum(wd - delta_b * w)
    return TrustRegion(wd, w, delta - drift.clamp_min(0), delta_b)


@torch.no_grad()
def violation(region: TrustRegion, delta: float) -> Tensor:
    """x_t = max(w_t D_t / delta, S_t / (delta + delta_b W_{t-1})) (19); feasible iff x_t <= 1."""
    token = region.weighted_divergence / delta
    if region.delta_b is None:
        return token
    spent = region.weighted_divergence.cumsum(-1)
    allowance = delta + region.delta_b * exclusive_cumsum(region.weights)
    return torch.maximum(token, spent / allowance)


@torch.no_grad()
def update_mask(
    region: TrustRegion,
    log_ratio: Tensor,
    advantages: Tensor,
    *,
    delta: float,
    gate: Literal["hard", "soft"] = "hard",
) -> Tensor:
    """M_t (10): 1 where the update moves rho_t towards one, else the gate of the constraints.

    Args:
        log_ratio: log rho_t.
        advantages: A_t.
        gate: "hard" is I_t = (w_t D_t <= c_t); "soft" is g(x_t) = min(1, 1/x_t) (20).

    Returns:
        M_t in [0, 1], shape and dtype of the divergence.
    """
    towards_one = advantages * log_ratio <= 0
    if gate == "hard":
        kept = (region.weighted_divergence <= region.threshold).to(region.threshold.dtype)
    elif gate == "soft":
        kept = violation(region, delta).clamp_min(1).reciprocal()
    else:
        raise ValueError(f"gate must be 'hard' or 'soft', got {gate!r}")
    return torch.where(towards_one, 1.0, kept)


def exclusive_cumsum(x: Tensor) -> Tensor:
    """Sum over j < t along the last dimension; 0 at t = 1."""
    return torch.nn.functional.pad(x.cumsum(-1)[..., :-1], (1, 0))
