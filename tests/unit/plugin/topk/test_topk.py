"""mu's most likely tokens from vLLM's answer to D_t: the codec, the capture, the alignment, the look at the logits."""

import asyncio
import math

import numpy as np
import oracle
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf
from oracle import fuzz
from tensordict import TensorDict
from verl.trainer.distillation.fsdp.losses import _chunked_topk_log_probs
from verl.workers.rollout.llm_server import FullyAsyncLLMServerClient
from verl.workers.rollout.replica import TokenOutput
from vllm.logprobs import create_sample_logprobs

from cppo_verl.core import exact_divergence
from cppo_verl.core.divergence import gather_log_probs
from cppo_verl.core.metrics import POSITION_BINS, position_sums
from cppo_verl.plugin.constants import TOP_K_ROLLOUT
from cppo_verl.plugin.losses import METRIC_PREFIX, loss_context
from cppo_verl.plugin.step_metrics import shares_by_update
from cppo_verl.plugin.topk.agent_loop import TopKAgentLoopWorker, align, recording_client
from cppo_verl.plugin.topk.codec import ABSENT, CODES_FIELD, IDS_FIELD, bytes_per_token, decode, encode, pack, unpack
from cppo_verl.plugin.topk.loss import divergence_of_logits
from cppo_verl.plugin.topk.vllm_server import CAPTURED, Captured, SampledLogProbs, captured

KINDS = pytest.mark.parametrize("kind", ["tv", "kl"])


# --- the codec ------------------------------------------------------------------------------------------------


def test_twenty_candidates_take_120_bytes():
    assert bytes_per_token(20) == 120
    ids, codes = pack(torch.zeros(7, 20, dtype=torch.int64), torch.zeros(7, 20))
    assert ids.element_size() + codes.element_size() == bytes_per_token(1)


def test_ids_and_log_probabilities_survive_the_packing():
    log_prob = torch.cat([torch.zeros(1), -torch.logspace(-8, math.log10(31.9), 4001)]).double()
    ids = torch.linspace(0, ABSENT, len(log_prob)).long()
    got_ids, code = unpack(*pack(ids, log_prob))
    assert torch.equal(got_ids, ids)
    torch.testing.assert_close(decode(code).double(), log_prob, rtol=1e-7, atol=2.0**-23)
    assert (code.diff() >= 0).all()
    assert torch.equal(encode(log_prob.float()), encode(log_prob.float().double()))


@pytest.mark.parametrize("log_prob", [-32.0, -80.0, -math.inf])
def test_what_is_less_likely_than_1e_14_counts_as_that(log_prob):
    ids, code = unpack(*pack(torch.tensor([ABSENT - 1]), torch.tensor([log_prob])))
    assert ids.item() == ABSENT - 1
    assert decode(code).item() == pytest.approx(-32, abs=1e-6)
    assert encode(torch.tensor(1e-7)).item() == 0


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
    got = divergence_of_logits(logits.float(), data, kind)[1].item()
    cells = oracle.partition(log_mu.exp().tolist(), y, min(20, len(log_mu)))
    want = {"tv": oracle.total_variation, "kl": oracle.kl}[kind](log_mu.exp().tolist(), log_pi.exp().tolist(), cells)
    # fp32; where mu is a spike, KL takes the logarithm of a rest of 1e-7
    assert got == pytest.approx(want, abs=1e-6 if kind == "tv" else 5e-6)


# --- the log-probabilities of a few tokens --------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_gathered_log_probs_are_those_of_the_log_softmax(dtype):
    g = torch.Generator().manual_seed(0)
    # 40,000 tokens: rows of 160 kB, so that the buffer holds 13 of the 40
    logits = (4 * torch.randn(40, 40_000, generator=g)).to(dtype).requires_grad_()
    ids = torch.randint(0, 40_000, (40, 5), generator=g)
    want = logits.detach().double().log_softmax(-1).gather(-1, ids)
    got = gather_log_probs(logits, ids)
    assert got.dtype == torch.float32 and not got.requires_grad
    torch.testing.assert_close(got.double(), want, rtol=0, atol=2e-5)
    rows = torch.tensor([39, 3, 3, 17])
    torch.testing.assert_close(gather_log_probs(logits, ids[rows], rows), got[rows])
    assert gather_log_probs(logits, ids[:0], rows[:0]).shape == (0, 5)


@pytest.mark.parametrize("shift", [-1e4, -80.0, 60.0, 95.0, 1e4])
def test_gathered_log_probs_of_logits_that_fp32_cannot_exponentiate(shift):
    g = torch.Generator().manual_seed(2)
    logits, ids = 3 * torch.randn(5, 50, generator=g), torch.randint(0, 50, (5, 4), generator=g)
    logits[1] += shift
    logits[3, 7] = -math.inf
    ids[3, 0] = 7
    want = logits.double().log_softmax(-1).gather(-1, ids)
    torch.testing.assert_close(gather_log_probs(logits, ids).double(), want, rtol=1e-6, atol=2e-6)


def test_gathered_log_probs_agree_with_verls():
    g = torch.Generator().manual_seed(1)
    logits, ids = torch.randn(17, 300, generator=g), torch.randint(0, 300, (17, 4), generator=g)
    verls = _chunked_topk_log_probs(logits[None], ids[None])[0]
    torch.testing.assert_close(gather_log_probs(logits, ids), verls, rtol=0, atol=2e-6)


# --- vLLM's answer --------------------------------------------------------------------------------------------


def answer(positions):
    """vLLM's flat log-probabilities of [(sampled id, its log-probability, {id: log-probability}), ...]."""
    flat = create_sample_logprobs(flat_logprobs=True)
    for sampled, log_prob, top in positions:
        ids, log_probs = [sampled, *top], [log_prob, *top.values()]
        flat.append_fast(ids, log_probs, iter(range(len(ids))), iter([None] * len(ids)))
    return flat


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


def test_fewer_candidates_are_marked_absent():
    result = captured(answer([(7, -1.0, {3: -0.5, 7: -1.0}), (5, -9.0, {4: -0.1}), (2, -0.1, {})]), 2)
    assert unpacked(result)[0] == [[3, 7], [4, ABSENT], [ABSENT, ABSENT]]


def test_an_empty_answer_has_no_rows():
    result = captured(answer([]), 3)
    assert result.ids.shape == result.codes.shape == (0, 3)
    assert result.sampled_log_prob.shape == (0,)


# --- alignment in the agent loop ------------------------------------------------------------------------------


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


# --- the look at the logits -----------------------------------------------------------------------------------


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
def test_divergence_of_logits_is_the_loops(kind, top_k):
    data, logits, log_mu, log_pi, responses, masks, prompts = random_micro_batch(top_k)
    got = divergence_of_logits(logits, data, kind)
    measure = {"tv": oracle.total_variation, "kl": oracle.kl}[kind]
    want = []
    for mu, pi, response, mask, prompt in zip(log_mu, log_pi, responses, masks, prompts, strict=True):
        want += [0.0] * (len(prompt) - 1)
        for m, p, y, valid in zip(mu.exp().tolist(), pi.exp().tolist(), response, mask, strict=True):
            want.append(measure(m, p, oracle.partition(m, y, top_k)) if valid else 0.0)
        want.append(0.0)
    assert got.tolist() == pytest.approx(want, abs=2e-6)
    if top_k == 11:
        exact = torch.cat([exact_divergence(p, m, kind) for m, p in zip(log_mu, log_pi, strict=True)])
        shown = got[got != 0]
        valid = torch.tensor([v for mask in masks for v in mask], dtype=torch.bool)
        torch.testing.assert_close(shown.double(), exact[valid], rtol=0, atol=2e-6)


def test_no_gradient_flows_and_the_logits_are_left_alone():
    data, logits, *_ = random_micro_batch()
    logits = logits.requires_grad_()
    before = logits.detach().clone()
    assert not divergence_of_logits(logits, data, "tv").requires_grad
    assert torch.equal(logits.detach(), before)


def test_parts_of_a_sequence_parallel_group_make_the_whole(monkeypatch):
    import cppo_verl.plugin.topk.loss as module

    data, logits, *_ = random_micro_batch()
    whole = divergence_of_logits(logits, data, "tv")
    n = -(-len(logits) // 3)
    padded = torch.cat([logits, torch.zeros(3 * n - len(logits), logits.shape[-1])])
    monkeypatch.setattr(module, "get_ulysses_sequence_parallel_world_size", lambda: 3)
    parts = []
    for rank in range(3):
        monkeypatch.setattr(module, "get_ulysses_sequence_parallel_rank", lambda rank=rank: rank)
        parts.append(divergence_of_logits(padded[rank * n : (rank + 1) * n], data, "tv"))
    assert torch.equal(torch.cat(parts)[: len(logits)], whole)


def test_verls_padding_rows_are_passed_over():
    data, logits, *_ = random_micro_batch()
    whole = divergence_of_logits(logits, data, "tv")
    # The last row is not valid anywhere; verl's padding leaves another row's candidates beside one token.
    longer = [*data[IDS_FIELD].unbind()[:3], data[IDS_FIELD].unbind()[2]]
    data[IDS_FIELD] = nested(longer)
    data[CODES_FIELD] = nested([*data[CODES_FIELD].unbind()[:3], data[CODES_FIELD].unbind()[2]])
    assert torch.equal(divergence_of_logits(logits, data, "tv"), whole)


@pytest.mark.parametrize("by", [1, -1])
def test_candidates_shifted_by_one_token_are_refused(by):
    data, logits, *_ = random_micro_batch()
    for field in (IDS_FIELD, CODES_FIELD):
        data[field] = nested([row.roll(by, 0) for row in data[field].unbind()])
    with pytest.raises(ValueError, match="do not stand beside the sampled tokens"):
        divergence_of_logits(logits, data, "tv")


@pytest.mark.parametrize("row", [0, 2])
def test_one_misplaced_token_among_many_is_found(row):
    data, logits, *_ = random_micro_batch(top_k=11)  # every token is a candidate, the sampled one too
    codes = data[CODES_FIELD].unbind()
    codes[row][-1] += 1  # a high bit: 4096 units of 2^-22
    data[CODES_FIELD] = nested(codes)
    with pytest.raises(ValueError, match="1 of 9 of this micro-batch.* for the same token"):
        divergence_of_logits(logits, data, "tv")


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
        divergence_of_logits(logits, data, "tv")


def test_fewer_candidates_are_refused_where_they_are_needed():
    data, logits, *_ = random_micro_batch()
    ids = data[IDS_FIELD].unbind()
    ids[2][1] = ABSENT  # tool output
    data[IDS_FIELD] = nested(ids)
    divergence_of_logits(logits, data, "tv")
    ids[2][3, 2] = ABSENT
    data[IDS_FIELD] = nested(ids)
    with pytest.raises(ValueError, match="gave 2 of mu's 3 most likely tokens at response position 3"):
        divergence_of_logits(logits, data, "tv")
    data[IDS_FIELD] = nested([*ids[:2], ids[2][:2], ids[3]])
    with pytest.raises(ValueError, match="row 2 of this micro-batch has 2 rows of mu's most likely tokens for 6"):
        divergence_of_logits(logits, data, "tv")


# --- mismatch and drift ---------------------------------------------------------------------------------------


def test_the_first_update_is_told_apart_from_the_later_ones():
    sums = {"all/tokens": [4.0, 2.0, 4.0], "all/divergence": [0.04, 0.2, 0.4]}
    sums |= {f"position_{b}/{name}": [0.0] * 3 for b in range(8) for name in ("tokens", "divergence")}
    sums |= {"position_3/tokens": [0.0, 1.0, 3.0], "position_3/divergence": [0.0, 0.1, 0.5]}
    metrics = shares_by_update({METRIC_PREFIX + key: value for key, value in sums.items()})
    assert metrics == pytest.approx(
        {
            "trust_region/first_update/divergence": 0.01,
            "trust_region/later_updates/divergence": 0.1,
            "trust_region/later_updates/divergence/position_3": 0.15,
        }
    )
    # The separate trainer's later mini-batches between two weight syncs.
    later = shares_by_update({METRIC_PREFIX + key: value for key, value in sums.items()}, first_updates=0)
    assert later == pytest.approx(
        {
            "trust_region/later_updates/divergence": 0.064,
            "trust_region/later_updates/divergence/position_3": 0.15,
        }
    )
    assert shares_by_update({"grad_norm": [1.0]}) == {}


@fuzz
@given(st.lists(st.lists(st.booleans(), min_size=30, max_size=30), min_size=1, max_size=5), st.integers(0, 99))
def test_position_sums_are_the_loops(masks, seed):
    valid = torch.tensor(masks).float()
    divergence = torch.rand(valid.shape, generator=torch.Generator().manual_seed(seed)) * valid
    tokens, sums = [0] * POSITION_BINS, [0.0] * POSITION_BINS
    for mask, row in zip(masks, divergence.tolist(), strict=True):
        inside = [d for d, v in zip(row, mask, strict=True) if v]
        for t, d in enumerate(inside, start=1):
            b = next(b for b in range(POSITION_BINS) if POSITION_BINS * t <= (b + 1) * len(inside))
            tokens[b] += 1
            sums[b] += d
    got_tokens, got_sums = position_sums(divergence, valid).tolist()
    assert got_tokens == tokens
    assert got_sums == pytest.approx(sums, abs=1e-5)


def test_a_top_k_divergence_without_the_trainer_is_refused():
    from loss_batches import actor_config, batch, call

    with pytest.raises(RuntimeError, match="divergence=topk_tv is measured in the forward pass"):
        call(batch(), actor_config(divergence="topk_tv"))


def test_the_loss_takes_the_measured_divergence_on_valid_tokens_alone():
    from loss_batches import actor_config, batch, call

    data = batch()
    mask = data["response_mask"]
    exact = (data["log_prob"].detach().exp() - data["old_log_prob"].exp()).abs()
    with loss_context(divergence=torch.where(mask, exact, torch.nan)):
        loss, metrics = call(data, actor_config(divergence="topk_tv"))
    want, want_metrics = call(data, actor_config())
    assert loss.item() == pytest.approx(want.item())
    assert metrics == pytest.approx(want_metrics)
