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
from torch.nn.functional import pad

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


def count(valid: Tensor) -> tuple[Tensor, Tensor]:
    """Number t of each token among the valid ones of its response, and their number T.

    Args:
        valid: the mask as 0 and 1, [..., L].

    Returns:
        t, [..., L], the last valid token's outside the mask; T, [..., 1].
    """
    t = valid.cumsum(-1)
    return t, t[..., -1:]


def position_weights(
    mask: Tensor,
    w_min: float,
    dtype: torch.dtype = torch.float32,
    horizon: int | None = None,
    counted: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Position weights w_t = 1 - (1 - w_min)(t - 1)/(T - 1) (9).

    w_1 = 1 where T = 1: ours, the paper divides by zero.

    Args:
        mask: valid tokens, [..., L]; may hold 0 and 1 in ``dtype`` too.
        w_min: weight of the last token, in (0, 1].
        dtype: of the result.
        horizon: T for all responses alike, whose later tokens keep w_min; None for each one's number of valid tokens.
        counted: `count` of the mask, if the caller has it already.

    Returns:
        w_t, [..., L]; 0 outside the mask.
    """
    valid = mask.to(dtype)
    t, length = count(valid) if counted is None else counted
    steps = length - 1 if horizon is None else torch.full_like(length, horizon - 1)
    w = torch.addcdiv(valid, (t - 1).mul_(valid), steps.clamp_min_(1), value=w_min - 1)
    return w if horizon is None else w.clamp_min_(w_min).mul_(valid)


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
        x: values >= 0, [..., L]; those outside the mask are ignored.
        mask: valid tokens, [..., L].
        q: the quantile, in [0, 1].

    Returns:
        [..., 1]; 0 for an empty response. Between a finite and an infinite value it is infinite.
    """
    return quantile_of_largest(torch.where(mask, x, 0.0), mask.sum(-1, keepdim=True), q)


@torch.no_grad()
def quantile_of_largest(x: Tensor, number: Tensor, q: float) -> Tensor:
    """Quantile over the ``number`` largest values of each row, interpolated linearly between ranks.

    These are a response's valid tokens, where ``x`` is not negative and zero on all others.

    Args:
        x: values, [..., L].
        number: how many, [..., 1], in any dtype.
        q: the quantile, in [0, 1].

    Returns:
        [..., 1]; the largest value where ``number`` is 0. Between a finite and an infinite value it is infinite.
    """
    length, number = x.shape[-1], number.double().clamp_min(1)
    # No quantile lies below that of a whole row.
    ordered = _sort_from(x, int(q * (length - 1)))
    rank = torch.add(length - number, number - 1, alpha=q)
    low, high = (ordered.gather(-1, r.long()) for r in (rank, rank.ceil()))
    # lerp towards infinity is nan.
    return low.lerp(high, rank.frac().to(x.dtype)).nan_to_num_(nan=torch.inf, posinf=torch.inf)


@torch.no_grad()
def build_trust_region(
    divergence: Tensor,
    mask: Tensor | None,
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
        mask: valid tokens, [..., L]; None where ``weights`` are given and the divergence is zero outside the mask.
        delta: token threshold, > 0, in units of D_t.
        delta_b: prefix-average threshold, a number or [..., 1]; None for no prefix budget, which leaves c_t = delta.
        w_min: weight of the last token, in (0, 1].
        weights: w_t, [..., L], in place of those that (9) makes of ``w_min``; zero outside the mask.

    Returns:
        `TrustRegion`, in the dtype of the divergence.
    """
    if mask is not None:
        divergence = torch.where(mask, divergence, 0.0)
        weights = position_weights(mask, w_min, divergence.dtype) if weights is None else weights
    assert weights is not None, "without a mask, weights must be given"
    w = weights.to(divergence.dtype)
    wd = w * divergence
    if delta_b is None:
        return TrustRegion(wd, w, torch.full_like(wd, delta), None)
    if not isinstance(delta_b, Tensor):
        delta_b = torch.full_like(wd[..., :1], delta_b)
    delta_b = delta_b.to(wd)
    # delta_b W_{t-1} - S_{t-1} as one sum of centred terms: the difference of two long sums would
    # lose the digits that decide at 64k tokens.
    credit = exclusive_cumsum((delta_b - divergence).mul_(w))
    return TrustRegion(wd, w, credit.clamp_max_(0).add_(delta), delta_b)


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
    direction = advantages * log_ratio
    if gate == "hard":
        # Compared in place, which gives numbers: booleans and their conversion take six times as long on a CPU.
        excess = region.weighted_divergence - region.threshold
        return torch.minimum(direction, excess, out=excess).le_(0)
    towards_one = direction <= 0
    if gate == "soft":
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
    return pad(x, (1, -1)).cumsum_(-1)


def _sort_from(x: Tensor, first: int) -> Tensor:
    """Rows in ascending order from position ``first`` on; what stands before it is not larger."""
    if x.device.type == "cpu":
        # With vector instructions numpy sorts twenty times as fast as torch does.
        import numpy as np

        ordered = np.partition(x.numpy(), first, axis=-1)
        ordered[..., first:].sort(axis=-1)
        return torch.from_numpy(ordered)
    return x.sort(-1).values
