"""The record of a sweep's job."""

import json

import pytest

from cppo_verl.artifacts.run_reader import read_run, read_runs
from cppo_verl.artifacts.sweep_record import RECORD, has_finished, read_record, write_record

COMMAND = ["module", "kind=a", "lr=1"]


def test_a_record_is_read_as_it_was_written(tmp_path):
    assert read_record(tmp_path) is None
    write_record(tmp_path, COMMAND, ["kind=a"], None)
    assert read_record(tmp_path) == {"command": COMMAND, "swept": ["kind=a"], "exit_code": None}


@pytest.mark.parametrize(("exit_code", "finished"), [(0, True), (1, False), (143, False), (None, False)])
def test_a_job_has_finished_when_its_command_ended_well_whatever_the_arguments_order(tmp_path, exit_code, finished):
    assert not has_finished(tmp_path / "new", COMMAND)
    write_record(tmp_path, COMMAND, ["kind=a"], exit_code)
    assert has_finished(tmp_path, COMMAND[::-1]) == finished


def test_what_an_attempt_killed_as_it_started_has_left_blocks_nothing(tmp_path):
    (tmp_path / "job.lock").touch()
    (tmp_path / f"{RECORD}.0123.tmp").write_text('{"comm')
    assert not has_finished(tmp_path, COMMAND)


def test_a_folder_that_no_sweep_has_made_is_refused(tmp_path):
    (tmp_path / "precious").touch()
    with pytest.raises(ValueError, match=f"{tmp_path} holds what no sweep has made: move it, or choose another"):
        has_finished(tmp_path, COMMAND)
    with pytest.raises(ValueError, match="is a file where a job has its folder: move it"):
        has_finished(tmp_path / "precious", COMMAND)


def test_another_commands_folder_is_refused_with_the_difference(tmp_path):
    write_record(tmp_path, COMMAND, ["kind=a"], 0)
    with pytest.raises(ValueError, match=r"run of another command \(there: lr=1; here: -\): choose another"):
        has_finished(tmp_path, COMMAND[:-1])


DAMAGED = ['{"command": ["mod', "", "[]", '{"command": []}', "\xff", "[" * 100_000]
DAMAGED += [json.dumps({"command": [], "exit_code": 0} | swept) for swept in ({"swept": [1]}, {"swept": 1})]


@pytest.mark.parametrize("text", DAMAGED)
def test_a_damaged_record_is_named_with_the_way_out(tmp_path, text):
    (tmp_path / RECORD).write_text(text, encoding="latin-1")
    with pytest.raises(ValueError, match=f"{tmp_path / RECORD} is damaged .*: move {tmp_path} away to run it anew"):
        has_finished(tmp_path, COMMAND)
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "data": {}}')
    (tmp_path / "hydra.yaml").write_text("hydra: {runtime: {choices: {method: cppo}}}")
    (tmp_path / "config.yaml").write_text("data: {seed: 3}")
    run = read_run(tmp_path)
    assert (run.label, run.seed) == ("cppo", 3) and f"{RECORD} is damaged" in run.notes[0]


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
def test_a_jobs_label_in_the_table_is_what_it_was_swept_by_but_for_the_seed(tmp_path, swept, label):
    folder = tmp_path / "sweep" / "job"
    (folder / ".hydra").mkdir(parents=True)
    (folder / ".hydra" / "hydra.yaml").write_text("hydra: {runtime: {choices: {method: cppo}}}")
    (folder / ".hydra" / "config.yaml").write_text("{seed: 3, data: {seed: '${seed}'}}")
    (folder / "metrics-0.jsonl").write_text('{"step": 0, "data": {"val-core/aime24/acc/mean@16": 0.5}}\n')
    (tmp_path / "sweep" / "multirun.yaml").write_text("{}")
    write_record(folder, [], swept, 0)
    (run,) = read_runs(tmp_path / "sweep")
    assert (run.label, run.seed, run.notes) == (label, 3, [])
    assert [run.label for run in read_runs(tmp_path / "sweep", "mine")] == ["mine"]
