"""mask_std_0: prompts whose responses all have the same reward stay out of the update and of its denominators.

The gradient is that of the batch with these prompts removed, under any micro-batching and number of ranks;
`cppo_verl.plugin.preflight.mask_std_0_rules` refuses the settings under which it would not be.
"""

from collections import defaultdict

import torch
from tensordict import TensorDict
from torch import Tensor


def rows_with_spread(
    uids: list[str], rewards: list[float], padding: list[bool], keys: list[str] | None = None
) -> tuple[Tensor, float]:
    """Find the rows of prompts whose responses' rewards differ.

    A prompt with a single response has no standard deviation and is kept. verl's padding rows, which count for nothing,
    are kept too.

    Args:
        uids, rewards, padding: each row's prompt, its reward, and whether it is padding.
        keys: "<prompt>_<session>_<output>" of each row, for verl's GRPO, to which a session's last output is the
            response; None where each row is one.

    Returns:
        Boolean [rows], true where kept, and the share of prompts left out.
    """
    groups: dict[str, list[int]] = defaultdict(list)
    for row, uid in enumerate(uids):
        if not padding[row]:
            groups[uid].append(row)
    kept = torch.ones(len(uids), dtype=torch.bool)
    left_out = 0
    for rows in groups.values():
        responses = _last_outputs(rows, keys) if keys else rows
        if len(responses) > 1 and len({rewards[row] for row in responses}) == 1:
            kept[rows] = False
            left_out += 1
    return kept, left_out / len(groups)


def _last_outputs(rows: list[int], keys: list[str]) -> list[int]:
    last: dict[str, tuple[int, int]] = {}
    for row in rows:
        session, _, output = keys[row].rpartition("_")
        last[session] = max(last.get(session, (-1, row)), (int(output), row))
    return [row for _, row in last.values()]


def mini_batch_of_row(rows: int, dp_size: int, mini_batch_size: int) -> Tensor:
    """Index of the mini-batch of each row, [rows].

    verl gives each rank a contiguous part of the batch, and each rank cuts its part into contiguous mini-batches.
    """
    return (torch.arange(rows) % (rows // dp_size)) // (mini_batch_size // dp_size)


def leave_out(data: TensorDict, kept: Tensor, mini_batches: Tensor, seq_mean: bool) -> TensorDict:
    """response_mask, loss_mask and, with ``seq_mean``, advantages that leave rows out of the loss and its denominators.

    A row without valid tokens has no loss, and verl counts ``loss_mask`` for the token denominator. Its sequence
    denominator is the configured mini-batch size, which cannot be changed; in the seq-mean modes the advantages of the
    kept rows are scaled up instead. The masks do not see that, because the sign stays.

    Args:
        data: nested response_mask and loss_mask, and advantages with ``seq_mean``.
        kept, mini_batches: whether each row is kept, and the index of its mini-batch, [rows].
        seq_mean: whether ``loss_agg_mode`` averages over sequences.
    """
    lengths = data["response_mask"].offsets().diff()
    keep_token = kept.repeat_interleave(lengths)
    fields = {name: _like(data[name], keep_token) for name in ("response_mask", "loss_mask")}
    if seq_mean:
        rows = torch.bincount(mini_batches)
        scale = rows / torch.bincount(mini_batches, weights=kept.double()).clamp_min(1)
        fields["advantages"] = _like(data["advantages"], scale[mini_batches].repeat_interleave(lengths))
    # A mini-batch with no token left, be it of padding rows alone, would divide by zero: count one, which has no loss.
    first = data["loss_mask"].offsets()[:-1]
    of_counted = mini_batches.repeat_interleave(lengths)[fields["loss_mask"].values() > 0]
    for mini_batch in set(mini_batches.tolist()) - set(of_counted.unique().tolist()):
        rows = ((mini_batches == mini_batch) & (lengths > 0)).nonzero().flatten()
        fields["loss_mask"].values()[first[rows[:1]]] = 1
    return TensorDict(fields, batch_size=len(kept))


def changed_rows(before: TensorDict, after: TensorDict) -> Tensor:
    """Indices of the rows in which a field of ``after`` differs from that of ``before``."""
    row_of_token = torch.arange(len(after)).repeat_interleave(after["response_mask"].offsets().diff())
    differs = [row_of_token[field.values() != before[name].values()] for name, field in after.items()]
    return torch.cat(differs).unique()


def _like(nested: Tensor, factor: Tensor) -> Tensor:
    """``nested`` times a factor per token, a new tensor of its dtype."""
    values = (nested.values() * factor).to(nested.dtype)
    return torch.nested.nested_tensor_from_jagged(values, nested.offsets())  # type: ignore[attr-defined]  # it is nested
