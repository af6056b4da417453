"""`evaluate` on a checkpoint of the quickstart."""

import json
import os
import re
import signal
import subprocess
import sys

import pytest
from trainer_run import QUICKSTART, RAY_STARTED, Program

from cppo_verl.artifacts.run_reader import read_run


def test_evaluate_interrupted_and_again_gives_verls_own_metric(quickstart, tmp_path):
    command = [sys.executable, "-m", "cppo_verl", "evaluate", "--output", str(tmp_path / "e"), "--samples", "4"]
    command += ["--checkpoint", str(quickstart.output / "checkpoints" / "global_step_6"), "--"]
    command += ["--config-dir", str(QUICKSTART.parent), "--config-name", "quickstart", f"output={quickstart.output}"]
    command += ["data.val_max_samples=12"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    killed = Program(command, {"OMP_NUM_THREADS": "1"}, signal.SIGINT)
    killed.wait_for(tmp_path / "e" / "verl.log", RAY_STARTED)
    killed.process.send_signal(signal.SIGINT)
    assert "interrupted; the same command starts over" in killed.finish().text
    assert killed.code == 130
    assert killed.survivors() == []
    assert not (tmp_path / "e" / "result.json").exists()

    def state():
        saved = {path.name: path.read_bytes() for path in (quickstart.output / "hydra").iterdir()}
        return sorted(path.name for path in (quickstart.output / "checkpoints").iterdir()), saved

    before = state()
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
    assert state() == before
    log = (tmp_path / "e" / "verl.log").read_text()
    assert "No dataloader state found" in log and "extra_state" not in log

    third = subprocess.run(command, env=environment, text=True, capture_output=True)
    assert third.returncode == 0
    assert "is there: showing it" in third.stdout
    command[command.index("--checkpoint") + 1] = str(quickstart.output / "checkpoints" / "global_step_3")
    other = subprocess.run(command, env=environment, text=True, capture_output=True)
    assert other.returncode == 1 and "result.json is of another evaluation (checkpoint was" in other.stderr
