"""Any part of a run is killed at any moment: the run ends, says what died and how to continue, and leaves nothing."""

import json

import pytest
from faults import PARTS, end_by_killing
from trainer_run import BRIEF, Run, link, metrics, wait_for

PHASES = ("generation", "update", "checkpoint")
CI = [("rollout engine", "generation")]
"""With what dies in tests/e2e/test_lora.py and tests/e2e/test_recipes.py."""


def begin(folder, phase, *overrides):
    """A run that saves after each of its four steps, at the beginning of a phase of the second."""
    command = [*BRIEF, "trainer.save_freq=1", "trainer.total_training_steps=4", "trust_region.dump.every=0", *overrides]
    run = Run(folder, *command, probe=f"phase:{phase},2").read_until("starting Ray")
    wait_for(folder / "logs" / "train-0.log", f"the {phase} of step 2 begins", patience=240)
    return run


def cases():
    for part in PARTS:
        for phase in PHASES:
            marks = [] if (part, phase) in CI else [pytest.mark.nightly]
            yield pytest.param(part, phase, id=f"{part}, {phase}", marks=marks)


@pytest.mark.parametrize("part, phase", list(cases()))
def test_a_run_ends_when_a_part_of_it_is_killed(part, phase, interrupted, tmp_path):
    link(interrupted, tmp_path)
    run = begin(tmp_path, phase)
    end_by_killing(run, part)
    # The newest whole checkpoint is that of the first step, or of the second if it was killed late in its save. Without
    # its control store a run may go on to its end.
    whole = (tmp_path / "checkpoints" / "latest_checkpointed_iteration.txt").read_text()
    assert whole == "4" if run.code == 0 else whole in ("1", "2") or part == "launcher"


@pytest.mark.nightly
@pytest.mark.parametrize("phase", PHASES)
def test_a_killed_run_continues_with_its_metrics_and_its_best_checkpoint(phase, interrupted, tmp_path):
    link(interrupted, tmp_path)
    validated = ["trainer.test_freq=1", "data.val_max_samples=16", "actor_rollout_ref.rollout.val_kwargs.n=4"]
    end_by_killing(begin(tmp_path, phase, *validated), "actor worker")
    folder = tmp_path / "checkpoints"
    whole = int((folder / "latest_checkpointed_iteration.txt").read_text())
    command = [*BRIEF, "trainer.save_freq=1", "trainer.total_training_steps=4", "trust_region.dump.every=0", *validated]
    run = Run(tmp_path, *command).finish()
    assert run.code == 0, run.text
    before, after = (metrics(tmp_path, attempt) for attempt in (0, 1))
    trained = [step for step, values in after.items() if "actor/lr" in values]
    assert trained == list(range(whole + 1, 5)) and set(before) >= set(range(1, whole + 1))
    accuracy = "val-core/reasoning_gym/number_sorting/acc/mean@4"
    scores = {step: values[accuracy] for step, values in (before | after).items() if accuracy in values}
    best = json.loads((folder / "best" / "best.json").read_text())
    assert best["accuracy"] == max(score for step, score in scores.items() if step > 0)
    assert (folder / "best" / f"global_step_{best['step']}" / "actor").is_dir()
    assert run.survivors() == []
