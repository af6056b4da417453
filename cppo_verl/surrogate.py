"""The ratio-advantage surrogate that every masked method shares, and the clipped one of prefix ratios."""

import torch
from torch import Tensor

from cppo_verl.divergence import as_float32

# exp(20) is far beyond any ratio cap in use and far from overflow in fp32.
MAX_LOG_RATIO = 20.0


def masked_surrogate(
    log_pi: Tensor, log_mu: Tensor, advantages: Tensor, update_mask: Tensor, ratio_cap: float | None = None
) -> Tensor:
    """Per-token loss whose negative sum over tokens is the surrogate (11), sum_t M_t rho_t A_t.

    Its gradient with respect to log_pi is -M_t min(rho_t, ratio_cap) A_t: the cap truncates the
    importance ratio without stopping the gradient, as DPPO does.

    Args:
        log_pi: log-probability of the sampled token under the current policy; carries the gradient.
        log_mu: the same under the rollout policy.
        advantages: A_t.
        update_mask: M_t in [0, 1], no gradient.
        ratio_cap: upper bound of rho_t; None for exp(20), the numerical bound.

    Returns:
        Loss per token in fp32 (fp64 for fp64), same shape, to be averaged by the caller.
    """
    log_pi, log_mu = as_float32(log_pi), as_float32(log_mu)
    log_ratio = (log_pi.detach() - log_mu).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    ratio = log_ratio.exp() if ratio_cap is None else log_ratio.exp().clamp_max(ratio_cap)
    weight = update_mask * ratio * advantages
    # 1 + log_pi - sg(log_pi) is one with gradient one: value and gradient without a second exp.
    return -weight * (1 + (log_pi - log_pi.detach()))


def clipped_surrogate(log_pi: Tensor, ratio: Tensor, advantages: Tensor, low: float, high: float) -> Tensor:
    """Per-token loss -sg(clip(ratio, 1 - low, 1 + high)) A_t log pi_t, as CISPO has it, with value
    -clip(ratio) A_t.

    Args:
        ratio: any importance ratio without gradient, e.g. of the functions below.
        low, high: clip-higher bounds, high >= low.
    """
    log_pi = as_float32(log_pi)
    weight = ratio.detach().clamp(1 - low, 1 + high) * advantages
    return -weight * (1 + (log_pi - log_pi.detach()))


@torch.no_grad()
def minimum_prefix_ratio(log_ratio: Tensor, mask: Tensor) -> Tensor:
    """rho_t min_{j<t} rho_j, and rho_1 at t = 1: MinPRO's (arXiv 2601.22718) surrogate for the prefix
    ratio prod_{j<=t} rho_j.

    The paper's abstract gives the ratio. Ours is what it leaves open: the minimum runs over the
    response's valid tokens before t and is not bounded by one, and the ratio is clipped without
    gradient (`clipped_surrogate`).
    """
    log_ratio = torch.where(mask, log_ratio, torch.inf).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    before = torch.nn.functional.pad(log_ratio.cummin(-1).values[..., :-1], (1, 0), value=MAX_LOG_RATIO)
    has_prefix = mask.cumsum(-1) > 1
    return torch.where(mask, (log_ratio + torch.where(has_prefix, before, 0.0)).exp(), 1.0)


@torch.no_grad()
def mean_prefix_ratio(log_ratio: Tensor, mask: Tensor) -> Tensor:
    """(prod_{j<=t} rho_j)^(1/t), the geometric mean of the prefix's ratios, PNPO's (arXiv 2608.01418).

    The source was not at hand beyond this definition; the clipping is `clipped_surrogate`'s.
    """
    log_ratio = torch.where(mask, log_ratio, 0.0).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    return (log_ratio.cumsum(-1) / mask.cumsum(-1).clamp_min(1)).exp()
