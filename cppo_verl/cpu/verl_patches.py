"""The places in verl 0.9.1 that offer no seam. Applied on the CPU platform only."""

import os
from collections.abc import Callable
from functools import partial, wraps
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
import verl.utils.distributed as distributed
import wrapt
from tensordict import TensorDict
from torch import Tensor
from torch.nn.functional import pad

from cppo_verl.cpu import agent_loop_patches

if TYPE_CHECKING:
    from verl.workers.rollout.vllm_rollout.bucketed_weight_transfer import BucketedWeightReceiver, BucketedWeightSender
    from vllm import SamplingParams


def apply() -> None:
    # initialize_global_process_group_ray joins "cpu:gloo" and "<device>:<backend>" into one string;
    # on this platform both name the CPU, which torch refuses as a duplicate.
    # tests/unit/cpu/test_verl_patches.py fails when verl no longer does so.
    distributed.initialize_global_process_group_ray = partial(
        distributed.initialize_global_process_group_ray, backend="cpu:gloo"
    )
    wrapt.when_imported("verl.workers.rollout.vllm_rollout.bucketed_weight_transfer")(separate_sockets)
    wrapt.when_imported("verl.utils.torch_functional")(normalise_blocks)
    wrapt.when_imported("verl.utils.tensordict_utils")(select_rows_at_once)
    wrapt.when_imported("verl.utils.seqlen_balancing")(balance_numbers)
    wrapt.when_imported("verl.workers.rollout.vllm_rollout.vllm_async_server")(leave_out_text)
    wrapt.when_imported("verl.workers.rollout.llm_server")(agent_loop_patches.ask_once)
    wrapt.when_imported("verl.trainer.ppo.v1.agent_loop_tq")(agent_loop_patches.join_puts)
    wrapt.when_imported("verl.experimental.agent_loop.agent_loop")(agent_loop_patches.score_in_place)
    wrapt.when_imported("verl.experimental.agent_loop.agent_loop")(agent_loop_patches.make_loops_directly)


def separate_sockets(module: ModuleType) -> None:
    """Give the weight transfers of each Ray cluster on a machine a socket of their own.

    verl names the socket after the Ray job, and the first job of every Ray cluster has the same id. Two trainers side
    by side, each with a Ray cluster of its own, would take over each other's socket, and a rollout engine would load
    the weights of the other run.
    """
    for name in ("BucketedWeightSender", "BucketedWeightReceiver"):
        wrapt.wrap_function_wrapper(module, f"{name}.__init__", _with_own_socket)


def _with_own_socket(
    wrapped: Callable[..., None],
    transfer: "BucketedWeightSender | BucketedWeightReceiver",
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> None:
    wrapped(*args, **kwargs)
    # Ray sets it in each of its workers; vLLM's processes inherit it from theirs.
    transfer.zmq_handle += f".{os.environ['RAY_RAYLET_PID']}"


BLOCK = 2**22
"""Logits that are normalised at once; in fp32 this takes 16 MiB beside them."""


def normalise_blocks(module: ModuleType) -> None:
    """Normalise the logits of many tokens at once where there is no flash-attn, those in half precision in fp32.

    verl's way without it is a Python loop over the first dimension of the logits. verl's engines join the rows of a
    batch, so that each step of the loop is about one token, forward and backward. Its log-probabilities of logits in
    half precision are in half precision too on a CPU, whose autocast does not raise them as a GPU's does.
    """

    @wraps(module.logprobs_from_logits_v2)
    def log_probs(logits: Tensor, labels: Tensor) -> Tensor:
        blocks = logits.split(max(1, BLOCK // max(1, logits.shape[1:].numel())))
        dtype = torch.promote_types(logits.dtype, torch.float32)
        normaliser = torch.cat([block.to(dtype).logsumexp(-1) for block in blocks])
        return logits.gather(-1, labels.unsqueeze(-1)).squeeze(-1) - normaliser

    module.logprobs_from_logits_v2 = log_probs  # type: ignore[attr-defined]  # a patch


def select_rows_at_once(module: ModuleType) -> None:
    """Select the rows of a mini-batch by one index from each nested tensor [B, *, ...].

    verl takes such a tensor of the whole batch apart for each mini-batch. It takes the mini-batch apart once more, even
    where that is a single micro-batch.
    """
    select, chunk = module.index_select_tensor_dict, module.chunk_tensordict

    @wraps(select)
    def select_rows(batch: TensorDict | None, indices: Tensor | list[int]) -> TensorDict | None:
        if batch is None:
            return select(batch, indices)
        rows = torch.as_tensor(indices)
        nested = {key: x for key, x in batch.items() if is_joined(x)}
        selected = select(batch.exclude(*nested), rows)
        return selected.update({key: rows_of_nested(x, rows) for key, x in nested.items()})

    @wraps(chunk)
    def chunk_rows(td: TensorDict, chunks: int) -> list[TensorDict]:
        nested = {key: x for key, x in td.items() if isinstance(x, Tensor) and x.is_nested}
        if chunks > 1 or not all(map(is_joined, nested.values())):
            return chunk(td, chunks)
        rows = torch.arange(len(td))
        return [td.copy().update({key: rows_of_nested(x, rows) for key, x in nested.items()})]

    module.index_select_tensor_dict = select_rows  # type: ignore[attr-defined]  # a patch
    module.chunk_tensordict = chunk_rows  # type: ignore[attr-defined]  # a patch


def is_joined(x: Any) -> bool:
    """Whether it is a nested tensor [B, *, ...] whose rows lie one after the other without a gap."""
    if not isinstance(x, Tensor) or not x.is_nested or x.layout is not torch.jagged:
        return False
    if x.lengths() is not None:  # type: ignore[attr-defined]  # it is nested
        return False
    # The dimension whose length differs may be another, as in verl's position ids [B, 4, *].
    return bool(len(x.values()) == x.offsets()[-1])  # type: ignore[attr-defined]


def rows_of_nested(nested: Tensor, rows: Tensor) -> Tensor:
    """The rows of a nested tensor [B, *, ...] with these indices, in their order."""
    offsets: Tensor = nested.offsets()  # type: ignore[attr-defined]  # it is nested
    lengths = offsets.diff()[rows]
    ends = lengths.cumsum(0)
    shift = (offsets[:-1][rows] - ends + lengths).repeat_interleave(lengths)
    values = nested.values()[torch.arange(len(shift)) + shift]
    # Without the extremes torch would pad the rows to the number of all values.
    return torch.nested.nested_tensor_from_jagged(
        values, pad(ends, (1, 0)), min_seqlen=int(lengths.min()), max_seqlen=int(lengths.max())
    )


def balance_numbers(module: ModuleType) -> None:
    """Balance the ranks' loads as numbers: verl compares the elements of a tensor with each other, one by one."""
    balance = module.karmarkar_karp

    @wraps(balance)
    def balance_of_numbers(seqlen_list: Tensor | list[int], *args: Any, **kwargs: Any) -> list[list[int]]:
        return balance(seqlen_list.tolist() if isinstance(seqlen_list, Tensor) else seqlen_list, *args, **kwargs)

    module.karmarkar_karp = balance_of_numbers  # type: ignore[attr-defined]  # a patch


def leave_out_text(module: ModuleType) -> None:
    """Ask vLLM for token ids alone, because verl does not read their text."""
    module.SamplingParams = partial(without_text, module.SamplingParams)  # type: ignore[attr-defined]  # a patch


def without_text(sampling_params: type["SamplingParams"], **given: Any) -> "SamplingParams":
    """Sampling parameters whose answer has text only where vLLM looks for a stop string in it."""
    return sampling_params(**{"detokenize": bool(given.get("stop"))} | given)
