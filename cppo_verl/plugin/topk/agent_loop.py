"""verl's agent loops with mu's most likely tokens beside their responses.

An agent loop, verl's or a user's, makes a response of what one or several calls of the rollout engine returned: cut,
joined, with tool output between. Only token ids and log-probabilities survive that. So each call is recorded, and every
response token finds its candidates by its id and log-probability at the end.
"""

import copy
from typing import TYPE_CHECKING, Any

import numpy as np
import ray
import torch
import wrapt
from verl.experimental.agent_loop import AgentLoopOutput
from verl.trainer.ppo.v1.agent_loop_tq import AgentLoopManagerTQ, AgentLoopWorkerTQ
from verl.workers.rollout.llm_server import LLMServerClient
from verl.workers.rollout.replica import TokenOutput

from cppo_verl.plugin.topk.codec import ABSENT, CODES_FIELD, IDS_FIELD
from cppo_verl.plugin.topk.vllm_server import CAPTURED, Captured

Calls = list[tuple[list[int], Captured]]
"""Token ids and capture of each call of the rollout engine, in order."""

if TYPE_CHECKING:
    from verl.experimental.agent_loop import AgentLoopWorker as VerlWorker
    from verl.experimental.agent_loop.agent_loop import _InternalAgentLoopOutput
else:
    VerlWorker = AgentLoopWorkerTQ.__ray_metadata__.modified_class  # the class that ray.remote wrapped


class TopKAgentLoopManager(AgentLoopManagerTQ):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.agent_loop_workers_class = ray.remote(TopKAgentLoopWorker)


class TopKAgentLoopWorker(VerlWorker):
    calls: Calls
    """Of the response in the making."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.top_k = self.config.actor_rollout_ref.actor.policy_loss.top_k

    async def _run_agent_loop(
        self, sampling_params: dict[str, Any], trajectory: dict[str, Any], **kwargs: Any
    ) -> "_InternalAgentLoopOutput":
        if trajectory["validate"]:
            return await super()._run_agent_loop(sampling_params, trajectory, **kwargs)
        # Many responses are made at once, all with the worker's one client: this one gets a copy of the worker whose
        # client records the calls made for it.
        worker = copy.copy(self)
        worker.calls = []
        worker.llm_client = recording_client(self.llm_client, worker.calls)
        sampling_params = sampling_params | {"logprobs": self.top_k}
        return await super(TopKAgentLoopWorker, worker)._run_agent_loop(sampling_params, trajectory, **kwargs)

    async def _agent_loop_postprocess(
        self, output: AgentLoopOutput | list[AgentLoopOutput], validate: bool, **kwargs: Any
    ) -> "_InternalAgentLoopOutput":
        if not validate:
            outputs = output if isinstance(output, list) else [output]
            output = [OutputWithCandidates(x, self.calls, self.top_k) for x in outputs]  # type: ignore[misc]  # proxies
        return await super()._agent_loop_postprocess(output, validate, **kwargs)


def recording_client(client: LLMServerClient, calls: Calls) -> LLMServerClient:
    """A copy of ``client`` that appends the capture of every call of a rollout server to ``calls``.

    It records below ``generate``, because verl's asynchronous client joins there the parts of an aborted and resumed
    answer and drops the fields that it does not know.
    """

    async def acquire_server(request_id: str, **fields: Any) -> tuple[str, "RecordingServer"]:
        server_id, server = await client._acquire_server(request_id, **fields)
        return server_id, RecordingServer(server, calls)

    recording = copy.copy(client)
    vars(recording).update(_acquire_server=acquire_server, _release_server=client._release_server)
    return recording


class RecordingServer:
    """The handle of a rollout server, as `LLMServerClient.generate` uses it."""

    def __init__(self, server: ray.actor.ActorHandle, calls: Calls) -> None:
        self._server = server
        self._calls = calls

    @property
    def generate(self) -> "RecordingServer":
        return self

    async def remote(self, **kwargs: Any) -> TokenOutput:
        output = await self._server.generate.remote(**kwargs)
        captured = output.extra_fields.pop(CAPTURED, None)
        if captured is not None:
            self._calls.append((output.token_ids, captured))
        return output


class OutputWithCandidates(wrapt.ObjectProxy):
    """An agent loop's output, verl's or a user's own, that puts its candidates into TransferQueue, as [L, K]."""

    def __init__(self, output: AgentLoopOutput, calls: Calls, top_k: int) -> None:
        super().__init__(output)
        ids, codes = align(output.response_ids, output.response_mask, output.response_logprobs or [], calls, top_k)
        self._self_candidates = {IDS_FIELD: torch.from_numpy(ids), CODES_FIELD: torch.from_numpy(codes)}

    def as_dict(self) -> dict[str, Any]:
        return self.__wrapped__.as_dict() | self._self_candidates


def align(
    response_ids: list[int], response_mask: list[int], log_probs: list[float], calls: Calls, top_k: int
) -> tuple[np.ndarray, np.ndarray]:
    """Find the candidates of each response token, packed: int32 [L, K] and int16 [L, K].

    The generated tokens of a response (mask 1) are, in order, some of those that the engine returned, with the
    log-probabilities that it returned. All other tokens, and those that are not found, get ABSENT ids, which the loss
    refuses on a token that it trains on.
    """
    ids = np.full((len(response_ids), top_k), ABSENT, dtype=np.int32)
    codes = np.zeros((len(response_ids), top_k), dtype=np.int16)
    wanted = np.flatnonzero(response_mask)
    if not calls or not len(wanted) or len(log_probs) != len(response_ids):
        return ids, codes
    returned_ids = np.concatenate([np.asarray(token_ids, dtype=np.int64) for token_ids, _ in calls])
    returned = Captured(*map(np.concatenate, zip(*(captured for _, captured in calls), strict=True)))
    wanted_ids, wanted_log_probs = np.asarray(response_ids)[wanted], np.asarray(log_probs)[wanted]

    rows = np.arange(len(wanted))
    as_returned = (
        len(wanted) <= len(returned_ids)
        and ((returned_ids[rows] == wanted_ids) & (returned.sampled_log_prob[rows] == wanted_log_probs)).all()
    )
    if not as_returned:
        # The agent loop dropped some: each token takes the first equal one after the last one taken, if there is one.
        left = enumerate(zip(returned_ids.tolist(), returned.sampled_log_prob.tolist(), strict=True))
        tokens = zip(wanted_ids.tolist(), wanted_log_probs.tolist(), strict=True)
        rows = np.array([next((row for row, other in left if other == token), -1) for token in tokens])
    wanted, rows = wanted[rows >= 0], rows[rows >= 0]
    ids[wanted], codes[wanted] = returned.ids[rows], returned.codes[rows]
    return ids, codes
