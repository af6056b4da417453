"""The launcher `processes` with a small hydra application in the trainer's place: tests/sweep_app.py."""

import argparse
import dataclasses
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import pytest
import yaml
from commands import GRPO
from hydra import compose, initialize_config_dir
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import CompactHydraException
from hydra.types import RunMode
from omegaconf import OmegaConf
from verl.utils.config import omega_conf_to_dataclass

from cppo_verl.artifacts.run_reader import read_runs
from cppo_verl.evaluation import evaluate
from cppo_verl.launch.hydra_launcher import Processes, check_apart, check_environment, folder_name
from cppo_verl.launch.sweep_job import RECORD, Occupied, Point, has_finished, write_record

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
        )

    def finish(self):
        self.text = self.process.communicate(timeout=300)[0]
        self.code = self.process.returncode
        return self


def sweep(folder, *arguments, **more):
    return Sweep(folder, "-m", "output=out", "plans=plans", *arguments, **more)


def notes(folder, point):
    file = folder / "out" / point / "checkpoints" / "notes.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def plan(folder, **behaviours):
    (folder / "plans").mkdir(exist_ok=True)
    for kind, behaviour in behaviours.items():
        (folder / "plans" / kind).write_text(behaviour)


def wait_for(condition, what, seconds=120):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.1)


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    """Three points, two at a time, of which the second fails."""
    folder = tmp_path_factory.mktemp("sweep")
    plan(folder, b="fail")
    return sweep(folder, "kind=a,b,c", "hydra.launcher.jobs=2").finish()


@pytest.fixture(scope="module")
def again(first):
    """The same command, from elsewhere, with the cause of the failure gone."""
    plan(first.folder, b="")
    return sweep(first.folder, "kind=a,b,c", f"output={first.folder / 'out'}").finish()


@pytest.mark.process
def test_each_point_is_a_process_and_a_folder_of_its_own(first):
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


@pytest.mark.process
def test_a_failure_is_reported_and_ends_no_other_point(first):
    assert first.code == 1
    assert re.search(
        r"kind=b: failed with exit code 1; the end of out/kind=b/train-0.log:\n(.*\n)*.*as it was told", first.text
    )
    assert "2 finished, 1 failed, 0 to be run" in first.text
    assert "the results: python -m cppo_verl table out\n" in first.text


@pytest.mark.process
def test_the_same_command_runs_what_failed_and_nothing_else(first, again):
    assert again.code == 0, again.text
    assert "3 points in out, 2 of them finished before" in again.text
    assert [len(notes(again.folder, f"kind={kind}")) for kind in "abc"] == [1, 2, 1]
    # the failed attempt's log is kept
    assert "as it was told" in (again.folder / "out" / "kind=b" / "train-0.log").read_text()
    assert (again.folder / "out" / "kind=b" / "train-1.log").exists()


@pytest.mark.process
def test_odd_values_reach_the_points_unchanged(tmp_path):
    odd = ["/a b/c.parquet", "[1, [x, 2]]", "'it is, \"so\"'", "{a: {b: 1e-6}}", "null", "'null'"]
    result = sweep(tmp_path, f"value={','.join(odd)}", "seed=7", "hydra.launcher.jobs=3").finish()
    assert result.code == 0, result.text
    folders = [path.parent for path in (tmp_path / "out").glob(f"*/{RECORD}")]
    values = [notes(tmp_path, folder.name)[0]["config"]["value"] for folder in folders]
    want = ["/a b/c.parquet", [1, ["x", 2]], 'it is, "so"', {"a": {"b": 1e-6}}, None, "null"]
    assert sorted(map(repr, values)) == sorted(map(repr, want))
    assert {notes(tmp_path, folder.name)[0]["config"]["seed"] for folder in folders} == {7}
    assert all(re.fullmatch(r"value=[\w.,=+-]+", folder.name) for folder in folders)


@pytest.mark.process
def test_a_killed_sweep_takes_its_point_along_and_goes_on(tmp_path):
    plan(tmp_path, b="wait")
    command = ["kind=a,b,c"]
    killed = sweep(tmp_path, *command)
    wait_for(lambda: notes(tmp_path, "kind=b"), "the second point never started")
    killed.process.kill()
    child = notes(tmp_path, "kind=b")[0]["pid"]
    assert "kind=b: SIGTERM" in killed.finish().text  # its trainer has ended as it was asked to
    plan(tmp_path, b="")
    resumed = sweep(tmp_path, *command).finish()
    assert resumed.code == 0, resumed.text
    assert not psutil.pid_exists(child)
    assert [len(notes(tmp_path, f"kind={kind}")) for kind in "abc"] == [1, 2, 1]
    assert "1 of them finished before" in resumed.text


@pytest.mark.process
def test_a_trainer_that_its_sweep_has_left_behind_is_waited_for(tmp_path):
    plan(tmp_path, a="wait")
    killed = sweep(tmp_path, "kind=a,b")
    wait_for(lambda: notes(tmp_path, "kind=a"), "the first point never started")
    for process in [*psutil.Process(killed.process.pid).children(), killed.process]:
        process.kill()
    resumed = sweep(tmp_path, "kind=a,b")
    for line in resumed.process.stdout:
        if "kind=a: another process still runs it" in line:
            break
    assert len(notes(tmp_path, "kind=a")) == 1
    plan(tmp_path, a="")
    assert resumed.finish().code == 0, resumed.text
    # how it ended nobody has seen, so that it is run once more
    assert [len(notes(tmp_path, f"kind={kind}")) for kind in "ab"] == [2, 1]


@pytest.mark.process
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_the_points_in_order_and_starts_no_other(tmp_path, number, code):
    plan(tmp_path, a="wait", b="wait")
    result = sweep(tmp_path, "kind=a,b,c", "hydra.launcher.jobs=2")
    wait_for(lambda: notes(tmp_path, "kind=a") and notes(tmp_path, "kind=b"), "the points never started")
    result.process.send_signal(number)
    result.finish()
    assert result.code == code, result.text
    assert "0 finished, 0 failed, 3 to be run\n" in result.text
    assert "the same command runs these" in result.text
    assert notes(tmp_path, "kind=c") == []
    for kind in "ab":
        # SIGTERM lets a trainer end its step, Ctrl-C does not
        stopped = (tmp_path / "out" / f"kind={kind}" / "checkpoints" / "stopped").exists()
        assert stopped == (number == signal.SIGTERM)
        assert json.loads((tmp_path / "out" / f"kind={kind}" / RECORD).read_text())["exit_code"] == code
        assert not psutil.pid_exists(notes(tmp_path, f"kind={kind}")[0]["pid"])


@pytest.fixture
def cluster(tmp_path, monkeypatch):
    """Address of a Ray cluster of this machine's, outside of the tests' own processes."""
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "0" * 64)
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(HELPERS), os.environ.get("PYTHONPATH", "")])))
    command = ["ray", "start", "--head", "--block", "--num-cpus=2", "--port=0", f"--dashboard-port={free_port()}"]
    folder = tempfile.mkdtemp(dir="/tmp")  # pytest's own are too long for the paths of Ray's sockets
    command += ["--dashboard-host=127.0.0.1", f"--temp-dir={folder}", "--disable-usage-stats"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    for line in process.stdout:
        if "Ray runtime started" in line:
            break
    yield f"http://127.0.0.1:{command[6].partition('=')[2]}"
    process.terminate()
    process.communicate(timeout=60)
    shutil.rmtree(folder)


def free_port():
    with socket.socket() as connection:
        connection.bind(("127.0.0.1", 0))
        return connection.getsockname()[1]


@pytest.mark.process
def test_points_are_jobs_of_a_shared_cluster_and_found_again(tmp_path, cluster):
    plan(tmp_path, b="wait")
    plans = f"plans={tmp_path / 'plans'}"
    command = ["kind=a,b", f"hydra.launcher.address={cluster}", plans]
    killed = sweep(tmp_path, *command)
    wait_for(lambda: notes(tmp_path, "kind=b"), "the second point never started")
    for process in [*psutil.Process(killed.process.pid).children(), killed.process]:
        process.kill()
    plan(tmp_path, b="")
    resumed = sweep(tmp_path, *command).finish()
    assert resumed.code == 0, resumed.text
    # each ran once: the job that the killed sweep has left behind was followed to its end
    jobs = set()
    for kind in "ab":
        assert len(notes(tmp_path, f"kind={kind}")) == 1
        jobs.add(json.loads((tmp_path / "out" / f"kind={kind}" / RECORD).read_text())["job"])
    assert len(jobs) == 2
    assert "Running entrypoint for job" in (tmp_path / "out" / "kind=a" / "train-0.log").read_text()


@pytest.mark.process
def test_an_address_without_a_cluster_stops_the_sweep_once(tmp_path):
    result = sweep(tmp_path, "kind=a,b", f"hydra.launcher.address=http://127.0.0.1:{free_port()}").finish()
    assert result.code == 1
    assert len(re.findall("hydra.launcher.address=http.*Failed to connect to Ray", result.text)) == 1
    assert "started" not in result.text


@pytest.mark.process
def test_hydras_basic_launcher_is_refused_before_ray_starts_with_the_overrides_to_add(tmp_path):
    command = ["-m", *GRPO, "+method=cppo,dppo", f"hydra.sweep.dir={tmp_path / 'out'}"]
    result = Sweep(tmp_path, *command, module="verl.trainer.main_ppo").finish()
    assert result.code == 1
    assert "add hydra/launcher=processes hydra.sweep.dir=FOLDER" in result.text
    assert "ray init kwargs" not in result.text
    assert "Started a local Ray instance" not in result.text


def launcher(*command):
    result = Processes(jobs=1, address=None, point_overrides=OmegaConf.create())
    result.config = OmegaConf.create({"hydra": {"overrides": {"task": list(command)}}})
    return result


@pytest.mark.parametrize(
    ("command", "point", "name"),
    [
        (["output=/a/b", "+method=a,b", "seed=1,2"], ["output=/a/b", "+method=a", "seed=2"], "method=a,seed=2"),
        # whatever their order, and whether they came from a sweep file
        (["seed=1,2"], ["seed=1", "method=a"], "method=a,seed=1"),
        (["x.delta_b=1,2"], ["x.delta_b=1", "y.w_min=1e-6"], "delta_b=1,w_min=1e-6"),
        (["a.lr=1,2", "b.lr=1,2"], ["a.lr=1", "b.lr=2"], "a.lr=1,b.lr=2"),
        (["optim@actor.optim=a,b"], ["optim@actor.optim=a"], "optim=a"),
        (["method=a"], ["method=a"], "run"),
    ],
)
def test_a_points_name_is_what_it_was_swept_by(command, point, name):
    assert folder_name(launcher(*command).swept(point)) == name


def test_names_of_odd_values_stay_apart_and_are_file_names():
    values = ["/data/a", "_data_a", "'/data/a'", "x" * 300, "x" * 301, "[1,2]", "ü/.."]
    names = [folder_name([f"value={value}"]) for value in values]
    assert len(set(names)) == len(values)
    assert all(len(name) < 200 and "/" not in name for name in names)


def point(folder, *arguments):
    return Point("kind=a", ["kind=a"], str(folder), ["module", "kind=a", *arguments], [], str(folder / "checkpoints"))


def test_what_a_folder_holds_of_others_is_refused(tmp_path):
    assert not has_finished(point(tmp_path / "new"))
    (tmp_path / "point.lock").touch()  # all that an attempt killed at its very start has left
    assert not has_finished(point(tmp_path))
    (tmp_path / "precious").touch()
    with pytest.raises(Occupied, match="holds something that no sweep has made: move it"):
        has_finished(point(tmp_path))
    write_record(tmp_path, {"command": ["module", "kind=a", "lr=1"], "swept": ["kind=a"], "exit_code": 0})
    assert has_finished(point(tmp_path, "lr=1"))
    with pytest.raises(Occupied, match=r"run of another command \(there: lr=1; here: -\): choose another"):
        has_finished(point(tmp_path))


def test_points_that_would_share_checkpoints_are_refused(tmp_path):
    a, b = point(tmp_path / "a"), point(tmp_path / "b")
    check_apart([a, b])
    with pytest.raises(CompactHydraException, match="would share the checkpoints .*hydra.launcher.point_overrides"):
        check_apart([a, dataclasses.replace(b, checkpoints=a.checkpoints)])


def test_one_place_for_all_points_or_another_each_time_is_refused(monkeypatch):
    config = OmegaConf.create({"hydra": {"sweep": {"dir": "out"}}})
    check_environment(config)
    with pytest.raises(CompactHydraException, match=r"hydra.sweep.dir=multirun/\$.* add hydra.sweep.dir=FOLDER"):
        check_environment(OmegaConf.create({"hydra": {"sweep": {"dir": "multirun/${now:%Y}"}}}))
    monkeypatch.setenv("VERL_FILE_LOGGER_PATH", "metrics.jsonl")
    with pytest.raises(CompactHydraException, match="VERL_FILE_LOGGER_PATH=metrics.jsonl .*: unset VERL_FILE"):
        check_environment(config)


def test_a_points_checkpoint_can_be_evaluated(tmp_path):
    checkpoint = tmp_path / "method=cppo,seed=1" / "checkpoints" / "global_step_2"
    args = argparse.Namespace(checkpoint=checkpoint, samples=4, temperature=1.0, top_p=1.0)
    parsed = OverridesParser.create().parse_overrides(evaluate.overrides(args, checkpoint.parent))
    assert not any(override.is_sweep_override() for override in parsed)
    assert str(checkpoint) in [override.value() for override in parsed]


@pytest.mark.parametrize("jobs", [0, -1, 1.5, True, "2"])
def test_impossible_numbers_of_jobs_are_refused(jobs):
    with pytest.raises(ValueError, match=f"hydra.launcher.jobs={jobs} is not permitted"):
        Processes(jobs=jobs, address=None, point_overrides=OmegaConf.create())


@pytest.mark.process
@pytest.mark.parametrize(("name", "points"), [("seeds", 3), ("methods", 7), ("delta_b_w_min", 9)])
def test_every_named_sweep_is_one_of_runs_that_compose(name, points):
    recipe = ["data_dir=/data", "output=/runs", "scale=qwen3_1.7b_base"]
    with initialize_config_dir(str(ROOT / "recipes"), version_base=None):
        config = compose("paper", [*recipe, f"+sweep={name}"], return_hydra_config=True)
        assert config.hydra.mode == RunMode.MULTIRUN
        assert config.hydra.launcher._target_.endswith(".Processes")
        params = [f"{key}={value}" for key, value in config.hydra.sweeper.params.items()]
        (found,) = BasicSweeper.split_arguments(OverridesParser.create().parse_overrides(params), None)
        assert len(set(map(tuple, found))) == points
        last = compose("paper", [*recipe, *found[-1]], return_hydra_config=True)
    for override in found[-1]:
        key, _, value = override.partition("=")
        assert str(last.hydra.runtime.choices.get(key, OmegaConf.select(last, key))) == value
    omega_conf_to_dataclass(last.actor_rollout_ref.actor)


def test_every_named_sweep_is_tested():
    assert {path.stem for path in (ROOT / "recipes" / "sweep").iterdir()} == {"seeds", "methods", "delta_b_w_min"}


@pytest.mark.process
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


@pytest.mark.parametrize(
    ("swept", "label"),
    [
        (["method=dppo", "seed=1"], "dppo"),
        (["delta_b=0.02", "seed=1", "w_min=0.8"], "delta_b=0.02,w_min=0.8"),
        (["delta_b=0.02", "method=dppo"], "delta_b=0.02,dppo"),
        (["seed=1"], "cppo"),  # hydra's choice
        ([], "cppo"),
    ],
)
def test_a_points_label_in_the_table_is_what_it_was_swept_by_but_for_the_seed(tmp_path, swept, label):
    folder = tmp_path / "sweep" / "point"
    (folder / ".hydra").mkdir(parents=True)
    (folder / ".hydra" / "hydra.yaml").write_text("hydra: {runtime: {choices: {method: cppo}}}")
    (folder / ".hydra" / "config.yaml").write_text("{seed: 3, data: {seed: '${seed}'}}")
    (folder / "metrics-0.jsonl").write_text('{"step": 0, "data": {"val-core/aime24/acc/mean@16": 0.5}}\n')
    (tmp_path / "sweep" / "multirun.yaml").write_text("{}")
    write_record(folder, {"command": [], "swept": swept, "exit_code": 0})
    (run,) = read_runs(tmp_path / "sweep")
    assert (run.label, run.seed, run.notes) == (label, 3, [])
    assert [run.label for run in read_runs(tmp_path / "sweep", "mine")] == ["mine"]
