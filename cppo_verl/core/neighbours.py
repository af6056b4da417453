"""Rules of CPPO's neighbours that are no value of its own settings.

The conventions are those of `cppo_verl.core.trust_region`: per-token tensors [..., L], a boolean ``mask`` of the valid
tokens, no gradient. M_t is 0 or 1, in the dtype of the inputs.
"""

import torch
from torch import Tensor

from cppo_verl.core.divergence import binary_divergence


@torch.no_grad()
def kpop_mask(log_pi: Tensor, log_mu: Tensor, phi: float) -> Tensor:
    """M_t of KPop (Guo et al., Ant Group), which keeps a token whatever the direction of its update.

    It keeps the tokens whose larger one of KL(mu || pi) and KL(pi || mu), on {sampled token, all others}, is at most
    phi. Read in verl pull request 6800 and in prime-rl pull request 3283.

    Args:
        log_pi, log_mu: log-probability of the sampled token, [..., L].
        phi: threshold in nats; 0.1 is said to be its authors' in prime-rl.
    """
    forward, backward = binary_divergence(log_pi, log_mu, "kl"), binary_divergence(log_mu, log_pi, "kl")
    return (torch.maximum(forward, backward) <= phi).to(forward.dtype)


@torch.no_grad()
def vaco_mask(log_ratio: Tensor, advantages: Tensor, mask: Tensor, delta: float) -> Tensor:
    """M_t of VACO (arXiv 2603.01365) for language models, as its co-author wrote it in open-instruct pull request 1681.

    It drops the tokens whose updates move rho_t away from one, in responses whose mean of |rho_t - 1| over valid tokens
    exceeds ``delta``. That mean is twice an estimate of the response's mean TV.

    Args:
        log_ratio, advantages: log rho_t and A_t, [..., L].
        delta: threshold; the pull request's own example has 2.0.
    """
    deviation = torch.where(mask, (log_ratio.exp() - 1).abs(), 0.0).sum(-1, keepdim=True)
    near = deviation <= delta * mask.sum(-1, keepdim=True)
    return ((advantages * log_ratio <= 0) | near).to(log_ratio.dtype)
