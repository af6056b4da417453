"""SIGTERM comes at any moment, or a file finds no room: the run ends in order and says so."""

import signal

import pytest
from trainer_run import BRIEF, Run, link, metrics, wait_for


@pytest.mark.nightly
@pytest.mark.parametrize("phase", ["generation", "update", "checkpoint"])
def test_sigterm_ends_a_run_after_its_step_in_every_phase(phase, interrupted, tmp_path):
    link(interrupted, tmp_path)
    command = [*BRIEF, "trainer.save_freq=2", "trainer.total_training_steps=4", "trust_region.dump.every=0"]
    run = Run(tmp_path, *command, probe=f"phase:{phase},2").read_until("starting Ray")
    wait_for(tmp_path / "logs" / "train-0.log", f"the {phase} of step 2 begins", patience=240)
    run.process.send_signal(signal.SIGTERM)
    assert run.finish().code == 143, run.text
    assert run.survivors() == []
    step = max(metrics(tmp_path, 0))
    assert step in (2, 3)  # the request may come as a step ends
    assert f"stopped after step {step} of 4: SIGTERM; the same command continues" in run.text
    assert (tmp_path / "checkpoints" / "latest_checkpointed_iteration.txt").read_text() == str(step)


@pytest.mark.nightly
def test_metrics_that_find_no_room_end_the_run(interrupted, tmp_path):
    link(interrupted, tmp_path)
    command = [*BRIEF, "trainer.save_freq=1", "trainer.total_training_steps=4", "trust_region.dump.every=0"]
    run = Run(tmp_path, *command, probe="metrics:/dev/full").finish()
    assert run.code == 1
    assert "No space left on device" in run.text
    assert run.survivors() == []
