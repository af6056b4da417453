"""The settings in which runs differ."""

from pathlib import Path

from report_runs import make, read

from cppo_verl.analysis.report.config_differences import overrides, settings
from cppo_verl.analysis.report.page import page_values
from cppo_verl.analysis.report.runs import lines, reported


def test_configs_differ_where_they_differ(tmp_path, monkeypatch):
    monkeypatch.setenv("SECRET", "hunter2")
    more = "key: ${oc.env:SECRET}\nvia: ${key}\nhere: ${now:%Y}\nself: {a: '${self}'}\n"
    more += "name: oc.env\nodd: '${${name}:SECRET}'\nblank: '${ oc.env:SECRET}'\nunset: '${oc.env:NOWHERE}'\n"
    runs = read(
        make(tmp_path / "a", "cppo", 1, config=more + "lists: {x: [1, 2], y: null}\nonly: {there: true}"),
        make(tmp_path / "b", "dppo", 2, config=more + "lists: {x: [1, 3], y: null}", budget=False),
    )
    flat = [settings(run) for run in runs]
    assert flat[0]["trainer.default_local_dir"] == "<run>/c"
    assert flat[0]["key"] == flat[0]["via"] == "${oc.env:SECRET}" and flat[0]["here"] == "${now:%Y}"
    assert "hunter2" not in str(flat)
    table = page_values(runs)["differences"]
    assert table.header == ["setting", "cppo", "dppo"]
    assert table.rows == [
        ["actor_rollout_ref.actor.policy_loss.mask", "budget", "none"],
        ["data.seed", "1", "2"],
        ["lists.x", "[1, 2]", "[1, 3]"],
        ["only.there", "true", "–"],
    ]
    assert overrides(runs[0]) == page_values(runs[:1])["overrides"] == ["method=cppo", "data.seed=1"]


def test_runs_name_does_not_stand_for_the_values_that_look_like_it(tmp_path, monkeypatch):
    """hydra calls the runs of a sweep 0, 1, ...; no number of a run's settings is its folder."""
    monkeypatch.chdir(tmp_path)
    for seed in (0, 1):
        config = f"mine: {seed}/tokens\nlists: {{x: [{seed}/a, /b]}}\nbeside: /data/{seed}/train\nnumbers: [0, 1]"
        make(tmp_path / str(seed), seed=seed, config=config)
    runs = reported(read(Path("0"), Path("1")))
    for seed, item in enumerate(runs):
        assert item.thresholds == (0.05, 0.8) and item.has_two_constraints
        assert item.settings["output"] == "<run>" and item.settings["trainer.default_local_dir"] == "<run>/c"
        assert item.settings["mine"] == "<run>/tokens" and item.settings["lists.x"] == '["<run>/a", "/b"]'
        assert item.settings["beside"] == f"/data/{seed}/train" and item.settings["numbers"] == "[0, 1]"


def test_seeds_are_one_line_whatever_their_folders_are_called(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for seed in (0, 1):
        make(tmp_path / str(seed), seed=seed)
    (line,) = lines(reported(read(Path("."))))
    assert len(line.runs) == 2


def test_folder_whose_name_begins_like_the_runs_is_another(tmp_path):
    (run,) = read(make(tmp_path / "a", config=f"warm_start: {tmp_path}/ab/model\nown: file://{tmp_path}/a/model"))
    values = settings(run)
    assert values["warm_start"] == f"{tmp_path}/ab/model" and values["own"] == "file://<run>/model"
