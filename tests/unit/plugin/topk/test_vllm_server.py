"""What vLLM's answer holds, as arrays, and that each request gets its own."""

import asyncio
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from vllm import CompletionOutput, RequestOutput
from vllm_answers import answer

from cppo_verl.plugin.topk.codec import ABSENT, decode, unpack
from cppo_verl.plugin.topk.vllm_server import CAPTURED, CapturingEngine, SampledLogProbs, TopKServer, captured


def unpacked(result):
    ids, code = unpack(torch.from_numpy(result.ids), torch.from_numpy(result.codes))
    return ids.tolist(), decode(code).tolist()


def test_an_answer_becomes_arrays_that_stand_beside_its_tokens():
    flat = answer([(7, -1.0, {3: -0.5, 7: -1.0}), (5, -9.0, {4: -0.1, 6: -3.0})])
    result = captured(flat, 2)
    assert (result.ids.dtype, result.codes.dtype) == (np.int32, np.int16)
    assert result.sampled_log_prob.tolist() == [-1.0, -9.0]
    ids, log_probs = unpacked(result)
    assert ids == [[3, 7], [4, 6]]
    assert log_probs[0] == [-0.5, -1.0]
    assert log_probs[1] == pytest.approx([-0.1, -3.0])
    # what verl reads of it
    assert [x[t].logprob for x, t in zip(SampledLogProbs(flat), [7, 5], strict=True)] == [-1.0, -9.0]
    with pytest.raises(KeyError):
        SampledLogProbs(flat)[0][3]


def test_an_empty_answer_has_no_rows():
    result = captured(answer([]), 3)
    assert result.ids.shape == result.codes.shape == (0, 3)
    assert result.sampled_log_prob.shape == (0,)


def test_a_position_with_fewer_candidates_has_absent_ids():
    ids, log_probs = unpacked(captured(answer([(7, -1.0, {3: -0.5, 7: -1.0}), (5, -9.0, {4: -0.5})]), 2))
    assert ids == [[3, 7], [4, ABSENT]]
    assert log_probs[1] == [-0.5, pytest.approx(-32.0)]


class Engine:
    """Answers as vLLM's engine would: each prompt with its own tokens again, all at the same time."""

    def __init__(self, requests):
        self.all_are_here, self.missing, self.asked, self.seeds = asyncio.Event(), requests, [], []

    async def generate(self, *, prompt, sampling_params, request_id, **_):
        self.asked.append((request_id, sampling_params.logprobs, sampling_params.extra_args))
        self.seeds.append(sampling_params.seed)
        self.missing -= 1
        if not self.missing:
            self.all_are_here.set()
        await self.all_are_here.wait()
        tokens = prompt["prompt_token_ids"]
        flat = answer([(token, -token / 8, {token: -token / 8}) for token in tokens])
        completion = CompletionOutput(0, "", tokens, None, flat, finish_reason="stop")
        yield RequestOutput(request_id, None, tokens, None, [completion], finished=True)


async def serve(prompts, **sampling_params):
    """What verl's server makes of these prompts with one request id, at once."""
    server = TopKServer.__new__(TopKServer)  # its constructor asks Ray
    server.config = SimpleNamespace(
        max_model_len=64, full_determinism=True, seed=0, enable_rollout_routing_replay=False, mtp=None
    )
    server.config.get = lambda name, default: default
    server.model_config = SimpleNamespace(processor=None, lora_rank=0, lora={})
    server.replica_rank, server.global_steps, server._admitting, server._submission_paused = 0, 1, 0, False
    server._disaggregation_role = None
    engine = Engine(len(prompts))
    server.engine = CapturingEngine(engine)
    sampling_params = {"max_tokens": 8} | sampling_params
    outputs = [server.generate(prompt, dict(sampling_params), "det-0") for prompt in prompts]
    return await asyncio.gather(*outputs), engine


def test_requests_of_one_id_at_once_get_their_own_candidates():
    """With rollout.full_determinism verl's agent loops give many requests one id."""
    prompts = [[3, 5], [4], [6, 7, 8]]
    outputs, engine = asyncio.run(serve(prompts, logprobs=1))
    assert engine.asked == [("det-0", 1, None)] * 3
    for prompt, output in zip(prompts, outputs, strict=True):
        assert output.token_ids == prompt
        ids, log_probs = unpacked(output.extra_fields[CAPTURED])
        assert ids == [[token] for token in prompt]
        assert log_probs == [[-token / 8] for token in prompt]
        assert output.log_probs == output.extra_fields[CAPTURED].sampled_log_prob.tolist()


def test_a_request_as_verl_makes_it_is_served_as_verl_serves_it():
    own = {"mine": 1}
    (output,), engine = asyncio.run(serve([[3, 5]], logprobs=True, extra_args=own))
    assert (engine.asked, output.log_probs) == ([("det-0", 0, own)], [-3 / 8, -5 / 8])
    assert CAPTURED not in output.extra_fields
    (output,), engine = asyncio.run(serve([[3, 5]], logprobs=1, extra_args=own))
    assert engine.asked == [("det-0", 1, own)]
    assert CAPTURED in output.extra_fields


def test_verl_still_gives_all_requests_of_full_determinism_one_seed():
    """When this fails, drop the check of it in preflight."""
    _, engine = asyncio.run(serve([[3, 5], [3, 5]]))
    assert len(engine.seeds) == 2 and len(set(engine.seeds)) == 1 and engine.seeds[0] is not None
