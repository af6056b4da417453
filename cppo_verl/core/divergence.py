"""Token-level divergences D_t between the rollout policy mu and the current policy pi.

All of them are one distance on a partition of the vocabulary into retained tokens and "other": the
binary form retains the sampled token, the top-K form mu's K most likely tokens and the sampled one,
the exact form every token. Refining a partition never lowers the value: binary <= top-K <= exact.
Inputs are log-probabilities in any floating dtype; half precision is raised to fp32 first.
"""

from typing import Literal

import torch
from torch import Tensor

Kind = Literal["tv", "kl"]


def binary_divergence(log_pi: Tensor, log_mu: Tensor, kind: Kind = "tv") -> Tensor:
    """Divergence D_t on two categories: the sampled token, and all others.

    TV is |pi_t - mu_t|; KL is KL(mu || pi) of the two-point distributions. Source: section 3 of the paper.

    Args:
        log_pi: log-probability of the sampled token under pi, [...].
        log_mu: log-probability of the sampled token under mu, [...].
        kind: "tv" or "kl".

    Returns:
        D_t, [...], fp32 or fp64: TV in [0, 1], KL in nats.

    Raises:
        ValueError: ``kind`` is neither.
    """
    log_pi, log_mu = as_float32(log_pi), as_float32(log_mu)
    if kind == "tv":
        return (log_pi.exp() - log_mu.exp()).abs()
    return partition_divergence(log_pi.unsqueeze(-1), log_mu.unsqueeze(-1), kind)


def partition_divergence(log_pi: Tensor, log_mu: Tensor, kind: Kind = "tv") -> Tensor:
    """Divergence D_t on C retained tokens and "other", the remaining mass: the exact one with C = V.

    Args:
        log_pi: log-probabilities of C distinct tokens under pi, [..., C]. A column of -inf in both is unused.
        log_mu: log-probabilities of the same tokens under mu, [..., C].
        kind: "tv" is half the L1 distance, "kl" is KL(mu || pi).

    Returns:
        D_t, [...]: TV in [0, 1], KL in nats. KL is infinite where pi gives no mass to a retained token that mu can
        sample.

    Raises:
        ValueError: ``kind`` is neither.
    """
    if kind not in ("tv", "kl"):
        raise ValueError(f"kind must be 'tv' or 'kl', got {kind!r}")
    log_pi, log_mu = as_float32(log_pi), as_float32(log_mu)
    pi, mu = log_pi.exp(), log_mu.exp()
    pi_other, mu_other = _other_mass(log_pi, pi), _other_mass(log_mu, mu)
    if kind == "tv":
        return 0.5 * ((pi - mu).abs().sum(-1) + (pi_other - mu_other).abs())
    # A mass below the others' rounding error is noise: without the floor, 1e-7 against 0 would be infinite.
    floor = torch.finfo(pi.dtype).eps
    other = mu_other * (mu_other.clamp_min(floor) / pi_other.clamp_min(floor)).log()
    retained = torch.where(mu > 0, mu * (log_mu - log_pi), torch.zeros_like(mu)).sum(-1)
    return (retained + other).clamp_min(0)


def top_k_divergence(log_pi: Tensor, log_mu: Tensor, sampled: Tensor, k: int, kind: Kind = "tv") -> Tensor:
    """Divergence D_t on mu's K most likely tokens, the sampled token if it is not among them, and "other".

    Args:
        log_pi: log-probabilities of the whole vocabulary under pi, [..., V].
        log_mu: the same under mu, [..., V].
        sampled: ids of the sampled tokens, [...].
        k: K >= 1. From K = V on, every token is retained and the value is the exact divergence.
        kind: "tv" or "kl".

    Returns:
        D_t, [...]: TV in [0, 1], KL in nats.

    Raises:
        ValueError: ``k`` is below 1, or ``kind`` is neither.
    """
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    top = log_mu.topk(min(k, log_mu.shape[-1]), dim=-1).indices
    sampled = sampled.unsqueeze(-1)
    ids = torch.cat([top, sampled], dim=-1)
    return candidate_divergence(log_pi.gather(-1, ids), log_mu.gather(-1, ids), (top == sampled).any(-1), kind)


def candidate_divergence(log_pi: Tensor, log_mu: Tensor, sampled_is_top: Tensor, kind: Kind = "tv") -> Tensor:
    """Top-K divergence D_t from the log-probabilities of the retained tokens alone.

    Args:
        log_pi: log-probabilities under pi of mu's K most likely tokens and, in the last column, of the sampled token,
            [..., K + 1].
        log_mu: the same under mu, [..., K + 1].
        sampled_is_top: whether the sampled token is among the K, [...]; its column is unused then.
        kind: "tv" or "kl".

    Returns:
        D_t, [...]: TV in [0, 1], KL in nats.

    Raises:
        ValueError: ``kind`` is neither.
    """
    unused = torch.nn.functional.pad(sampled_is_top.unsqueeze(-1), (log_mu.shape[-1] - 1, 0))
    return partition_divergence(log_pi.masked_fill(unused, -torch.inf), log_mu.masked_fill(unused, -torch.inf), kind)


@torch.no_grad()
def gather_logits(
    logits: Tensor,
    ids: Tensor,
    rows: Tensor,
    group: "torch.distributed.ProcessGroup | None" = None,
    first_column: int = 0,
) -> Tensor:
    """Logits of a few tokens, without gradient, also where several ranks hold parts of the logits.

    Each number is held by one rank of the group and is zero on the others, so that their sum, one all-reduce, is exact.
    On an accelerator no value is looked at, so that the host waits for nothing.

    Args:
        logits: those of this rank, shape [N, W], any floating dtype.
        ids: token ids, shape [R, C]; the same on all ranks.
        rows: which rows of the logits, shape [R]; those outside of 0..N-1 are another rank's.
        group: the ranks, each with as many rows and columns; None if this one has all.
        first_column: id of the token that the first of the W columns belongs to.

    Returns:
        Shape [R, C], fp32 or fp64; NaN where none holds a logit.
    """
    rows, columns, (height, width) = rows.unsqueeze(-1), ids - first_column, logits.shape
    held = (rows >= 0) & (rows < height) & (columns >= 0) & (columns < width)
    found = as_float32(logits[rows.clamp(0, height - 1), columns.clamp(0, width - 1)])
    if group is None:
        return found.where(held, torch.nan)
    found = torch.stack([found.where(held, 0), held.to(found.dtype)])
    torch.distributed.all_reduce(found, group=group)
    return found[0].where(found[1] > 0, torch.nan)


def log_probs_beside(logits: Tensor, log_prob: Tensor) -> Tensor:
    """Log-probabilities of tokens whose logits are known beside those of one with a known log-probability.

    log pi(v) = z_v - z_y + log pi(y), where y is that one and z are the logits. So all of them have the rounding of
    log pi(y), which is that of the logits' normaliser: 2e-6 in fp32 where that is 20 to 30.

    Args:
        logits: z, that of y in the last column, shape [..., C].
        log_prob: log pi(y), shape [...].

    Returns:
        Shape [..., C], fp32.
    """
    logits = logits.double()
    return (logits - logits[..., -1:] + log_prob.unsqueeze(-1)).float()


def as_float32(x: Tensor) -> Tensor:
    """Raise half precision to fp32 and leave fp32 and fp64 alone.

    Args:
        x: any shape and floating dtype.

    Returns:
        The same shape, fp32 or fp64.
    """
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def _other_mass(log_p: Tensor, p: Tensor) -> Tensor:
    # expm1 keeps the digits of 1 - p that a sharp policy's p = 0.9999999 loses.
    other = -torch.expm1(log_p[..., 0]) if p.shape[-1] == 1 else 1 - p.sum(-1)
    return other.clamp_min(0)
