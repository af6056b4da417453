"""What the CPU platform replaces in verl, and whether verl still needs it."""

import inspect

import pytest
import torch
import torch.distributed as dist
from tensordict import NonTensorData, NonTensorStack, TensorDict
from torch.utils._python_dispatch import TorchDispatchMode
from verl.utils import seqlen_balancing, tensordict_utils, torch_functional
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


class Counted(TorchDispatchMode):
    """Adds up what ``count(function, args, result)`` says of each tensor operation inside."""

    def __init__(self, count):
        super().__init__()
        self.count, self.number = count, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.number += self.count(function, args, result)
        return result


def log_probs(compute, logits, labels):
    """Log-probabilities, their gradient for the logits, and how often logits were normalised."""
    logits = logits.clone().requires_grad_()
    with Counted(lambda function, *_: function is torch.ops.aten.logsumexp.default) as counted:
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


def test_logits_in_half_precision_have_the_log_probabilities_that_a_gpu_gives_them():
    """When verl's are in fp32 on a CPU too, drop the conversion."""
    logits, labels = torch.randn(3, 5, dtype=torch.bfloat16), torch.tensor([0, 4, 2])
    patched = torch_functional.logprobs_from_logits_v2
    with torch.autocast("cpu", torch.bfloat16):
        result, gradient, _ = log_probs(patched, logits, labels)
        assert patched.__wrapped__(logits, labels).dtype == torch.bfloat16
    expected, expected_gradient, _ = log_probs(patched.__wrapped__, logits.float(), labels)
    torch.testing.assert_close(result, expected)
    torch.testing.assert_close(gradient, expected_gradient.bfloat16())


def test_no_tokens_have_no_log_probabilities():
    assert torch_functional.logprobs_from_logits_v2(torch.zeros(0, 5), torch.zeros(0, dtype=torch.int64)).shape == (0,)


def batch_of_rows():
    """Seven rows of every kind of field: nested, dense, Python objects and one for the whole batch."""
    g = torch.Generator().manual_seed(2)
    lengths = [3, 1, 4, 1, 5, 2, 6]
    fields = {
        "ids": torch.nested.as_nested_tensor(
            [torch.randint(9, (n,), generator=g) for n in lengths], layout=torch.jagged
        ),
        "log_probs": torch.nested.as_nested_tensor([torch.rand(n, generator=g) for n in lengths], layout=torch.jagged),
        "top": torch.nested.as_nested_tensor([torch.rand(n, 2, generator=g) for n in lengths], layout=torch.jagged),
        "positions": tensordict_utils.nested_tensor_from_tensor_list(
            [torch.rand(2, n, generator=g) for n in lengths], ragged_idx=2
        ),
        # As it comes from another process: torch does not know its longest row.
        "sent": torch.nested.nested_tensor_from_jagged(
            torch.rand(22, generator=g), torch.tensor([0, *lengths]).cumsum(0)
        ),
        "strided": torch.nested.as_nested_tensor([torch.rand(n, generator=g) for n in lengths], layout=torch.strided),
        "dense": torch.rand(7, 3, generator=g),
        "names": NonTensorStack(*"abcdefg"),
        "temperature": NonTensorData(0.5),
    }
    return TensorDict(fields, batch_size=7)


def batch_of_joined_rows():
    """Without the nested fields that are left to verl."""
    return batch_of_rows().exclude("positions", "strided")


def batch_with_gaps():
    """Rows that are parts of longer ones, as `torch.nested.narrow` makes them."""
    values = torch.rand(7, 9, generator=torch.Generator().manual_seed(4))
    parts = torch.nested.narrow(values, 1, torch.arange(7), torch.tensor([2, 1, 2, 1, 2, 2, 2]), layout=torch.jagged)
    return batch_of_rows().update({"part": parts})


def assert_same_rows(result, expected):
    assert result.keys() == expected.keys() and result.batch_size == expected.batch_size
    for name, field in expected.items():
        if isinstance(field, torch.Tensor) and field.is_nested:
            torch.testing.assert_close(result[name].unbind(), field.unbind(), rtol=0, atol=0)
            assert result[name].layout == field.layout
            if name != "top":  # whose rows verl pads to the length of all rows together
                assert torch.equal(result[name].to_padded_tensor(-1), field.to_padded_tensor(-1))
        elif isinstance(field, torch.Tensor):
            assert torch.equal(result[name], field)
        else:
            assert tensordict_utils.get(result, name) == tensordict_utils.get(expected, name)


@pytest.mark.parametrize("batch", [batch_of_rows, batch_of_joined_rows, batch_with_gaps])
@pytest.mark.parametrize("rows", [[2, 3, 4], [6, 0, -1], [5], torch.tensor([1, 4])])
def test_rows_selected_at_once_are_those_that_verl_selects(rows, batch):
    select = tensordict_utils.index_select_tensor_dict
    assert_same_rows(select(batch(), rows), select.__wrapped__(batch(), rows))


@pytest.mark.parametrize("batch", [batch_of_rows, batch_of_joined_rows, batch_with_gaps])
@pytest.mark.parametrize("chunks", [1, 7])
def test_chunks_are_those_that_verl_makes(chunks, batch):
    chunk = tensordict_utils.chunk_tensordict
    results, expected = chunk(batch(), chunks), chunk.__wrapped__(batch(), chunks)
    for pair in zip(results, expected, strict=True):
        assert_same_rows(*pair)


def test_selected_candidates_are_padded_to_the_longest_row():
    selected = tensordict_utils.index_select_tensor_dict(batch_of_joined_rows(), [2, 3, 4])
    (chunk,) = tensordict_utils.chunk_tensordict(selected, 1)
    assert [x["top"].to_padded_tensor(0).shape for x in (selected, chunk)] == [(3, 5, 2)] * 2


def taken_apart(function, args, result):
    """The number of rows that a nested tensor is taken apart into."""
    return len(result) if function is torch.ops.aten.unbind.int and args[0].is_nested else 0


def test_a_mini_batch_takes_no_other_rows_apart():
    """When verl's own count is that of the selected rows, drop select_rows_at_once."""
    batch = batch_of_rows().select("ids", "top")
    counts = []
    for function in (tensordict_utils.index_select_tensor_dict, tensordict_utils.chunk_tensordict):
        for version in (function, function.__wrapped__):
            with Counted(taken_apart) as unbound:
                version(batch, [1, 2] if "select" in function.__name__ else 1)
            counts.append(unbound.number)
    assert counts == [0, 2 * 7, 0, 2 * 7]


def test_ranks_are_balanced_by_numbers_and_as_before():
    """When verl compares numbers itself, drop balance_numbers."""
    lengths = torch.randint(1, 99, (24,), generator=torch.Generator().manual_seed(3))
    partitions = []
    for patched in (True, False):
        balance = seqlen_balancing.karmarkar_karp if patched else seqlen_balancing.karmarkar_karp.__wrapped__
        with Counted(lambda *_: 1) as compared:
            partitions.append(balance(seqlen_list=lengths, k_partitions=3, equal_size=True))
        assert (compared.number == 0) == patched
    assert partitions[0] == partitions[1]


def test_the_server_makes_text_for_stop_strings_alone():
    """When verl names detokenize itself, drop leave_out_text."""
    assert not vllm_async_server.SamplingParams(max_tokens=3, temperature=0.5).detokenize
    assert vllm_async_server.SamplingParams(max_tokens=3, stop=["</answer>"]).detokenize
    assert vllm_async_server.SamplingParams(max_tokens=3, detokenize=True).detokenize
    assert SamplingParams(max_tokens=3).detokenize
    generate = inspect.getsource(vllm_async_server.vLLMHttpServer.generate)
    assert ".text" not in generate
    assert "detokenize" not in generate
