"""Divergences on a partition: by hand, against the oracle, and in the order binary <= top-K <= exact."""

import math

import oracle
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracle import fuzz
from verl.trainer.distillation.fsdp.losses import _chunked_topk_log_probs
from verl.utils.torch_functional import logprobs_from_logits

from cppo_verl.core import binary_divergence, partition_divergence, top_k_divergence
from cppo_verl.core.divergence import gather_logits, log_probs_beside

KINDS = pytest.mark.parametrize("kind", ["tv", "kl"])
PRECISIONS = pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float64, {"rel": 1e-9, "abs": 1e-12}), (torch.float32, {"rel": 2e-4, "abs": 2e-6})],
    ids=["fp64", "fp32"],
)
ORACLE = {"tv": oracle.total_variation, "kl": oracle.kl}
MU, PI = [0.5, 0.3, 0.15, 0.05], [0.3, 0.3, 0.2, 0.2]


@st.composite
def policies(draw, spread=3):
    """Logits of mu and pi over a small vocabulary, ties and equal policies included, and a sampled token."""
    size = draw(st.integers(2, 8))
    logits = st.lists(st.integers(-spread * 16, spread * 16).map(lambda n: n / 16), min_size=size, max_size=size)
    mu = draw(logits)
    pi = draw(st.one_of(logits, st.just(mu)))
    return torch.tensor([mu, pi], dtype=torch.float64).log_softmax(-1), draw(st.integers(0, size - 1))


def logs(*probs, dtype=torch.float64):
    return torch.tensor(probs, dtype=dtype).log()


def top_k(log_pi, log_mu, y, k, kind):
    return top_k_divergence(log_pi, log_mu, torch.tensor(y), k, kind)


# --- by hand --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mu", "pi", "tv", "kl"),
    [
        (0.5, 0.25, 0.25, 0.5 * math.log(2) + 0.5 * math.log(2 / 3)),
        (0.25, 0.5, 0.25, 0.25 * math.log(0.5) + 0.75 * math.log(1.5)),
        (0.7, 0.7, 0.0, 0.0),
        (1.0, 0.5, 0.5, math.log(2)),
    ],
)
def test_binary_by_hand(mu, pi, tv, kl):
    assert binary_divergence(logs(pi), logs(mu), "tv").item() == pytest.approx(tv, abs=1e-15)
    assert binary_divergence(logs(pi), logs(mu), "kl").item() == pytest.approx(kl, abs=1e-15)


@pytest.mark.parametrize(
    ("k", "y", "tv", "cells"),
    [
        (1, 0, 0.2, [[0], [1, 2, 3]]),
        (1, 3, 0.2, [[0], [3], [1, 2]]),  # sampled outside the top K: a category of its own
        (2, 1, 0.2, [[0], [1], [2, 3]]),
        (2, 2, 0.2, [[0], [1], [2], [3]]),
        (4, 3, 0.2, [[0], [1], [2], [3]]),
        (9, 3, 0.2, [[0], [1], [2], [3]]),  # K beyond the vocabulary
    ],
)
def test_top_k_by_hand(k, y, tv, cells):
    assert top_k(logs(*PI), logs(*MU), y, k, "tv").item() == pytest.approx(tv)
    kl = sum(sum(MU[i] for i in c) * math.log(sum(MU[i] for i in c) / sum(PI[i] for i in c)) for c in cells)
    assert top_k(logs(*PI), logs(*MU), y, k, "kl").item() == pytest.approx(kl)


def test_top_k_sees_what_the_binary_form_misses():
    """The sampled token keeps its mass while the others trade theirs."""
    mu, pi = logs(0.2, 0.5, 0.3), logs(0.2, 0.1, 0.7)
    assert binary_divergence(pi[0], mu[0]).item() == 0
    assert top_k(pi, mu, 0, 1, "tv").item() == pytest.approx(0.4)
    assert partition_divergence(pi, mu).item() == pytest.approx(0.4)


def test_the_top_k_tokens_are_those_of_mu():
    mu, pi = logs(0.6, 0.2, 0.1, 0.1), logs(0.1, 0.2, 0.1, 0.6)
    assert top_k(pi, mu, 0, 1, "kl").item() == pytest.approx(0.6 * math.log(6) + 0.4 * math.log(0.4 / 0.9))


def test_disjoint_policies():
    mu, pi = logs(1.0, 0.0), logs(0.0, 1.0)
    assert partition_divergence(pi, mu, "tv").item() == 1
    assert partition_divergence(pi, mu, "kl").item() == math.inf


@KINDS
def test_shapes(kind):
    log_pi, log_mu = torch.randn(2, 3, 5, 7).log_softmax(-1)
    sampled = torch.randint(7, (3, 5))
    for value in (
        partition_divergence(log_pi, log_mu, kind),
        top_k_divergence(log_pi, log_mu, sampled, 2, kind),
        binary_divergence(log_pi[..., 0], log_mu[..., 0], kind),
    ):
        assert value.shape == (3, 5)
    each = [top_k(log_pi[i, j], log_mu[i, j], sampled[i, j].item(), 2, kind) for i in range(3) for j in range(5)]
    batched = top_k_divergence(log_pi, log_mu, sampled, 2, kind).flatten()
    torch.testing.assert_close(batched, torch.stack(each))


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="js"):
        partition_divergence(logs(0.5, 0.5), logs(0.5, 0.5), "js")
    with pytest.raises(ValueError, match="js"):
        binary_divergence(logs(0.5), logs(0.5), "js")
    with pytest.raises(ValueError, match="0"):
        top_k(logs(*PI), logs(*MU), 0, 0, "tv")


# --- against the oracle ---------------------------------------------------------------------------------------


@PRECISIONS
@KINDS
@given(drawn=policies(), k=st.integers(1, 10))
@fuzz
def test_agrees_with_the_oracle(kind, dtype, tolerance, drawn, k):
    both, y = drawn
    log_mu, log_pi = both.to(dtype)
    mu, pi = ([math.exp(v) for v in x.tolist()] for x in (log_mu, log_pi))
    ranked = sorted(log_mu.tolist(), reverse=True)

    def expected(cells):
        return pytest.approx(ORACLE[kind](mu, pi, cells), **tolerance)

    assert binary_divergence(log_pi[y], log_mu[y], kind).item() == expected(oracle.partition(mu, y, 0))
    assert partition_divergence(log_pi, log_mu, kind).item() == expected(oracle.exact_cells(mu))
    if k >= len(mu) or ranked[k - 1] > ranked[k]:  # a tie across rank K leaves the K tokens open
        assert top_k(log_pi, log_mu, y, k, kind).item() == expected(oracle.partition(mu, y, k))


@KINDS
@given(pair=st.tuples(oracle.log_probs, oracle.log_probs))
@fuzz
def test_binary_at_the_ends_of_the_scale(kind, pair):
    """Log-probabilities from 0 to -60, from the two numbers alone: finite, and the formula to fp64 precision."""
    log_mu, log_pi = pair
    got = binary_divergence(*torch.tensor([log_pi, log_mu], dtype=torch.float64), kind).item()
    mu, pi = ([math.exp(x), -math.expm1(x)] for x in pair)
    if pi[1] > 0:
        assert got == pytest.approx(ORACLE[kind](mu, pi, [[0], [1]]), rel=1e-12, abs=1e-14)
    assert math.isfinite(got) and got >= 0


def test_binary_kl_of_a_sharp_policy_in_single_precision():
    """1 - pi = 1e-6 keeps its digits; 1 - exp(log_pi) in fp32 would be 1.3 % off."""
    log_pi, log_mu = torch.tensor([-1e-6, -0.1])
    mu, pi = ([math.exp(x), -math.expm1(x)] for x in (log_mu.item(), log_pi.item()))
    assert binary_divergence(log_pi, log_mu, "kl").item() == pytest.approx(oracle.kl(mu, pi, [[0], [1]]), rel=1e-5)


# --- properties -----------------------------------------------------------------------------------------------


@PRECISIONS
@KINDS
@given(data=st.data())
@fuzz
def test_refining_the_partition_never_lowers_the_value(kind, dtype, tolerance, data):
    both, y = data.draw(policies(spread=30 if kind == "tv" else 3))  # KL of a tiny 1 - sum(p) is all rounding
    log_mu, log_pi = both.to(dtype)
    binary, exact = binary_divergence(log_pi[y], log_mu[y], kind), partition_divergence(log_pi, log_mu, kind)
    chain = [binary, *(top_k(log_pi, log_mu, y, k, kind) for k in range(1, len(log_mu) + 3))]
    slack = 5 * tolerance["abs"] + tolerance["rel"] * exact
    assert all(value <= exact + slack for value in chain)
    assert all(value >= binary - slack for value in chain)
    if len(set(log_mu.tolist())) == len(log_mu):
        assert all(coarse <= fine + slack for coarse, fine in zip(chain, chain[1:], strict=False))
    for covering in chain[len(log_mu) :]:
        assert covering.item() == pytest.approx(exact.item(), **tolerance)


@PRECISIONS
@given(drawn=policies(spread=30), k=st.integers(1, 10))
@fuzz
def test_range_and_zero(dtype, tolerance, drawn, k):
    """TV in [0, 1], KL >= 0 and finite between positive policies, both 0 exactly where the policies are equal."""
    both, y = drawn
    log_mu, log_pi = both.to(dtype)
    for kind in ("tv", "kl"):
        values = torch.stack(
            [
                binary_divergence(log_pi[y], log_mu[y], kind),
                top_k(log_pi, log_mu, y, k, kind),
                partition_divergence(log_pi, log_mu, kind),
            ]
        )
        assert (values >= 0).all() and values.isfinite().all()
        if kind == "tv":
            assert (values <= 1 + tolerance["abs"]).all()
        if torch.equal(log_pi, log_mu):
            assert not values.any()
        if (log_pi.exp() - log_mu.exp()).abs().max() > 0.01:
            assert values[2] > 1e-5


@KINDS
@given(drawn=policies())
@fuzz
def test_an_unused_category_changes_nothing(kind, drawn):
    (log_mu, log_pi), _ = drawn
    unused = torch.full((1,), -torch.inf)
    got = partition_divergence(torch.cat([log_pi[:-1], unused]), torch.cat([log_mu[:-1], unused]), kind)
    assert got.item() == pytest.approx(partition_divergence(log_pi[:-1], log_mu[:-1], kind).item(), rel=1e-9, abs=1e-12)


@KINDS
@given(drawn=policies())
@fuzz
def test_half_precision_is_raised_first(kind, drawn):
    half, y = drawn[0].bfloat16(), drawn[1]
    (log_mu, log_pi), (mu, pi) = half, half.float()
    for got, expected in (
        (binary_divergence(log_pi[y], log_mu[y], kind), binary_divergence(pi[y], mu[y], kind)),
        (partition_divergence(log_pi, log_mu, kind), partition_divergence(pi, mu, kind)),
        (top_k(log_pi, log_mu, y, 2, kind), top_k(pi, mu, y, 2, kind)),
    ):
        assert got.dtype == torch.float32
        assert torch.equal(got, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_log_probs_beside_a_known_one_are_those_of_the_log_softmax(dtype):
    g = torch.Generator().manual_seed(0)
    logits = (4 * torch.randn(40, 4_000, generator=g)).to(dtype).requires_grad_()
    ids, rows = torch.randint(0, 4_000, (40, 5), generator=g), torch.randperm(40, generator=g)
    want = logits.detach().double().log_softmax(-1)[rows].gather(-1, ids)
    found = gather_logits(logits, ids, rows)
    assert found.dtype == torch.float32 and not found.requires_grad
    got = log_probs_beside(found, want[:, -1].float())
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), want, rtol=0, atol=2e-6)
    torch.testing.assert_close(got[:, -1], want[:, -1].float(), rtol=0, atol=0)
    assert gather_logits(logits, ids[:0], rows[:0]).shape == (0, 5)


def test_logits_that_this_rank_does_not_hold_are_nan():
    logits = torch.arange(12.0).view(3, 4)
    ids = torch.tensor([[0, 3], [4, -1], [1, 2], [1, 2]])
    found = gather_logits(logits, ids, torch.tensor([2, 0, -1, 3]))
    assert found[0].tolist() == [8.0, 11.0] and found[1:].isnan().all()
    assert gather_logits(logits, ids[:1] + 8, torch.tensor([1]), first_column=8).tolist() == [[4.0, 7.0]]


def test_gathered_log_probs_agree_with_verls():
    g = torch.Generator().manual_seed(1)
    logits, ids = torch.randn(17, 300, generator=g), torch.randint(0, 300, (17, 4), generator=g)
    verls = _chunked_topk_log_probs(logits[None], ids[None])[0]
    log_prob = logprobs_from_logits(logits, ids[:, -1])
    got = log_probs_beside(gather_logits(logits, ids, torch.arange(17)), log_prob)
    torch.testing.assert_close(got, verls, rtol=0, atol=2e-6)
