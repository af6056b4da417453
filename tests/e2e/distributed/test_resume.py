"""Two ranks: a run from start to end, and the same once more, preempted, killed and resumed."""

import json
import re

import pytest
from faults import end_by_killing
from trainer_run import metrics
from two_ranks import on_one_node

from cppo_verl.artifacts.run_reader import read_run
from cppo_verl.artifacts.token_dump import REASONS, read_tokens


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Of the attempts at the same once more, each ended in another way; verl itself saves at steps 3 and 6 alone."""
    return tmp_path_factory.mktemp("attempts")


@pytest.fixture(scope="module")
def preempted(interrupted, folder):
    """Stopped in the generation of step 4."""
    return on_one_node(folder, interrupted, probe="generation:4").until("generation").ask_to_stop().finish()


@pytest.fixture(scope="module")
def killed(interrupted, folder, preempted):
    """With half a checkpoint of step 6, which does not count, so that the updates of two steps are lost.

    Only the trainer's death stops a checkpoint whose weights are written.
    """
    run = on_one_node(folder, interrupted, "trainer.val_before_train=false", probe="checkpoint:6")
    end_by_killing(run.until("checkpoint"), "trainer")


@pytest.fixture(scope="module")
def resumed(interrupted, folder, killed):
    """To the end, while the wall clock jumps back by a day and forth by two."""
    return on_one_node(folder, interrupted, probe="clock:5").finish()


def test_pi_is_mu_at_the_first_update_on_every_rank(on_policy):
    assert on_policy.code == 0, on_policy.text
    values = metrics(on_policy.output, 0)
    assert values[1]["trust_region/divergence_p90"] < 1e-5
    assert values[1]["trust_region/masked_share"] == 0
    assert values[1]["actor/kl_loss"] < 1e-6  # the reference is the model itself
    # after it, the rollout engine has the new weights
    assert values[2]["trust_region/divergence_p90"] < 1e-5
    assert values[2]["actor/kl_loss"] > values[1]["actor/kl_loss"]


def test_sigterm_ends_a_run_after_its_step_with_a_checkpoint(preempted):
    assert preempted.code == 143, preempted.text
    assert "stopped after step 4 of 6: SIGTERM; the same command continues" in preempted.text
    log = (preempted.output / "logs" / "train-0.log").read_text()
    assert "cppo_verl  stopped after step 4 of 6: SIGTERM" in log
    assert "Traceback" not in log
    assert not (preempted.output / "checkpoints" / "stop").exists()
    assert preempted.survivors() == []


def test_no_attempt_trains_a_step_again_whose_checkpoint_is_whole(resumed, folder):
    steps = [sorted(metrics(folder, attempt)) for attempt in range(3)]
    assert steps == [[0, 1, 2, 3, 4], [5], [4, 5, 6]]
    # of the step it resumes at there is a validation alone
    assert "actor/lr" not in metrics(folder, 2)[4]


def test_a_run_that_was_stopped_and_killed_equals_an_uninterrupted_one(resumed, on_policy):
    assert (resumed.code, on_policy.code) == (0, 0), resumed.text + on_policy.text
    joint, whole = read_run(resumed.output / "logs").steps, read_run(on_policy.output / "logs").steps
    assert list(joint) == list(whole) == list(range(7))
    of_the_run = re.compile(
        r"actor/(?!perf)|critic/|trust_region/|val-core/.*/mean@|(response|prompt)_length|training/(global|epoch)"
    )
    rates = set()
    for step in range(1, 7):
        assert 0 < joint[step]["timing_s/step"] < 600  # whatever the wall clock does
        want = {name: value for name, value in whole[step].items() if of_the_run.match(name)}
        assert {name: joint[step][name] for name in want} == pytest.approx(want, rel=1e-3, abs=1e-6)
        rates.add(want["actor/lr"])
    assert len(rates) == 6
    assert whole[6]["actor/grad_norm"] > 0


def test_rotation_spares_the_best_checkpoint(resumed):
    folder = resumed.output / "checkpoints"
    best = json.loads((folder / "best" / "best.json").read_text())
    # the last attempt validates its checkpoint first
    key = "val-core/reasoning_gym/number_sorting/acc/mean@16"
    validated = [
        (step, values[key])
        for attempt in range(3)
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


@pytest.mark.parametrize("run", ["on_policy", "resumed"])
def test_two_ranks_dump_as_many_responses_as_asked_for(run, request):
    dump = read_tokens(request.getfixturevalue(run).output)
    assert dump.notes == []
    assert sorted(response.step for response in dump.responses) == [2] * 7 + [4] * 7 + [6] * 7
    assert len({(response.step, response.key) for response in dump.responses}) == 21
    for response in dump.responses:
        assert response.update == 0
        assert response.divergence.max() < 1e-4
        assert set(response.reason) == {REASONS.index("kept")}
