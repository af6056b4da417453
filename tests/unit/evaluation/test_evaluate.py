"""What a folder of verl's answers says of a checkpoint."""

import json

import pytest
from run_folders import write_damaged_answers

from cppo_verl.evaluation.evaluate import show, summary


def test_summary_counts_problems_with_fewer_answers_than_asked_for(tmp_path):
    write_damaged_answers(tmp_path)
    value = summary(tmp_path, 5, 3)
    assert value["benchmarks"]["aime24"] == {
        "problems": 1,
        "answers": 3,
        "short": 0,
        "average": pytest.approx(2 / 3),
        "interval": [None, None],
        "pass": {1: pytest.approx(2 / 3), 2: pytest.approx(1.0)},
    }
    text = show(json.loads(json.dumps(value)))
    assert "| aime24    | 1        | 66.67" in text
    assert "aime25: 1 problem(s) have fewer than 3 answers" in text
