"""The ratio-advantage surrogate that every masked method shares."""

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
