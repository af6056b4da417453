"""The 48 bits of a candidate."""

import math

import pytest
import torch

from cppo_verl.plugin.topk.codec import ABSENT, bytes_per_token, decode, encode, pack, unpack


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
