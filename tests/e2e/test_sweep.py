"""A sweep of verl's trainer over losses, killed and resumed."""

import signal
import subprocess
import sys

import pytest
from trainer_run import BRIEF, QUICKSTART, RAY_STARTED, Run, link

from cppo_verl.artifacts.run_reader import read_run

METHODS = ["grpo", "minpro"]  # verl's own loss, and the plug-in's whose mask is not CPPO's


def sweep(output):
    """Both losses for two steps, as a sweep over the quickstart's config."""
    # The config file has chosen a method: no plus sign.
    command = [
        f"output={output}",
        f"inputs={output}",
        f"method={','.join(METHODS)}",
        *BRIEF,
        "trainer.total_training_steps=2",
    ]
    command += ["trainer.test_freq=2", "data.val_max_samples=4", "trainer.logger=[console]"]
    config = ["--config-dir", str(QUICKSTART.parent), "--config-name", "quickstart"]
    return Run(output, *command, program=["-m", "verl.trainer.main_ppo", *config, "-m"])


@pytest.fixture(scope="module")
def killed_sweep(interrupted, tmp_path_factory):
    """Interrupted as its second job starts."""
    output = tmp_path_factory.mktemp("methods")
    link(interrupted, output)
    run = sweep(output).read_until(rf"method={METHODS[1]}: started")
    run.wait_for(output / "sweep" / f"method={METHODS[1]}" / "train-0.log", RAY_STARTED)
    run.process.send_signal(signal.SIGINT)
    return run.finish()


@pytest.fixture(scope="module")
def resumed_sweep(killed_sweep):
    """The same command again."""
    return sweep(killed_sweep.output).finish()


def test_an_interrupted_sweep_leaves_no_process_and_counts_its_jobs(killed_sweep):
    assert killed_sweep.code == 130, killed_sweep.text
    assert "1 finished, 0 failed, 1 to be run" in killed_sweep.text
    assert killed_sweep.survivors() == []


def test_a_resumed_sweep_skips_what_has_finished(resumed_sweep):
    assert resumed_sweep.code == 0, resumed_sweep.text
    assert "2 finished, 0 failed, 0 to be run" in resumed_sweep.text
    attempts = [len(list((resumed_sweep.output / "sweep" / f"method={m}").glob("train-*.log"))) for m in METHODS]
    assert attempts == [1, 2]
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
