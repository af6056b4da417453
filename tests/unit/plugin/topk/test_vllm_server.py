"""What vLLM's answer holds, as arrays."""

import numpy as np
import pytest
import torch
from vllm_answers import answer

from cppo_verl.plugin.topk.codec import ABSENT, decode, unpack
from cppo_verl.plugin.topk.vllm_server import SampledLogProbs, captured


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
