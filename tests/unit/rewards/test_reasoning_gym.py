"""The reward on good and bad answers to problems read back from their file."""

import json

import pandas
import pytest

from cppo_verl.data.reasoning_gym import write_parquet
from cppo_verl.rewards.reasoning_gym import compute_score

AMPLE = 60.0  # seconds, for answers that must be graded on a busy machine too
UNHURT = {"timed_out": 0.0, "crashed": 0.0}
SORT = dict(min_numbers=3, max_numbers=3, min_decimals=0, max_decimals=0, min_value=10, max_value=99)


@pytest.fixture
def problem(tmp_path):
    """A function of answer: the score of one sorting problem, read back from its file."""
    _, path = write_parquet("number_sorting", tmp_path, train_size=1, validation_size=1, **SORT)
    row = pandas.read_parquet(path).iloc[0]
    truth = row["reward_model"]["ground_truth"]
    return truth, lambda answer: compute_score(row["data_source"], answer, truth, row["extra_info"], AMPLE)


def test_a_right_answer_scores_one_in_any_notation(problem):
    truth, score = problem
    plain = json.dumps([float(x) for x in json.loads(truth.replace("'", '"'))])
    for answer in (truth, f" {truth}\n", plain, f"Let me see: <answer>[]</answer> no, <answer>{truth}</answer>"):
        assert score(answer) == {"score": 1.0, "acc": 1.0, **UNHURT}


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
def test_an_answer_that_is_not_right_scores_zero(problem, answer):
    _, score = problem
    assert score(answer) == {"score": 0.0, "acc": 0.0, **UNHURT}


def test_reversed_and_untagged_answers_score_zero(problem):
    truth, score = problem
    assert score(str(json.loads(truth.replace("'", '"'))[::-1]))["acc"] == 0.0
    assert score(f"The answer is {truth}.")["acc"] == 0.0


@pytest.mark.parametrize(
    ("task", "answer", "limit", "lost"),
    [("countdown", "9**9**9", 0.5, "timed_out"), ("spiral_matrix", "exit()", AMPLE, "crashed")],
)
def test_what_a_verifier_computes_neither_hangs_nor_ends_a_worker(tmp_path, task, answer, limit, lost):
    _, path = write_parquet(task, tmp_path, train_size=1, validation_size=1)
    row = pandas.read_parquet(path).iloc[0]

    def score(text, seconds):
        return compute_score(row["data_source"], text, "", row["extra_info"], time_limit=seconds)

    truth = row["reward_model"]["ground_truth"]
    assert score(truth, AMPLE) == {"score": 1.0, "acc": 1.0, **UNHURT}
    assert score(f"<answer>{answer}</answer>", limit) == {"score": 0.0, "acc": 0.0, **UNHURT, lost: 1.0}
    assert score(truth, AMPLE)["acc"] == 1.0


def test_partial_credit_is_not_accuracy(tmp_path):
    _, path = write_parquet("spell_backward", tmp_path, train_size=5, validation_size=1, min_word_len=6)
    row = pandas.read_parquet(path).iloc[0]
    answer = row["reward_model"]["ground_truth"][:-1] + "?"
    result = compute_score(row["data_source"], answer, "", row["extra_info"], AMPLE)
    assert 0 < result["score"] < 1 and result["acc"] == 0.0


def test_an_answer_on_which_the_verifier_raises_scores_zero(tmp_path):
    """prime_factorization's verifier raises on text that holds no number."""
    _, path = write_parquet("prime_factorization", tmp_path, train_size=9, validation_size=1)
    row = pandas.read_parquet(path).iloc[0]
    assert compute_score(row["data_source"], "seven", "", row["extra_info"])["acc"] == 0.0


@pytest.mark.parametrize("data_source", ["math_dapo", "reasoning_gym/sort_of", "number_sorting"])
def test_a_data_source_without_a_task_is_refused_by_name(data_source):
    with pytest.raises(ValueError, match=data_source):
        compute_score(data_source, "1", "1", {"entry": "{}", "task_kwargs": "{}"})


def test_a_row_without_its_problem_is_refused():
    with pytest.raises(ValueError, match=r"extra_info must hold .*got \['index'\]"):
        compute_score("reasoning_gym/number_sorting", "1", "1", {"index": 0})
