"""Each data set's rows in verl's schema, and the rows that are refused."""

import pytest
from prepared import BOXED, aime_year, dapo_row, manifest, names, rows, run, sanity_row, write

# What DAPO-Math-17k's own prompts have around the problem.
DAPO_MATH = (
    "Solve the following math problem step by step. The last line of your response should be of the form Answer: "
    "$Answer (without quotes) where $Answer is the answer to the problem.\n\n{}\n\n"
    'Remember to put your answer on its own line after "Answer:".'
)


def test_aime_reads_three_years_from_three_kinds_of_file(tmp_path):
    """Three years, three kinds of file, three namings; part I and II apart; repeats as in some public copies."""
    from verl.utils.reward_score import default_compute_score

    first = write(tmp_path / "I.csv", aime_year(2024, "0{}", "Problem", "Answer")[:15])
    second = write(tmp_path / "II.parquet", aime_year(2024, "0{}", "Problem", "Answer")[15:] * 3)
    folder = write(tmp_path / "2025" / "a.jsonl", aime_year(2025, "so it is $\\boxed{{0{}}}$.", "question", "solution"))
    last = write(tmp_path / "2026.json", [row | {"answer": int(row["answer"])} for row in aime_year(2026)])
    source = (f"2024={first}", f"2024={second}", f"2025={folder.parent}", f"2026={last}")
    assert run("aime", "--source", *source, "--output", tmp_path / "out", "--expect-rows", 90) == 0
    got = rows(tmp_path / "out" / "validation.parquet")
    assert [row["data_source"] for row in got] == ["aime24"] * 30 + ["aime25"] * 30 + ["aime26"] * 30
    assert [row["reward_model"]["ground_truth"] for row in got] == [str(i) for i in range(30)] * 3
    assert [row["extra_info"]["year"] for row in got] == [2024] * 30 + [2025] * 30 + [2026] * 30
    counts = manifest(tmp_path / "out")["files"]["validation.parquet"]
    assert (counts["read"], counts["duplicates"], counts["rows"]) == (120, 30, 90)
    for year, row in zip((2024, 2025, 2026), got[3::30], strict=True):
        assert row["prompt"] == [{"role": "user", "content": DAPO_MATH.format(f"Problem 3 of {year}")}]
        for response, right in (("So.\nAnswer: 3", True), ("So.\nAnswer: $3$", True), ("So.\nAnswer: 4", False)):
            truth = row["reward_model"]["ground_truth"]
            assert default_compute_score(row["data_source"], response, truth)["acc"] is right


@pytest.mark.parametrize("answer", ["1000", "-1", "3.5", "", "x", None, "336^\\circ", "\u0663", "12 or 13"])
def test_an_aime_answer_must_be_an_integer_from_0_to_999(tmp_path, capsys, answer):
    content = aime_year(2025)
    content[17]["answer"] = answer
    source = write(tmp_path / "a.parquet", content)
    assert run("aime", "--years", "2025", "--source", f"2025={source}", "--output", tmp_path / "out") == 1
    error = capsys.readouterr().err
    assert "row 17" in error and repr(answer) in error
    assert names(tmp_path / "out") == []


def test_gsm8k_ground_truths_are_found_by_verls_reward(tmp_path):
    """verl's reader finds, in the form that the prompt asks for, the ground truth that is written."""
    from verl.utils.reward_score import default_compute_score

    train = [{"question": "Q1", "answer": "1+1=<<1+1=2>>2\n#### 2"}, {"question": "Q2", "answer": "x\n#### 1,234,567"}]
    test = [{"question": "Q3", "answer": "#### -0.5"}]
    source = [f"{part}={write(tmp_path / f'{part}.csv', c)}" for part, c in (("train", train), ("validation", test))]
    assert run("gsm8k", "--source", *source, "--output", tmp_path / "out", "--expect-rows", 2) == 0
    got = rows(tmp_path / "out" / "train.parquet") + rows(tmp_path / "out" / "validation.parquet")
    assert [row["reward_model"]["ground_truth"] for row in got] == ["2", "1234567", "-0.5"]
    assert [row["extra_info"]["split"] for row in got] == ["train", "train", "validation"]
    for row in got:
        assert '"#### N"' in row["prompt"][0]["content"]
        truth = row["reward_model"]["ground_truth"]
        assert default_compute_score(row["data_source"], f"Sure.\n#### {truth}", truth) == 1.0
        assert default_compute_score(row["data_source"], f"Sure.\n#### {truth}1", truth) == 0.0


@pytest.mark.parametrize("answer", ["no mark 5", "#### five", "#### ", "#### 1 2"])
def test_a_gsm8k_answer_must_end_in_a_number(tmp_path, capsys, answer):
    good = write(tmp_path / "good.jsonl", [{"question": "Q", "answer": "#### 1"}])
    bad = write(tmp_path / "bad.jsonl", [{"question": "Q", "answer": "#### 1"}, {"question": "R", "answer": answer}])
    assert run("gsm8k", "--source", f"train={good}", f"validation={bad}", "--output", tmp_path / "out") == 1
    error = capsys.readouterr().err
    assert "bad.jsonl, row 1" in error and repr(answer) in error
    assert names(tmp_path / "out") == []


def test_the_sanity_test_keeps_its_own_words_and_the_rest_of_a_row_is_ours(tmp_path):
    content = [sanity_row("What is 1+1?", "2"), sanity_row("Where?", " (0,\\frac12)"), sanity_row("What is 1+1?", "2")]
    source = write(tmp_path / "train" / "math_1460.parquet", content)
    assert run("sanity-test", "--source", source.parent, "--output", tmp_path / "out", "--expect-rows", 2) == 0
    assert names(tmp_path / "out") == ["manifest.json", "train.parquet"]
    assert rows(tmp_path / "out" / "train.parquet") == [
        {
            "data_source": "math",
            "prompt": [{"role": "user", "content": problem + BOXED}],
            "ability": "math",
            "reward_model": {"style": "rule", "ground_truth": answer},
            "extra_info": {"split": "train", "index": index},
        }
        for index, (problem, answer) in enumerate([("What is 1+1?", "2"), ("Where?", "(0,\\frac12)")])
    ]


BAD_SANITY = {
    # Precision-RL's repository has the problems in this form too, without the words that ask for a box.
    "problems alone": ([{"problem": "a", "answer": "1"}], "no column prompt, reward_model; it has problem, answer"),
    "no words": (
        [sanity_row("x", "1"), sanity_row("y", "1", prompt=[{"role": "user", "content": "What is y?"}])],
        "row 1: prompt must ask for its answer in \\boxed{}, got ...'What is y?'",
    ),
    "a dialogue that ends elsewhere": (
        [sanity_row("x", "1", prompt=[{"role": "user", "content": BOXED}, {"role": "user", "content": "And then?"}])],
        "row 0: prompt must ask for its answer",
    ),
    "no truth": ([sanity_row("x", "1", reward_model="1")], "row 0: reward_model must hold ground_truth, got '1'"),
    "empty truth": ([sanity_row("x", " ")], "row 0: reward_model.ground_truth is empty"),
}


@pytest.mark.parametrize("case", BAD_SANITY)
def test_a_row_that_is_no_sanity_tests_is_refused(tmp_path, capsys, case):
    content, message = BAD_SANITY[case]
    source = write(tmp_path / "bad.jsonl", content)
    assert run("sanity-test", "--source", source, "--output", tmp_path / "out") == 1
    assert message in capsys.readouterr().err
    assert names(tmp_path / "out") == []


GOOD = dapo_row("Fine", "1")


BAD_DAPO = {
    "missing columns": ([{"prompt": "a", "solution": "1"}], "no column data_source, ability, reward_model, extra_info"),
    "its columns": ([{"prompt": "a", "solution": "1"}], "it has prompt, solution"),
    "null prompt": ([GOOD, dapo_row("x", "1", prompt=None)], "row 1: prompt must be a list of messages, got None"),
    "text prompt": ([dapo_row("x", "1", prompt="What?")], "got 'What?'"),
    "no content": ([dapo_row("x", "1", prompt=[{"role": "user"}])], "got {'role': 'user'}"),
    "null content": ([dapo_row("x", "1", prompt=[{"role": "user", "content": None}])], "must be text, got None"),
    "blank content": ([dapo_row("x", "1", prompt=[{"role": "user", "content": "\ufeff \n"}])], "content is empty"),
    "NUL": ([GOOD, GOOD, dapo_row("a\0b", "1")], "row 2: prompt.content holds a NUL"),
    "number answer": ([dapo_row("x", 7)], "reward_model.ground_truth must be text, got 7"),
    "no answer": ([dapo_row("x", "1", reward_model={"style": "rule"})], "must hold ground_truth, got {'style'"),
    "no index": ([dapo_row("x", "1", extra_info=None)], "extra_info must be a dict"),
    "unknown source": ([GOOD, dapo_row("x", "1", data_source="my_math")], "data_source 'my_math' is unknown to verl"),
    "upper case": ([dapo_row("x", "1", data_source="AIME25")], "data_source 'AIME25'"),
    "only conflicts": ([dapo_row("x", "1"), dapo_row("x", "2")], "no row of train is left"),
}


@pytest.mark.parametrize("case", BAD_DAPO)
def test_a_row_that_cannot_be_used_is_shown(tmp_path, capsys, case):
    content, message = BAD_DAPO[case]
    source = write(tmp_path / "bad.jsonl", content)
    assert run("dapo", "--source", source, "--output", tmp_path / "out") == 1
    assert message in capsys.readouterr().err
    assert names(tmp_path / "out") == []
