"""D_t on mu's most likely tokens, taken from the logits of the actor's own forward pass.

verl's engines call the loss function with the logits once, before they are reduced to log-probabilities. This logits
hook is the one of its distillation losses, ``distillation_use_topk``; it must return one number per token. FSDP's
engine has the logits of some tokens on a rank, Megatron's those of some columns of the vocabulary.
"""

from typing import NamedTuple

import torch
from tensordict import TensorDict
from torch import Tensor
from torch.distributed import ProcessGroup
from verl.utils.ulysses import get_ulysses_sequence_parallel_rank
from verl.workers.config import ActorConfig
from verl.workers.utils.losses import ppo_loss
from verl.workers.utils.padding import no_padding_2_padding

from cppo_verl.core.divergence import Kind, candidate_divergence, gather_log_probs, gather_sharded_log_probs
from cppo_verl.plugin.config import MaskedLossConfig
from cppo_verl.plugin.losses import loss_context
from cppo_verl.plugin.topk.codec import ABSENT, CODES_FIELD, IDS_FIELD, UNIT, decode, encode, unpack

DIVERGENCE = "cppo_divergence"
"""Key of D_t in the engine's model output."""
TOLERANCE = round(1e-5 / UNIT)
"""Difference of two codes that may still be roundings of one log-probability."""


class Layout(NamedTuple):
    """Where the engine keeps the logits of a micro-batch."""

    starts: Tensor
    """The row of this rank's logits at which each row of the micro-batch begins, [B]; it may lie outside of them."""
    group: ProcessGroup | None = None
    """The ranks over which the vocabulary is split, if it is."""
    vocabulary: int = 0
    """Number of tokens; of a split vocabulary's columns, those after them are padding."""


def top_k_ppo_loss(
    config: ActorConfig,
    model_output: dict | None = None,
    data: TensorDict | None = None,
    dp_group: ProcessGroup | None = None,
    student_logits: Tensor | None = None,
    data_format: str | None = None,
    vocabulary: int = 0,
) -> tuple[Tensor, dict] | dict[str, Tensor]:
    """verl's ``ppo_loss``, with D_t measured in verl's logits hook.

    Called with ``student_logits`` [1 or B, tokens, columns], those that this rank holds, it returns D_t as
    {DIVERGENCE: [1 or B, tokens]}, zero outside the responses. Called with the model's output, it returns the loss and
    its metrics.

    Args:
        data_format: how Megatron's engine has laid the micro-batch out; FSDP's engine does not say.
        vocabulary: the model's number of tokens, of which Megatron's columns may be more.
    """
    policy_loss = config.policy_loss
    assert isinstance(policy_loss, MaskedLossConfig) and data is not None
    if student_logits is not None:
        if data_format is None:
            layout = fsdp_layout(data, student_logits)
        else:
            layout = megatron_layout(data, student_logits, data_format, vocabulary)
        divergence = divergence_of_logits(student_logits.flatten(0, 1), data, policy_loss.kind, layout)
        return {DIVERGENCE: divergence.view(student_logits.shape[:2])}
    assert model_output is not None
    with loss_context(divergence=no_padding_2_padding(model_output[DIVERGENCE], data)):
        return ppo_loss(config, model_output, data, dp_group)


def fsdp_layout(data: TensorDict, logits: Tensor) -> Layout:
    """One row after the other, padded at the end to equal parts of the Ulysses sequence-parallel ranks."""
    first = get_ulysses_sequence_parallel_rank() * logits.shape[1]  # 0 without such ranks
    return Layout(data["input_ids"].offsets()[:-1] - first)


def megatron_layout(data: TensorDict, logits: Tensor, data_format: str, vocabulary: int) -> Layout:
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
    return Layout(padded.cumsum(0) - padded, group, vocabulary)


@torch.no_grad()
def divergence_of_logits(logits: Tensor, data: TensorDict, kind: Kind, layout: Layout) -> Tensor:
    """D_t at the valid response tokens of a micro-batch, where they are predicted, zero elsewhere.

    Args:
        logits: [n, columns], what this rank holds of the micro-batch: prompt and response of each row, one after the
            other.
        data: the micro-batch, its tensors nested [B, (tokens)] or [B, (tokens), K].
        kind: "tv" or "kl".

    Returns:
        [n], fp32.

    Raises:
        ValueError: candidates that do not belong to their tokens; all are checked, each time.
    """
    response_mask, responses = data["response_mask"], data["responses"].values()
    rows, tokens, entries, captured = _places(data, layout.starts)
    valid = response_mask.values().bool()
    # Places, not a mask: with a mask every use of it would make the host wait for an accelerator.
    here = (valid & (rows >= 0) & (rows < len(logits))).nonzero().squeeze(-1)
    rows, entries = rows[here], entries[here]

    sampled = responses[here]
    log_mu_sampled = data["rollout_log_probs"].values()[here].float()
    ids, codes = unpack(data[IDS_FIELD].values()[entries], data[CODES_FIELD].values()[entries])
    ids = ids.where(captured[here].unsqueeze(-1), ABSENT)
    is_sampled = ids == sampled.unsqueeze(-1)
    check_alignment(ids, codes, is_sampled, log_mu_sampled, tokens[here])

    retained = torch.cat([ids, sampled.unsqueeze(-1)], dim=-1)
    if layout.group is None:
        log_pi = gather_log_probs(logits, retained, rows)
    else:
        log_pi = gather_sharded_log_probs(logits, retained, rows, layout.group, layout.vocabulary)
    log_mu = torch.cat([decode(codes), log_mu_sampled.unsqueeze(-1)], dim=-1)
    out = logits.new_zeros(len(logits), dtype=torch.float32)
    out[rows] = candidate_divergence(log_pi, log_mu, is_sampled.any(-1), kind)
    return out


def _places(data: TensorDict, starts: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of each response token: the row of the logits that predict it, its position in the response, the row of its
    candidates, and whether there is one, as verl's padding rows and changed responses have fewer."""
    lengths = data["responses"].offsets().diff()
    total = len(data["responses"].values())  # known to the host, as the sum of the lengths is not

    def of_tokens(of_responses: Tensor) -> Tensor:
        return of_responses.repeat_interleave(lengths, output_size=total)

    position = torch.arange(total, device=lengths.device) - of_tokens(data["responses"].offsets()[:-1])
    row = of_tokens(starts + data["prompts"].offsets().diff() - 1) + position
    entry = of_tokens(data[IDS_FIELD].offsets()[:-1]) + position
    captured = position < of_tokens(data[IDS_FIELD].offsets().diff())
    return row, position, entry.where(captured, 0), captured


def check_alignment(ids: Tensor, codes: Tensor, is_sampled: Tensor, log_mu: Tensor, position: Tensor) -> None:
    """Raise ValueError unless mu's most likely tokens belong to the token that was sampled with them.

    The sampled token's log-probability came another way, as verl's rollout_log_probs. Among the candidates
    it must have that very probability; else none of them may be less likely.

    Args:
        ids, codes, is_sampled: [n, K]; log_mu, position: [n].
    """
    code = encode(log_mu)
    apart = (is_sampled & ((codes - code.unsqueeze(-1)).abs() > TOLERANCE)).any(-1)
    outside = ~is_sampled.any(-1) & (codes.amax(-1) > code + TOLERANCE)
    absent = (ids == ABSENT).any(-1)
    wrong = absent | apart | outside
    if not wrong.any():
        return
    where = int(wrong.nonzero()[0])
    n, t = int(wrong.sum()), int(position[where])
    if absent[where]:
        got, wanted = int((ids[where] != ABSENT).sum()), ids.shape[-1]
        raise ValueError(
            f"the rollout engine gave {got} of mu's {wanted} most likely tokens at response position {t} ({n} such or "
            f"misaligned tokens of {len(ids)} in this micro-batch): an agent loop that changes the response after it "
            "was captured, or an engine that returns fewer; use divergence=binary_tv with it"
        )
    raise ValueError(
        f"mu's most likely tokens do not belong to the sampled tokens: {n} of {len(ids)} of this micro-batch, the "
        f"first at response position {t}, where rollout_log_probs has {log_mu[where].item():.6f} and the capture "
        + (
            f"{decode(codes[where][is_sampled[where]]).item():.6f} for the same token"
            if is_sampled[where].any()
            else f"only less likely tokens than that, down to {decode(codes[where].amax()).item():.6f}"
        )
        + "; D_t would be measured against another token's distribution"
    )
