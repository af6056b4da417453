"""The ratio-advantage surrogate that every masked method shares, and the weights of prefix ratios."""

import math
from typing import Any

import torch
from torch import Tensor

from cppo_verl.core.divergence import as_float32

MAX_LOG_RATIO = 20.0
"""exp(20) is far beyond any ratio cap in use and far from overflow in fp32."""


@torch.no_grad()
def surrogate_weight(
    log_ratio: Tensor, advantages: Tensor, update_mask: Tensor, ratio_cap: float | None = None
) -> Tensor:
    """Weight M_t min(rho_t, ratio_cap) A_t, which multiplies grad log pi_t in the surrogate (11).

    Args:
        log_ratio: log rho_t = log pi(y_t | s_t) - log mu(y_t | s_t), [..., L], fp32 or fp64.
        advantages: A_t, [..., L].
        update_mask: M_t, [..., L].
        ratio_cap: upper bound of rho_t, which truncates the importance ratio without stopping the gradient, as DPPO
            does; None for exp(20), the numerical bound.

    Returns:
        [..., L], in the dtype of ``log_ratio``.
    """
    upper = MAX_LOG_RATIO if ratio_cap is None else min(math.log(ratio_cap), MAX_LOG_RATIO)
    return log_ratio.clamp(-MAX_LOG_RATIO, upper).exp_().mul_(advantages).mul_(update_mask)


@torch.no_grad()
def clipped_weight(ratio: Tensor, advantages: Tensor, low: float, high: float) -> Tensor:
    """Weight clip(ratio, 1 - low, 1 + high) A_t, clipped without gradient as CISPO's is.

    Args:
        ratio: an importance ratio per token, [..., L].
        advantages: A_t, [..., L].
        low: 1 - low is the lower bound; none from 1 on.
        high: 1 + high is the upper bound.

    Returns:
        [..., L], in the dtype of ``ratio``.
    """
    return ratio.clamp(1 - low, 1 + high) * advantages


class WeightedLogProb(torch.autograd.Function):
    """The weight itself, whose gradient with respect to log_pi is the weight too.

    Its gradient is that of weight_t rho_t / sg(rho_t), without the exponential and what it would store. Its sum is the
    surrogate (11), sum_t M_t rho_t A_t, for `surrogate_weight` without a cap.
    """

    @staticmethod
    def forward(ctx: Any, log_pi: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.dtype = log_pi.dtype
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (weight,) = ctx.saved_tensors
        return (grad * weight).to(ctx.dtype), None


def masked_surrogate(
    log_pi: Tensor, log_mu: Tensor, advantages: Tensor, update_mask: Tensor, ratio_cap: float | None = None
) -> Tensor:
    """Per-token loss -M_t min(rho_t, ratio_cap) A_t, whose negative sum is the surrogate (11).

    Args:
        log_pi: log pi(y_t | s_t), [..., L]; carries the gradient, which is the loss itself.
        log_mu: log mu(y_t | s_t), [..., L].
        advantages: A_t, [..., L].
        update_mask: M_t, [..., L].
        ratio_cap: as for `surrogate_weight`.

    Returns:
        [..., L], fp32 (fp64 for fp64).
    """
    log_ratio = as_float32(log_pi.detach()) - as_float32(log_mu)
    return -WeightedLogProb.apply(log_pi, surrogate_weight(log_ratio, advantages, update_mask, ratio_cap))


@torch.no_grad()
def minimum_prefix_ratio(log_ratio: Tensor, mask: Tensor) -> Tensor:
    """MinPRO's ratio (arXiv 2601.22718), rho_t min_{j<t} rho_j, in place of prod_{j<=t} rho_j; rho_1 at t = 1.

    The ratio is the abstract's; that it is clipped without gradient (`clipped_weight`) is confirmed second-hand, its
    bounds are printed nowhere. Ours: the minimum runs over the response's valid tokens before t and is not bounded by
    one.

    Args:
        log_ratio: log rho_t, [..., L].
        mask: valid tokens, [..., L].

    Returns:
        [..., L]; 1 outside the mask.
    """
    log_ratio = torch.where(mask, log_ratio, torch.inf).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    before = torch.nn.functional.pad(log_ratio.cummin(-1).values[..., :-1], (1, 0), value=MAX_LOG_RATIO)
    has_prefix = mask.cumsum(-1) > 1
    return torch.where(mask, (log_ratio + torch.where(has_prefix, before, 0.0)).exp(), 1.0)


@torch.no_grad()
def mean_prefix_ratio(log_ratio: Tensor, mask: Tensor) -> Tensor:
    """PNPO's ratio (arXiv 2608.01418), (prod_{j<=t} rho_j)^(1/t): the geometric mean of the prefix's ratios.

    Only this definition is PNPO's; the clipping is `clipped_weight`'s, as for MinPRO.

    Args:
        log_ratio: log rho_t, [..., L].
        mask: valid tokens, [..., L].

    Returns:
        [..., L]; outside the mask the ratio of the valid prefix.
    """
    log_ratio = torch.where(mask, log_ratio, 0.0).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    return (log_ratio.cumsum(-1) / mask.cumsum(-1).clamp_min(1)).exp()
