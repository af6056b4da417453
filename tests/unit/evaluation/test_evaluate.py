"""What a folder of verl's answers says of a checkpoint."""

import json

import pytest
from run_folders import answer, write

from cppo_verl.evaluation.evaluate import show, summary


def test_summary_counts_problems_with_fewer_answers_than_asked_for(tmp_path):
    write(
        tmp_path / "5.jsonl",
        *[answer("u1", i, "p", acc) for i, acc in enumerate([1.0, 0.0])],
        answer("u1", 2, "p", 0.0),
        answer("u1", 2, "p", 1.0, output=1),  # the second output of the same sample
        answer("u2", 0, "q", 0.0),
        json.dumps({"input": "r", "acc": None, "uid": "u3_0_0"}),
        '{"input": "cut',
    )
    (tmp_path / "5.sources.json").write_text(json.dumps({"u1": "aime24", "u2": "aime25"}))
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
