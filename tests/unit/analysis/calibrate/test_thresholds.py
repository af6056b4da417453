"""The search for thresholds and the intervals, against the oracle."""

import math
import re
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from drifting_dumps import DELTA, DELTA_B, RULES, by_oracle, drifting, sample

from cppo_verl.analysis.calibrate import thresholds
from cppo_verl.analysis.calibrate.thresholds import DIGITS, Shares, Thresholds, Unreachable, intervals, propose
from cppo_verl.artifacts.token_dump import REASONS
from cppo_verl.plugin.config import CPPOLossConfig


@pytest.fixture(scope="module")
def responses():
    return drifting()


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("masked", [0.03, 0.12])
def test_the_proposal_is_the_smallest_that_masks_no_more_than_wanted_by_the_oracle(name, masked, responses):
    rule = RULES[name]
    data = drifting(topk=True) if name == "topk" else responses
    of = sample(rule, data)
    found = propose(of, masked, None if rule.budget == "none" else 0.6)
    tokens, count, by_token, unsure = by_oracle(rule, data, found)
    counts = of.at(found)
    assert counts.tokens.sum() == tokens
    assert counts.masked.sum() == pytest.approx(count, abs=unsure)
    assert (counts.masked - counts.by_budget).sum() == pytest.approx(by_token, abs=unsure)
    # no more than wanted, and with thresholds one digit lower more than wanted
    assert count <= masked * tokens + unsure
    assert tokens * masked - count < 0.05 * masked * tokens + 1
    lower = found._replace(delta=DIGITS[DIGITS.index(found.delta) - 1])
    if found.delta_b is None:
        assert by_oracle(rule, data, lower)[1] + unsure > masked * tokens
        return
    assert by_token <= 0.4 * masked * tokens + unsure
    assert by_oracle(rule, data, lower)[2] + unsure > 0.4 * masked * tokens
    lower = found._replace(delta_b=DIGITS[DIGITS.index(found.delta_b) - 1])
    assert by_oracle(rule, data, lower)[1] + unsure > masked * tokens


def test_thresholds_have_three_digits_and_cover_what_a_config_takes():
    assert all(low < high for low, high in zip(DIGITS, DIGITS[1:], strict=False))
    assert {1e-10, 0.0472, 0.15, 0.999, 1.0} <= set(DIGITS)
    assert all(float(f"{value:.3g}") == value for value in DIGITS)


@pytest.mark.parametrize("name", RULES)
def test_larger_thresholds_mask_less(name, responses):
    of = sample(RULES[name], responses)
    budget = RULES[name].budget != "none"
    for key in ("delta", "delta_b")[: 1 + budget]:
        proposed = Thresholds(0.03, 0.006 if budget else None)
        points = thresholds.others(of, proposed, key)
        assert len(points) == 13 and points[6] == proposed
        shares = [Shares.of(of.at(point)).masked for point in points]
        assert shares == sorted(shares, reverse=True)
        assert shares[0] > shares[-1] > 0


def test_what_the_run_masked_is_what_its_dump_says(responses):
    recorded = thresholds.recorded(responses)
    again = sample(CPPOLossConfig(), responses).at(Thresholds(DELTA, DELTA_B))
    reasons = [REASONS[code] for response in responses for code in response.reason]
    assert recorded.masked.sum() == reasons.count("token") + reasons.count("budget") > 20
    assert recorded.by_budget.sum() == reasons.count("budget") > 10
    assert recorded.violating.sum() == len(reasons) - reasons.count("kept") - reasons.count("")
    assert (abs(again - recorded).sum() <= 1).all()  # one token on the edge
    assert thresholds.recorded([*responses, replace(responses[0], update_mask=None)]) is None


def test_a_share_that_cannot_be_had_is_refused_with_what_can(responses):
    of = sample(CPPOLossConfig(), responses)
    away = np.concatenate([(r.advantage * (r.log_pi - r.log_mu) * r.divergence > 0)[r.mask] for r in responses]).mean()
    with pytest.raises(Unreachable, match="72.00% of the tokens are to be masked by delta") as error:
        propose(of, 0.9, 0.2)
    most = float(re.search(r"only (\S+)% move away from one", str(error.value))[1])
    assert most == pytest.approx(100 * away, abs=0.5)  # D_t of the smallest moves rounds to 0
    with pytest.raises(Unreachable, match=r"with delta=0.\d+ for the others, delta_b=0 would still mask only \d+"):
        propose(of, 0.4, 0.95)


def test_ties_among_the_tokens_are_no_silent_nearest_value(responses):
    twins = [replace(responses[-1], key=f"p{i}_0_0") for i in range(20)]
    of = sample(CPPOLossConfig(budget="none", w_min=1.0), twins)
    length = twins[0].mask.sum()
    assert propose(of, 2 / length, None).delta > 0
    with pytest.raises(Unreachable, match=rf"mask between {2 / length:.2%} and {3 / length:.2%} of these"):
        propose(of, 2.5 / length, None)


def counted(prompts, tokens, masked, by_budget):
    columns = {"tokens": tokens, "masked": masked, "by_budget": by_budget, "violating": masked}
    return pd.DataFrame(columns, index=pd.Index(prompts, name="prompt"), dtype=float)


def test_the_interval_is_the_binomials_where_every_prompt_has_one_token():
    n, share = 400, 0.1
    masked = (np.arange(n) < share * n).astype(float)
    columns = (np.ones(n), masked, masked * (np.arange(n) % 4 > 0))
    prompts = [f"p{i}" for i in range(n)]
    got, budget = intervals(counted(prompts, *columns))
    half = 1.96 * math.sqrt(share * (1 - share) / n)
    assert got == pytest.approx((share - half, share + half), abs=0.1 * half)
    assert intervals(counted(prompts, *columns))[0] == got  # seeded
    half = 1.96 * math.sqrt(0.75 * 0.25 / (share * n))
    assert budget == pytest.approx((0.75 - half, 0.75 + half), abs=0.2 * half)
    # ten alike of each prompt tell no more than one
    ten = [np.repeat(x, 10) for x in columns]
    clustered, _ = intervals(counted(np.repeat(prompts, 10), *ten))
    assert clustered == pytest.approx(got, rel=1e-9)
    singly, _ = intervals(counted([f"p{i}" for i in range(10 * n)], *ten))
    assert singly.high - singly.low == pytest.approx((got.high - got.low) / math.sqrt(10), rel=0.1)


def test_responses_weigh_by_their_tokens():
    counts = counted(["a", "b"], [90, 10], [0, 10], [0, 0])
    assert Shares.of(counts) == (100, 0.1, 0.0, 0.1, 0.1)
    assert intervals(counts)[0] == (0, 1)
    assert Shares.of(counts.loc[["a"]]) == (90, 0.0, None, 0.0, 0.0)
