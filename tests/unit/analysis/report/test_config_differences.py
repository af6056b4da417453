"""The settings in which runs differ."""

from report_runs import make, read

from cppo_verl.analysis.report.config_differences import overrides, settings
from cppo_verl.analysis.report.page import page_values


def test_configs_differ_where_they_differ(tmp_path, monkeypatch):
    monkeypatch.setenv("SECRET", "hunter2")
    more = "key: ${oc.env:SECRET}\nspaced: '${ oc.env:SECRET}'\nvia: ${key}\nhere: ${now:%Y}\nself: {a: '${self}'}\n"
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
