"""Grades of answers as models write them, and ground truths that cannot be used."""

import math
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from cppo_verl.rewards import math_grading
from cppo_verl.rewards.sandbox import Sandbox

AMPLE = 60.0  # seconds, for answers that must be graded on a busy machine too


def box(answer):
    return f"Hence the result is \\boxed{{{answer}}}."


def line(answer):
    return f"We are done.\nAnswer: {answer}"


# response, ground truth, right for math_verify, right for math_dapo. Rows in which both reject a right answer document
# limits of the verifiers.
ANSWERS = [
    # integers, and where they stand
    (line("42"), "42", 1, 1),
    (line("$42$"), "42", 1, 1),
    (line("42."), "42", 1, 0),
    (line("042"), "42", 1, 0),
    (box("42"), "42", 1, 1),
    (box("43"), "42", 0, 0),
    (box("42"), "043", 0, 0),
    ("\\[ \\boxed{42} \\]", "42", 1, 1),
    ("答案是 \\boxed{42}。", "42", 1, 1),
    ("**Answer:** 42", "42", 1, 0),
    ("### Answer: **42**.", "42", 1, 0),
    ("Answer:\n\\[\n42\n\\]", "42", 1, 0),
    ("The answer is 42.", "42", 1, 0),
    ("The final answer is $42$. I hope it is correct.", "42", 1, 0),
    ("so x = 42", "42", 0, 0),
    ("42", "42", 0, 0),
    # signs, decimals, fractions, percent
    (line("-7"), "-7", 1, 1),
    (line("7"), "-7", 0, 0),
    (line("−7"), "-7", 1, 0),
    (box("−7"), "-7", 1, 0),
    (line("3.50"), "3.5", 1, 0),
    (line("0.5"), "\\frac12", 1, 0),
    (line("$.5$"), "0.5", 1, 0),
    (line(".5"), "5", 0, 0),
    (line("1/2"), "\\frac{1}{2}", 1, 0),
    (line("$\\dfrac{1}{2}$"), "\\frac{1}{2}", 1, 0),
    (line("\\(\\frac{1}{2}\\)"), "0.5", 1, 0),
    (line("\\frac12"), "\\frac{1}{2}", 1, 1),
    (box("\\tfrac{2}{4}"), "\\frac{1}{2}", 1, 0),
    (box("2\\frac{1}{2}"), "\\frac52", 1, 0),
    (box("½"), "1/2", 1, 0),
    (box("2½"), "2.5", 1, 0),
    (box("0.333"), "1/3", 0, 0),
    (box("50\\%"), "50\\%", 1, 1),
    (box("50\\%"), "50", 0, 0),
    # intervals, sets, tuples
    (line("(1, 2)"), "(1,2)", 1, 1),
    (box("[1,2)"), "[1,2)", 1, 1),
    (box("[1,2]"), "(1,2)", 0, 0),
    (box("[0, 1]"), "[0,1]", 1, 0),
    (box("(-∞, 3]"), "(-\\infty,3]", 1, 0),
    (box("(-\\infty,0) ∪ (1,\\infty)"), "(-\\infty,0)\\cup(1,\\infty)", 1, 0),
    (box("x ≤ 3"), "x\\leq 3", 1, 0),
    (box("\\{1,2,3\\}"), "\\{3,2,1\\}", 1, 0),
    (box("3,1,2"), "1,2,3", 1, 0),
    (box("1,2"), "1,2,3", 0, 0),
    (line("5, 6"), "5", 0, 0),
    (line("5 \\text{ or } 6"), "5,6", 1, 0),
    (line("(2,1,3)"), "(2,1,3)", 1, 1),
    (box("(2,1,3)"), "(1,2,3)", 0, 0),
    (box("\\pm 2"), "-2,2", 1, 0),
    (box("\\emptyset"), "\\emptyset", 1, 1),
    # units, degrees, thousands
    (line("12 cm"), "12", 1, 1),
    (line("12\\text{ cm}"), "12", 1, 1),
    (box("12\\text{ cm}"), "12", 1, 0),
    # two ground truths of the sanity test end in a full stop
    (box("7\\text{ hours}."), "7\\text{ hours}.", 1, 1),
    (box("7"), "7\\text{ hours}.", 1, 0),
    (line("42 apples"), "42", 1, 0),
    (line("\\$15"), "15", 1, 1),
    (line("30^\\circ"), "30", 1, 1),
    (box("30°"), "30", 1, 0),
    (line("1,000,000"), "1000000", 1, 1),
    (box("1{,}000"), "1000", 1, 0),
    (box("1 000"), "1000", 0, 0),
    (box("2×10^3"), "2000", 1, 0),
    (box("1e3"), "1000", 0, 0),
    # formulas
    (line("\\sqrt2"), "\\sqrt{2}", 1, 1),
    (box("\\sqrt{8}"), "2\\sqrt{2}", 1, 0),
    (box("2π"), "2\\pi", 1, 0),
    (box("3.14159"), "\\pi", 0, 0),
    (line("x+1"), "1+x", 1, 0),
    (box("x²+2x+1"), "(x+1)^2", 1, 0),
    (line("x=5"), "5", 1, 1),
    (box("x=5"), "5", 1, 0),
    (box("3+4i"), "4i+3", 1, 0),
    (box("\\binom{5}{2}"), "10", 1, 0),
    (box("\\frac{a}{b+\\frac{1}{c}}"), "\\frac{a}{b+1/c}", 1, 0),
    (box("\\begin{pmatrix}1&2\\\\3&4\\end{pmatrix}"), "\\begin{pmatrix}1&2\\\\3&4\\end{pmatrix}", 1, 1),
    (box("\\text{(C)}"), "C", 1, 0),
    (box("\\text{No}"), "yes", 0, 0),
    # several answers: the last counts
    ("\\boxed{1}, no: \\boxed{2}", "2", 1, 1),
    ("\\boxed{1}, no: \\boxed{2}", "1", 0, 0),
    ("Answer: 1\nAnswer: 2", "2", 1, 1),
    ("Answer: 1\nAnswer: 2", "1", 0, 0),
    ("Answer: 1\n\\boxed{2}", "2", 1, 0),
    ("Answer: 1\n\\boxed{2}", "1", 0, 1),
    ("\\boxed{\\boxed{5}}", "5", 1, 1),
    # nothing to read
    ("", "5", 0, 0),
    ("I do not know.", "5", 0, 0),
    ("Answer:", "5", 0, 0),
    (box(""), "5", 0, 0),
    ("\\boxed{5", "5", 0, 0),
    (box("5\x00"), "5", 0, 0),
    (box("5\ud800"), "5", 0, 0),
    ("\x00\ud800 " + box("5"), "5", 1, 1),
    (box("5") + "x" * math_grading.ANSWER_CHARACTERS, "5", 0, 0),
    # ground truths in other forms
    (line("34"), '["34"]', 1, 1),
    (line("5"), '["4", "5"]', 1, 1),
    (line("6"), ["4", "5"], 0, 0),
    (line("5"), np.array(["4", "5"], dtype=object), 1, 1),
    (line("5"), 5, 1, 1),
    (line("5"), np.int64(5), 1, 1),
    (line("5"), 5.0, 1, 1),
    (line("2.5"), 2.5, 1, 1),
    (line('["a", 1]'), '["a", 1]', 1, 1),
    (box("5"), "$5$", 1, 0),
    (box("5"), "\\boxed{5}", 1, 0),
]


@pytest.mark.parametrize("response, truth, verify, dapo", ANSWERS)
def test_each_rule_grades_the_answers_that_models_write(response, truth, verify, dapo):
    unhurt = {"timed_out": 0.0, "crashed": 0.0}
    assert math_grading.math_verify("aime", response, truth, time_limit=AMPLE) == {
        "score": float(verify),
        "acc": float(verify),
        **unhurt,
    }
    assert math_grading.math_dapo("aime", response, truth, {}, time_limit=AMPLE) == {
        "score": 1.0 if dapo else -1.0,
        "acc": float(dapo),
        **unhurt,
    }


# What is given as the answer, and whether it is 6.
SIX = [
    *[(text, 1) for text in ("6", "6.", "6.0", "06", "+6", "$6$", "6 cm", "6\\text{ cm}", "6 apples", "6 ways")],
    *[(text, 1) for text in ("x = 6", "5 + 1", "5 + 1 = 6", "6 = 2 \\cdot 3", "\\$6", "12/2", "\\frac{12}{2}", "2×3")],
    *[
        (text, 0)
        for text in ("7", "-6", "60", "16", "0.6", "1/6", "6/7", "6x", "x", "6%", "6!", "6^2", "\\sqrt{6}", "6i")
    ],
    *[(text, 0) for text in ("not 6", "never 6", "not equal to 6", "\\text{not } 6", "≠ 6", "\\neq 6", "not -6")],
    *[(text, 0) for text in ("anything but 6", "any number except 6", "unknown, not 6", "everything but 6", "no 6")],
    *[
        (text, 0)
        for text in ("between 6 and 100", "between 1 and 6", "\\text{between }6\\text{ and }100", "from 6 to 9")
    ],
    *[
        (text, 0)
        for text in ("6 to 100", "6-7", "6 \\text{ to } 7", "[6, 7]", "(6, 7)", "6 \\pm 1", "\\{6, 7\\}", "6, 7")
    ],
    *[
        (text, 0)
        for text in ("6 or 7", "6 and 7", "either 6 or 8", "6 or more", "6\\text{ or more}", "6\\text{ or less}")
    ],
    *[
        (text, 0)
        for text in ("at least 6", "at most 6", "more than 6", "less than 6", "> 6", "\\geq 6", "x > 6", "x < 6")
    ],
    *[
        (text, 0)
        for text in (
            "about 6",
            "approximately 6",
            "\\approx 6",
            "nearly 6",
            "around 6",
            "roughly 6",
            "6 mod 7",
            "six or seven",
            "6 \\pmod 7",
            "6 of the 9",
        )
    ],
]
GIVEN = {
    "box": "Hence the result is \\boxed{{{}}}.",
    "line": "We are done.\nAnswer: {}",
    "sentence": "Adding up, the answer is {}.",
    "sentence with more": "So the final answer is therefore {}. I hope it is correct.",
}


@pytest.mark.parametrize("given", GIVEN)
def test_an_answer_is_judged_as_a_whole_however_it_is_given(given):
    def verified(text):
        return math_grading.math_verify("aime", GIVEN[given].format(text), "6", time_limit=AMPLE)["acc"]

    assert len(SIX) >= 80
    wrong = [(text, right) for text, right in SIX if verified(text) != right]
    assert wrong == []


@pytest.mark.parametrize(
    ("response", "right"),
    [
        ("The answer isn't 6.", 0),
        ("I do not think that the answer is 6 or 7.", 0),
        ("What is the answer? 6 would do.", 0),
        ("The answer lies between 6 and 100.", 0),
        ("The answer could be 6.", 0),
        ("The answer must be found. There are 6 pairs.", 0),
        ("The answer to the question is 6, because 2 times 3 is 6.", 1),
        ("The answer is 6, not 7.", 1),
        ("The answer is 6! Great.", 1),
        ("First I thought that the answer is 7. No: the answer is 6.", 1),
        ("First I thought that the answer is 6. No: the answer is 7.", 0),
        ("Answer: **6**", 1),
        ("The answer is **6**.", 1),
        ("Answer: 6 since there are 3 pairs", 1),
        ("\\boxed{}, so the answer is not 6", 0),
        ("\\boxed{7} The answer is 6.", 0),
        ("\\boxed{6} and more", 1),
    ],
)
def test_what_a_response_announces(response, right):
    assert math_grading.math_verify("aime", response, "6", time_limit=AMPLE)["acc"] == right


def test_a_missing_library_is_named(tmp_path, monkeypatch):
    (tmp_path / "math_verify.py").write_text("raise ImportError('no antlr4 here')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(math_grading, "_VERIFY", Sandbox(math_grading.__file__, "_load_math_verify"))
    with pytest.raises(ImportError, match=r"pip install math-verify==0\.9\.0 .*\(no antlr4 here\)"):
        math_grading.math_verify("aime", box("5"), "5")


@pytest.mark.parametrize(
    "truth", ["", " ", None, math.nan, [], ["5", ""], {"answer": 5}, b"5", "9" * 20_000, ["9" * 6_000] * 2]
)
def test_a_ground_truth_that_cannot_be_used_is_shown(truth):
    with pytest.raises(ValueError, match="ground_truth must") as raised:
        math_grading.math_dapo("aime", "Answer: 5", truth)
    assert len(str(raised.value)) < 400


@pytest.mark.parametrize("limit", [0, -1, math.nan, math.inf])
def test_a_time_limit_that_cannot_be_used_is_shown(limit):
    with pytest.raises(ValueError, match="time_limit must be a positive number of seconds, got"):
        math_grading.math_verify("aime", "Answer: 5", "5", time_limit=limit)


@pytest.mark.parametrize("name", ["math_dapo", "math_verify"])
def test_verl_calls_each_reward_and_reports_accuracy(compose, name):
    from verl.trainer.ppo.metric_utils import process_validation_metrics
    from verl.trainer.ppo.reward import get_custom_reward_fn

    config = compose(
        "reward.custom_reward_function.path=pkg://cppo_verl.rewards.math_grading",
        f"reward.custom_reward_function.name={name}",
        f"+reward.custom_reward_function.reward_kwargs.time_limit={AMPLE}",
    )
    reward = get_custom_reward_fn(config)
    responses = [line("5"), line("6"), "no idea", box("5")]
    # As the reward loop does: in an executor's threads, by keyword.
    with ThreadPoolExecutor(2) as pool:
        outcomes = list(
            pool.map(
                lambda text: reward(data_source="aime", solution_str=text, ground_truth="5", extra_info={}), responses
            )
        )
    infos = {key: [outcome[key] for outcome in outcomes] for key in outcomes[0]}
    metrics = process_validation_metrics(["aime"] * 4, ["problem"] * 4, infos)["aime"]
    assert metrics["acc"]["mean@4"] == 0.5  # verl's core metric where there is an "acc"
    assert metrics["score"]["mean@4"] == (0.0 if name == "math_dapo" else 0.5)
    assert metrics["timed_out"]["mean@4"] == metrics["crashed"]["mean@4"] == 0.0
