"""What compared runs differ in beside their method, named above the numbers of `table` and `report`."""

import json

import pytest
from omegaconf import OmegaConf
from run_folders import validation, write

from cppo_verl.artifacts.run_reader import read_run
from cppo_verl.cli import main
from cppo_verl.evaluation.comparability import BESIDE_THE_METHOD, unequal

SAVED = {
    "place": "${oc.env:HOME}/data",
    "data": {"train_files": "${place}/train.parquet", "train_batch_size": 64, "seed": 1},
    "reward": {"custom_reward_function": {"name": "math_verify"}},
    "actor_rollout_ref": {"actor": {"loss_agg_mode": "token-mean", "policy_loss": {"delta": 0.15}}},
}


def make(folder, **changed):
    """A run's folder with one validation and a saved config, in which dotted keys are changed."""
    config = OmegaConf.create(SAVED)
    for key, value in changed.items():
        OmegaConf.update(config, key, value)
    write(folder / "metrics-0.jsonl", validation(10, aime24=0.25), json.dumps({"step": 11, "data": {"x": 1.0}}))
    write(folder / "hydra" / "hydra.yaml", f"hydra: {{runtime: {{choices: {{method: {folder.name}}}}}}}")
    write(folder / "hydra" / "config.yaml", OmegaConf.to_yaml(config))
    return folder


def test_runs_that_differ_in_their_method_and_seed_alone_are_equal(tmp_path):
    rule = "actor_rollout_ref.actor.policy_loss"
    folders = [make(tmp_path / "cppo"), make(tmp_path / "dppo", **{f"{rule}.delta": 0.2, "data.seed": 2})]
    assert unequal([read_run(folder) for folder in folders]) == []


@pytest.mark.parametrize("what", BESIDE_THE_METHOD)
def test_each_other_setting_is_named_with_its_values(tmp_path, what):
    for key in BESIDE_THE_METHOD[what]:
        folders = [make(tmp_path / "cppo", **{key: "one"}), make(tmp_path / "dppo", **{key: "other"})]
        (line,) = unequal([read_run(folder) for folder in folders])
        assert line == f"the runs differ in more than the method, {what}: {key} is one in cppo; other in dppo"


def test_the_readers_environment_is_not_shown_and_a_damaged_config_is_left_out(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/hunter2")
    folders = [make(tmp_path / "cppo"), make(tmp_path / "dppo", place="/d"), make(tmp_path / "cut")]
    write(folders[2] / "hydra" / "config.yaml", "data: {train_files: [")
    (line,) = unequal([read_run(folder) for folder in folders])
    files = "${place}/train.parquet in cppo; /d/train.parquet in dppo"
    assert line == f"the runs differ in more than the method, prompts: data.train_files is {files}"


def test_table_and_report_say_so_above_their_numbers(tmp_path, capsys):
    names = ("reward.custom_reward_function.name", "math_dapo")
    folders = [str(make(tmp_path / "cppo")), str(make(tmp_path / "dppo", **dict([names])))]
    said = f"reward: {names[0]} is math_verify in cppo; math_dapo in dppo"
    assert main(["table", *folders]) == 0
    out, err = capsys.readouterr()
    assert said in out.splitlines()[0] and said not in err
    assert main(["table", *folders, "--format", "csv"]) == 0
    out, err = capsys.readouterr()
    assert out.startswith("method,") and said in err
    assert main(["report", *folders, "--output", str(tmp_path / "report.html")]) == 0
    page = (tmp_path / "report.html").read_text()
    assert page.index(said) < page.index("<table")
