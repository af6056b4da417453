"""Each response token's candidates, found among those of the rollout engine's calls."""

import asyncio
import sys

import numpy as np
import pytest
from omegaconf import OmegaConf
from verl.experimental.agent_loop import AgentLoopOutput
from verl.workers.rollout.llm_server import FullyAsyncLLMServerClient, LLMServerClient
from verl.workers.rollout.replica import TokenOutput

from cppo_verl.plugin.constants import TOP_K_ROLLOUT
from cppo_verl.plugin.topk.agent_loop import OutputWithCandidates, TopKAgentLoopWorker, align, recording_client
from cppo_verl.plugin.topk.codec import ABSENT, CODES_FIELD, IDS_FIELD, unpack
from cppo_verl.plugin.topk.vllm_server import CAPTURED, Captured


def call_of(tokens, first):
    """A call of the engine that returned ``tokens``; candidate ids and log-probabilities tell its rows apart."""
    n = np.arange(first, first + len(tokens))
    ids = (100 * n[:, None] + np.arange(2)).astype(np.int32)
    return tokens, Captured(-0.1 - n / 7.0, ids, ids.astype(np.int16))


def log_probs_of(call):
    return call[1].sampled_log_prob.tolist()


def test_one_call_cut_at_the_response_length():
    call = call_of([5, 6, 5, 5], 1)
    ids, codes = align([5, 6, 5], [1, 1, 1], log_probs_of(call)[:3], [call], 2)
    assert ids.tolist() == [[100, 101], [200, 201], [300, 301]]
    assert (codes == ids).all()


def test_several_calls_with_tool_output_between_and_an_aborted_one():
    one, aborted, two = call_of([5, 6], 1), call_of([], 0), call_of([5, 7, 8], 3)
    response = [5, 6, 50, 51, 5, 7]
    log_probs = [*log_probs_of(one), 0.0, 0.0, *log_probs_of(two)[:2]]
    ids, _ = align(response, [1, 1, 0, 0, 1, 1], log_probs, [one, aborted, two], 2)
    assert ids[:, 0].tolist() == [100, 200, ABSENT, ABSENT, 300, 400]


def test_tokens_that_an_agent_loop_dropped_shift_nothing():
    one, two = call_of([5, 6, 9], 1), call_of([5, 6, 9], 4)
    log_probs = [*log_probs_of(one)[:2], *log_probs_of(two)[1:]]
    ids, _ = align([5, 6, 6, 9], [1, 1, 1, 1], log_probs, [one, two], 2)
    assert ids[:, 0].tolist() == [100, 200, 500, 600]


def test_the_same_token_twice_takes_two_rows():
    tokens, capture = call_of([9, 5, 5], 1)
    call = tokens, capture._replace(sampled_log_prob=np.array([-0.1, -0.5, -0.5]))
    ids, _ = align([5, 5], [1, 1], [-0.5, -0.5], [call], 2)
    assert ids[:, 0].tolist() == [200, 300]


def test_finding_the_rest_of_a_long_response_takes_linear_time():
    call = call_of([5] * 2001, 1)

    def steps(length):
        """Lines of Python that run; each turn of a loop, a generator's too, is one."""
        count = 0

        def trace(frame, event, argument):
            nonlocal count
            count += 1
            return trace

        log_probs = log_probs_of(call)[1 : length + 1]
        before = sys.gettrace()
        sys.settrace(trace)
        try:
            ids, _ = align([5] * length, [1] * length, log_probs, [call], 2)
        finally:
            sys.settrace(before)
        assert ids[[0, -1], 0].tolist() == [200, 100 * (length + 1)]
        return count

    assert steps(2000) < 3 * steps(1000)


def test_an_agent_loops_own_kind_of_output_keeps_what_is_its_own():
    class Own(AgentLoopOutput):
        rounds: int

        def as_dict(self):
            return super().as_dict() | {"rounds": self.rounds}

    call = call_of([5, 6], 1)
    own = Own(
        prompt_ids=[0],
        response_ids=[5, 6],
        response_mask=[1, 1],
        response_logprobs=log_probs_of(call),
        metrics={},
        rounds=3,
    )
    output = OutputWithCandidates(own, [call], 2)
    output.reward_score = 1.0  # as verl sets it afterwards
    fields = output.as_dict()
    assert isinstance(output, Own) and fields["rounds"] == 3 and fields["rm_scores"].tolist() == [0, 1]
    assert unpack(fields[IDS_FIELD], fields[CODES_FIELD])[0][:, 0].tolist() == [100, 200]


@pytest.mark.parametrize("change", ["token", "log_prob", "no log_probs", "no calls"])
def test_a_token_that_the_engine_never_returned_has_no_candidates(change):
    call = call_of([5, 6, 7], 1)
    response, log_probs, calls = [5, 6, 7], log_probs_of(call), [call]
    if change == "token":
        response[1] = 60
    elif change == "log_prob":
        log_probs[1] += 1e-9
    elif change == "no log_probs":
        log_probs = []
    else:
        calls = []
    ids, _ = align(response, [1, 1, 1], log_probs, calls, 2)
    assert (ids[1] == ABSENT).all()


def test_an_empty_response_has_no_rows():
    ids, codes = align([], [], [], [call_of([], 0)], 2)
    assert ids.shape == codes.shape == (0, 2)


def test_validation_asks_for_no_candidates(monkeypatch):
    asked = []

    async def run(self, sampling_params, trajectory):
        asked.append(sampling_params["logprobs"])

    monkeypatch.setattr(TopKAgentLoopWorker.__mro__[1], "_run_agent_loop", run)
    worker = object.__new__(TopKAgentLoopWorker)
    worker.top_k, worker.llm_client = 7, object.__new__(FullyAsyncLLMServerClient)
    for validate in (True, False):
        asyncio.run(worker._run_agent_loop({"logprobs": True}, {"validate": validate}))
    assert asked == [True, 7]


def test_an_aborted_and_resumed_response_has_the_candidates_of_both_parts():
    """verl's asynchronous client, which resumes by itself and returns the joined tokens alone."""
    answers = [("aborted", call_of([5, 6], 1)), ("aborted", call_of([], 0)), ("completed", call_of([7, 5], 3))]

    class Server:
        generate = property(lambda self: self)

        async def remote(self, prompt_ids, **kwargs):
            reason, (tokens, capture) = answers.pop(0)
            log_probs = capture.sampled_log_prob.tolist()
            return TokenOutput(
                token_ids=list(tokens), log_probs=log_probs, stop_reason=reason, extra_fields={CAPTURED: capture}
            )

    class Client(FullyAsyncLLMServerClient):
        async def _acquire_server(self, request_id, **fields):
            return "0", Server()

        def _release_server(self, server_id, request_id=None):
            pass

    async def respond():
        calls = []
        client = Client(OmegaConf.create({"actor_rollout_ref": {"rollout": {"name": TOP_K_ROLLOUT}}}))
        client = recording_client(client, calls)
        output = await client.generate("id", prompt_ids=[1, 2], sampling_params={"logprobs": 2})
        return output, align(output.token_ids, [1] * len(output.token_ids), output.log_probs, calls, 2)

    output, (ids, _) = asyncio.run(respond())
    assert output.token_ids == [5, 6, 7, 5]
    assert CAPTURED not in output.extra_fields
    assert ids[:, 0].tolist() == [100, 200, 300, 400]


def test_responses_made_at_the_same_time_get_their_own_candidates(monkeypatch):
    """verl's own `_run_agent_loop`, with one worker and one client for all responses."""
    import verl.experimental.agent_loop.agent_loop as verls

    class Server:
        generate = property(lambda self: self)

        async def remote(self, prompt_ids, sampling_params, **kwargs):
            await asyncio.sleep(0.001 * (prompt_ids[0] % 3))
            tokens, capture = call_of([prompt_ids[-1]], prompt_ids[0])
            fields = {CAPTURED: capture} if sampling_params["logprobs"] == 2 else {}
            return TokenOutput(token_ids=tokens, log_probs=capture.sampled_log_prob.tolist(), extra_fields=fields)

    class Client(LLMServerClient):
        async def _acquire_server(self, request_id, **fields):
            return "0", Server()

        def _release_server(self, server_id, request_id=None):
            pass

    class TwoCalls:
        def __init__(self, server_manager, **_):
            self.client = server_manager

        async def run(self, sampling_params, number):
            answers = [
                await self.client.generate(str(number), prompt_ids=[first, 5], sampling_params=sampling_params)
                for first in (number, number + 50)
            ]
            return AgentLoopOutput(
                prompt_ids=[0],
                response_ids=[token for a in answers for token in a.token_ids],
                response_mask=[1, 1],
                response_logprobs=[x for a in answers for x in a.log_probs],
                metrics={},
            )

    async def postprocess(self, output, validate, **kwargs):
        return output if validate else output[0]

    monkeypatch.setattr(TopKAgentLoopWorker.__mro__[1], "_agent_loop_postprocess", postprocess)
    monkeypatch.setitem(verls._agent_loop_registry, "two_calls", {"_target_": "two_calls"})
    monkeypatch.setattr(verls.hydra.utils, "instantiate", lambda config, **kwargs: TwoCalls(**kwargs))
    config = OmegaConf.create({"actor_rollout_ref": {"rollout": {"name": TOP_K_ROLLOUT}}, "data": {}})
    worker = object.__new__(TopKAgentLoopWorker)
    vars(worker).update(top_k=2, config=config, llm_client=Client(config), tools=[])
    vars(worker).update(dict.fromkeys(("tokenizer", "processor", "hf_model_type", "dataset_cls")))

    async def respond(number, validate):
        trajectory = {"step": 0, "sample_index": 0, "rollout_n": 0, "validate": validate}
        settings = {"logprobs": True}
        return await worker._run_agent_loop(settings, trajectory, agent_name="two_calls", trace=False, number=number)

    async def respond_to_all():
        return await asyncio.gather(*(respond(n, validate=False) for n in range(1, 8)), respond(9, validate=True))

    *responses, validation = asyncio.run(respond_to_all())
    for number, response in enumerate(responses, start=1):
        ids, _ = unpack(response.as_dict()[IDS_FIELD], response.as_dict()[CODES_FIELD])
        assert ids[:, 0].tolist() == [100 * number, 100 * (number + 50)]
    assert IDS_FIELD not in validation.as_dict()
