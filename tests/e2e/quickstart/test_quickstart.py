"""The quickstart in short, as verl's trainer ran it: what it logs, dumps, keeps and prints."""

import re

import numpy as np
import pandas
import pytest
from omegaconf import OmegaConf
from PIL import Image
from trainer_run import QUICKSTART, metrics
from transformers import AutoTokenizer

from cppo_verl.artifacts.run_reader import read_generations, read_run
from cppo_verl.artifacts.token_dump import REASONS, read_tokens
from cppo_verl.cli import main
from cppo_verl.rewards.reasoning_gym import compute_score

REGION = OmegaConf.load(QUICKSTART.with_name("quickstart.yaml")).trust_region


def test_two_signals_at_its_start_end_it_and_leave_no_process(interrupted):
    assert not interrupted.ended_by_the_first
    assert interrupted.code == 130, interrupted.text
    assert "interrupted; the same command continues from the last checkpoint" in interrupted.text
    assert not (interrupted.output / "checkpoints" / "stop").exists()
    assert interrupted.survivors() == []


def test_a_run_ends_well_and_leaves_no_process(quickstart):
    assert quickstart.code == 0, quickstart.text
    assert quickstart.survivors() == []


def test_the_summary_names_files_that_exist(quickstart):
    assert re.search(r"validation accuracy \(Avg@16\) +0\.\d+ at step 0 -> 0\.\d+ at step 6", quickstart.text)
    assert re.search(r"tokens masked +\d+\.\d% of", quickstart.text) or re.search(
        r"tokens masked +\d+\.\d%,", quickstart.text
    )
    output = quickstart.output
    assert (output / "checkpoints" / "latest_checkpointed_iteration.txt").read_text() == "6"
    assert list((output / "logs" / "tensorboard").glob("events.out.tfevents.*"))
    assert list((output / "logs" / "wandb").glob("offline-run-*/*.wandb"))
    with Image.open(output / "quickstart.png") as picture:
        assert picture.width > 1000
        assert len(picture.convert("RGB").getcolors(1 << 24)) > 50


def test_every_step_reports_the_trust_region(quickstart):
    steps = metrics(quickstart.output, 0)
    assert sorted(steps) == list(range(7))
    for step in range(1, 7):
        values = steps[step]
        assert 0 <= values["trust_region/masked_share"] < 0.5
        assert 0 < values["trust_region/divergence"] < values["trust_region/divergence_p90"] < 1
        assert REGION.delta_b - 1e-6 <= values["trust_region/effective_delta_b"] <= 2 * REGION.delta_b + 1e-6
        assert values["actor/grad_norm"] > 0
        assert not [key for key in values if key.startswith("actor/trust_region")]
    assert any(values.get("trust_region/masked_share", 0) > 0 for values in steps.values())
    assert "val-core/reasoning_gym/number_sorting/acc/mean@16" in steps[3]


def test_the_token_dump_agrees_with_its_definitions_and_the_steps_metrics(quickstart):
    dump = read_tokens(quickstart.output)
    assert dump.notes == []
    tokenizer = AutoTokenizer.from_pretrained(quickstart.output / "model")
    problems = {
        row["prompt"][0]["content"].strip(): {
            "data_source": row["data_source"],
            "extra_info": row["extra_info"],
            "ground_truth": None,
            "time_limit": 60.0,
        }
        for row in pandas.read_parquet(quickstart.output / "data" / "train.parquet").to_dict("records")
    }
    assert sorted(dump.headers) == [2, 4, 6]
    logged = metrics(quickstart.output, 0)
    for step, header in dump.headers.items():
        responses = [response for response in dump.responses if response.step == step]
        method = header["method"]
        assert (method["loss_mode"], method["delta"], method["divergence"]) == ("cppo", REGION.delta, "binary_tv")
        assert header["tokenizer"] == str(quickstart.output / "model")
        # every response but those of prompts left out, once
        share = logged[step]["trust_region/left_out_prompt_share"]
        assert len({response.key for response in responses}) == len(responses) == round(256 * (1 - share))
        assert {response.update for response in responses} <= set(range(8))
        for response in responses:
            assert response.mask.all()
            mu, pi = np.exp(response.log_mu.astype(float)), np.exp(response.log_pi.astype(float))
            np.testing.assert_allclose(response.divergence, abs(pi - mu), atol=1e-6)
            weights = np.linspace(1, method["w_min"], len(mu)) if len(mu) > 1 else np.ones(1)
            np.testing.assert_allclose(response.weighted_divergence, weights * response.divergence, atol=1e-6)
            spent = np.cumsum(response.weighted_divergence - response.delta_b * weights)
            allowed = method["delta"] - np.concatenate([[0], spent[:-1]])
            np.testing.assert_allclose(response.threshold, np.minimum(method["delta"], allowed), atol=1e-5)
            reason = np.array(REASONS)[response.reason]
            violated = response.weighted_divergence > response.threshold
            towards_one = response.advantage * (response.log_pi - response.log_mu) <= 0
            above = response.weighted_divergence > np.float32(method["delta"])
            want = np.where(towards_one, "towards_one", np.where(above, "token", "budget"))
            assert (reason == np.where(violated, want, "kept")).all()
            assert (response.update_mask == ~np.isin(reason, ["token", "budget"])).all()
            assert len(set(response.advantage)) == 1 and response.advantage[0] != 0
            # the very text that was asked and scored
            prompt, answer = (
                tokenizer.decode(ids, skip_special_tokens=True) for ids in (response.prompt, response.response)
            )
            asked = problems[re.sub("<user>|<assistant>", "", prompt).strip()]
            assert compute_score(solution_str=answer, **asked)["score"] == pytest.approx(response.score)

        def pooled(name, part=responses):
            return np.concatenate([getattr(response, name) for response in part])

        values = logged[step]
        masked, reason = 1 - pooled("update_mask"), np.array(REASONS)[pooled("reason")]
        assert values["trust_region/masked_share"] == pytest.approx(masked.mean(), rel=1e-5)
        assert values["trust_region/divergence"] == pytest.approx(pooled("divergence").mean(), rel=1e-4)
        if masked.any():
            by_budget = (reason == "budget").sum() / masked.sum()
            assert values.get("trust_region/budget_rejected_share") == pytest.approx(by_budget, rel=1e-5)
        delta_b = np.mean([response.delta_b for response in responses])
        assert values["trust_region/effective_delta_b"] == pytest.approx(delta_b, rel=1e-5)
        for when, part in (("first", lambda u: u == 0), ("later", lambda u: u > 0)):
            part = [response for response in responses if part(response.update)]
            wanted = values.get(f"trust_region/{when}_update" + "s" * (when == "later") + "/divergence")
            assert (wanted is None) == (not part)
            if part:
                assert wanted == pytest.approx(pooled("divergence", part).mean(), rel=1e-4, abs=1e-9)
            if part and when == "first":
                log_mu, log_pi = (pooled(name, part).astype(float) for name in ("log_mu", "log_pi"))
                error = np.abs(log_pi - log_mu).sum() / np.abs(log_mu).sum()
                assert values["trust_region/first_update/relative_log_prob_error"] == pytest.approx(error, rel=1e-3)
    assert {"kept", "towards_one", "budget"} <= {REASONS[code] for r in dump.responses for code in r.reason}


def test_the_log_has_a_line_per_step_for_people(quickstart):
    log = (quickstart.output / "logs" / "train-0.log").read_text()
    lines = re.findall(r"cppo_verl  step (\d)/6  (\d:\d\d:\d\d) left  (.*)", log)
    assert [int(step) for step, _, _ in lines] == list(range(1, 7))
    assert lines[-1][1] == "0:00:00"
    assert all(re.search(r"reward 0\.\d+  validation \d+\.\d%  masked \d+\.\d%  [\d,]+ tokens/s", x) for *_, x in lines)


def test_validation_keeps_the_answers_that_make_up_its_metric(quickstart):
    run = read_run(quickstart.output)
    assert run.generations == quickstart.output / "validation"
    accuracies = run.accuracies()
    for step in (0, 3, 6):
        answers = read_generations(run.generations, step)
        assert answers.notes == []
        assert len(answers.correct) == 16
        assert {len(samples) for samples in answers.correct.values()} == {16}
        assert {benchmark for benchmark, _ in answers.correct} == {"reasoning_gym/number_sorting"}
        values = answers.accuracy().values()
        assert sum(values) / 16 == pytest.approx(accuracies[step]["reasoning_gym/number_sorting"])


def test_the_engines_mismatch_is_that_of_the_logged_first_updates(quickstart, capsys):
    assert main(["mismatch", "--dump", str(quickstart.output)]) == 0
    out = capsys.readouterr().out
    assert "ok: the mismatch alone takes 0.0% of the prefix budget and puts 0.00% of the tokens outside" in out
    mean = float(re.search(r"^\| all +\| [\d,]+ +\| (\S+)", out, re.M)[1])
    steps = metrics(quickstart.output, 0)
    logged = [steps[step]["trust_region/first_update/divergence"] for step in (2, 4, 6)]
    assert min(logged) <= mean * 1.005 and mean <= max(logged) * 1.005  # printed with three digits
