"""The engines' mismatch beside the thresholds: sums by the oracle's loops, what is said of them, and the command."""

from dataclasses import replace

import numpy as np
import oracle
import pytest
from documented import ROOT
from omegaconf import OmegaConf
from token_dumps import CPPO, RUN_HEADER, make_response, save

from cppo_verl.analysis.mismatch import Mismatch, overrides, rule_of
from cppo_verl.cli import main
from cppo_verl.doctor.checks import compose_command

DTYPE = "actor_rollout_ref.rollout.dtype=bfloat16"
QUICKSTART = ["--config-dir", str(ROOT / "examples" / "quickstart"), "--config-name", "quickstart", "output=/runs/q"]


def responses(mean, count=6, length=60):
    """First updates with a D_t around ``mean`` and tool output between their tokens."""
    g = np.random.default_rng(0)
    made = []
    for i in range(count):
        mask = make_response(i, length).mask
        divergence = np.where(mask, g.exponential(mean, length), 0).clip(max=1).astype(np.float32)
        made.append(make_response(i, length, update=0, divergence=divergence))
    return made


@pytest.mark.parametrize("budget", ["adaptive", "fixed", "none"])
def test_the_sums_are_those_of_the_oracle(budget):
    rule, given = CPPO(budget=budget), responses(0.05)
    found = Mismatch.of(given, rule)
    spent, allowed, beyond_delta, beyond_budget, total = 0.0, 0.0, 0, 0, 0
    for response in given:
        div, valid = response.divergence.tolist(), response.mask.tolist()
        w = oracle.position_weights(valid, rule.w_min)
        delta_b = {"none": None, "fixed": rule.delta_b, "adaptive": oracle.adaptive_budget(div, valid, rule.delta_b)}
        c = oracle.effective_threshold(div, valid, w, rule.delta, delta_b[budget])
        for d, v, w_t, c_t in zip(div, valid, w, c, strict=True):
            if v:
                total += 1
                spent += w_t * d
                allowed += w_t * (delta_b[budget] or 0)
                beyond_delta += w_t * d > rule.delta
                beyond_budget += c_t < w_t * d <= rule.delta
    assert (len(found.tokens), found.responses) == (total, len(given))
    assert found.tokens.beyond_delta.sum() == beyond_delta > 0
    assert found.tokens.beyond_budget.sum() == beyond_budget and (beyond_budget > 0) == (budget != "none")
    assert found.outside == pytest.approx((beyond_delta + beyond_budget) / total)
    assert found.spent == pytest.approx(spent / allowed if allowed else 0)
    table = found.table()
    assert len(table.rows) == 9 and sum(int(row[1]) for row in table.rows[:-1]) == total == int(table.rows[-1][1])


@pytest.mark.parametrize(
    ("mean", "begins", "says"),
    [
        (1e-7, "ok: the mismatch alone takes 0.0% of the prefix budget and puts 0.00% of the tokens outside", []),
        (0.004, "warn: the mismatch alone takes", ["the same precision", "trust_region.delta_b=0.02"]),
        (0.04, "FAIL: the mismatch alone takes", ["the same precision", "trust_region.delta_b="]),
        (0.3, "FAIL: ", ["is no rounding: the engines do not compute the same policy"]),
    ],
)
def test_what_is_said_grows_with_the_mismatch(mean, begins, says):
    found = Mismatch.of(responses(mean), CPPO(budget="fixed"))
    lines = found.advice(None)
    assert lines[0].startswith(begins)
    assert found.masks == begins.startswith("FAIL")
    assert all(any(part in line for line in lines) for part in says)
    assert (len(lines) == 1) == (not says)


def test_a_method_without_a_budget_is_judged_by_its_token_threshold_alone():
    found = Mismatch.of(responses(0.05), CPPO(budget="none", w_min=1.0))
    (first, *rest) = found.advice(None)
    assert first.startswith("FAIL: the mismatch alone puts ") and not any("delta_b" in line for line in rest)
    assert found.table().rows[0][4] is None


def test_the_advice_names_what_the_run_sets():
    config = compose_command([*QUICKSTART, "actor_rollout_ref.rollout.quantization=fp8", DTYPE])
    lines = Mismatch.of(responses(0.04), CPPO()).advice(config)
    assert any("actor_rollout_ref.rollout.quantization=null (it is fp8)" in line for line in lines)
    assert any("the rollout computes in bfloat16, the actor in fp32" in line for line in lines)


def test_another_loss_is_judged_by_cppos_thresholds_of_its_run():
    verls = {"_target_": "cppo_verl.plugin.config.MethodConfig", "loss_mode": "vanilla"}
    header = RUN_HEADER | {"method": verls, "clip_ratio_c": 10.0}
    rule = rule_of(header)
    assert (rule.delta, rule.delta_b, rule.budget, rule.divergence) == (0.05, 0.005, "fixed", "binary_tv")
    # The run's thresholds are of TV.
    rule = rule_of(header | {"divergence": "topk_kl"})
    assert (rule.delta, rule.delta_b, rule.divergence) == (0.1, 0.002, "topk_kl")


def test_the_overrides_make_one_update_that_leaves_its_tokens_alone(tmp_path):
    command = [*QUICKSTART, "trainer.logger=[console,wandb]", "data.train_batch_size=64"]
    config = compose_command([*command, *overrides(compose_command(command), tmp_path / "a=b")])
    trainer, actor, dump = config.trainer, config.actor_rollout_ref.actor, config.trust_region.dump
    assert config.data.train_batch_size == actor.ppo_mini_batch_size == 4
    assert (trainer.total_training_steps, trainer.save_freq, trainer.test_freq) == (1, -1, -1)
    assert (trainer.val_before_train, trainer.resume_mode, trainer.logger) == (False, "disable", ["console"])
    assert (dump.every, dump.folder) == (1, str(tmp_path / "a=b" / "tokens"))
    written = [trainer.default_local_dir, dump.folder, trainer.validation_data_dir, trainer.rollout_data_dir]
    assert all(path is None or path.startswith(str(tmp_path)) for path in written)
    assert OmegaConf.to_container(config.actor_rollout_ref.rollout) == OmegaConf.to_container(
        compose_command(command).actor_rollout_ref.rollout
    )


def test_a_dump_is_read_and_decides_the_exit_code(tmp_path, capsys):
    for mean, code in ((1e-6, 0), (0.04, 1)):
        save(tmp_path, 3, [*responses(mean), make_response(1, update=1)], **RUN_HEADER)
        assert main(["mismatch", "--dump", str(tmp_path)]) == code
        out = capsys.readouterr().out
        assert "6 responses" in " ".join(out.split())
        assert ("ok: " in out) == (code == 0)


def test_first_updates_with_another_kind_of_divergence_are_left_out(tmp_path, capsys):
    header = RUN_HEADER | {"clip_ratio_c": 10.0}
    topk = header | {"divergence": "topk_tv", "method": header["method"] | {"divergence": "topk_tv"}}
    far = np.full(40, 0.9, np.float32)
    save(tmp_path, 3, [make_response(i, step=3, update=0, divergence=far) for i in (1, 2)], **topk)
    save(tmp_path, 5, [replace(response, step=5) for response in responses(1e-6)], **header)
    assert main(["mismatch", "--dump", str(tmp_path)]) == 0
    out, err = capsys.readouterr()
    assert "6 responses" in " ".join(out.split())
    assert "note: 2 response(s) with another D_t than binary_tv, that of step 5, are left out" in err


def test_what_cannot_be_measured_is_refused(tmp_path, capsys):
    (tmp_path / "run" / "hydra").mkdir(parents=True)
    (tmp_path / "run" / "hydra" / "hydra.yaml").touch()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").touch()
    save(tmp_path, 3, [make_response(1, update=1)], **RUN_HEADER)
    for arguments, said in (
        ([], "give either the arguments of a training command after --, or --dump FOLDER"),
        (["--dump", "x", "--", "+method=cppo"], "give either"),
        (["--dump", str(tmp_path)], "no response of a first update in"),
        (["--dump", str(tmp_path / "run")], "no token dump at"),
        (["--", "trainer.nnods=2"], "Could not override 'trainer.nnods'"),
        (["--", "trainer.nnodes=2"], "add +method=cppo to it"),
        (["--", *QUICKSTART, "actor_rollout_ref.rollout.top_p=0.9"], "truncates the sampling distribution"),
        (["--output", str(tmp_path / "run" / "m"), "--", *QUICKSTART], "is within the run"),
        (["--output", str(tmp_path / "other"), "--", *QUICKSTART], "holds what this command has not made"),
        (["--output", str(tmp_path / "other" / "file"), "--", *QUICKSTART], "file: Not a directory; name a folder"),
        (["--output", str(tmp_path / "other" / "file" / "m"), "--", *QUICKSTART], "m: Not a directory; name a folder"),
    ):
        assert main(["mismatch", *arguments]) == 2
        assert said in capsys.readouterr().err
