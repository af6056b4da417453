"""D_t on mu's most likely tokens, taken from the actor's own forward pass.

verl's engines call the loss function twice for each micro-batch: with the logits z, before they are reduced to
log-probabilities, and with log pi(y) of the sampled tokens y. The first call, which verl makes for its distillation
losses (``distillation_use_topk``), keeps the logits of mu's candidates and of y. The second has the candidates'
log-probabilities from them: log pi(v) = z_v - z_y + log pi(y). So the vocabulary is not read a second time.
"""

from typing import NamedTuple

import torch
from tensordict import TensorDict
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.nn.functional import pad
from verl.utils.ulysses import get_ulysses_sequence_parallel_group, get_ulysses_sequence_parallel_rank
from verl.workers.config import ActorConfig
from verl.workers.utils.losses import ppo_loss

from cppo_verl.core.divergence import Kind, candidate_divergence, gather_logits, log_probs_beside
from cppo_verl.plugin.config import MaskedLossConfig
from cppo_verl.plugin.losses import loss_context
from cppo_verl.plugin.topk.codec import ABSENT, CODES_FIELD, IDS_FIELD, UNIT, decode, encode, unpack

LOGITS_FIELD = "cppo_logits"
"""Field of a micro-batch between the two calls, by `retained_logits`."""
TOLERANCE = round(1e-5 / UNIT)
"""Difference of two codes that may still be roundings of one log-probability."""


class Layout(NamedTuple):
    """Where the engine keeps the logits of a micro-batch."""

    starts: Tensor
    """The row of this rank's logits at which each row of the micro-batch begins, [B]; it may lie outside of them."""
    group: ProcessGroup | None = None
    """The ranks that share the logits, each with some tokens (FSDP) or some columns of the vocabulary (Megatron)."""
    first_column: int = 0
    """Id of the token that this rank's first column belongs to."""


def top_k_ppo_loss(
    config: ActorConfig,
    model_output: dict | None = None,
    data: TensorDict | None = None,
    dp_group: ProcessGroup | None = None,
    student_logits: Tensor | None = None,
    data_format: str | None = None,
) -> tuple[Tensor, dict] | dict[str, Tensor]:
    """verl's ``ppo_loss`` with a top-K D_t.

    Called with ``student_logits`` [1 or B, tokens, columns], those that this rank holds, it keeps some of them in
    ``data`` and returns {}. Called with the model's output, it returns the loss and its metrics.

    Args:
        data_format: how Megatron's engine has laid the micro-batch out; FSDP's engine does not say.
    """
    policy_loss = config.policy_loss
    assert isinstance(policy_loss, MaskedLossConfig) and data is not None
    if student_logits is not None:
        if data_format is None:
            layout = fsdp_layout(data, student_logits)
        else:
            layout = megatron_layout(data, student_logits, data_format)
        data[LOGITS_FIELD] = retained_logits(student_logits.flatten(0, 1), data, layout)
        return {}
    assert model_output is not None
    if LOGITS_FIELD not in data:
        raise RuntimeError(
            f"verl's {config.strategy} engine has not shown the logits of this micro-batch to the loss before its "
            "log-probabilities, which the top-K divergences need: use divergence=binary_tv"
        )
    divergence = token_divergence(data.pop(LOGITS_FIELD), model_output["log_probs"], data, policy_loss.kind)
    with loss_context(divergence=divergence):
        return ppo_loss(config, model_output, data, dp_group)


def fsdp_layout(data: TensorDict, logits: Tensor) -> Layout:
    """One row after the other, padded at the end to equal parts of the Ulysses sequence-parallel ranks."""
    first = get_ulysses_sequence_parallel_rank() * logits.shape[1]  # 0 without such ranks
    return Layout(data["input_ids"].offsets()[:-1] - first, get_ulysses_sequence_parallel_group())


def megatron_layout(data: TensorDict, logits: Tensor, data_format: str) -> Layout:
    """Each row padded: "thd" to a multiple of the tensor-parallel size, "bshd" to the longest row."""
    from megatron.core.parallel_state import get_tensor_model_parallel_group

    group, input_ids = get_tensor_model_parallel_group(), data["input_ids"]
    lengths, tokens = input_ids.offsets().diff(), len(input_ids.values())
    if data_format == "bshd":
        padded = torch.full_like(lengths, logits.shape[1])
    elif not tokens <= logits.shape[1] <= tokens + (group.size() - 1) * len(lengths):
        raise RuntimeError(
            f"Megatron's engine has laid {tokens} tokens of {len(lengths)} rows out in {logits.shape[1]} logits, where "
            f"the top-K divergences look for each row from a multiple of {group.size()} on: use divergence=binary_tv"
        )
    else:
        padded = (lengths + group.size() - 1) // group.size() * group.size()
    return Layout(padded.cumsum(0) - padded, group, group.rank() * logits.shape[-1])


@torch.no_grad()
def retained_logits(logits: Tensor, data: TensorDict, layout: Layout) -> Tensor:
    """The logits of mu's candidates and the sampled token where each response token is predicted.

    Args:
        logits: [n, columns], what this rank holds of the micro-batch: prompt and response of each row, one after the
            other.
        data: the micro-batch, its tensors nested [B, (tokens)] or [B, (tokens), K].

    Returns:
        Nested [B, (tokens), K + 1], fp32 or fp64, on each rank of the group; the sampled token's last, NaN for an
        absent candidate.
    """
    ids, _ = _candidates(data)
    retained = torch.cat([ids, data["responses"].values().unsqueeze(-1)], dim=-1)
    found = gather_logits(logits, retained, _places(data, layout.starts), layout.group, layout.first_column)
    return torch.nested.nested_tensor_from_jagged(found, data["responses"].offsets())


@torch.no_grad()
def token_divergence(logits: Tensor, log_probs: Tensor, data: TensorDict, kind: Kind) -> Tensor:
    """D_t at the valid response tokens of a micro-batch, zero elsewhere.

    Args:
        logits: nested [B, (tokens), K + 1], by `retained_logits`.
        log_probs: nested [B, (tokens of prompt and response)], at each token log pi of the one that follows it.
        data: the micro-batch, its tensors nested [B, (tokens)] or [B, (tokens), K].
        kind: "tv" or "kl".

    Returns:
        [B, L] with the longest response's L, fp32.

    Raises:
        ValueError: candidates that do not belong to their tokens (all are checked, each time); log-probabilities in
            half precision.
    """
    if log_probs.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"the actor's log-probabilities are {log_probs.dtype}, too coarse for a top-K divergence, which makes "
            "those of mu's tokens from them: train in fp32, or use divergence=binary_tv"
        )
    valid, sampled = data["response_mask"].values().bool(), data["responses"].values()
    ids, codes = _candidates(data)
    is_sampled = ids == sampled.unsqueeze(-1)
    log_mu_sampled = data["rollout_log_probs"].values().float()
    check_alignment(ids, codes, is_sampled, log_mu_sampled, valid, data["responses"].offsets())

    log_pi_sampled = log_probs.values()[_places(data, data["input_ids"].offsets()[:-1])]
    log_pi = log_probs_beside(logits.values(), log_pi_sampled)
    log_mu = torch.cat([decode(codes), log_mu_sampled.unsqueeze(-1)], dim=-1)
    divergence = candidate_divergence(log_pi, log_mu, is_sampled.any(-1), kind).where(valid, 0)
    offsets = data["responses"].offsets()
    longest = int(offsets.diff().max())  # without it torch pads each row to the length of all together
    return torch.nested.nested_tensor_from_jagged(divergence, offsets, max_seqlen=longest).to_padded_tensor(0.0)


def _of_tokens(of_responses: Tensor, data: TensorDict) -> Tensor:
    """A number of each response [B], repeated for each of its tokens."""
    lengths = data["responses"].offsets().diff()
    # The host knows their number, but not that it is the sum of the lengths.
    return of_responses.repeat_interleave(lengths, output_size=len(data["responses"].values()))


def _positions(data: TensorDict) -> Tensor:
    """The position of each response token in its response."""
    offsets = data["responses"].offsets()
    return torch.arange(len(data["responses"].values()), device=offsets.device) - _of_tokens(offsets[:-1], data)


def _places(data: TensorDict, starts: Tensor) -> Tensor:
    """Where each response token is predicted, if row i of the micro-batch begins at ``starts[i]``."""
    return _of_tokens(starts + data["prompts"].offsets().diff() - 1, data) + _positions(data)


def _candidates(data: TensorDict) -> tuple[Tensor, Tensor]:
    """mu's candidates of each response token: ids, or ABSENT, and codes, [tokens, K].

    verl's padding rows and changed responses have fewer rows of candidates than tokens.
    """
    offsets, positions = data[IDS_FIELD].offsets(), _positions(data)
    captured = positions < _of_tokens(offsets.diff(), data)
    packed = [data[field].values() for field in (IDS_FIELD, CODES_FIELD)]
    entry = (_of_tokens(offsets[:-1], data) + positions).where(captured, len(packed[0]))
    ids, codes = unpack(*(pad(x, (0, 0, 0, 1))[entry] for x in packed))
    return ids.where(captured.unsqueeze(-1), ABSENT), codes


def check_alignment(
    ids: Tensor, codes: Tensor, is_sampled: Tensor, log_mu: Tensor, valid: Tensor, offsets: Tensor
) -> None:
    """Raise ValueError unless mu's most likely tokens belong to the token that was sampled with them.

    The sampled token's log-probability came another way, as verl's rollout_log_probs. Among the candidates
    it must have that very probability; else none of them may be less likely.

    Args:
        ids, codes, is_sampled: [tokens, K], of all responses.
        log_mu, valid: [tokens].
        offsets: where each response begins and the last one ends, [B + 1].
    """
    code = encode(log_mu)
    apart = (is_sampled & ((codes - code.unsqueeze(-1)).abs() > TOLERANCE)).any(-1)
    outside = ~is_sampled.any(-1) & (codes.amax(-1) > code + TOLERANCE)
    absent = (ids == ABSENT).any(-1)
    wrong = (absent | apart | outside) & valid
    if not wrong.any():
        return
    where, n, tokens = int(wrong.nonzero()[0]), int(wrong.sum()), int(valid.sum())
    t = where - int(offsets[offsets <= where].max())
    if absent[where]:
        got, wanted = int((ids[where] != ABSENT).sum()), ids.shape[-1]
        raise ValueError(
            f"the rollout engine gave {got} of mu's {wanted} most likely tokens at response position {t} ({n} such or "
            f"misaligned tokens of {tokens} in this micro-batch): an agent loop that changes the response after it "
            "was captured, or an engine that returns fewer; use divergence=binary_tv with it"
        )
    raise ValueError(
        f"mu's most likely tokens do not belong to the sampled tokens: {n} of {tokens} of this micro-batch, the "
        f"first at response position {t}, where rollout_log_probs has {log_mu[where].item():.6f} and the capture "
        + (
            f"{decode(codes[where][is_sampled[where]]).item():.6f} for the same token"
            if is_sampled[where].any()
            else f"only less likely tokens than that, down to {decode(codes[where].amax()).item():.6f}"
        )
        + "; D_t would be measured against another token's distribution"
    )
