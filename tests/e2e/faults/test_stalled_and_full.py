"""A run that stands still while somebody waits for its end, and one whose metrics find no room."""

import signal
import time

import pytest
from trainer_run import BRIEF, QUICKSTART, Run, link

pytestmark = pytest.mark.nightly
SHORT = [*BRIEF, "trainer.total_training_steps=4", "trainer.save_freq=1", "trust_region.dump.every=0"]


def test_a_run_that_stands_still_ends_once_it_is_asked_to_stop(interrupted, tmp_path):
    link(interrupted, tmp_path)
    run = Run(tmp_path, *SHORT, "trainer.stop_seconds=10", probe="generation:2").until("generation")
    run.kill("VLLM::EngineCore", signal.SIGSTOP)
    run.ask_to_stop()
    begin = time.monotonic()
    run.finish()
    assert time.monotonic() - begin < 120
    assert run.code == 1
    assert "asked to stop, and no progress for" in run.text
    assert "the same command continues from the checkpoint of step 1" in run.text
    assert not (tmp_path / "checkpoints" / "stop").exists()
    assert run.survivors() == []


def test_metrics_without_room_end_the_run_with_what_to_do(interrupted, tmp_path, monkeypatch):
    link(interrupted, tmp_path)
    monkeypatch.setenv("VERL_FILE_LOGGER_PATH", "/dev/full")
    config = ["--config-dir", str(QUICKSTART.parent), "--config-name", "quickstart", f"output={tmp_path}"]
    run = Run(tmp_path, *config, *SHORT, program=["-m", "verl.trainer.main_ppo"]).finish()
    assert run.code == 1
    assert "nothing can be written to /dev/full, beside it or to" in run.text
    assert "No space left on device. Make room; the same command continues from the checkpoint of step 1" in run.text
    assert run.survivors() == []
