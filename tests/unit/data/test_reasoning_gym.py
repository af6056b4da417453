"""The verifier on good and bad answers; the parquet files; the split."""

import json

import pytest

pandas = pytest.importorskip("pandas")
pytest.importorskip("reasoning_gym")

from cppo_verl.data import reasoning_gym as rg  # noqa: E402

SORT = dict(min_numbers=3, max_numbers=3, min_decimals=0, max_decimals=0, min_value=10, max_value=99)


@pytest.fixture
def problem(tmp_path):
    """A function of answer: the score of one sorting problem, read back from its file."""
    _, path = rg.write_parquet("number_sorting", tmp_path, train_size=1, validation_size=1, **SORT)
    row = pandas.read_parquet(path).iloc[0]
    truth = row["reward_model"]["ground_truth"]
    return truth, lambda answer: rg.compute_score(row["data_source"], answer, truth, row["extra_info"])


def test_right_answers(problem):
    truth, score = problem
    plain = json.dumps([float(x) for x in json.loads(truth.replace("'", '"'))])
    for answer in (truth, f" {truth}\n", plain, f"Let me see: <answer>[]</answer> no, <answer>{truth}</answer>"):
        assert score(answer) == {"score": 1.0, "acc": 1.0}


@pytest.mark.parametrize(
    "answer",
    [
        "",
        "[]",
        "sorted",
        "['1', '2', '3']",
        "['a', 'b', 'c']",
        "[" * 100_000,
        "9" * 100_000,
        "\x00\ud800",
        "<answer></answer>",
    ],
    ids=["empty", "no numbers", "words", "wrong", "letters", "nested", "huge", "odd characters", "empty tag"],
)
def test_wrong_answers_score_zero(problem, answer):
    _, score = problem
    assert score(answer) == {"score": 0.0, "acc": 0.0}


def test_reversed_and_untagged_answers_score_zero(problem):
    truth, score = problem
    assert score(str(json.loads(truth.replace("'", '"'))[::-1]))["acc"] == 0.0
    assert score(f"The answer is {truth}.")["acc"] == 0.0


def test_partial_credit_is_not_accuracy(tmp_path):
    _, path = rg.write_parquet("spell_backward", tmp_path, train_size=5, validation_size=1, min_word_len=6)
    row = pandas.read_parquet(path).iloc[0]
    answer = row["reward_model"]["ground_truth"][:-1] + "?"
    result = rg.compute_score(row["data_source"], answer, "", row["extra_info"])
    assert 0 < result["score"] < 1 and result["acc"] == 0.0


def test_verifier_that_raises_scores_zero(tmp_path):
    """prime_factorization's verifier raises on text that holds no number."""
    _, path = rg.write_parquet("prime_factorization", tmp_path, train_size=9, validation_size=1)
    row = pandas.read_parquet(path).iloc[0]
    assert rg.compute_score(row["data_source"], "seven", "", row["extra_info"])["acc"] == 0.0


def test_schema(tmp_path):
    datasets = pytest.importorskip("datasets")
    train, validation = rg.write_parquet("number_sorting", tmp_path, train_size=20, validation_size=5, **SORT)
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
        paths = rg.write_parquet(
            "number_sorting", tmp_path / folder, train_size=400, validation_size=100, seed=3, **narrow
        )
        questions[folder] = [[p[0]["content"] for p in pandas.read_parquet(path)["prompt"]] for path in paths]
    train, validation = questions["a"]
    assert questions["a"] == questions["b"]
    assert not set(train) & set(validation)
    assert 0 < len(train) < 400 and len(validation) == 100


def test_no_training_problem_left(tmp_path):
    narrow = dict(SORT, min_numbers=1, max_numbers=1, min_value=10, max_value=10.5)
    with pytest.raises(ValueError, match="number_sorting"):
        rg.write_parquet("number_sorting", tmp_path, train_size=4, validation_size=20, **narrow)


def test_failed_write_keeps_the_old_file(tmp_path, monkeypatch):
    train, _ = rg.write_parquet("number_sorting", tmp_path, train_size=3, validation_size=1, **SORT)
    before = train.read_bytes()

    def half(self, path, **kwargs):
        with open(path, "wb") as file:
            file.write(b"PAR1")
        raise OSError("disk full")

    monkeypatch.setattr(pandas.DataFrame, "to_parquet", half)
    with pytest.raises(OSError, match="disk full"):
        rg.write_parquet("number_sorting", tmp_path, train_size=30, validation_size=1, **SORT)
    assert train.read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["train.parquet", "validation.parquet"]


def test_errors_show_the_value(tmp_path, problem):
    extra_info = {"entry": "{}", "task_kwargs": "{}"}
    for data_source in ("math_dapo", "reasoning_gym/sort_of", "number_sorting"):
        with pytest.raises(ValueError, match=data_source):
            rg.compute_score(data_source, "1", "1", extra_info)
    with pytest.raises(ValueError, match="extra_info"):
        rg.compute_score("reasoning_gym/number_sorting", "1", "1", {"index": 0})
    with pytest.raises(ValueError, match="no_such_task"):
        rg.write_parquet("no_such_task", tmp_path, train_size=1, validation_size=1)
    with pytest.raises(ValueError, match="train_size=0"):
        rg.write_parquet("number_sorting", tmp_path, train_size=0, validation_size=1)
