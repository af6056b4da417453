"""The whole job in verl's real trainer: Ray, FSDP2 on gloo, vLLM. Each run costs a minute or two of start-up,
so that they share one folder and each test reads what they left behind."""

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pandas
import pytest
import torch
from documented import overrides, shown
from omegaconf import OmegaConf
from PIL import Image
from trainer_run import QUICKSTART, SHORT, Run, link, metrics
from transformers import AutoTokenizer

from cppo_verl.analysis.calibrate.thresholds import intervals, recorded
from cppo_verl.artifacts.run_reader import read_generations, read_run
from cppo_verl.artifacts.stop_request import request_stop
from cppo_verl.artifacts.token_dump import REASONS, read_tokens
from cppo_verl.core import top_k_divergence
from cppo_verl.rewards.reasoning_gym import compute_score

pytestmark = pytest.mark.trainer

ROOT = Path(__file__).parents[2]
REGION = OmegaConf.load(QUICKSTART.with_name("quickstart.yaml")).trust_region


def on_two_ranks(output, first):
    """Six steps with a KL reference, and a single update a rollout batch, so that pi is still mu."""
    if not (output / "data").exists():
        link(first, output)
    return Run(
        output,
        *SHORT,
        "trainer.n_gpus_per_node=2",
        "ray_kwargs.ray_init.num_gpus=2",
        "data.train_batch_size=16",
        "actor_rollout_ref.actor.ppo_mini_batch_size=16",
        "actor_rollout_ref.actor.use_kl_loss=true",
        "actor_rollout_ref.actor.optim.lr_scheduler_type=cosine",
        "actor_rollout_ref.ref.log_prob_micro_batch_size_per_gpu=64",
        "actor_rollout_ref.rollout.agent.default_agent_loop=seeded",
        "trainer.logger=[console,file]",
        "trust_region.dump.responses=7",
        probe="seeded",
    )


@pytest.fixture(scope="module")
def on_policy(first, tmp_path_factory):
    """Uninterrupted."""
    return on_two_ranks(tmp_path_factory.mktemp("on_policy"), first).finish()


@pytest.fixture(scope="module")
def preempted(first, tmp_path_factory):
    """The same once more, with SIGTERM once step 3 is done, the last before step 6 that verl itself saves."""
    run = on_two_ranks(tmp_path_factory.mktemp("preempted"), first).read_until(r"^step +3 ")
    run.process.send_signal(signal.SIGTERM)
    return run.finish()


@pytest.fixture(scope="module")
def resumed(first, preempted):
    """The same command again, where a later attempt was killed while it wrote its checkpoint."""
    checkpoints = preempted.output / "checkpoints"
    step = (checkpoints / "latest_checkpointed_iteration.txt").read_text()
    half = checkpoints / "global_step_6"
    shutil.copytree(checkpoints / f"global_step_{step}" / "actor", half / "actor")
    with next(half.glob("actor/model_*rank_0.pt")).open("r+b") as file:
        file.truncate(1000)
    return on_two_ranks(preempted.output, first).finish()


def test_the_job_ends_well_and_leaves_nothing_running(first):
    assert first.code == 0, first.text
    assert first.survivors() == []


def test_the_summary_names_files_that_are_there(first):
    assert re.search(r"validation accuracy \(Avg@16\) +0\.\d+ at step 0 -> 0\.\d+ at step 6", first.text)
    assert re.search(r"tokens masked +\d+\.\d% of", first.text) or re.search(r"tokens masked +\d+\.\d%,", first.text)
    output = first.output
    assert (output / "checkpoints" / "latest_checkpointed_iteration.txt").read_text() == "6"
    assert list((output / "logs" / "tensorboard").glob("events.out.tfevents.*"))
    assert list((output / "logs" / "wandb").glob("offline-run-*/*.wandb"))
    with Image.open(output / "quickstart.png") as picture:
        assert picture.width > 1000
        assert len(picture.convert("RGB").getcolors(1 << 24)) > 50


def test_every_step_reports_the_trust_region(first):
    steps = metrics(first.output, 0)
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


def test_the_dump_tells_of_every_token_what_the_steps_metrics_tell_of_all(first):
    dump = read_tokens(first.output)
    assert dump.notes == []
    tokenizer = AutoTokenizer.from_pretrained(first.output / "model")
    problems = {
        row["prompt"][0]["content"].strip(): {
            "data_source": row["data_source"],
            "extra_info": row["extra_info"],
            "ground_truth": None,
        }
        for row in pandas.read_parquet(first.output / "data" / "train.parquet").to_dict("records")
    }
    assert sorted(dump.headers) == [2, 4, 6]
    logged = metrics(first.output, 0)
    for step, header in dump.headers.items():
        responses = [response for response in dump.responses if response.step == step]
        method = header["method"]
        assert (method["loss_mode"], method["delta"], method["divergence"]) == ("cppo", REGION.delta, "binary_tv")
        assert header["tokenizer"] == str(first.output / "model")
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
    assert {"kept", "towards_one", "budget"} <= {REASONS[code] for r in dump.responses for code in r.reason}


@pytest.mark.parametrize("run", ["on_policy", "resumed"])
def test_two_ranks_dump_as_many_responses_as_were_asked_for(run, request):
    dump = read_tokens(request.getfixturevalue(run).output)
    assert dump.notes == []
    assert sorted(response.step for response in dump.responses) == [2] * 7 + [4] * 7 + [6] * 7
    assert len({(response.step, response.key) for response in dump.responses}) == 21
    for response in dump.responses:
        assert response.update == 0
        assert response.divergence.max() < 1e-4
        assert set(response.reason) == {REASONS.index("kept")}


def test_a_person_sees_one_line_a_step(first):
    log = (first.output / "logs" / "train-0.log").read_text()
    lines = re.findall(r"cppo_verl  step (\d)/6  (\d:\d\d:\d\d) left  (.*)", log)
    assert [int(step) for step, _, _ in lines] == list(range(1, 7))
    assert lines[-1][1] == "0:00:00"
    assert all(re.search(r"reward 0\.\d+  validation \d+\.\d%  masked \d+\.\d%  [\d,]+ tokens/s", x) for *_, x in lines)


def test_validations_answers_are_kept_and_make_up_its_metric(first):
    run = read_run(first.output)
    assert run.generations == first.output / "validation"
    accuracies = run.accuracies()
    for step in (0, 3, 6):
        answers = read_generations(run.generations, step)
        assert answers.notes == []
        assert len(answers.correct) == 16
        assert {len(samples) for samples in answers.correct.values()} == {16}
        assert {benchmark for benchmark, _ in answers.correct} == {"reasoning_gym/number_sorting"}
        values = answers.accuracy().values()
        assert sum(values) / 16 == pytest.approx(accuracies[step]["reasoning_gym/number_sorting"])


def test_the_best_checkpoint_is_kept_out_of_the_rotation(resumed):
    folder = resumed.output / "checkpoints"
    best = json.loads((folder / "best" / "best.json").read_text())
    # an attempt that resumes validates its checkpoint first
    key = "val-core/reasoning_gym/number_sorting/acc/mean@16"
    validated = [
        (step, values[key])
        for attempt in range(2)
        for step, values in sorted(metrics(resumed.output, attempt).items())
        if step and key in values
    ]
    assert len(validated) == 3
    step, accuracy = max(validated, key=lambda item: item[1])
    assert best == {"step": step, "accuracy": pytest.approx(accuracy)}
    kept = [path.name for path in (folder / "best").glob("global_step_*")]
    assert kept == [f"global_step_{best['step']}"]
    # verl keeps two: the best is one of them, sharing its files, or is kept here alone
    weights = folder / "best" / kept[0] / "actor" / "model_world_size_2_rank_0.pt"
    assert weights.stat().st_size > 100_000
    rotated = folder / kept[0] / "actor" / weights.name
    assert weights.stat().st_nlink == 1 + rotated.exists()


def test_a_checkpoint_is_evaluated_by_verls_validation_killed_and_again(first, tmp_path):
    command = [sys.executable, "-m", "cppo_verl", "evaluate", "--output", str(tmp_path / "e"), "--samples", "4"]
    command += ["--checkpoint", str(first.output / "checkpoints" / "global_step_6"), "--"]
    command += ["--config-dir", str(QUICKSTART.parent), "--config-name", "quickstart", f"output={first.output}"]
    command += ["data.val_max_samples=12"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    killed = subprocess.Popen(command, env=environment, text=True, stdout=subprocess.PIPE)
    time.sleep(25)
    killed.send_signal(signal.SIGINT)
    assert "interrupted; the same command starts over" in killed.communicate(timeout=60)[0]
    assert killed.returncode == 130
    assert not (tmp_path / "e" / "result.json").exists()

    before = sorted(path.name for path in (first.output / "checkpoints").iterdir())
    again = subprocess.run(command, env=environment, text=True, capture_output=True)
    assert again.returncode == 0, again.stdout + again.stderr
    assert re.search(r"\| reasoning_gym/number_sorting \| 12 +\| \d+\.\d\d \[", again.stdout)
    result = json.loads((tmp_path / "e" / "result.json").read_text())
    benchmark = result["benchmarks"]["reasoning_gym/number_sorting"]
    assert (benchmark["problems"], benchmark["answers"], benchmark["short"]) == (12, 48, 0)
    assert result["step"] == 6
    # the same number as verl's own metric, and nothing of the run's touched
    metrics = read_run(tmp_path / "e" / "metrics.jsonl").steps
    key = "val-core/reasoning_gym/number_sorting/acc/mean@4"
    assert benchmark["average"] == pytest.approx([v[key] for v in metrics.values() if key in v][0])
    assert sorted(path.name for path in (first.output / "checkpoints").iterdir()) == before

    third = subprocess.run(command, env=environment, text=True, capture_output=True, timeout=30)
    assert third.returncode == 0
    assert "is there: showing it" in third.stdout


def test_sigterm_ends_the_run_after_its_step_with_a_checkpoint_of_it(preempted):
    assert preempted.code == 143, preempted.text
    step = max(metrics(preempted.output, 0))
    assert step in (4, 5)
    assert f"stopped after step {step} of 6: SIGTERM; the same command continues" in preempted.text
    log = (preempted.output / "logs" / "train-0.log").read_text()
    assert f"cppo_verl  stopped after step {step} of 6: SIGTERM" in log
    assert "Traceback" not in log
    assert not (preempted.output / "checkpoints" / "stop").exists()
    assert preempted.survivors() == []


def test_a_resumed_run_is_the_uninterrupted_one(preempted, resumed, on_policy):
    assert (resumed.code, on_policy.code) == (0, 0), resumed.text + on_policy.text
    stopped = max(metrics(preempted.output, 0))
    assert sorted(metrics(resumed.output, 1)) == list(range(stopped, 7))
    # nothing was trained twice: of the step it resumes at there is a validation alone
    assert "actor/lr" not in metrics(resumed.output, 1)[stopped]
    joint, whole = read_run(resumed.output / "logs").steps, read_run(on_policy.output / "logs").steps
    assert list(joint) == list(whole) == list(range(7))
    of_the_run = re.compile(
        r"actor/(?!perf)|critic/|trust_region/|val-core/.*/mean@|(response|prompt)_length|training/(global|epoch)"
    )
    rates = set()
    for step in range(1, 7):
        want = {name: value for name, value in whole[step].items() if of_the_run.match(name)}
        assert {name: joint[step][name] for name in want} == pytest.approx(want, rel=1e-3, abs=1e-6)
        rates.add(want["actor/lr"])
    assert len(rates) == 6
    assert whole[6]["actor/grad_norm"] > 0


def test_what_two_signals_interrupt_while_it_starts_leaves_nothing(first):
    run = Run(first.output, *SHORT, "trainer.total_training_steps=12").read_until("starting Ray")
    time.sleep(15)
    run.process.send_signal(signal.SIGTERM)
    time.sleep(3)
    assert run.process.poll() is None
    run.process.send_signal(signal.SIGTERM)
    assert run.finish().code == 130
    assert "interrupted; the same command continues from the last checkpoint" in run.text
    assert not (first.output / "checkpoints" / "stop").exists()
    assert run.survivors() == []


def test_before_the_first_update_pi_is_mu_on_every_rank(on_policy):
    assert on_policy.code == 0, on_policy.text
    values = metrics(on_policy.output, 0)
    assert values[1]["trust_region/divergence_p90"] < 1e-5
    assert values[1]["trust_region/masked_share"] == 0
    assert values[1]["actor/kl_loss"] < 1e-6  # the reference is the model itself
    # after it, the rollout engine has the new weights
    assert values[2]["trust_region/divergence_p90"] < 1e-5
    assert values[2]["actor/kl_loss"] > values[1]["actor/kl_loss"]


def test_a_missing_model_stops_the_trainer_with_its_path(first, tmp_path):
    run = Run(first.output, *SHORT, "trainer.total_training_steps=20", "actor_rollout_ref.model.path=/nowhere/model")
    run.finish()
    assert run.code == 1
    assert "no actor_rollout_ref.model.path=/nowhere/model" in run.text
    assert run.survivors() == []


def test_a_checkpoint_that_finds_no_room_ends_the_run_and_spares_the_one_before(first, tmp_path):
    link(first, tmp_path)
    run = Run(tmp_path, *BRIEF, "trainer.save_freq=1", "trainer.total_training_steps=3", probe="full").finish()
    assert run.code == 1
    folder = tmp_path / "checkpoints"
    assert re.search(
        rf"on [\d.]+: the checkpoint of step 2 could not be written to {folder} .*; that of step 1 is whole", run.text
    )
    assert (folder / "latest_checkpointed_iteration.txt").read_text() == "1"
    weights = torch.load(folder / "global_step_1" / "actor" / "model_world_size_1_rank_0.pt", weights_only=False)
    assert sum(tensor.numel() for tensor in weights.values()) > 250_000
    assert run.survivors() == []


METHODS = ["grpo", "trm_max_avg", "minpro"]  # the losses beside CPPO's: verl's own and the plug-in's other two


def sweep(output):
    """These losses for two steps, as a sweep over the quickstart's config."""
    # The config file has chosen a method: no plus sign.
    command = [f"output={output}", f"method={','.join(METHODS)}", "trainer.total_training_steps=2"]
    command += ["trainer.save_freq=-1", "trainer.test_freq=2", "trainer.val_before_train=false"]
    command += ["data.val_max_samples=4"]
    command += ["trainer.logger=[console]", "data.train_batch_size=16"]
    config = ["--config-dir", str(QUICKSTART.parent), "--config-name", "quickstart"]
    return Run(output, *command, program=["-m", "verl.trainer.main_ppo", *config, "-m"])


@pytest.fixture(scope="module")
def killed_sweep(first, tmp_path_factory):
    """Killed as its second point starts."""
    output = tmp_path_factory.mktemp("methods")
    link(first, output)
    run = sweep(output).read_until(rf"2/3 method={METHODS[1]}: started")
    while not (output / "sweep" / f"method={METHODS[1]}" / "train-0.log").exists():
        time.sleep(0.1)
    run.process.send_signal(signal.SIGINT)
    return run.finish()


@pytest.fixture(scope="module")
def resumed_sweep(killed_sweep):
    """The same command again."""
    return sweep(killed_sweep.output).finish()


def test_a_killed_sweep_leaves_no_process_and_says_how_to_go_on(killed_sweep):
    assert killed_sweep.code == 130, killed_sweep.text
    assert "1 finished, 0 failed, 2 to be run" in killed_sweep.text
    assert killed_sweep.survivors() == []


def test_a_resumed_sweep_runs_no_finished_point_again(resumed_sweep):
    assert resumed_sweep.code == 0, resumed_sweep.text
    assert "3 finished, 0 failed, 0 to be run" in resumed_sweep.text
    attempts = [len(list((resumed_sweep.output / "sweep" / f"method={m}").glob("train-*.log"))) for m in METHODS]
    assert attempts == [1, 2, 1]
    assert resumed_sweep.survivors() == []


@pytest.mark.parametrize("method", METHODS)
def test_every_loss_trains(resumed_sweep, method):
    run = read_run(resumed_sweep.output / "sweep" / f"method={method}")
    assert [run.steps[step]["actor/grad_norm"] > 0 for step in (1, 2)] == [True, True]
    assert 0 <= run.steps[1]["trust_region/left_out_prompt_share"] < 1
    assert ("trust_region/masked_share" in run.steps[1]) == (method != "grpo")


def test_a_sweep_becomes_a_table_of_its_methods(resumed_sweep):
    command = [sys.executable, "-m", "cppo_verl", "table", str(resumed_sweep.output / "sweep")]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    rows = [line.split("|")[1:3] for line in result.stdout.splitlines()[2:]]
    assert {tuple(map(str.strip, row)) for row in rows} == {(method, "1") for method in METHODS}


# --- calibrated thresholds ---------------------------------------------------------------------------------------


def test_calibrated_thresholds_mask_the_share_that_was_promised(first, tmp_path):
    """Three times as much as the first run masked: larger shares are known better, and the first run's own thresholds
    would miss this one by far."""
    command = [sys.executable, "-m", "cppo_verl", "calibrate", str(first.output), "--masked-share", "0.2"]
    result = subprocess.run([*command, "--output", str(tmp_path / "c.html")], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    pasted = re.search(r"^trust_region\.delta=\S+ trust_region\.delta_b=\S+$", result.stdout, re.M)[0].split()
    promised, *ends = re.search(r"masks (\S+)% of .* interval (\S+)% to (\S+)%", result.stdout).groups()
    link(first, tmp_path)
    brief = ["trainer.test_freq=-1", "trainer.save_freq=-1", "trainer.val_before_train=false"]
    run = Run(tmp_path, *SHORT, *brief, "trainer.logger=[console,file]", *pasted).finish()
    assert run.code == 0, run.text
    assert run.survivors() == []

    def steps_of_the_dump(output):
        """Masked share of each step that dumps, and how many tokens its updates saw."""
        tokens = Counter()
        for response in read_tokens(output).responses:
            tokens[response.step] += int(response.mask.sum())
        return {step: (metrics(output, 0)[step]["trust_region/masked_share"], n) for step, n in tokens.items()}

    def pooled(shares):
        return sum(share * n for share, n in shares.values()) / sum(n for _, n in shares.values())

    given, before = steps_of_the_dump(tmp_path), steps_of_the_dump(first.output)
    assert sorted(given) == sorted(before) == [2, 4, 6]
    responses = read_tokens(tmp_path).responses
    interval, _ = intervals(recorded(responses), [response.uid for response in responses])
    # Both shares are estimates. Three standard errors of their difference, each a quarter of its interval.
    low, high = (float(end) / 100 for end in ends)
    allowed = 3 * math.hypot(high - low, interval.high - interval.low) / 4
    assert abs(pooled(given) - float(promised) / 100) < allowed
    assert abs(pooled(before) - float(promised) / 100) > allowed


# --- top-K divergences ----------------------------------------------------------------------------------------

BRIEF = ["trainer.test_freq=-1", "trainer.save_freq=-1", "trainer.val_before_train=false"]
BRIEF += ["trainer.logger=[console,file]", "data.train_batch_size=16", "actor_rollout_ref.actor.policy_loss.top_k=5"]


@pytest.fixture(scope="module")
def top_k(first, tmp_path_factory):
    """Two steps of four updates on responses of two turns, each look at the logits saved; validation before."""
    output = tmp_path_factory.mktemp("top_k")
    link(first, output)
    return Run(
        output,
        *BRIEF,
        "divergence=topk_tv",
        "trainer.total_training_steps=2",
        "trainer.val_before_train=true",
        "data.val_max_samples=4",
        "actor_rollout_ref.rollout.agent.default_agent_loop=two_turns",
        probe=f"dump:{output / 'dump'}",
    ).finish()


def test_top_k_runs_and_tells_mismatch_from_drift(top_k):
    assert top_k.code == 0, top_k.text
    log = (top_k.output / "logs" / "train-0.log").read_text()
    assert "mu's 5 most likely tokens: 30 bytes a response token, at most 0.1 MB a step of 128 responses" in log
    assert "model engine initialized" in log
    for values in (metrics(top_k.output, 0)[step] for step in (1, 2)):
        # unchanged weights: two engines in fp32
        assert values["trust_region/first_update/divergence"] < 2e-6
        assert values["trust_region/later_updates/divergence"] > 1e-3
        positions = [values[f"trust_region/later_updates/divergence/position_{b}"] for b in range(8)]
        assert max(positions) < 1
        assert min(positions) > 0
    assert top_k.survivors() == []


def test_divergences_are_those_of_both_policies_full_distributions(top_k):
    from transformers import AutoModelForCausalLM

    from cppo_verl.core import binary_divergence, exact_divergence

    dumps = [torch.load(path) for path in sorted((top_k.output / "dump").iterdir())]
    assert len(dumps) == 8
    mu = AutoModelForCausalLM.from_pretrained(top_k.output / "model", dtype=torch.float32)
    coarser = finer = interior = 0
    for update, dump in enumerate(dumps[:4]):  # of the first step, generated with the weights on disk
        end = 0
        assert (dump["divergence"].max() < 1e-5) == (update == 0)
        for ids, prompt, response, mask, log_mu_sampled in zip(
            *(dump[name] for name in ("input_ids", "prompts", "responses", "response_mask", "rollout_log_probs")),
            strict=True,
        ):
            begin, end = end, end + len(ids)
            predicting = slice(len(prompt) - 1, len(ids) - 1)
            valid = mask.bool()
            with torch.no_grad():
                log_mu = mu(ids[None]).logits[0, predicting].log_softmax(-1)[valid]
            log_pi = dump["logits"][begin:end][predicting].log_softmax(-1)[valid]
            divergence, sampled = dump["divergence"][begin:end][predicting], response[valid]
            assert (divergence[~valid] == 0).all()
            interior += int((~valid).sum())
            torch.testing.assert_close(
                log_mu.gather(-1, sampled[:, None])[:, 0], log_mu_sampled[valid], rtol=1e-5, atol=1e-5
            )
            # The tokens' order in mu may differ between engines where two are equally likely to fp32.
            want = top_k_divergence(log_pi, log_mu, sampled, 5, "tv")
            torch.testing.assert_close(divergence[valid], want, rtol=0, atol=1e-5)
            binary = binary_divergence(*(x.gather(-1, sampled[:, None])[:, 0] for x in (log_pi, log_mu)), "tv")
            exact = exact_divergence(log_pi, log_mu, "tv")
            assert (binary <= divergence[valid] + 1e-5).all()
            assert (divergence[valid] <= exact + 1e-5).all()
            coarser += int((divergence[valid] > binary + 1e-4).sum())
            finer += int((exact > divergence[valid] + 1e-4).sum())
    # neither bound is met by all being equal, and the responses do hold tool output
    assert min(coarser, finer, interior) > 100


def test_a_capture_shifted_by_one_token_stops_the_run(first, tmp_path):
    link(first, tmp_path)
    command = [*BRIEF, "divergence=topk_tv", "trainer.total_training_steps=2"]
    run = Run(tmp_path, *command, probe="shift").finish()
    assert run.code == 1
    assert "mu's most likely tokens do not stand beside the sampled tokens" in run.text
    assert not list((tmp_path / "logs").glob("metrics-*.jsonl")) or metrics(tmp_path, 0) == {}
    assert run.survivors() == []


@pytest.mark.parametrize("mode", ["colocate_async", "separate_async"])
def test_divergences_of_stale_responses_are_those_of_two_checkpoints(first, mode, tmp_path):
    """The asynchronous trainers train step 2 on responses of the initial weights: at its first update mu is the
    model on disk and pi the checkpoint of step 1. Asked to stop while step 2 is at work, they do so in order."""
    from transformers import AutoModelForCausalLM

    link(first, tmp_path)
    (example,) = (command for command in shown("examples/README.md", "quickstart/run.py") if mode in str(command))
    command = [*overrides(example), *BRIEF, "method=trm_max_avg", "divergence=topk_kl"]
    # All prompts take part: which of them have answers of both kinds is drawn anew in each run.
    command += ["trainer.total_training_steps=50", "actor_rollout_ref.actor.policy_loss.mask_std_0=false"]
    command += ["trainer.save_freq=1", "trainer.max_actor_ckpt_to_keep=null"]
    command += ["actor_rollout_ref.actor.checkpoint.save_contents=[model,hf_model]"]
    command += ["trust_region.dump.every=1", "trust_region.dump.responses=1000"]
    if mode == "colocate_async":
        command += ["trainer.n_gpus_per_node=2", "ray_kwargs.ray_init.num_gpus=2"]
        command += ["actor_rollout_ref.actor.use_dynamic_bsz=true"]
        command += ["actor_rollout_ref.rollout.log_prob_use_dynamic_bsz=true"]
        command += ["actor_rollout_ref.actor.ppo_max_token_len_per_gpu=512"]
        command += ["actor_rollout_ref.rollout.log_prob_max_token_len_per_gpu=512"]
    else:
        # Of 16 prompts, where the example's batch of 32 has eight mini-batches.
        command += ["trainer.v1.separate_async.parameter_sync_step=4"]
    run = Run(tmp_path, *command, probe=f"dump:{tmp_path / 'dump'}").read_until(r"^step +1 ")
    request_stop(tmp_path / "checkpoints", "enough")
    assert run.finish().code == 143, run.text
    assert run.survivors() == []
    steps = metrics(tmp_path, 0)
    assert f"stopped after step {max(steps)} of 50: enough; the same command continues" in run.text
    assert (tmp_path / "checkpoints" / "latest_checkpointed_iteration.txt").read_text() == str(max(steps))
    for values in steps.values():
        stale = values["training/off_policy/trajectory_staleness/mean"] > 0
        assert (values["trust_region/first_update/divergence"] > 1e-4) == stale
        assert values["trust_region/later_updates/divergence"] > 1e-4
    assert steps[2]["training/off_policy/trajectory_staleness/min"] == 1
    tokens = read_tokens(tmp_path)
    assert tokens.notes == [] and sorted(tokens.headers) == sorted(steps)
    for step, values in steps.items():
        of_step = [response for response in tokens.responses if response.step == step]
        # The separate trainer's metrics of a step are means over its parts, each of one update.
        parts = {response.update for response in of_step} if mode == "separate_async" else {None}
        means = [
            np.concatenate([r.divergence[r.mask] for r in of_step if part in (r.update, None)]).mean() for part in parts
        ]
        assert np.mean(means) == pytest.approx(values["trust_region/divergence"], rel=1e-4)

    mu, pi = (
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        for folder in (first.output / "model", tmp_path / "checkpoints" / "global_step_1" / "actor" / "huggingface")
    )
    compared = 0
    for path in (tmp_path / "dump").iterdir():
        dump, end = torch.load(path), 0
        for ids, prompt, response, mask in zip(
            *(dump[name] for name in ("input_ids", "prompts", "responses", "response_mask")), strict=True
        ):
            begin, end = end, end + len(ids)
            predicting = slice(len(prompt) - 1, len(ids) - 1)
            with torch.no_grad():
                log_mu, log_pi = (net(ids[None]).logits[0, predicting].log_softmax(-1) for net in (mu, pi))
            seen = dump["logits"][begin:end][predicting].log_softmax(-1)
            # Looks of other updates are at other weights.
            if not torch.allclose(seen, log_pi, atol=1e-4) or not mask.all():
                continue
            want = top_k_divergence(log_pi, log_mu, response, 5, "kl")
            if want.max() > 1e-3:
                torch.testing.assert_close(dump["divergence"][begin:end][predicting], want, rtol=1e-3, atol=2e-5)
                compared += 1
    assert compared >= 16  # of the 32 responses of the first update


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("actor_rollout_ref.actor.policy_loss.top_k=23", "policy_loss.top_k=23 is more than the 22 tokens"),
        (
            "+actor_rollout_ref.rollout.agent.agent_loop_manager_class=verl.trainer.ppo.v1.AgentLoopManagerTQ",
            "does not hand mu's most likely tokens over",
        ),
    ],
)
def test_what_only_the_trainer_can_see_stops_it_before_its_workers(first, tmp_path, override, message):
    link(first, tmp_path)
    run = Run(
        tmp_path, "divergence=topk_tv", override, "++actor_rollout_ref.rollout.engine_kwargs.vllm.max_logprobs=23"
    )
    run.finish()
    assert run.code == 1
    assert message in run.text
    # what verl says once they are there
    assert "model engine initialized" not in (tmp_path / "logs" / "train-0.log").read_text()
    assert run.survivors() == []
