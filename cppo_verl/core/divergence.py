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


def gather_log_probs(logits: Tensor, ids: Tensor, rows: Tensor | None = None) -> Tensor:
    """Log-probabilities log_softmax(logits[rows]).gather(ids), without gradient, a few rows at a time.

    On an accelerator no value is looked at, so that the host waits for nothing.

    Args:
        logits: shape [N, V], any floating dtype.
        ids: token ids, shape [R, C].
        rows: which rows of the logits, shape [R]; all of them if None.

    Returns:
        Shape [R, C], fp32.
    """
    logits = logits.detach()
    rows = torch.arange(len(logits), device=logits.device) if rows is None else rows
    retained = logits[rows.unsqueeze(-1), ids].double()
    return (retained - _normaliser(logits, rows).unsqueeze(-1)).float()


def gather_sharded_log_probs(
    logits: Tensor, ids: Tensor, rows: Tensor, group: "torch.distributed.ProcessGroup", vocabulary: int
) -> Tensor:
    """`gather_log_probs` where the columns of the logits are split evenly over the ranks of a group, in order.

    One all-reduce brings together each rank's normaliser and the logits of the ids that it holds, C + ranks numbers a
    row. All but one of the summands of each are zero, so the sum is exact.

    Args:
        logits: the columns of this rank, shape [N, W], any floating dtype.
        ids: token ids, shape [R, C]; the same on all ranks, as are the rows.
        rows: which rows of the logits, shape [R].
        group: the ranks.
        vocabulary: how many of their columns are tokens; those after them are padding.

    Returns:
        Shape [R, C], fp32; NaN for an id that is no token.
    """
    logits, width = logits.detach(), logits.shape[-1]
    first = group.rank() * width
    column, tokens = ids - first, logits[:, : max(0, vocabulary - first)]
    held = (column >= 0) & (column < width)
    retained = logits[rows.unsqueeze(-1), column.clamp(0, width - 1)].double().where(held, 0)
    retained.masked_fill_((ids < 0) | (ids >= vocabulary), torch.nan)
    normalisers = retained.new_zeros(len(rows), group.size())
    normalisers[:, group.rank()] = _normaliser(tokens, rows) if tokens.shape[-1] else -torch.inf
    shared = torch.cat([retained, normalisers], dim=-1)
    torch.distributed.all_reduce(shared, group=group)
    retained, normalisers = shared.split([ids.shape[-1], group.size()], dim=-1)
    return (retained - normalisers.logsumexp(-1, keepdim=True)).float()


def _normaliser(logits: Tensor, rows: Tensor) -> Tensor:
    return (_cached_normaliser if logits.device.type == "cpu" else _block_normaliser)(logits, rows)


def _block_normaliser(logits: Tensor, rows: Tensor, block_bytes: int = 2**24) -> Tensor:
    """logsumexp(logits[rows]) of shape [R], fp64, in blocks that are large enough to keep an accelerator busy."""
    blocks = []
    for part in rows.split(max(1, block_bytes // (4 * logits.shape[-1]))):
        x = logits[part].float()
        largest = x.amax(-1, keepdim=True).clamp_min_(torch.finfo(x.dtype).min)  # a shard may have no mass at all
        blocks.append(largest.squeeze(-1).double() + x.sub_(largest).exp_().sum(-1).log_())
    return torch.cat(blocks)


def _cached_normaliser(logits: Tensor, rows: Tensor, buffer_bytes: int = 2**21) -> Tensor:
    """logsumexp(logits[rows]) of shape [R], fp64, reading the logits once.

    The exponentials are summed in a buffer that stays in the processor's cache, which is four times faster than the
    memory, and is all that is allocated beside the result.
    """
    index, vocabulary = rows.tolist(), logits.shape[-1]
    step = max(1, min(len(rows), buffer_bytes // (4 * vocabulary)))
    buffer = torch.empty((step, vocabulary), dtype=torch.float32)
    total = torch.empty(len(rows), dtype=torch.float32)
    for start in range(0, len(rows), step):
        part = index[start : start + step]
        # Neighbours, as a response's rows are, need no copy.
        neighbours = part[-1] - part[0] == len(part) - 1 and part == list(range(part[0], part[-1] + 1))
        taken = logits[part[0] : part[-1] + 1] if neighbours else logits[part]
        x = buffer[: len(taken)]
        # Not shifted by the largest logit first, which is a pass more; where fp32 does not reach, see below.
        x = torch.exp(taken, out=x) if taken.dtype == x.dtype else x.copy_(taken).exp_()
        torch.sum(x, -1, out=total[start : start + step])
    normaliser = total.double().log_()
    out_of_range = ((total < 1e-30) | ~total.isfinite()).nonzero().flatten()
    for part in out_of_range.split(step):
        normaliser[part] = logits[rows[part]].double().logsumexp(-1)
    return normaliser


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
