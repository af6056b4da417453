"""What other methods would have done with dumped tokens: as training with them records it, and as the oracle says."""

import math
from functools import partial

import numpy as np
import pytest
from token_dumps import METHODS, RUN_HEADER, actor, dumped, expected, make_response

from cppo_verl.analysis import replay
from cppo_verl.artifacts.token_dump import REASONS


@pytest.fixture(scope="module")
def responses(tmp_path_factory):
    _, _, by_row = dumped(tmp_path_factory.mktemp("dump"), METHODS["dppo"])
    return {row: response for row, (response,) in by_row.items()}


@pytest.mark.parametrize("name", [name for name in METHODS if name not in ("vanilla", "cispo")])
def test_a_method_would_have_done_what_it_does_when_it_trains(name, responses, tmp_path):
    _, _, recorded = dumped(tmp_path, METHODS[name])
    replayed = replay.decisions(replay.Setting(name, actor(METHODS[name])), list(responses.values()))
    for row, decided in zip(responses, replayed, strict=True):
        (record,) = recorded[row]
        for column in ("update_mask", "reason", "divergence"):
            np.testing.assert_array_equal(getattr(decided, column), getattr(record, column))
        for column in ("weighted_divergence", "threshold"):
            got, wanted = getattr(decided, column), getattr(record, column)
            assert (got is None) == (wanted is None)
            if wanted is not None:  # sums of rows padded to another length round otherwise
                np.testing.assert_allclose(got, wanted, atol=1e-6)
        assert decided.delta_b == pytest.approx(record.delta_b, abs=1e-7)


@pytest.mark.parametrize("name", ["cppo", "fixed", "trm_max", "minpro"])
def test_reasons_agree_with_the_oracle(name, responses):
    method = METHODS[name]
    replayed = replay.decisions(replay.Setting(name, actor(method)), list(responses.values()))
    for response, decided in zip(responses.values(), replayed, strict=True):
        columns = (response.log_mu, response.log_pi, response.advantage, response.mask)
        _, reason, sure, *_ = expected(method, *(column.tolist() for column in columns))
        got = [REASONS[code] for code in decided.reason]
        assert [r for r, s in zip(got, sure, strict=True) if s] == [r for r, s in zip(reason, sure, strict=True) if s]


def test_verls_own_losses_are_judged_by_their_gradient(responses):
    """PPO's clip with its dual, and CISPO's clipped weight, from their formulas."""
    low, high, dual = 0.8, 1.28, 3.0
    for name in ("vanilla", "cispo"):
        clipped = 0
        replayed = replay.decisions(replay.Setting(name, actor(METHODS[name])), list(responses.values()))
        for response, decided in zip(responses.values(), replayed, strict=True):
            rows = zip(response.log_mu, response.log_pi, response.advantage, response.mask, strict=True)
            for t, (mu, pi, adv, valid) in enumerate(rows):
                rho = math.exp(float(pi) - float(mu))
                if not valid:
                    wanted = 0.0
                elif name == "vanilla":
                    wanted = float(not (adv > 0 and rho > high or adv < 0 and (rho < low or rho > dual)))
                else:
                    wanted = min(1.0, min(max(rho, low), high) / rho)
                assert decided.update_mask[t] == pytest.approx(wanted, abs=1e-3), (name, rho, adv)
                assert REASONS[decided.reason[t]] == ("" if not valid else "kept" if wanted == 1 else "clipped")
                clipped += wanted < 1 and bool(valid)
        assert clipped > 10


@pytest.mark.parametrize("advantage", [1.0, -1.0])
def test_a_token_whose_ratio_underflows_is_taken_out_as_the_loss_takes_it_out(advantage):
    """verl's PPO loss clamps log rho_t at -20, beyond which it has no gradient."""
    log_pi = np.array([-0.5, -60.0, -120.0], np.float32)
    columns = {"log_mu": np.full(3, -0.5, np.float32), "log_pi": log_pi, "mask": np.ones(3, bool)}
    columns |= {"response": np.zeros(3, np.int32), "divergence": np.zeros(3, np.float32)}
    response = make_response(0, 3, advantage=np.full(3, advantage, np.float32), **columns)
    (decided,) = replay.decisions(replay.setting("grpo", RUN_HEADER), [response])
    assert [REASONS[code] for code in decided.reason] == ["kept", "clipped", "clipped"]


def test_every_shipped_method_composes_with_the_runs_thresholds():
    assert "cppo" in replay.METHODS and "_common" not in replay.METHODS
    for name in replay.METHODS:
        assert replay.setting(name, RUN_HEADER).label == name
    method = replay.setting("cppo", RUN_HEADER).actor.policy_loss
    assert (method.delta, method.delta_b, method.budget, method.divergence) == (0.05, 0.005, "fixed", "binary_tv")
    assert replay.setting("cppo_pr6731", RUN_HEADER).actor.policy_loss.horizon == 32
    grpo = replay.setting("grpo", RUN_HEADER).actor
    # The preset's second clip is out of reach; the run's own is the one that it trained with.
    assert (grpo.clip_ratio_high, grpo.clip_ratio_c) == (0.28, 10000)
    assert replay.run_setting(RUN_HEADER | {"clip_ratio_c": 7.0}).actor.clip_ratio_c == 7
    assert replay.run_setting(RUN_HEADER).actor.policy_loss.delta == 0.07


def test_overrides_of_a_setting():
    text = "cppo trust_region.delta=0.3 actor_rollout_ref.actor.policy_loss.gate=soft"
    method = replay.setting(text, RUN_HEADER).actor.policy_loss
    assert (method.delta, method.delta_b, method.gate) == (0.3, 0.005, "soft")
    with pytest.raises(ValueError, match="no method 'cpo'; there are cispo, cppo"):
        replay.setting("cpo", RUN_HEADER)
    with pytest.raises(ValueError, match="no method ''; there are cispo"):
        replay.setting(" ", RUN_HEADER)
    with pytest.raises(ValueError, match=r"policy_loss.delta=7 is not permitted: a number in \(0, 1\]"):
        replay.setting("cppo trust_region.delta=7", RUN_HEADER)
    with pytest.raises(ValueError, match="dlta"):
        replay.setting("cppo actor_rollout_ref.actor.policy_loss.dlta=7", RUN_HEADER)


def test_a_top_k_divergence_is_judged_only_by_the_dump_that_has_it():
    setting = replay.setting("cppo divergence=topk_tv", RUN_HEADER)
    assert not replay.is_replayable(setting, RUN_HEADER)
    assert replay.is_replayable(setting, RUN_HEADER | {"divergence": "topk_tv"})
    assert replay.is_replayable(replay.setting("cppo", RUN_HEADER), RUN_HEADER | {"divergence": "topk_tv"})


OTHER = "is not the config class of a policy loss"
NO_SETTING = "is no setting of a method: a number, a name or null"
LOSS = RUN_HEADER["method"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda call: {"method": call}, OTHER),
        (lambda call: {"method": call | {"_target_": "builtins.exec"}}, OTHER),
        (lambda call: {"method": {"_target_": ["os.mkdir"]} | call}, OTHER),
        (lambda call: {"method": {"_target_": "verl.workers.config.HFModelConfig", "path": call}}, OTHER),
        (lambda call: {"method": {"_target_": "cppo_verl.plugin.config.DumpConfig", "folder": call}}, OTHER),
        (lambda call: {"method": {"_target_": "${oc.env:TARGET}"} | call}, OTHER),
        (lambda call: {"method": {"delta": 0.1}}, OTHER),
        (lambda call: {"method": [call]}, "method"),
        (lambda call: {"method": LOSS | {"delta": call}}, NO_SETTING),
        (lambda call: {"method": LOSS | {"delta": [call]}}, NO_SETTING),
        (lambda call: {"method": LOSS | {"rollout_correction": call}}, NO_SETTING),
        (lambda call: {"method": LOSS | {"_partial_": True, "_args_": [call]}}, NO_SETTING),
        (lambda call: {"method": LOSS | {"_recursive_": True}}, "policy_loss has no key '_recursive_'"),
        (lambda call: {"method": LOSS | {"delta": f"${{oc.create:{call}}}"}}, NO_SETTING),
        (lambda call: {"method": LOSS | {"gate": "${oc.env:SECRET}"}}, NO_SETTING),
        (lambda call: {"method": LOSS | {"gate": "${oc.decode:${oc.env:SECRET}}"}}, NO_SETTING),
        (lambda call: {"method": LOSS | {"gate": "${ oc.env : SECRET }"}}, NO_SETTING),
        (lambda call: {"method": LOSS | {"gate": "a" * 65}}, NO_SETTING),
        (lambda call: {"method": LOSS | {"delta": 10**400}}, NO_SETTING),
        (lambda call: {"method": LOSS | {"delta": math.nan}}, NO_SETTING),
        (lambda call: {"method": LOSS | {"trust_remote_code": True}}, "policy_loss has no key 'trust_remote_code'"),
        (lambda call: {"clip_ratio_low": call}, "clip_ratio_low"),
        (lambda call: {"clip_ratio_high": "${oc.env:SECRET}"}, "clip_ratio_high"),
        (lambda call: {"trust_region": {"delta": call}}, NO_SETTING),
        (lambda call: {"trust_region": {"delta": str(call)}}, NO_SETTING),
        (lambda call: {"trust_region": {"delta": f"${{oc.create:{call}}}"}}, NO_SETTING),
        (lambda call: {"trust_region": {"budget": "${oc.env:SECRET}"}}, NO_SETTING),
        (lambda call: {"trust_region": {f"x={call}": 1}}, NO_SETTING),
        (lambda call: {"trust_region": {"a.b": 1}}, NO_SETTING),
        (lambda call: {"max_response_length": "${oc.env:SECRET}"}, "max_response_length"),
        (lambda call: {"max_response_length": call}, "max_response_length"),
    ],
)
def test_nothing_that_a_header_says_is_run_or_resolved(change, message, tmp_path, monkeypatch):
    monkeypatch.setenv("SECRET", "hunter2")
    monkeypatch.setenv("TARGET", "os.mkdir")
    header = RUN_HEADER | change({"_target_": "os.mkdir", "path": str(tmp_path / "owned")})
    said = replay.lacking(header)
    for setting in () if said else (replay.run_setting, partial(replay.setting, "cppo")):
        try:
            setting(header)
        except ValueError as error:
            said.append(str(error))
    assert message in "".join(said) and "hunter2" not in "".join(said)
    assert not (tmp_path / "owned").exists()


def test_a_setting_that_is_null_or_infinite_is_read_as_it_was_written():
    kl = {"divergence": "binary_kl", "delta": math.inf, "horizon": None, "preflight": {"any": "thing"}}
    assert replay.run_setting(RUN_HEADER | {"method": LOSS | kl}).actor.policy_loss.delta == math.inf
    thresholds = RUN_HEADER["trust_region"] | {"delta": None}
    with pytest.raises(ValueError, match=r"policy_loss.delta=None is not permitted: a number in \(0, 1\]"):
        replay.setting("cppo", RUN_HEADER | {"trust_region": thresholds})
