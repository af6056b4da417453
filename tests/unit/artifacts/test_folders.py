"""The files of a folder of which parts are links."""

import pytest
from run_folders import validation, write

from cppo_verl.artifacts.folders import files_below
from cppo_verl.artifacts.run_reader import read_run, read_runs
from cppo_verl.artifacts.token_dump import read_tokens


def test_each_folder_is_entered_once_and_by_its_own_name(tmp_path):
    for name in ("z/deep/1.txt", "z/2.txt", "disk/3.txt", "3.other"):
        write(tmp_path / "run" / name) if name[0] != "d" else write(tmp_path / name)
    (tmp_path / "run" / "a").symlink_to(tmp_path / "run" / "z")
    (tmp_path / "run" / "z" / "up").symlink_to(tmp_path / "run")
    (tmp_path / "run" / "far").symlink_to(tmp_path / "disk")
    (tmp_path / "run" / "gone").symlink_to(tmp_path / "nowhere")
    found = [str(file.relative_to(tmp_path / "run")) for file in files_below(tmp_path / "run", "*.txt")]
    assert sorted(found) == ["far/3.txt", "z/2.txt", "z/deep/1.txt"]
    assert list(files_below(tmp_path / "nowhere", "*.txt")) == []


def test_a_run_whose_checkpoints_lie_on_another_disk_is_read_whole(tmp_path):
    run, disk = tmp_path / "run", tmp_path / "disk"
    write(disk / "metrics-0.jsonl", validation(0, aime24=0.1))
    write(disk / "validation" / "0.jsonl")
    write(run / "hydra" / "hydra.yaml", "hydra: {runtime: {choices: {method: cppo}}}")
    write(run / "hydra" / "config.yaml", "data: {seed: 3}")
    (run / "checkpoints").symlink_to(disk)
    found = read_run(run)
    assert (found.label, found.seed, found.accuracies()) == ("cppo", 3, {0: {"aime24": 0.1}})
    assert found.generations == run / "checkpoints" / "validation"


def test_a_link_to_one_of_the_runs_is_no_further_run(tmp_path):
    for seed in (1, 2):
        write(tmp_path / str(seed) / "metrics-0.jsonl", validation(0, aime24=0.1))
        write(tmp_path / str(seed) / "hydra" / "hydra.yaml", "hydra: {}")
        write(tmp_path / str(seed) / "hydra" / "config.yaml", f"data: {{seed: {seed}}}")
    (tmp_path / "0-latest").symlink_to(tmp_path / "2")
    assert [(run.path.name, run.seed) for run in read_runs(tmp_path)] == [("1", 1), ("2", 2)]


def test_a_token_dump_behind_a_link_is_found(tmp_path):
    write(tmp_path / "disk" / "tokens" / "step-1.parquet")  # damaged, which a note says
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoints").symlink_to(tmp_path / "disk")
    with pytest.raises(FileNotFoundError, match="no token dump at"):
        read_tokens(tmp_path / "nowhere")
    assert "not readable, skipped" in read_tokens(tmp_path / "run").notes[0]
