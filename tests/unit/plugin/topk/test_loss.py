"""D_t from the logits that verl's hook shows and the log-probabilities that verl makes of them."""

import sys
from types import SimpleNamespace

import oracle
import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from oracle import fuzz
from tensordict import TensorDict
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from verl.utils.torch_functional import logprobs_from_logits_v2
from verl.workers.config import FSDPActorConfig
from vllm_answers import answer

from cppo_verl.core import partition_divergence
from cppo_verl.plugin.config import CPPOLossConfig
from cppo_verl.plugin.topk.codec import ABSENT, CODES_FIELD, IDS_FIELD, decode, unpack
from cppo_verl.plugin.topk.loss import (
    Layout,
    fsdp_layout,
    megatron_layout,
    retained_logits,
    token_divergence,
    top_k_ppo_loss,
)
from cppo_verl.plugin.topk.vllm_server import captured

KINDS = pytest.mark.parametrize("kind", ["tv", "kl"])


@st.composite
def shapes_of_mu(draw):
    """mu over 64 tokens from flat to a spike, and pi somewhere around it."""
    seed, scale = draw(st.integers(0, 10**6)), draw(st.sampled_from([0.0, 0.01, 0.5, 2.0, 8.0, 30.0]))
    drift = draw(st.sampled_from([0.0, 0.03, 0.3, 1.0]))
    g = torch.Generator().manual_seed(seed)
    size = draw(st.sampled_from([4, 20, 21, 64]))
    mu = scale * torch.randn(size, generator=g, dtype=torch.float64)
    return torch.stack([mu, mu + drift * torch.randn(size, generator=g, dtype=torch.float64)]).log_softmax(-1)


@fuzz
@given(shapes_of_mu(), st.integers(0, 3), st.sampled_from(["tv", "kl"]))
def test_a_divergence_is_that_of_the_full_distributions(policies, y, kind):
    log_mu, log_pi = policies
    if torch.unique(log_mu).numel() < len(log_mu):  # which of equals are the top K is open
        log_mu = (log_mu - 1e-4 * torch.arange(len(log_mu))).log_softmax(-1)
    data, logits = micro_batch([log_mu[None]], [log_pi[None]], [[y]], top_k=min(20, len(log_mu)))
    got = fsdp_divergence(logits.float(), data, kind).item()
    cells = oracle.partition(log_mu.exp().tolist(), y, min(20, len(log_mu)))
    want = {"tv": oracle.total_variation, "kl": oracle.kl}[kind](log_mu.exp().tolist(), log_pi.exp().tolist(), cells)
    # fp32. The logits' normaliser rounds log pi(y), and with it all others. Where mu is a spike, KL takes the logarithm
    # of a rest of 1e-7.
    rounding = 2 * torch.finfo(torch.float32).eps * (abs(log_pi[y].item()) + 5)
    assert got == pytest.approx(want, abs=(1e-6 if kind == "tv" else 5e-6) + rounding)


def log_probs_of(logits, data):
    """As verl's engine makes them: at each token that of the next."""
    following = data["input_ids"].values().roll(-1).unsqueeze(-1)
    log_probs = logprobs_from_logits_v2(logits, following.squeeze(-1))
    return torch.nested.nested_tensor_from_jagged(log_probs, data["input_ids"].offsets())


def flat(padded, data):
    """The response tokens of [B, L], whose other places are zero."""
    inside = torch.arange(padded.shape[1]) < data["responses"].offsets().diff().unsqueeze(-1)
    assert not padded[~inside].any()
    return padded[inside]


def divergence_of(logits, data, kind, layout):
    """D_t at each response token, where one rank has all logits."""
    retained = retained_logits(logits, data, layout)
    return flat(token_divergence(retained, log_probs_of(logits, data), data, kind), data)


def fsdp_divergence(logits, data, kind):
    return divergence_of(logits, data, kind, fsdp_layout(data, logits.unsqueeze(0)))


def nested(rows):
    return torch.nested.as_nested_tensor(rows, layout=torch.jagged)


def micro_batch(log_mu, log_pi, responses, top_k, masks=None, prompts=None):
    """verl's micro-batch and packed logits of given policies.

    Args:
        log_mu, log_pi: per response, log-probabilities [L, V] where its tokens are predicted.
        responses: per response, its tokens.
    """
    prompts = prompts or [[0, 0]] * len(responses)
    masks = masks or [[1] * len(r) for r in responses]
    ids, codes, sampled, packed = [], [], [], []
    for mu, pi, response, prompt in zip(log_mu, log_pi, responses, prompts, strict=True):
        y = torch.tensor(response)
        positions = [
            (t, row[t].item(), dict(zip(top.indices.tolist(), top.values.tolist(), strict=True)))
            for t, row in zip(response, mu, strict=True)
            for top in [row.topk(top_k)]
        ]
        result = captured(answer(positions), top_k)
        ids.append(torch.from_numpy(result.ids))
        codes.append(torch.from_numpy(result.codes))
        sampled.append(mu.gather(-1, y[:, None]).squeeze(-1).float())
        # Logits, not log-probabilities; where no response token is predicted, noise.
        noise = torch.full((1, pi.shape[-1]), 3.0, dtype=pi.dtype)
        packed += [noise.expand(len(prompt) - 1, -1), pi + 5 * torch.rand(len(pi), 1), noise]
    data = TensorDict(
        {
            "prompts": nested([torch.tensor(p) for p in prompts]),
            "responses": nested([torch.tensor(r) for r in responses]),
            "input_ids": nested([torch.tensor([*p, *r]) for p, r in zip(prompts, responses, strict=True)]),
            "response_mask": nested([torch.tensor(m) for m in masks]),
            "rollout_log_probs": nested(sampled),
            IDS_FIELD: nested(ids),
            CODES_FIELD: nested(codes),
        },
        batch_size=len(responses),
    )
    return data, torch.cat(packed)


def random_micro_batch(top_k=3, vocabulary=11, seed=0):
    g = torch.Generator().manual_seed(seed)
    lengths = [4, 1, 6, 3]
    policies = [torch.randn(2, n, vocabulary, generator=g, dtype=torch.float64).log_softmax(-1) for n in lengths]
    responses = [torch.randint(0, vocabulary, (n,), generator=g).tolist() for n in lengths]
    masks = [[1, 1, 1, 1], [1], [1, 0, 0, 1, 1, 1], [0, 0, 0]]
    prompts = [[1, 2], [3], [4, 5, 6], [7, 8]]
    log_mu, log_pi = [p[0] for p in policies], [p[1] for p in policies]
    data, logits = micro_batch(log_mu, log_pi, responses, top_k, masks, prompts)
    return data, logits, log_mu, log_pi, responses, masks, prompts


@KINDS
@pytest.mark.parametrize("top_k", [1, 3, 11])
def test_the_divergence_is_the_oracles(kind, top_k):
    data, logits, log_mu, log_pi, responses, masks, _ = random_micro_batch(top_k)
    got = fsdp_divergence(logits, data, kind)
    measure = {"tv": oracle.total_variation, "kl": oracle.kl}[kind]
    want = []
    for mu, pi, response, mask in zip(log_mu, log_pi, responses, masks, strict=True):
        for m, p, y, valid in zip(mu.exp().tolist(), pi.exp().tolist(), response, mask, strict=True):
            want.append(measure(m, p, oracle.partition(m, y, top_k)) if valid else 0.0)
    assert got.tolist() == pytest.approx(want, abs=2e-6)
    if top_k == 11:
        exact = torch.cat([partition_divergence(p, m, kind) for m, p in zip(log_mu, log_pi, strict=True)])
        shown = got[got != 0]
        valid = torch.tensor([v for mask in masks for v in mask], dtype=torch.bool)
        torch.testing.assert_close(shown.double(), exact[valid], rtol=0, atol=2e-6)


class Waits(TorchDispatchMode):
    """Counts the operations for whose result the host of an accelerator waits."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        by_mask = func is torch.ops.aten.index.Tensor and any(i is not None and i.dtype == torch.bool for i in args[1])
        spread = func is torch.ops.aten.repeat_interleave.Tensor and (kwargs or {}).get("output_size") is None
        self.count += by_mask or spread or func.overloadpacket in (torch.ops.aten.nonzero, torch.ops.aten.item)
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


@pytest.fixture
def one_rank():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


@pytest.mark.parametrize("copies", [1, 30])
def test_the_host_waits_twice_whatever_the_number_of_responses(copies, one_rank):
    data, logits, *_ = random_micro_batch()
    whole = fsdp_divergence(logits, data, "tv")
    data = TensorDict({k: nested(list(x.unbind()) * copies) for k, x in data.items()}, batch_size=4 * copies)
    logits = logits.repeat(copies, 1)
    log_probs = log_probs_of(logits, data)
    for group in (None, one_rank):
        layout = Layout(fsdp_layout(data, logits.unsqueeze(0)).starts, group)
        with Waits() as waits:
            got = token_divergence(retained_logits(logits, data, layout), log_probs, data, "tv")
        assert waits.count == 2
        torch.testing.assert_close(flat(got, data), whole.repeat(copies))


class LargestResult(TorchDispatchMode):
    """Number of elements of the largest result that is no view of a tensor."""

    def __init__(self, tensor):
        super().__init__()
        self.storage, self.elements = tensor.untyped_storage().data_ptr(), 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if isinstance(x, torch.Tensor) and not x.is_nested and x.untyped_storage().data_ptr() != self.storage:
                self.elements = max(self.elements, x.numel())
        return result


def test_no_logit_is_read_but_those_of_the_retained_tokens():
    data, logits, log_mu, _, responses, _, prompts = random_micro_batch(top_k=3, vocabulary=5000)
    log_probs, layout, row = log_probs_of(logits, data), fsdp_layout(data, logits.unsqueeze(0)), 0
    poisoned = torch.full_like(logits, torch.nan)
    for mu, response, prompt in zip(log_mu, responses, prompts, strict=True):
        for t, y in enumerate(response):
            ids = [*mu[t].topk(3).indices.tolist(), y]
            poisoned[row + len(prompt) - 1 + t, ids] = logits[row + len(prompt) - 1 + t, ids]
        row += len(prompt) + len(response)
    with LargestResult(poisoned) as largest:
        got = token_divergence(retained_logits(poisoned, data, layout), log_probs, data, "tv")
    assert largest.elements < 5000
    torch.testing.assert_close(flat(got, data), fsdp_divergence(logits, data, "tv"))


@pytest.mark.parametrize("shift", [-80.0, 20.0, 50.0, 1e4])
def test_the_divergence_is_as_exact_as_the_logits_normaliser(shift):
    data, logits, *_ = random_micro_batch()
    shifted = (logits + shift).float()
    want = fsdp_divergence(shifted.double(), data, "tv")
    rounding = 2 * torch.finfo(torch.float32).eps * shifted.abs().max().item()
    torch.testing.assert_close(fsdp_divergence(shifted, data, "tv"), want, rtol=0, atol=rounding + 1e-6)


def test_logits_of_minus_infinity_have_no_mass():
    data, logits, *_ = random_micro_batch(top_k=11)
    row, y = 1, int(data["responses"].values()[0])  # which predict the first response token
    other = (y + 1) % 11
    logits[row, other] = -torch.inf
    shown = retained_logits(logits, data, fsdp_layout(data, logits.unsqueeze(0))).values()[0]
    assert (shown == -torch.inf).sum() == 1
    mu = torch.zeros(11)
    ids, codes = unpack(data[IDS_FIELD].values()[0], data[CODES_FIELD].values()[0])
    mu[ids] = decode(codes).exp()
    want = 0.5 * (mu - logits[row].softmax(-1)).abs().sum().item()
    assert fsdp_divergence(logits, data, "tv")[0].item() == pytest.approx(want, abs=1e-6)
    assert fsdp_divergence(logits, data, "kl")[0].item() == torch.inf


def test_log_probabilities_in_half_precision_are_refused():
    data, logits, *_ = random_micro_batch()
    retained = retained_logits(logits.bfloat16(), data, fsdp_layout(data, logits.unsqueeze(0)))
    exact = token_divergence(retained, log_probs_of(logits.bfloat16().float(), data), data, "tv")
    torch.testing.assert_close(flat(exact, data), fsdp_divergence(logits.bfloat16().float(), data, "tv"))
    with pytest.raises(ValueError, match=r"are torch\.bfloat16, too coarse .* train in fp32, or use divergence=bin"):
        token_divergence(retained, log_probs_of(logits, data).bfloat16(), data, "tv")


def test_a_token_that_the_model_does_not_have_makes_no_number():
    data, logits, *_ = random_micro_batch()
    retained = retained_logits(logits[:, :9], data, fsdp_layout(data, logits.unsqueeze(0)))
    assert token_divergence(retained, log_probs_of(logits, data), data, "tv").isnan().any()


def test_log_probabilities_before_the_logits_are_refused():
    data, _, *_ = random_micro_batch()
    config = FSDPActorConfig(
        strategy="fsdp2",
        rollout_n=1,
        ppo_micro_batch_size_per_gpu=1,
        policy_loss=CPPOLossConfig(divergence="topk_tv"),
    )
    with pytest.raises(RuntimeError, match=r"verl's fsdp2 engine has not shown the logits .*divergence=binary_tv"):
        top_k_ppo_loss(config, {"log_probs": data["rollout_log_probs"]}, data)


def test_no_gradient_flows_and_the_logits_are_left_alone():
    data, logits, *_ = random_micro_batch()
    logits = logits.requires_grad_()
    before = logits.detach().clone()
    assert not fsdp_divergence(logits, data, "tv").requires_grad
    assert torch.equal(logits.detach(), before)


def test_each_logit_is_that_of_one_rank_of_a_sequence_parallel_group(monkeypatch):
    import cppo_verl.plugin.topk.loss as module

    data, logits, *_ = random_micro_batch()
    whole = retained_logits(logits, data, fsdp_layout(data, logits.unsqueeze(0))).values()
    n = -(-len(logits) // 3)
    padded = torch.cat([logits, torch.zeros(3 * n - len(logits), logits.shape[-1])])
    parts = []
    for rank in range(3):
        monkeypatch.setattr(module, "get_ulysses_sequence_parallel_rank", lambda rank=rank: rank)
        part = padded[rank * n : (rank + 1) * n]
        parts.append(retained_logits(part, data, fsdp_layout(data, part.unsqueeze(0))).values())
    parts = torch.stack(parts)
    assert (~parts.isnan()).sum(0).eq(1).all()
    assert torch.equal(parts.nansum(0), whole)


def test_logits_that_megatron_has_laid_out_otherwise_are_refused(one_rank, monkeypatch):
    core = SimpleNamespace(get_tensor_model_parallel_group=lambda: one_rank)
    monkeypatch.setitem(sys.modules, "megatron.core.parallel_state", core)
    data, logits, *_ = random_micro_batch()
    layout = megatron_layout(data, logits.unsqueeze(0), "thd")
    torch.testing.assert_close(divergence_of(logits, data, "tv", layout), fsdp_divergence(logits, data, "tv"))
    for length in (len(logits) // 2, len(logits) + 1):  # of two context-parallel ranks; padded
        with pytest.raises(RuntimeError, match=rf"{len(logits)} tokens of 4 rows out in {length} logits"):
            megatron_layout(data, torch.empty(1, length, 11), "thd")


def test_verls_padding_rows_are_passed_over():
    data, logits, *_ = random_micro_batch()
    whole = fsdp_divergence(logits, data, "tv")
    # The last row is not valid anywhere; verl's padding leaves another row's candidates beside one token.
    longer = [*data[IDS_FIELD].unbind()[:3], data[IDS_FIELD].unbind()[2]]
    data[IDS_FIELD] = nested(longer)
    data[CODES_FIELD] = nested([*data[CODES_FIELD].unbind()[:3], data[CODES_FIELD].unbind()[2]])
    assert torch.equal(fsdp_divergence(logits, data, "tv"), whole)


@pytest.mark.parametrize("by", [1, -1])
def test_candidates_shifted_by_one_token_are_refused(by):
    data, logits, *_ = random_micro_batch()
    for field in (IDS_FIELD, CODES_FIELD):
        data[field] = nested([row.roll(by, 0) for row in data[field].unbind()])
    with pytest.raises(ValueError, match="do not belong to the sampled tokens"):
        fsdp_divergence(logits, data, "tv")


@pytest.mark.parametrize("row", [0, 2])
def test_one_misplaced_token_among_many_is_found(row):
    data, logits, *_ = random_micro_batch(top_k=11)  # every token is a candidate, the sampled one too
    codes = data[CODES_FIELD].unbind()
    codes[row][-1] += 1  # a high bit: 4096 units of 2^-22
    data[CODES_FIELD] = nested(codes)
    with pytest.raises(ValueError, match="1 of 9 of this micro-batch.* for the same token"):
        fsdp_divergence(logits, data, "tv")


def test_a_sampled_token_likelier_than_the_candidates_is_refused():
    data, logits, *_ = random_micro_batch()
    ids = data[IDS_FIELD].unbind()
    sampled = data["responses"].unbind()[0][0]
    ids[0][0] = torch.tensor([i for i in range(11) if i != sampled][:3])
    log_probs = data["rollout_log_probs"].unbind()
    log_probs[0][0] = -1e-3
    data[IDS_FIELD], data["rollout_log_probs"] = nested(ids), nested(log_probs)
    with pytest.raises(
        ValueError, match="response position 0, where rollout_log_probs has -0.001000.*only less likely"
    ):
        fsdp_divergence(logits, data, "tv")


def test_fewer_candidates_are_refused_where_they_are_needed():
    data, logits, *_ = random_micro_batch()
    ids = data[IDS_FIELD].unbind()
    ids[2][1] = ABSENT  # tool output
    data[IDS_FIELD] = nested(ids)
    fsdp_divergence(logits, data, "tv")
    ids[2][3, 2] = ABSENT
    data[IDS_FIELD] = nested(ids)
    with pytest.raises(ValueError, match="gave 2 of mu's 3 most likely tokens at response position 3"):
        fsdp_divergence(logits, data, "tv")
    data[IDS_FIELD] = nested([*ids[:2], ids[2][:2], ids[3]])
    codes = data[CODES_FIELD].unbind()
    data[CODES_FIELD] = nested([*codes[:2], codes[2][:2], codes[3]])
    with pytest.raises(ValueError, match="gave 0 of mu's 3 .* at response position 3 .* changes the response after"):
        fsdp_divergence(logits, data, "tv")
