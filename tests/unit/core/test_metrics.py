"""Sums over tokens, and by position in the response."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracle import fuzz

from cppo_verl.core.metrics import POSITION_BINS, TOKEN_SUMS, position_sums, token_sums
from cppo_verl.core.trust_region import build_trust_region


def test_what_a_soft_gate_takes_off_one_token_among_many_is_not_rounded_away():
    valid = torch.ones(1, 100_000)
    divergence, update_mask = torch.zeros_like(valid), torch.ones_like(valid)
    update_mask[0, 7] = 1 - 2**-10
    region = build_trust_region(divergence, None, delta=0.15, delta_b=None, weights=valid)
    sums = token_sums(region, update_mask, divergence, divergence, valid, valid, 0.15).view(len(TOKEN_SUMS), -1)
    of_all = dict(zip(TOKEN_SUMS, sums[:, 0].tolist(), strict=True))
    assert (of_all["masked"], of_all["budget_rejected"]) == (2**-10, 2**-10)


@fuzz
@given(st.lists(st.lists(st.booleans(), min_size=30, max_size=30), min_size=1, max_size=5), st.integers(0, 99))
def test_position_sums_are_those_of_the_oracle(masks, seed):
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
