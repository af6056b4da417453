"""The two coupled constraints of CPPO, in the order of the paper (arXiv 2606.10968).

Every function takes per-token tensors of shape [..., L] and a boolean ``mask`` of the same shape that is true on the T
valid tokens of a response. Tokens outside the mask (padding, tool output) have w = D = 0 and do not advance t, wherever
they stand. ``delta`` is the token threshold. Results are of shape [..., L] where nothing else is said. Nothing here
carries a gradient.

An infinite D_t, which KL has where pi gives no mass to a token that mu can sample, violates both constraints: it uses
up the prefix budget, and every gate takes its limit on this token and those after it.
"""

from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

Gate = Literal["hard", "soft", "sapo", "penalty"]


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


def position_weights(
    mask: Tensor, w_min: float, dtype: torch.dtype = torch.float32, horizon: int | None = None
) -> Tensor:
    """Position weights w_t = 1 - (1 - w_min)(t - 1)/(T - 1) (9).

    w_1 = 1 where T = 1: ours, the paper divides by zero.

    Args:
        mask: valid tokens, [..., L]; may hold 0 and 1 in ``dtype`` too.
        w_min: weight of the last token, in (0, 1].
        dtype: of the result.
        horizon: T for all responses alike, whose later tokens keep w_min; None for each one's number of valid tokens.

    Returns:
        w_t, [..., L]; 0 outside the mask.
    """
    valid = mask.to(dtype)
    elapsed = valid.cumsum(-1).sub_(1)
    steps = elapsed[..., -1:].clone() if horizon is None else torch.full_like(elapsed[..., -1:], horizon - 1)
    w = torch.addcmul(elapsed.new_ones(()), elapsed, (w_min - 1) / steps.clamp_min_(1))
    if horizon is not None:
        w.clamp_min_(w_min)
    return w.mul_(valid)


def shuffled_weights(
    mask: Tensor, w_min: float, dtype: torch.dtype = torch.float32, generator: torch.Generator | None = None
) -> Tensor:
    """The weights of (9) at random positions within each response: the ablation of Figure 5.

    Args:
        mask: valid tokens, [..., L].
        w_min: weight of the last token before shuffling, in (0, 1].
        dtype: of the result.
        generator: of the random order; torch's default if None.

    Returns:
        w_t, [..., L]; 0 outside the mask.
    """
    keys = torch.rand(mask.shape, device=mask.device, generator=generator)
    order = torch.where(mask, keys, torch.inf).argsort(-1)
    t = torch.empty_like(order).scatter_(-1, order, torch.arange(mask.shape[-1], device=mask.device).expand_as(order))
    steps = (mask.sum(-1, keepdim=True) - 1).clamp_min(1)
    return torch.where(mask, 1 - (1 - w_min) * (t.to(dtype) / steps), 0.0)


@torch.no_grad()
def adaptive_budget(
    divergence: Tensor, mask: Tensor, delta_b_min: float, upper: float = 2.0, p90: Tensor | None = None
) -> Tensor:
    """Adaptive budget of a response, delta_b(y) = clamp(P90(D_1..D_T), delta_b_min, upper delta_b_min) (22).

    Args:
        divergence: D_t, [..., L].
        mask: valid tokens, [..., L].
        delta_b_min: lower clamp, > 0, in units of D_t.
        upper: upper clamp in units of ``delta_b_min``, >= 1; the paper's is 2.
        p90: ``masked_quantile(divergence, mask, 0.9)``, [..., 1], if the caller has it already.

    Returns:
        delta_b, [..., 1]; delta_b_min for an empty response.
    """
    p90 = masked_quantile(divergence, mask, 0.9) if p90 is None else p90
    return p90.clamp(delta_b_min, upper * delta_b_min)


@torch.no_grad()
def masked_quantile(x: Tensor, mask: Tensor, q: float) -> Tensor:
    """Quantile over each response's valid tokens, interpolated linearly between ranks.

    Args:
        x: values, [..., L].
        mask: valid tokens, [..., L].
        q: the quantile, in [0, 1].

    Returns:
        [..., 1]; 0 for an empty response. Between a finite and an infinite value it is infinite.
    """
    ordered = _sort(torch.where(mask, x, torch.inf))
    length = mask.sum(-1, keepdim=True)
    rank = q * (length - 1).clamp_min(0).to(torch.float64)
    low, high = (ordered.gather(-1, r.long()) for r in (rank.floor(), rank.ceil()))
    # lerp towards infinity is nan.
    value = torch.where(high.isinf(), high, low.lerp(high, (rank - rank.floor()).to(x.dtype)))
    return torch.where(length > 0, value, 0.0)


@torch.no_grad()
def build_trust_region(
    divergence: Tensor,
    mask: Tensor,
    *,
    delta: float,
    delta_b: Tensor | float | None,
    w_min: float = 1.0,
    weights: Tensor | None = None,
) -> TrustRegion:
    """Both constraints of every token, with the effective threshold c_t (8).

    c_t = min(delta, delta + delta_b W_{t-1} - S_{t-1}), where S_t and W_t are the sums of w_j D_j and of w_j over
    j <= t. DPPO is the limit w_min = 1, delta_b = None.

    Args:
        divergence: D_t >= 0, [..., L], fp32 or fp64; values outside the mask are ignored.
        mask: valid tokens, [..., L].
        delta: token threshold, > 0, in units of D_t.
        delta_b: prefix-average threshold, a number or [..., 1]; None for no prefix budget, which leaves c_t = delta.
        w_min: weight of the last token, in (0, 1].
        weights: w_t, [..., L], in place of those that (9) makes of ``w_min``; zero outside the mask.

    Returns:
        `TrustRegion`, in the dtype of the divergence.
    """
    w = position_weights(mask, w_min, divergence.dtype) if weights is None else weights.to(divergence.dtype)
    wd = torch.where(mask, w * divergence, 0.0)
    if delta_b is None:
        return TrustRegion(wd, w, torch.full_like(wd, delta), None)
    delta_b = torch.as_tensor(delta_b, dtype=wd.dtype, device=wd.device).expand(*wd.shape[:-1], 1)
    # S_{t-1} - delta_b W_{t-1} as one sum of centred terms: the difference of two long sums would
    # lose the digits that decide at 64k tokens.
    drift = exclusive_cumsum(torch.addcmul(wd, delta_b, w, value=-1))
    return TrustRegion(wd, w, drift.clamp_min_(0).neg_().add_(delta), delta_b)


@torch.no_grad()
def violation(region: TrustRegion, delta: float) -> Tensor:
    """How far a token violates the constraints, x_t = max(w_t D_t / delta, S_t / (delta + delta_b W_{t-1})) (19).

    Args:
        region: the constraints of each token.
        delta: token threshold of that region, > 0.

    Returns:
        x_t, [..., L]; the token is feasible iff x_t <= 1.
    """
    token = region.weighted_divergence / delta
    if region.delta_b is None:
        return token
    spent = region.weighted_divergence.cumsum(-1)
    allowance = delta + region.delta_b * exclusive_cumsum(region.weights)
    return torch.maximum(token, spent / allowance)


@torch.no_grad()
def update_mask(
    region: TrustRegion, log_ratio: Tensor, advantages: Tensor, *, delta: float, gate: Gate = "hard", tau: float = 1.0
) -> Tensor:
    """Mask M_t (10): 1 where the update moves rho_t towards one, else the gate of the constraints.

    Args:
        region: the constraints of each token.
        log_ratio: log rho_t, [..., L].
        advantages: A_t, [..., L].
        delta: token threshold of that region, > 0.
        gate: of the violation x_t (19).
            "hard" is I_t = (w_t D_t <= c_t), the same as x_t <= 1.
            "soft" is g(x_t) = min(1, 1/x_t) (20).
            "sapo" is 4 s(tau x_t) (1 - s(tau x_t)), s the logistic function: SAPO's gate
            (arXiv 2511.20347) with x_t where that has rho_t - 1. It is below 1 inside the region too.
            "penalty" is 1 - x_t, and 1 + x_t towards one: the gradient of DRPO's quadratic penalty
            (arXiv 2606.09821), which pulls back beyond the boundary. DRPO itself has x_t = D_t / delta,
            which is w_min = 1, delta_b = None and binary TV.
        tau: sharpness of "sapo", > 0.

    Returns:
        M_t, [..., L], in the dtype of the divergence; in [0, 1] but for "penalty", which is unbounded: an infinite D_t
        makes it infinite too, where the other gates are 0.

    Raises:
        ValueError: there is no such ``gate``.
    """
    towards_one = advantages * log_ratio <= 0
    if gate == "hard":
        return (towards_one | (region.weighted_divergence <= region.threshold)).to(region.threshold.dtype)
    elif gate == "soft":
        kept = violation(region, delta).clamp_min(1).reciprocal()
    elif gate == "sapo":
        s = torch.sigmoid(tau * violation(region, delta))
        kept = 4 * s * (1 - s)
    elif gate == "penalty":
        x = violation(region, delta)
        return torch.where(towards_one, 1 + x, 1 - x)
    else:
        raise ValueError(f"gate must be one of {get_args(Gate)}, got {gate!r}")
    return torch.where(towards_one, 1.0, kept)


@torch.no_grad()
def response_mask_by_divergence(
    divergence: Tensor, mask: Tensor, *, delta: float | None, delta_avg: float | None
) -> Tensor:
    """Mask M_t of TRM (arXiv 2512.23075), which keeps or drops a response whole, whatever the direction of its updates.

    Args:
        divergence: D_t, [..., L]; values outside the mask are ignored.
        mask: valid tokens, [..., L].
        delta: TRM-Max keeps the response if max_t D_t <= delta; None leaves this out.
        delta_avg: TRM-Avg keeps it if the mean of D_t <= delta_avg; None leaves this out.

    Returns:
        M_t in {0, 1}, [..., L], in the dtype of the divergence.

    Raises:
        ValueError: both thresholds are None.
    """
    if delta is None and delta_avg is None:
        raise ValueError("TRM needs a threshold: delta on the maximum, delta_avg on the mean, or both")
    divergence = torch.where(mask, divergence, 0.0)
    kept = torch.ones_like(mask[..., :1])
    if delta is not None:
        kept = kept & (divergence.amax(-1, keepdim=True) <= delta)
    if delta_avg is not None:
        kept = kept & (divergence.sum(-1, keepdim=True) <= delta_avg * mask.sum(-1, keepdim=True))
    return kept.expand_as(mask).to(divergence.dtype)


def exclusive_cumsum(x: Tensor) -> Tensor:
    """Sum over the positions before t, along the last dimension.

    Args:
        x: [..., L].

    Returns:
        [..., L]; 0 at t = 1.
    """
    sums = torch.zeros_like(x)
    torch.cumsum(x[..., :-1], -1, out=sums[..., 1:])
    return sums


def _sort(x: Tensor) -> Tensor:
    if x.device.type == "cpu":
        # With vector instructions numpy sorts twenty times as fast as torch does.
        import numpy as np

        return torch.from_numpy(np.sort(x.numpy(), axis=-1))
    return x.sort(-1).values
