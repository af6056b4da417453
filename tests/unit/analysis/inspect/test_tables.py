"""The counts of masked tokens agree with counting token by token."""

import weakref
from dataclasses import replace

import numpy as np
import pytest
from token_dumps import METHODS, actor, responses_of_cppo

from cppo_verl.analysis import replay
from cppo_verl.analysis.inspect.tables import Masks
from cppo_verl.artifacts.token_dump import REASONS

NAMES = ("cppo", "soft", "dppo", "trm_max", "minpro", "vanilla")


@pytest.fixture(scope="module")
def responses(tmp_path_factory):
    return responses_of_cppo(tmp_path_factory.mktemp("dump"))


@pytest.fixture(scope="module")
def decisions(responses):
    return {n: list(replay.decisions(replay.Setting(n, actor(METHODS[n])), responses)) for n in NAMES}


@pytest.fixture(scope="module")
def counted(responses, decisions):
    """Masks, and plain lists of (1 - M, reason, sign of A, bin, update) a generated token, of each setting."""
    rows = {name: [] for name in NAMES}
    for name in NAMES:
        for response, decided in zip(responses, decisions[name], strict=True):
            length, t = sum(response.mask.tolist()), 0
            for i, valid in enumerate(response.mask.tolist()):
                if valid:
                    t += 1
                    bin = next(b for b in range(8) if 8 * t <= (b + 1) * length)
                    adv = float(response.advantage[i])
                    row = (1 - float(decided.update_mask[i]), REASONS[decided.reason[i]])
                    rows[name].append((*row, (adv > 0) - (adv < 0), bin, response.update))
    return Masks.of(responses, list(decisions.values())), rows


def mean(values):
    values = list(values)
    return sum(values) / len(values)


def test_shares_agree_with_the_oracle(counted):
    masks, rows = counted
    for i, name in enumerate(NAMES):
        assert masks.rejected[i].mean() == pytest.approx(mean(r[0] for r in rows[name]), abs=1e-6)
        by_reason = masks.share_by_reason().loc[i]
        for reason, share in by_reason.items():
            wanted = [float(r[1] == reason) * (1 if reason == "towards_one" else r[0]) for r in rows[name]]
            assert share == pytest.approx(mean(wanted), abs=1e-6), (name, reason)
        assert sum(v for k, v in by_reason.items() if k != "towards_one") == pytest.approx(
            masks.rejected[i].mean(), abs=1e-6
        )
    # something to count of every kind
    by_reason = masks.share_by_reason()
    assert by_reason["budget"][0] > 0.05 < by_reason["towards_one"][0]
    assert by_reason["response"][3] > 0.05 < by_reason["clipped"][4]


@pytest.mark.parametrize("group", ["sign", "bin", "update"])
def test_shares_by_sign_position_and_update_agree_with_the_oracle(group, counted):
    masks, rows = counted
    place = 2 + ("sign", "bin", "update").index(group)
    got = masks.share_within(group)
    assert sorted(got) == sorted({row[place] for row in rows["cppo"]}) and len(got) > 1
    for value, shares in got.items():
        for i, name in enumerate(NAMES):
            wanted = mean(row[0] for row in rows[name] if row[place] == value)
            assert shares[i] == pytest.approx(wanted, abs=1e-6), (name, value)


def test_overlap_agrees_with_the_oracle(counted):
    masks, rows = counted
    got = masks.overlap()
    for i, a in enumerate(NAMES):
        for j, b in enumerate(NAMES):
            both = sum(min(x[0], y[0]) for x, y in zip(rows[a], rows[b], strict=True))
            assert got[i][j] == pytest.approx(both / sum(x[0] for x in rows[a]), abs=1e-5), (a, b)
    assert got[0][0] == 1 and got[0][2] != got[2][0]


def test_a_setting_that_masks_nothing_overlaps_with_none(responses, decisions):
    none = [replace(v, update_mask=np.ones_like(v.update_mask)) for v in decisions["cppo"]]
    assert Masks.of(responses, [none, decisions["cppo"]]).overlap() == [[None, None], [0.0, 1.0]]


def test_the_decisions_about_a_large_dump_are_not_held_all_at_once(responses):
    made = []

    def decided():
        for decision in replay.decisions(replay.Setting("dppo", actor(METHODS["dppo"])), responses):
            made.append(weakref.ref(decision))
            yield decision
            del decision
            assert sum(reference() is not None for reference in made) <= 2

    assert Masks.of(responses, [decided()]).rejected[0].sum() > 0 and len(made) == len(responses) > 10
