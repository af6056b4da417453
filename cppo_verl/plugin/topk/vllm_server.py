"""verl's vLLM rollout, whose answers hold mu's most likely tokens too; registered as "vllm_top_k".

A request with ``logprobs=K`` gets them. One with ``logprobs=True``, as verl's own are, is served as verl serves it.
"""

from argparse import Namespace
from collections.abc import AsyncGenerator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import ray
import torch
import wrapt
from verl.workers.rollout.replica import TokenOutput
from verl.workers.rollout.vllm_rollout.vllm_async_server import vLLMHttpServer, vLLMReplica
from vllm.logprobs import FlatLogprobs, Logprob

from cppo_verl.plugin.constants import TOP_K_ROLLOUT
from cppo_verl.plugin.topk.codec import ABSENT, pack

if TYPE_CHECKING:
    from vllm import RequestOutput, SamplingParams

CAPTURED = "mu_top_k"
"""Key of the `Captured` among a TokenOutput's extra fields, and of the `Request` among the sampling parameters'."""


class Captured(NamedTuple):
    """mu at the positions of one answer's tokens."""

    sampled_log_prob: np.ndarray
    """fp64, [L]: what verl gets as the tokens' log-probabilities."""
    ids: np.ndarray
    """int32, [L, K], packed; from the most likely one on, ABSENT where the engine gave fewer."""
    codes: np.ndarray
    """int16, [L, K], packed: see `cppo_verl.plugin.topk.codec`."""


class Request:
    """One call of `TopKServer.generate`: what it wants of the engine, and what it got."""

    def __init__(self, top_k: int) -> None:
        self.top_k = top_k
        self.log_probs = FlatLogprobs()


class TopKServer(vLLMHttpServer):
    async def run_server(self, args: Namespace) -> None:
        await super().run_server(args)
        self.engine = CapturingEngine(self.engine)  # type: ignore[assignment]  # a proxy

    async def generate(
        self, prompt_ids: list[int], sampling_params: dict[str, Any], request_id: str, *args: Any, **kwargs: Any
    ) -> TokenOutput:
        """verl's ``generate``; ``logprobs`` may be K >= 1 instead of True."""
        top_k = sampling_params.get("logprobs")
        if top_k is None or isinstance(top_k, bool):
            return await super().generate(prompt_ids, sampling_params, request_id, *args, **kwargs)
        request = Request(top_k)
        # Not kept by its id: with rollout.full_determinism verl's agent loops give many requests one.
        extra_args = (sampling_params.get("extra_args") or {}) | {CAPTURED: request}
        sampling_params = sampling_params | {"extra_args": extra_args}
        output = await super().generate(prompt_ids, sampling_params, request_id, *args, **kwargs)
        output.extra_fields[CAPTURED] = captured(request.log_probs, top_k)
        return output


class TopKReplica(vLLMReplica):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.server_class = ray.remote(TopKServer)

    def _get_server_name_prefix(self) -> str:
        # The workers look for a server under their rollout's name.
        return f"{TOP_K_ROLLOUT}_"


class CapturingEngine(wrapt.ObjectProxy):
    """vLLM's engine as `vLLMHttpServer.generate` sees it.

    verl builds the sampling parameters with logprobs 0 and keeps the sampled token's alone. The engine's ``generate``
    is the only place between the two. The `Request` comes among the extra arguments, and goes no further.
    """

    async def generate(
        self, *, sampling_params: "SamplingParams", **kwargs: Any
    ) -> AsyncGenerator["RequestOutput", None]:
        extra_args = sampling_params.extra_args or {}
        request: Request | None = extra_args.pop(CAPTURED, None)
        if request is not None:
            sampling_params.extra_args = extra_args or None
            sampling_params.logprobs = request.top_k
            # Flat lists, and no text of the candidates: the plain form costs an object and a detokenisation for each.
            sampling_params.flat_logprobs = True
            sampling_params.detokenize = bool(sampling_params.stop)
        generated = self.__wrapped__.generate(sampling_params=sampling_params, **kwargs)
        async for output in generated:
            if request is not None:
                for completion in output.outputs:
                    request.log_probs = completion.logprobs
                    completion.logprobs = SampledLogProbs(completion.logprobs)
            yield output


class SampledLogProbs(Sequence[dict[int, Logprob]]):
    """The sampled tokens' entries of vLLM's flat log-probabilities, each in vLLM's own form {token id: Logprob}.

    vLLM's own sequence would build each entry with all candidates.
    """

    def __init__(self, flat: FlatLogprobs) -> None:
        self.flat = flat

    def __len__(self) -> int:
        return len(self.flat)

    def __getitem__(self, position: int) -> dict[int, Logprob]:  # type: ignore[override]  # no slices
        first = self.flat.start_indices[position]
        return {self.flat.token_ids[first]: Logprob(self.flat.logprobs[first])}


def captured(flat: FlatLogprobs, top_k: int) -> Captured:
    """Arrays of a request's log-probabilities; vLLM lists, per position, the sampled token and then the likeliest."""
    starts = np.asarray(flat.start_indices, dtype=np.int64)
    counts = np.asarray(flat.end_indices, dtype=np.int64) - starts
    all_ids = np.asarray(flat.token_ids, dtype=np.int32)
    all_log_probs = np.asarray(flat.logprobs, dtype=np.float64)
    rank = np.arange(1, top_k + 1)
    present = rank < counts[:, None]
    columns = np.where(present, starts[:, None] + rank, 0)
    ids = np.where(present, all_ids[columns], ABSENT)
    log_probs = np.where(present, all_log_probs[columns], -np.inf)
    packed_ids, codes = pack(torch.from_numpy(ids), torch.from_numpy(log_probs))
    return Captured(all_log_probs[starts], packed_ids.numpy(), codes.numpy())
