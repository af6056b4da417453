"""What the CPU platform replaces in verl, and whether verl still needs it."""

import inspect

import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode
from verl.utils import torch_functional
from verl.workers.rollout.vllm_rollout import vllm_async_server
from vllm import SamplingParams

from cppo_verl.cpu import verl_patches


@pytest.fixture
def single_rank(monkeypatch):
    for key, value in {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "RANK": "0", "WORLD_SIZE": "1"}.items():
        monkeypatch.setenv(key, value)
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


def test_verl_still_names_the_cpu_twice_for_its_process_group(single_rank):
    """When this fails, drop verl_patches.py."""
    import verl.utils.distributed as distributed

    patched = distributed.initialize_global_process_group_ray
    with pytest.raises(ValueError, match="Duplicate device type cpu"):
        patched.func()
    patched()
    assert dist.get_world_size() == 1


class Normalisations(TorchDispatchMode):
    """Counts the calls of logsumexp inside."""

    number = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.number += function is torch.ops.aten.logsumexp.default
        return function(*args, **(kwargs or {}))


def log_probs(compute, logits, labels):
    """Log-probabilities, their gradient for the logits, and how often logits were normalised."""
    logits = logits.clone().requires_grad_()
    with Normalisations() as counted:
        result = compute(logits, labels)
    (gradient,) = torch.autograd.grad((result * torch.arange(1.0, len(result) + 1)).sum(), logits)
    return result.detach(), gradient, counted.number


@pytest.mark.parametrize("block", [8 * 5, verl_patches.BLOCK])
def test_blocks_of_tokens_have_the_log_probabilities_that_verl_computes_one_by_one(block, monkeypatch):
    """When verl's own loop counts one, drop normalise_blocks."""
    monkeypatch.setattr(verl_patches, "BLOCK", block)
    g = torch.Generator().manual_seed(1)
    logits, labels = torch.randn(19, 5, generator=g).mul_(8), torch.randint(5, (19,), generator=g)
    patched = torch_functional.logprobs_from_logits_v2
    result, gradient, number = log_probs(patched, logits, labels)
    expected, expected_gradient, one_by_one = log_probs(patched.__wrapped__, logits, labels)
    torch.testing.assert_close(result, expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-5, atol=1e-6)
    assert one_by_one == 19
    assert number == (3 if block == 40 else 1)


def test_blocks_of_half_precision_are_verls():
    logits, labels = torch.randn(3, 5, dtype=torch.bfloat16), torch.tensor([0, 4, 2])
    patched = torch_functional.logprobs_from_logits_v2
    assert torch.equal(patched(logits, labels), patched.__wrapped__(logits, labels))


def test_no_tokens_have_no_log_probabilities():
    assert torch_functional.logprobs_from_logits_v2(torch.zeros(0, 5), torch.zeros(0, dtype=torch.int64)).shape == (0,)


def test_the_server_makes_text_for_stop_strings_alone():
    """When verl names detokenize itself, drop leave_out_text."""
    assert not vllm_async_server.SamplingParams(max_tokens=3, temperature=0.5).detokenize
    assert vllm_async_server.SamplingParams(max_tokens=3, stop=["</answer>"]).detokenize
    assert vllm_async_server.SamplingParams(max_tokens=3, detokenize=True).detokenize
    assert SamplingParams(max_tokens=3).detokenize
    generate = inspect.getsource(vllm_async_server.vLLMHttpServer.generate)
    assert ".text" not in generate
    assert "detokenize" not in generate
