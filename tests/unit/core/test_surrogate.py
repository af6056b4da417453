"""The surrogate's value and gradient against the oracle, and the DPPO limit against verl's own loss."""

import math

import oracle
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracle import budgets, deltas, fuzz, lowest_weights

from cppo_verl.core import binary_divergence, build_trust_region, masked_surrogate, update_mask

ratio_caps = st.sampled_from([None, 1.0, 3.0, 20.0])
# Finite off the mask, as in a padded tensor: what an aggregated loss multiplies by zero must not be nan.
batches = oracle.batches(oracle.log_probs, oracle.log_probs, oracle.advantages, junk=st.sampled_from([0.0, -60.0]))


def tensors(batch, dtype=torch.float32):
    log_mu, log_pi, adv = (torch.tensor(x, dtype=dtype) for x in (batch.log_mu, batch.log_pi, batch.adv))
    return log_pi.requires_grad_(), log_mu, adv, torch.tensor(batch.valid)


def masked(log_pi, log_mu, adv, valid, gate="hard", **setting):
    """M from binary TV, without detaching anything by hand."""
    region = build_trust_region(binary_divergence(log_pi, log_mu), valid, **setting)
    return update_mask(region, log_pi - log_mu, adv, delta=setting["delta"], gate=gate)


def gradient(loss, log_pi):
    return torch.autograd.grad(loss, log_pi)[0]


@pytest.mark.parametrize(
    ("rho", "adv", "m", "cap", "expected"),
    [
        (1.0, 2.0, 1.0, None, -2.0),
        (1.5, 2.0, 1.0, None, -3.0),
        (0.5, -2.0, 1.0, None, 1.0),
        (1.5, 2.0, 0.0, None, 0.0),
        (1.5, 2.0, 0.25, None, -0.75),  # soft gate
        (8.0, 2.0, 1.0, 3.0, -6.0),  # truncated, not stopped
        (8.0, -2.0, 1.0, 3.0, 6.0),
        (3.0, 2.0, 1.0, 3.0, -6.0),
        (0.5, 2.0, 1.0, 3.0, -1.0),
        (8.0, 0.0, 1.0, 3.0, 0.0),
    ],
)
def test_value_and_gradient_by_hand(rho, adv, m, cap, expected):
    log_mu = torch.tensor(-1.25)
    log_pi = (log_mu + math.log(rho)).requires_grad_()
    loss = masked_surrogate(log_pi, log_mu, torch.tensor(adv), torch.tensor(m), cap)
    assert loss.item() == pytest.approx(expected, rel=1e-6)
    assert gradient(loss, log_pi).item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@given(batch=batches, delta=deltas, delta_b=budgets, w_min=lowest_weights, cap=ratio_caps, soft=st.booleans())
@fuzz
def test_agrees_with_the_oracle(dtype, batch, delta, delta_b, w_min, cap, soft):
    """End to end from two log-probabilities. D and M add no gradient: what remains is -M min(rho, cap) A."""
    log_pi, log_mu, adv, valid = tensors(batch, dtype)
    gate = "soft" if soft else "hard"
    m = masked(log_pi, log_mu, adv, valid, gate, delta=delta, delta_b=delta_b, w_min=w_min)
    loss = masked_surrogate(log_pi, log_mu, adv, m, cap)
    grad = gradient(loss.sum(), log_pi)
    assert torch.equal(grad[m == 0], torch.zeros_like(grad[m == 0]))
    cap = math.exp(20) if cap is None else cap
    for row, v in enumerate(batch.valid):
        log_probs = log_mu[row].tolist(), log_pi[row].tolist()
        value, slope = oracle.surrogate(*log_probs, adv[row].tolist(), m[row].tolist(), cap)
        for got, expected in ((loss, value), (grad, slope)):
            expected = torch.tensor(expected, dtype=dtype)
            # rho below exp(-20) is raised to it: 2e-9 A
            torch.testing.assert_close(got[row][v], expected[v], rtol=1e-5, atol=1e-4)

        if not soft:
            div = [abs(math.exp(p) - math.exp(q)) for p, q in zip(*log_probs, strict=True)]
            w = oracle.position_weights(v, w_min)
            away = [oracle.moves_away(*step) for step in zip(*log_probs, adv[row].tolist(), strict=True)]
            expected = oracle.hard_mask(div, v, w, delta, delta_b, away)
            clear = torch.tensor(oracle.decided(div, v, w, delta, delta_b, 2e-6))
            assert torch.equal(m[row][clear], torch.tensor(expected, dtype=dtype)[clear])


@pytest.mark.parametrize("log_ratio", [-300.0, -60.0, 60.0, 300.0])
def test_an_extreme_ratio_stays_finite(log_ratio):
    log_pi = torch.tensor(log_ratio).requires_grad_()
    loss = masked_surrogate(log_pi, torch.zeros(()), torch.ones(()), torch.ones(()))
    assert gradient(loss, log_pi).item() == pytest.approx(-math.exp(max(-20, min(20, log_ratio))), rel=1e-6)
    capped = masked_surrogate(log_pi, torch.zeros(()), torch.ones(()), torch.ones(()), 3.0)
    assert gradient(capped, log_pi).item() == pytest.approx(-min(math.exp(max(-20, log_ratio)), 3.0), rel=1e-6)


def test_half_precision_gradient():
    log_pi = torch.tensor([-0.25, -60.25, -300.0, -1.0]).bfloat16().requires_grad_()
    log_mu = torch.tensor([-0.5, -60.0, -302.0, -1.0]).bfloat16()
    loss = masked_surrogate(log_pi, log_mu, torch.ones(4), torch.ones(4))
    expected = -(log_pi.float() - log_mu.float()).exp()
    torch.testing.assert_close(gradient(loss.sum(), log_pi).float(), expected.detach(), rtol=2**-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_the_value_does_not_round_with_the_size_of_the_log_probability(dtype):
    log_pi = -torch.linspace(0, 60, 200).to(dtype)
    loss = masked_surrogate(log_pi, log_pi, torch.ones(200), torch.ones(200))
    assert torch.equal(loss, -torch.ones(200))


# --- DPPO -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def verl_dppo():
    """verl's aggregated loss and ours, each called the way verl's `ppo_loss` calls a policy loss."""
    core_algos = pytest.importorskip("verl.trainer.ppo.core_algos")
    from verl.workers.config import FSDPActorConfig

    def losses(log_pi, log_mu, adv, valid, our_loss, delta, cap, loss_agg_mode):
        config = FSDPActorConfig(
            strategy="fsdp",
            rollout_n=1,
            use_dynamic_bsz=True,
            clip_ratio_low=delta,
            clip_ratio_high=delta,
            clip_ratio_c=cap,
        )
        config.global_batch_info.update(
            dp_size=1,
            batch_num_tokens=max(int(valid.sum()), 1),
            global_batch_size=len(valid),
            loss_scale_factor=None,
        )
        theirs, _ = core_algos.get_policy_loss_fn("dppo_tv")(
            old_log_prob=log_mu,
            log_prob=log_pi,
            advantages=adv,
            response_mask=valid,
            loss_agg_mode=loss_agg_mode,
            config=config,
            rollout_is_weights=None,
        )
        ours = core_algos.agg_loss(
            loss_mat=our_loss, loss_mask=valid, loss_agg_mode=loss_agg_mode, **config.global_batch_info
        )
        return theirs, ours

    return losses


@pytest.mark.parametrize("loss_agg_mode", ["token-mean", "seq-mean-token-sum"])
@given(batch=batches, data=st.data(), cap=st.sampled_from([1.0, 3.0, 20.0]))
@fuzz
def test_dppo_limit_has_the_gradient_of_verls_dppo(verl_dppo, loss_agg_mode, batch, data, cap):
    """w = 1 and no budget: the same gradient, D exactly on the threshold included.

    verl reads the direction from sign(A) and a one-sided pi - mu <= delta; the paper from A (rho - 1) and |pi - mu|.
    They differ only in which blocked or kept tokens have A = 0, where the gradient is 0 either way.
    """
    log_pi, log_mu, adv, valid = tensors(batch)
    on_the_bar = st.sampled_from(binary_divergence(log_pi, log_mu).flatten().tolist())
    delta = max(data.draw(st.one_of(deltas, on_the_bar)), 1e-6)
    m = masked(log_pi, log_mu, adv, valid, delta=delta, delta_b=None, w_min=1.0)
    our_loss = masked_surrogate(log_pi, log_mu, adv, m, cap)
    theirs, ours = verl_dppo(log_pi, log_mu, adv, valid, our_loss, delta, cap, loss_agg_mode)
    torch.testing.assert_close(gradient(ours, log_pi), gradient(theirs, log_pi), rtol=1e-6, atol=0)


def test_the_prefix_budget_is_what_dppo_lacks(verl_dppo):
    """The worked example: DPPO keeps all four tokens, CPPO the first two; on those their gradients are equal."""
    mu, drift = torch.tensor([[0.5, 0.5, 0.5, 0.5]]), torch.tensor([[0.10, 0.05, 0.14, 0.02]])
    log_pi, log_mu, adv = (mu + drift).log().requires_grad_(), mu.log(), torch.ones(1, 4)
    valid = torch.ones(1, 4, dtype=torch.bool)
    m = masked(log_pi, log_mu, adv, valid, delta=0.15, delta_b=0.02, w_min=0.8)
    our_loss = masked_surrogate(log_pi, log_mu, adv, m, 20.0)
    theirs, ours = verl_dppo(log_pi, log_mu, adv, valid, our_loss, 0.15, 20.0, "seq-mean-token-sum")
    rho = [1.2, 1.1, 1.28, 1.04]
    torch.testing.assert_close(gradient(theirs, log_pi)[0], -torch.tensor(rho))
    torch.testing.assert_close(gradient(ours, log_pi)[0], -torch.tensor([1.2, 1.1, 0.0, 0.0]))
