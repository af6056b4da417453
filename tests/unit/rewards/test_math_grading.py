"""Verdicts on answers as models write them, and a worker that outlives whatever a verifier does."""

import math
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import psutil
import pytest

from cppo_verl.rewards import math_grading

HOSTILE = str(Path(__file__).parents[2] / "helpers" / "hostile_verifier.py")
AMPLE = 60.0  # seconds, for answers that must get their verdict on a busy machine too


def box(answer):
    return f"Hence the result is \\boxed{{{answer}}}."


def line(answer):
    return f"We are done.\nAnswer: {answer}"


# response, ground truth, right for math_verify, right for math_dapo. Where both say no to a right answer the
# row is a limit of the verifiers that a user should know of, not a wish.
VERDICTS = [
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


@pytest.mark.parametrize("response, truth, verify, dapo", VERDICTS)
def test_verdicts(response, truth, verify, dapo):
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


@pytest.mark.process
@pytest.mark.parametrize(
    "response",
    [
        "x" * 10**6,
        box("{" * 10**5 + "5" + "}" * 10**5),
        "\\boxed{" * 10**5,
        "answer: $ " * 10**5,
        box("(" * 900 + "5" + ")" * 900),
        box("\\frac{1}{" * 200 + "x" + "}" * 200),
        line("9^9^9^9"),
        box("10^{10^{10}}"),
        box("99999999!"),
        "answer 1 1" * 10**5,
    ],
    ids=lambda response: f"{response[:30]}...{len(response)}",
)
def test_monstrous_responses_end_within_the_limit(response):
    begin = time.monotonic()
    for reward in (math_grading.math_verify, math_grading.math_dapo):
        assert reward("aime", response, "\\frac{7}{x+1}", time_limit=0.3)["acc"] == 0.0
    assert time.monotonic() - begin < 30
    assert math_grading.math_verify("aime", box("5"), "5", time_limit=AMPLE)["acc"] == 1.0


@pytest.fixture
def hostile(monkeypatch):
    """The reward function with a verifier that does what the answer says."""
    child = math_grading._Child(HOSTILE, "load")
    monkeypatch.setattr(math_grading, "_DAPO", child)
    yield lambda response, limit=AMPLE: math_grading.math_dapo("aime", response, "right", time_limit=limit)
    child._stop()


RIGHT = {"score": 1.0, "acc": 1.0, "timed_out": 0.0, "crashed": 0.0}
WRONG = {"score": -1.0, "acc": 0.0, "timed_out": 0.0, "crashed": 0.0}


@pytest.mark.process
@pytest.mark.parametrize("deed", ["loop", "sleep", "sleep deaf", "threads", "regex", "power"])
def test_a_verifier_that_hangs_is_killed_and_replaced(hostile, deed, caplog):
    assert hostile("right") == RIGHT
    begin = time.monotonic()
    assert hostile(deed, 0.2) == WRONG | {"timed_out": 1.0}
    assert time.monotonic() - begin < 10
    assert "no verdict within 0.2 s" in caplog.text and deed in caplog.text
    assert hostile("right") == RIGHT
    assert len(_verifiers()) <= 3  # this one and those of the two rewards


@pytest.mark.process
@pytest.mark.parametrize(
    "deed", ["recurse", "overflow", "segfault", "exit", "exit at once", "kill", "interrupt", "raise", "memory"]
)
def test_a_verifier_that_dies_is_a_wrong_answer(hostile, deed, caplog):
    assert hostile(deed) == WRONG | {"crashed": 1.0}
    assert "died or raised" in caplog.text
    assert hostile("right") == RIGHT


def test_what_a_verifier_prints_stays_out_of_the_verdicts(hostile, capfd):
    assert hostile("print") == WRONG
    assert hostile("right") == RIGHT
    assert capfd.readouterr() == ("", "")


@pytest.mark.process
def test_a_child_grown_large_or_killed_between_answers_is_replaced(hostile):
    assert hostile("right") == RIGHT
    assert hostile("grow") == WRONG
    assert math_grading._DAPO._process is None
    assert hostile("right") == RIGHT
    first = math_grading._DAPO._process.pid
    os.kill(first, signal.SIGKILL)
    math_grading._DAPO._process.wait(10)
    assert hostile("right") == RIGHT
    assert math_grading._DAPO._process.pid != first


@pytest.mark.process
def test_an_interrupted_answer_does_not_leave_its_verdict_to_the_next(hostile):
    assert hostile("wrong") == WRONG

    def interrupt(*_):
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, 0.3)
    try:
        with pytest.raises(KeyboardInterrupt):
            hostile("sleep")
    finally:
        signal.signal(signal.SIGALRM, previous)
    assert hostile("right") == RIGHT


@pytest.mark.process
def test_threads_share_one_child(hostile):
    deeds = ["right", "wrong", "raise", "right", "exit at once", "right", "sleep", "wrong"] * 3
    with ThreadPoolExecutor(8) as pool:
        outcomes = list(pool.map(lambda deed: (deed, hostile(deed, 0.3 if deed == "sleep" else AMPLE)), deeds))
    expected = {"right": RIGHT, "wrong": WRONG, "sleep": WRONG | {"timed_out": 1.0}}
    for deed, outcome in outcomes:
        assert outcome == expected.get(deed, WRONG | {"crashed": 1.0}), deed
    assert len(_verifiers()) <= 3


@pytest.mark.process
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_fork_has_a_child_of_its_own(hostile):
    assert hostile("right") == RIGHT
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            status = 0 if hostile("right") == RIGHT and hostile("wrong") == WRONG else 2
        finally:
            os._exit(status)
    for _ in range(20):
        assert hostile("wrong") == WRONG
        assert hostile("right") == RIGHT
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


PARENT = f"""
import os, sys, threading, time
sys.path.append({os.path.dirname(math_grading.__file__)!r})  # the package itself would import torch
import math_grading
child = math_grading._Child({HOSTILE!r}, "load")
child.ask("right", ["right"], 60)
threading.Thread(target=child.ask, args=(sys.argv[1], ["right"], 1.0), daemon=True).start()
time.sleep(0.2)
print(child._process.pid, flush=True)
sys.stdin.readline()
os._exit(0) if sys.argv[1] == "sleep" else sys.exit()
"""


@pytest.mark.process
def test_no_child_outlives_its_parent():
    ends = [(deed, end) for deed in ("right", "sleep") for end in ("exit", "kill")]
    parents = [
        subprocess.Popen([sys.executable, "-c", PARENT, deed], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for deed, _ in ends
    ]
    children = [psutil.Process(int(parent.stdout.readline())) for parent in parents]
    for parent, (_, end) in zip(parents, ends, strict=True):
        if end == "kill":
            parent.kill()
        parent.communicate("\n")
    deadline = time.monotonic() + 30
    while any(_alive(child) for child in children):
        assert time.monotonic() < deadline, children
        time.sleep(0.1)


def test_a_missing_library_is_named(tmp_path, monkeypatch):
    (tmp_path / "math_verify.py").write_text("raise ImportError('no antlr4 here')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(math_grading, "_VERIFY", math_grading._Child(math_grading.__file__, "_load_math_verify"))
    with pytest.raises(ImportError, match=r"pip install math-verify==0\.9\.0 .*\(no antlr4 here\)"):
        math_grading.math_verify("aime", box("5"), "5")


def test_a_child_that_never_starts_is_an_error():
    with pytest.raises(RuntimeError, match="load_never does not start: exit status 7"):
        math_grading._Child(HOSTILE, "load_never").ask("5", ["5"], AMPLE)


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
def test_verl_calls_the_rewards_and_reports_accuracy(compose, name):
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


def _verifiers():
    """The running verifier processes of this process."""
    return [child for child in psutil.Process().children() if math_grading.__file__ in _command(child)]


def _command(process):
    try:
        return process.cmdline()
    except psutil.NoSuchProcess:  # or a zombie
        return []


def _alive(process):
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE  # init may be slow to reap
    except psutil.NoSuchProcess:
        return False
