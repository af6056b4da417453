"""mu's K most likely tokens on their way from the rollout engine to the loss: 48 bits each.

An int32 and an int16 hold 20 bits of token id and 27 of -log p in units of 2^-22, up to 32 (p = 1e-14).
Rounding moves log p by at most 2^-23 and a top-K TV by at most 1.2e-7, as fp32 arithmetic does; an int32 id
beside a half-precision log-probability would take the same room and move it by up to 1.2e-3.
"""

import torch
from torch import Tensor

IDS_FIELD = "mu_top_k_ids"
"""int32 [L, K] of TransferQueue: the id, and above it the low bits of the code."""
CODES_FIELD = "mu_top_k_codes"
"""int16 [L, K]: the high bits of the code."""

ID_BITS = 20
LOW_BITS = 12
CODE_BITS = LOW_BITS + 15
UNIT = 2.0**-22
ABSENT = (1 << ID_BITS) - 1
"""Id where the rollout engine gave no candidate; ids of tokens are below."""


def bytes_per_token(top_k: int) -> int:
    return top_k * (torch.int32.itemsize + torch.int16.itemsize)


def encode(log_prob: Tensor) -> Tensor:
    """Codes of log-probabilities, int32, any shape and floating dtype; the same number has the same code
    in each dtype that holds it, and codes grow as the probability falls."""
    return (log_prob.double() / -UNIT).round_().clamp_(0, (1 << CODE_BITS) - 1).int()


def decode(code: Tensor) -> Tensor:
    """fp32 log-probabilities of codes."""
    return code.float() * -UNIT


def pack(ids: Tensor, log_prob: Tensor) -> tuple[Tensor, Tensor]:
    """int32 and int16 tensors of token ids and their log-probabilities, of the same shape."""
    code = encode(log_prob)
    return ids.int() | (code << ID_BITS), (code >> LOW_BITS).short()


def unpack(packed_ids: Tensor, packed_codes: Tensor) -> tuple[Tensor, Tensor]:
    """int64 token ids and int32 codes of what `pack` made."""
    low = (packed_ids >> ID_BITS) & ((1 << LOW_BITS) - 1)
    return (packed_ids & ABSENT).long(), (packed_codes.int() << LOW_BITS) | low
