"""What the launcher `processes` makes of a sweep's overrides; tests/integration/test_sweep.py runs sweeps."""

import re
from pathlib import Path

import pytest
from hydra.core.plugins import Plugins
from hydra.plugins.launcher import Launcher
from hydra.plugins.search_path_plugin import SearchPathPlugin
from omegaconf import OmegaConf

from cppo_verl.launch.hydra_launcher import Job, check, identity

ROOT = Path(__file__).parents[3]


def test_hydra_finds_launcher_and_config_groups_by_itself():
    found = {
        kind: {f"{plugin.__module__}.{plugin.__name__}" for plugin in Plugins.instance().discover(kind)}
        for kind in (Launcher, SearchPathPlugin)
    }
    assert "hydra_plugins.cppo_verl.Processes" in found[Launcher]
    assert "hydra_plugins.cppo_verl.ConfigGroups" in found[SearchPathPlugin]


INTERNALS = re.compile(r"(?:from|import) hydra\._internal|sys\.modules\[.hydra|Plugins\.instance\(\)\.register")


def test_no_module_reaches_into_hydra():
    files = [*(ROOT / "cppo_verl").rglob("*.py"), ROOT / "hydra_plugins" / "cppo_verl.py"]
    found = {file.name for file in files if INTERNALS.search(file.read_text())}
    assert found == set()  # the doctor's, which composes a command line that is not its own


@pytest.mark.parametrize("jobs", [0, -1, 1.5, True, "2"])
def test_impossible_numbers_of_jobs_are_refused(jobs):
    from hydra_plugins.cppo_verl import Processes

    with pytest.raises(ValueError, match=f"hydra.launcher.jobs={jobs} is not permitted: an integer >= 1"):
        Processes(jobs=jobs)


def command(*overrides):
    return OmegaConf.create({"hydra": {"overrides": {"task": list(overrides)}, "sweep": {"dir": "out", "subdir": "0"}}})


@pytest.mark.parametrize(
    ("overrides", "job", "name"),
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
def test_a_jobs_name_is_what_it_was_swept_by(overrides, job, name):
    assert identity(command(*overrides), job)[1] == name


def test_names_of_odd_values_stay_apart_and_are_file_names():
    values = ["/data/a", "_data_a", "'/data/a'", "x" * 300, "x" * 301, "[1,2]", "ü/.."]
    names = [identity(command(), [f"value={value}"])[1] for value in values]
    assert len(set(names)) == len(values)
    assert all(len(name) < 200 and "/" not in name for name in names)


def job(name, checkpoints):
    return Job([name], Path("/out") / name, ["module", name], [name], Path(checkpoints))


def test_jobs_that_would_share_checkpoints_are_refused():
    check(command(), [job("a", "/a"), job("b", "/b")])
    with pytest.raises(ValueError, match="a and b would share /a: let the launcher set trainer.default_local_dir"):
        check(command(), [job("a", "/a"), job("b", "/a")])


def test_a_value_that_is_swept_twice_is_named():
    with pytest.raises(ValueError, match="the sweep has a several times: give each value once"):
        check(command(), [job("a", "/a"), job("b", "/b"), job("a", "/a")])


def test_a_sweep_folder_that_changes_with_the_time_is_refused():
    config = command()
    config.hydra.sweep.dir = "multirun/${now:%Y}"
    OmegaConf.register_new_resolver("now", lambda _: "2026", replace=True)
    with pytest.raises(ValueError, match="hydra.sweep.dir=multirun/2026 changes with the time: add hydra.sweep.dir="):
        check(config, [])


@pytest.mark.parametrize("name", ["VERL_FILE_LOGGER_PATH", "TENSORBOARD_DIR"])
def test_one_place_for_the_metrics_of_all_jobs_is_refused(monkeypatch, name):
    monkeypatch.setenv(name, "/metrics")
    with pytest.raises(ValueError, match=f"{name}=/metrics would be one place for all jobs: unset {name}"):
        check(command(), [])
