"""The launcher `processes` with a small hydra application in the trainer's place, tests/helpers/sweep_app.py."""

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import yaml
from commands import GRPO
from hydra import compose, initialize_config_dir
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.types import RunMode
from omegaconf import OmegaConf
from trainer_run import default_signals
from verl.utils.config import omega_conf_to_dataclass

from cppo_verl.artifacts.sweep_record import RECORD, read_record
from cppo_verl.evaluation import evaluate

ROOT = Path(__file__).parents[2]
HELPERS = ROOT / "tests" / "helpers"


class Sweep:
    """A command of a sweep in ``folder``."""

    def __init__(self, folder, *arguments, module="sweep_app", environment=()):
        paths = [str(HELPERS), os.environ.get("PYTHONPATH", "")]
        self.folder = folder
        self.process = subprocess.Popen(
            [sys.executable, "-m", module, *arguments],
            cwd=folder,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))} | dict(environment),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            preexec_fn=default_signals,
        )

    def read_until(self, text):
        for line in self.process.stdout:
            if text in line:
                return self
        raise AssertionError(f"{text!r} never came")

    def finish(self):
        self.text = self.process.communicate(timeout=300)[0]
        self.code = self.process.returncode
        return self


def sweep(folder, *arguments, **more):
    return Sweep(folder, "-m", "output=out", "plans=plans", *arguments, **more)


def notes(folder, job):
    file = folder / "out" / job / "checkpoints" / "notes.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def plan(folder, **behaviours):
    (folder / "plans").mkdir(exist_ok=True)
    for kind, behaviour in behaviours.items():
        (folder / "plans" / kind).write_text(behaviour)


def alive(pid):
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def wait_for(condition, what):
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.1)


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    """Three jobs, two at a time, of which the second fails."""
    folder = tmp_path_factory.mktemp("sweep")
    plan(folder, b="fail")
    return sweep(folder, "kind=a,b,c", "hydra.launcher.jobs=2").finish()


@pytest.fixture(scope="module")
def again(first):
    """The same command, from elsewhere, with the cause of the failure gone."""
    plan(first.folder, b="")
    return sweep(first.folder, "kind=a,b,c", f"output={first.folder / 'out'}").finish()


def test_each_job_is_a_process_and_a_folder_of_its_own(first):
    pids = {notes(first.folder, f"kind={kind}")[0]["pid"] for kind in "abc"}
    assert len(pids) == 3
    assert first.process.pid not in pids
    for kind in "abc":
        config = notes(first.folder, f"kind={kind}")[0]["config"]
        assert config["kind"] == kind
        folder = first.folder / "out" / f"kind={kind}"
        assert config["trainer"]["default_local_dir"] == str(folder / "checkpoints")
        assert config["trainer"]["experiment_name"] == f"app-kind={kind}"
        assert yaml.safe_load((folder / ".hydra" / "config.yaml").read_text())["kind"] == kind


def test_a_failure_is_reported_and_ends_no_other_job(first):
    assert first.code == 1
    assert "kind=b: ended with exit code 1" in first.text
    assert re.search(r"the end of \S+/out/kind=b/train-0.log:\n(.*\n)*.*as it was told", first.text)
    assert "2 finished, 1 failed, 0 to be run" in first.text
    assert "the results: cppo-verl table 'out'\n" in first.text


def test_the_same_command_runs_what_failed_and_nothing_else(first, again):
    assert again.code == 0, again.text
    assert "3 jobs in out, 2 of them finished before" in again.text
    assert [len(notes(again.folder, f"kind={kind}")) for kind in "abc"] == [1, 2, 1]
    # the failed attempt's log is kept
    assert "as it was told" in (again.folder / "out" / "kind=b" / "train-0.log").read_text()
    assert (again.folder / "out" / "kind=b" / "train-1.log").exists()


def test_odd_values_reach_the_jobs_unchanged(tmp_path):
    odd = ["/a b/c.parquet", "[1, [x, 2]]", "'it is, \"so\"'", "{a: {b: 1e-6}}", "null", "'null'"]
    result = sweep(tmp_path, f"value={','.join(odd)}", "seed=7", "hydra.launcher.jobs=3").finish()
    assert result.code == 0, result.text
    folders = [path.parent for path in (tmp_path / "out").glob(f"*/{RECORD}")]
    values = [notes(tmp_path, folder.name)[0]["config"]["value"] for folder in folders]
    want = ["/a b/c.parquet", [1, ["x", 2]], 'it is, "so"', {"a": {"b": 1e-6}}, None, "null"]
    assert sorted(map(repr, values)) == sorted(map(repr, want))
    assert {notes(tmp_path, folder.name)[0]["config"]["seed"] for folder in folders} == {7}
    assert all(re.fullmatch(r"value=[\w.,=+-]+", folder.name) for folder in folders)


def test_a_killed_sweep_takes_its_job_along_and_goes_on(tmp_path):
    plan(tmp_path, b="wait")
    command = ["kind=a,b,c"]
    killed = sweep(tmp_path, *command)
    wait_for(lambda: notes(tmp_path, "kind=b"), "the second job never started")
    killed.process.kill()
    child = notes(tmp_path, "kind=b")[0]["pid"]
    killed.finish()
    wait_for(lambda: not alive(child), "the trainer has outlived its sweep")
    plan(tmp_path, b="")
    resumed = sweep(tmp_path, *command).finish()
    assert resumed.code == 0, resumed.text
    assert [len(notes(tmp_path, f"kind={kind}")) for kind in "abc"] == [1, 2, 1]
    assert "1 of them finished before" in resumed.text


def test_a_trainer_that_its_sweep_has_left_behind_is_waited_for(tmp_path):
    plan(tmp_path, a="linger")
    killed = sweep(tmp_path, "kind=a,b")
    wait_for(lambda: notes(tmp_path, "kind=a"), "the first job never started")
    killed.process.kill()
    resumed = sweep(tmp_path, "kind=a,b").read_until("kind=a: another process still runs it")
    assert len(notes(tmp_path, "kind=a")) == 1
    plan(tmp_path, a="")
    assert resumed.finish().code == 0, resumed.text
    # how it ended nobody has seen, so that it is run once more
    assert [len(notes(tmp_path, f"kind={kind}")) for kind in "ab"] == [2, 1]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_the_jobs_in_order_and_starts_no_other(tmp_path, number, code):
    plan(tmp_path, a="wait", b="wait")
    result = sweep(tmp_path, "kind=a,b,c", "hydra.launcher.jobs=2")
    wait_for(lambda: notes(tmp_path, "kind=a") and notes(tmp_path, "kind=b"), "the jobs never started")
    result.process.send_signal(number)
    result.finish()
    assert result.code == code, result.text
    assert "0 finished, 0 failed, 3 to be run\n" in result.text
    assert "the same command runs what has not finished" in result.text
    assert notes(tmp_path, "kind=c") == []
    for kind in "ab":
        # SIGTERM lets a trainer end its step, Ctrl-C does not
        stopped = (tmp_path / "out" / f"kind={kind}" / "checkpoints" / "stopped").exists()
        assert stopped == (number == signal.SIGTERM)
        assert read_record(tmp_path / "out" / f"kind={kind}")["exit_code"] == (143 if stopped else None)
        assert not alive(notes(tmp_path, f"kind={kind}")[0]["pid"])


def test_a_signal_reaches_a_job_that_is_only_starting(tmp_path):
    plan(tmp_path, a="wait")
    result = sweep(tmp_path, "kind=a,b").read_until("kind=a: started")
    result.process.send_signal(signal.SIGTERM)
    assert result.finish().code == 143, result.text
    assert (tmp_path / "out" / "kind=a" / "checkpoints" / "stopped").read_text() == "SIGTERM"
    assert notes(tmp_path, "kind=b") == []


def test_a_damaged_record_stops_the_sweep_with_the_files_name(tmp_path):
    folder = tmp_path / "out" / "kind=a"
    folder.mkdir(parents=True)
    (folder / RECORD).write_text('{"command": ["sweep_a')
    result = sweep(tmp_path, "kind=a,b").finish()
    assert result.code == 1
    assert f"{folder / RECORD} is damaged" in result.text
    assert "Traceback" not in result.text
    assert not (tmp_path / "out" / "kind=b").exists()


@pytest.mark.parametrize("output", [[], ["output=a,b"]])
def test_a_sweep_without_one_folder_is_told_how_to_name_it(tmp_path, output):
    result = Sweep(tmp_path, "-m", "seed=1,2", *output).finish()
    assert result.code == 1
    assert "hydra.sweep.dir=${output} leads to no folder: give what it refers to one value" in result.text
    assert "Traceback" not in result.text
    # as the message says
    named = Sweep(tmp_path, "-m", "seed=1", "output='a,b'").finish()
    assert named.code == 0 and (tmp_path / "a,b" / "run" / RECORD).exists(), named.text


def test_hydras_basic_launcher_is_refused_before_ray_starts_with_the_overrides_to_add(tmp_path):
    command = ["-m", *GRPO, "+method=cppo,dppo", f"hydra.sweep.dir={tmp_path / 'out'}"]
    result = Sweep(tmp_path, *command, module="verl.trainer.main_ppo").finish()
    assert result.code == 1
    assert "add hydra/launcher=processes hydra.sweep.dir=FOLDER" in result.text
    assert "ray init kwargs" not in result.text
    assert "Started a local Ray instance" not in result.text


def test_a_jobs_checkpoint_can_be_evaluated(tmp_path):
    checkpoint = tmp_path / "method=cppo,seed=1" / "checkpoints" / "global_step_2"
    args = argparse.Namespace(checkpoint=checkpoint, samples=4, temperature=1.0, top_p=1.0)
    parsed = OverridesParser.create().parse_overrides(evaluate.overrides(args, checkpoint.parent))
    assert not any(override.is_sweep_override() for override in parsed)
    linked = checkpoint.parent / "checkpoint" / "global_step_2"
    assert str(linked) in [override.value() for override in parsed]


@pytest.mark.parametrize(("name", "jobs"), [("seeds", 3), ("methods", 7), ("delta_b_w_min", 9)])
def test_every_named_sweep_is_one_of_runs_that_compose(name, jobs):
    recipe = ["data_dir=/data", "output=/runs", "scale=qwen3_1.7b_base"]
    with initialize_config_dir(str(ROOT / "recipes"), version_base=None):
        config = compose("paper", [*recipe, f"+sweep={name}"], return_hydra_config=True)
        assert config.hydra.mode == RunMode.MULTIRUN
        assert config.hydra.launcher._target_.endswith(".Processes")
        params = [f"{key}={value}" for key, value in config.hydra.sweeper.params.items()]
        (found,) = BasicSweeper.split_arguments(OverridesParser.create().parse_overrides(params), None)
        assert len(set(map(tuple, found))) == jobs
        last = compose("paper", [*recipe, *found[-1]], return_hydra_config=True)
    for override in found[-1]:
        key, _, value = override.partition("=")
        assert str(last.hydra.runtime.choices.get(key, OmegaConf.select(last, key))) == value
    omega_conf_to_dataclass(last.actor_rollout_ref.actor)


def test_every_named_sweep_is_tested():
    names = {path.stem for path in (ROOT / "recipes" / "sweep").iterdir()}
    assert names == {"seeds", "methods", "delta_b_w_min", "slurm"}


def test_a_recipes_job_on_slurm_composes_and_may_start_ray(monkeypatch):
    monkeypatch.setenv("JOB_FOLDER", "/runs/method=dppo")
    command = ["data_dir=/data", "scale=qwen3_1.7b_base", "method=dppo", "+sweep=slurm", "hydra.sweep.dir=/runs"]
    with initialize_config_dir(str(ROOT / "recipes"), version_base=None):
        slurm, basic = (
            compose("paper", [*command, f"hydra/launcher={name}"], return_hydra_config=True)
            for name in ("submitit_slurm", "basic")
        )
    assert slurm.trainer.default_local_dir == "/runs/method=dppo/checkpoints"
    assert slurm.hydra.sweep.subdir == "method=dppo"
    assert slurm.hydra.launcher._target_.endswith(".SlurmLauncher")
    monkeypatch.setattr(HydraConfig.instance(), "cfg", slurm)
    omega_conf_to_dataclass(slurm.actor_rollout_ref.actor)
    monkeypatch.setattr(HydraConfig.instance(), "cfg", basic)
    with pytest.raises(Exception, match="in one process, where verl starts Ray once"):
        omega_conf_to_dataclass(basic.actor_rollout_ref.actor)


def test_submitit_runs_each_job_in_a_process_and_a_folder_of_its_own(tmp_path):
    command = ["--config-dir", str(ROOT / "recipes"), "-m", "+sweep=slurm", "hydra/launcher=submitit_local"]
    result = Sweep(tmp_path, *command, "hydra.sweep.dir=out", "kind=a,b", "seed=7").finish()
    assert result.code == 0, result.text
    (a,), (b,) = (notes(tmp_path, f"kind={kind},seed=7") for kind in "ab")
    assert len({a["pid"], b["pid"], result.process.pid}) == 3
    assert [a["config"]["kind"], b["config"]["kind"]] == ["a", "b"]
    assert a["config"]["trainer"]["default_local_dir"] == str(tmp_path / "out" / "kind=a,seed=7" / "checkpoints")


@pytest.mark.parametrize(
    ("folder", "name", "arguments"),
    [
        ("examples/quickstart", "quickstart", []),
        ("recipes", "paper", ["data_dir=/data", "scale=qwen3_1.7b_base"]),
    ],
)
def test_one_seed_sets_all_of_verls_that_a_run_uses(folder, name, arguments):
    with initialize_config_dir(str(ROOT / folder), version_base=None):
        config = compose(name, [*arguments, "output=/runs", "seed=7"])
    actor = config.actor_rollout_ref.actor
    assert {
        config.data.seed,
        actor.data_loader_seed,
        actor.fsdp_config.seed,
        config.actor_rollout_ref.rollout.seed,
    } == {7}
