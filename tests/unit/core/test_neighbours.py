"""KPop and VACO against loops over plain floats, written from the sources that the functions name."""

import math

import oracle
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracle import fuzz

from cppo_verl.core.neighbours import kpop_mask, vaco_mask

batches = oracle.batches(oracle.log_probs, oracle.log_probs, oracle.advantages, junk=st.sampled_from([0.0, -60.0]))


def bernoulli_kl(p, q):
    return math.fsum(a * math.log(a / b) for a, b in ((p, q), (1 - p, 1 - q)) if a > 0)


@pytest.mark.parametrize("mu", [0.02, 0.3, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("pi", [0.01, 0.3, 0.6, 0.95])
def test_kpop_bounds_the_larger_of_both_directions(mu, pi):
    larger = max(bernoulli_kl(mu, pi), bernoulli_kl(pi, mu))
    log_pi, log_mu = torch.tensor([pi, mu], dtype=torch.float64).log()
    for phi in (larger * 0.999, larger * 1.001 + 1e-15):
        assert kpop_mask(log_pi, log_mu, phi).item() == (larger <= phi)


@given(batch=batches, delta=st.sampled_from([0.1, 1.0, 2.0]))
@fuzz
def test_vaco_drops_what_moves_away_in_responses_that_are_far_off(batch, delta):
    log_mu, log_pi, adv = (torch.tensor(x, dtype=torch.float64) for x in (batch.log_mu, batch.log_pi, batch.adv))
    got = vaco_mask(log_pi - log_mu, adv, torch.tensor(batch.valid), delta)
    for row, valid in enumerate(batch.valid):
        tokens = [t for t, v in enumerate(valid) if v]
        ratio = [math.exp(batch.log_pi[row][t] - batch.log_mu[row][t]) for t in tokens]
        mean = sum(abs(r - 1) for r in ratio) / max(len(ratio), 1)
        if abs(mean - delta) > 1e-9:
            kept = [mean <= delta or batch.adv[row][t] * (r - 1) <= 0 for t, r in zip(tokens, ratio, strict=True)]
            assert got[row, tokens].tolist() == kept


def test_the_example_of_open_instructs_own_test():
    """Mean |rho - 1| of 1.25 and 3 around a threshold of 2, all advantages 1."""
    log_ratio = torch.tensor([[0.25, 1.0, 4.0], [4.0, 4.0, 4.0]]).log()
    kept = vaco_mask(log_ratio, torch.ones(2, 3), torch.ones(2, 3, dtype=torch.bool), 2.0)
    assert kept.tolist() == [[1, 1, 1], [0, 0, 0]]
