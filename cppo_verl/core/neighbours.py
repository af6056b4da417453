"""Rules of CPPO's neighbours that are no value of its own settings.

The conventions are those of `cppo_verl.core.trust_region`: per-token tensors [..., L], a boolean ``mask`` of the valid
tokens, no gradient. M_t is 0 or 1, in the dtype of the inputs.
"""

import torch
from torch import Tensor

from cppo_verl.core.divergence import binary_divergence


@torch.no_grad()
def kpop_mask(log_pi: Tensor, log_mu: Tensor, phi: float) -> Tensor:
    """Mask M_t of KPop (Guo et al., Ant Group), which keeps a token whatever the direction of its update.

    It keeps the tokens whose larger one of KL(mu || pi) and KL(pi || mu), on {sampled token, all others}, is at most
    phi. Read in verl pull request 6800 and in prime-rl pull request 3283.

    Args:
        log_pi: log-probability of the sampled token under pi, [..., L].
        log_mu: log-probability of the sampled token under mu, [..., L].
        phi: threshold in nats, > 0; 0.1 is said to be its authors' in prime-rl.

    Returns:
        M_t in {0, 1}, [..., L].
    """
    forward, backward = binary_divergence(log_pi, log_mu, "kl"), binary_divergence(log_mu, log_pi, "kl")
    return (torch.maximum(forward, backward) <= phi).to(forward.dtype)


@torch.no_grad()
def vaco_mask(log_ratio: Tensor, advantages: Tensor, mask: Tensor, delta: float) -> Tensor:
    """Mask M_t of VACO (arXiv 2603.01365) for language models.

    The rule is that of its co-author's open-instruct pull request 1681.
    It drops the tokens whose updates move rho_t away from one, in responses whose mean of |rho_t - 1| over valid tokens
    exceeds ``delta``. That mean is twice an estimate of the response's mean TV.

    Args:
        log_ratio: log rho_t, [..., L].
        advantages: A_t, [..., L].
        mask: valid tokens, [..., L].
        delta: threshold, > 0; the pull request's own example has 2.0.

    Returns:
        M_t in {0, 1}, [..., L].
    """
    deviation = torch.where(mask, (log_ratio.exp() - 1).abs(), 0.0).sum(-1, keepdim=True)
    near = deviation <= delta * mask.sum(-1, keepdim=True)
    return ((advantages * log_ratio <= 0) | near).to(log_ratio.dtype)
