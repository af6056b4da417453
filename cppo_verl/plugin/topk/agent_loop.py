"""verl's agent loops with mu's most likely tokens beside their responses.

An agent loop, verl's or a user's, makes a response of what one or several calls of the rollout engine
returned: cut, joined, with tool output between. Only token ids and log-probabilities survive that. So
each call is recorded on the way, and at the end every response token finds its own by these two.
"""

from contextvars import ContextVar

import numpy as np
import ray
import torch
from pydantic import PrivateAttr
from verl.experimental.agent_loop import AgentLoopOutput
from verl.trainer.ppo.v1.agent_loop_tq import AgentLoopManagerTQ, AgentLoopWorkerTQ
from verl.workers.rollout.llm_server import LLMServerClient

from cppo_verl.plugin.topk.codec import ABSENT, CODES_FIELD, IDS_FIELD
from cppo_verl.plugin.topk.vllm_server import CAPTURED, Captured

Calls = list[tuple[list[int], Captured]]
"""Token ids and capture of each call of the rollout engine, in order."""

_calls: ContextVar[Calls] = ContextVar("cppo_verl_top_k_calls")


class TopKAgentLoopManager(AgentLoopManagerTQ):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.agent_loop_workers_class = ray.remote(TopKAgentLoopWorker)


class TopKAgentLoopWorker(AgentLoopWorkerTQ.__ray_metadata__.modified_class):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.top_k = self.config.actor_rollout_ref.actor.policy_loss.top_k
        record_calls(self.llm_client)

    async def _run_agent_loop(self, sampling_params, trajectory, **kwargs):
        # Each response is generated in an asyncio task, and so a context, of its own.
        _calls.set([])
        if not trajectory["validate"]:
            sampling_params = sampling_params | {"logprobs": self.top_k}
        return await super()._run_agent_loop(sampling_params, trajectory, **kwargs)

    async def _agent_loop_postprocess(self, output, validate, **kwargs):
        if not validate:
            outputs = output if isinstance(output, list) else [output]
            output = [OutputWithCandidates.of(x, _calls.get(), self.top_k) for x in outputs]
        return await super()._agent_loop_postprocess(output, validate, **kwargs)


def record_calls(client: LLMServerClient) -> None:
    """Let every call that ``client`` makes of a rollout server leave its capture with the response in the making.

    Below ``generate``: verl's asynchronous client joins there what was aborted and resumed, and drops what
    it does not know.
    """
    acquire_server = client._acquire_server

    async def acquire_recording_server(request_id, **fields):
        server_id, server = await acquire_server(request_id, **fields)
        return server_id, RecordingServer(server)

    client._acquire_server = acquire_recording_server


class RecordingServer:
    """The handle of a rollout server, as `LLMServerClient.generate` uses it."""

    def __init__(self, server):
        self._server = server

    @property
    def generate(self) -> "RecordingServer":
        return self

    async def remote(self, **kwargs):
        output = await self._server.generate.remote(**kwargs)
        captured = output.extra_fields.pop(CAPTURED, None)
        if captured is not None:
            _calls.get().append((output.token_ids, captured))
        return output


class OutputWithCandidates(AgentLoopOutput):
    """An agent loop's output that puts the candidates of its response into TransferQueue, [L, K] each."""

    _candidates: dict[str, torch.Tensor] = PrivateAttr()

    @classmethod
    def of(cls, output: AgentLoopOutput, calls: Calls, top_k: int) -> "OutputWithCandidates":
        result = cls.model_construct(output.model_fields_set, **dict(output))
        ids, codes = align(output.response_ids, output.response_mask, output.response_logprobs or [], calls, top_k)
        result._candidates = {IDS_FIELD: torch.from_numpy(ids), CODES_FIELD: torch.from_numpy(codes)}
        return result

    def as_dict(self):
        return super().as_dict() | self._candidates


def align(
    response_ids: list[int], response_mask: list[int], log_probs: list[float], calls: Calls, top_k: int
) -> tuple[np.ndarray, np.ndarray]:
    """Candidates of each response token, packed: int32 [L, K] and int16 [L, K].

    The generated tokens of a response (mask 1) are, in order, some of those that the engine returned, with
    the log-probabilities that it returned. A token that is found nowhere, and all others, have ABSENT ids,
    which the loss refuses on a token that it trains on.
    """
    ids = np.full((len(response_ids), top_k), ABSENT, dtype=np.int32)
    codes = np.zeros((len(response_ids), top_k), dtype=np.int16)
    wanted = np.flatnonzero(response_mask)
    if not calls or not len(wanted) or len(log_probs) != len(response_ids):
        return ids, codes
    returned_ids = np.concatenate([np.asarray(token_ids, dtype=np.int64) for token_ids, _ in calls])
    returned = Captured(*map(np.concatenate, zip(*(captured for _, captured in calls), strict=True)))
    wanted_ids, wanted_log_probs = np.asarray(response_ids)[wanted], np.asarray(log_probs)[wanted]

    def same(rows: np.ndarray, positions: slice | int) -> np.ndarray:
        return (returned_ids[rows] == wanted_ids[positions]) & (
            returned.sampled_log_prob[rows] == wanted_log_probs[positions]
        )

    rows = np.arange(len(wanted))
    if len(wanted) > len(returned_ids) or not same(rows, slice(None)).all():
        # Something between was dropped: each takes the first of its kind after the last one taken.
        rows, begin = np.full(len(wanted), -1), 0
        for position in range(len(wanted)):
            found = np.flatnonzero(same(np.arange(begin, len(returned_ids)), position))
            if not len(found):
                break
            rows[position] = begin + found[0]
            begin = rows[position] + 1
    wanted, rows = wanted[rows >= 0], rows[rows >= 0]
    ids[wanted], codes[wanted] = returned.ids[rows], returned.codes[rows]
    return ids, codes
