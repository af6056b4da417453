"""The rows and files of a reasoning-gym task, and their split."""

import json

import datasets
import pandas
import pytest

from cppo_verl.data.reasoning_gym import write_parquet

SORT = dict(min_numbers=3, max_numbers=3, min_decimals=0, max_decimals=0, min_value=10, max_value=99)


def test_rows_have_verls_schema_and_their_problem_as_json(tmp_path):
    train, validation = write_parquet("number_sorting", tmp_path, train_size=20, validation_size=5, **SORT)
    for path, split, size in ((train, "train", 20), (validation, "validation", 5)):
        rows = datasets.Dataset.from_parquet(str(path), cache_dir=str(tmp_path / "cache"))
        assert len(rows) == size
        for index, row in enumerate(rows):
            assert set(row) == {"data_source", "prompt", "ability", "reward_model", "extra_info"}
            assert row["data_source"] == "reasoning_gym/number_sorting"
            assert [message["role"] for message in row["prompt"]] == ["user"]
            assert row["reward_model"]["style"] == "rule"
            assert (row["extra_info"]["split"], row["extra_info"]["index"]) == (split, index)
            entry = json.loads(row["extra_info"]["entry"])
            assert entry["question"] == row["prompt"][0]["content"]
            assert entry["answer"] == row["reward_model"]["ground_truth"]


def test_validation_is_held_out_and_reproducible(tmp_path):
    """Two numbers out of twelve: most training problems come up in validation too."""
    narrow = dict(SORT, min_numbers=2, max_numbers=2, max_value=21)
    questions = {}
    for folder in ("a", "b"):
        paths = write_parquet(
            "number_sorting", tmp_path / folder, train_size=400, validation_size=100, seed=3, **narrow
        )
        questions[folder] = [[p[0]["content"] for p in pandas.read_parquet(path)["prompt"]] for path in paths]
    train, validation = questions["a"]
    assert questions["a"] == questions["b"]
    assert not set(train) & set(validation)
    assert 0 < len(train) < 400 and len(validation) == 100


def test_a_task_without_training_problems_is_refused(tmp_path):
    narrow = dict(SORT, min_numbers=1, max_numbers=1, min_value=10, max_value=10.5)
    with pytest.raises(ValueError, match="number_sorting"):
        write_parquet("number_sorting", tmp_path, train_size=4, validation_size=20, **narrow)


def test_a_failed_write_keeps_the_old_files(tmp_path, monkeypatch):
    train, _ = write_parquet("number_sorting", tmp_path, train_size=3, validation_size=1, **SORT)
    before = train.read_bytes()

    def half(self, path, **kwargs):
        with open(path, "wb") as file:
            file.write(b"PAR1")
        raise OSError("disk full")

    monkeypatch.setattr(pandas.DataFrame, "to_parquet", half)
    with pytest.raises(OSError, match="disk full"):
        write_parquet("number_sorting", tmp_path, train_size=30, validation_size=1, **SORT)
    assert train.read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["train.parquet", "validation.parquet"]


def test_an_unknown_task_and_an_impossible_size_are_refused(tmp_path):
    with pytest.raises(ValueError, match="no_such_task"):
        write_parquet("no_such_task", tmp_path, train_size=1, validation_size=1)
    with pytest.raises(ValueError, match="train_size=0"):
        write_parquet("number_sorting", tmp_path, train_size=0, validation_size=1)
