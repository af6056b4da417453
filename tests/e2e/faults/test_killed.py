"""Any part of a run is killed at any moment: the run ends, says what died and how to continue, and leaves nothing."""

import pytest
from faults import PARTS, end_by_killing
from trainer_run import BRIEF, Run, link

pytestmark = pytest.mark.nightly
"""In CI a part is killed in a generation in tests/e2e/test_lora.py, and one in a checkpoint in
tests/e2e/distributed/test_resume.py."""


@pytest.mark.parametrize("phase", ["generation", "update", "checkpoint"])
@pytest.mark.parametrize("part", PARTS)
def test_a_run_ends_when_a_part_of_it_is_killed(part, phase, interrupted, tmp_path):
    link(interrupted, tmp_path)
    command = [*BRIEF, "trainer.save_freq=1", "trainer.total_training_steps=4", "trust_region.dump.every=0"]
    command += ["reward.num_workers=1"]  # +platform=cpu has none to kill
    run = Run(tmp_path, *command, probe=f"{phase}:2").until(phase)
    end_by_killing(run, part)
    # The newest whole checkpoint is that of the first step, or of the second if what was left has finished it. Without
    # its control store a run goes on, for the minute that Ray waits for it or to the end.
    whole = (tmp_path / "checkpoints" / "latest_checkpointed_iteration.txt").read_text()
    assert whole == "4" if run.code == 0 else whole in "12" or part == "control store"
