"""A sandbox that outlives whatever a verifier does, and leaves no process behind."""

import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

from cppo_verl.rewards import math_grading, sandbox
from cppo_verl.rewards.sandbox import Sandbox

HOSTILE = str(Path(__file__).parents[1] / "helpers" / "hostile_verifier.py")
AMPLE = 60.0  # seconds, for answers that must be graded on a busy machine too


def box(answer):
    return f"Hence the result is \\boxed{{{answer}}}."


@pytest.mark.parametrize(
    "response",
    [
        "x" * 10**6,
        box("{" * 10**5 + "5" + "}" * 10**5),
        "\\boxed{" * 10**5,
        "answer: $ " * 10**5,
        box("(" * 900 + "5" + ")" * 900),
        box("\\frac{1}{" * 200 + "x" + "}" * 200),
        "Answer: 9^9^9^9",
        box("10^{10^{10}}"),
        box("99999999!"),
        "answer 1 1" * 10**5,
    ],
    ids=lambda response: f"{response[:30]}...{len(response)}",
)
def test_monstrous_responses_end_within_the_limit(response):
    rewards = (math_grading.math_verify, math_grading.math_dapo)
    for reward in rewards:  # starts what the one before has ended, which may take longer than any limit
        assert reward("aime", box("5"), "5", time_limit=AMPLE)["acc"] == 1.0
    begin = time.monotonic()
    for reward in rewards:
        assert reward("aime", response, "\\frac{7}{x+1}", time_limit=0.3)["acc"] == 0.0
    assert time.monotonic() - begin < AMPLE
    assert math_grading.math_verify("aime", box("5"), "5", time_limit=AMPLE)["acc"] == 1.0


@pytest.fixture
def hostile(monkeypatch):
    """The reward function with a verifier that does what the answer says."""
    sandbox = Sandbox(HOSTILE, "load")
    monkeypatch.setattr(math_grading, "_DAPO", sandbox)
    yield lambda response, limit=AMPLE: math_grading.math_dapo("aime", response, "right", time_limit=limit)
    sandbox.stop()


RIGHT = {"score": 1.0, "acc": 1.0, "timed_out": 0.0, "crashed": 0.0}
WRONG = {"score": -1.0, "acc": 0.0, "timed_out": 0.0, "crashed": 0.0}


@pytest.mark.parametrize("deed", ["loop", "sleep", "sleep deaf", "threads", "regex", "power"])
def test_a_verifier_that_hangs_is_killed_and_replaced(hostile, deed, caplog):
    assert hostile("right") == RIGHT
    begin = time.monotonic()
    assert hostile(deed, 0.2) == WRONG | {"timed_out": 1.0}
    assert time.monotonic() - begin < AMPLE
    assert "not graded within 0.2 s" in caplog.text and deed in caplog.text
    assert hostile("right") == RIGHT
    assert len(_verifiers()) <= 4  # this one and those of the three rewards


@pytest.mark.parametrize(
    "deed", ["recurse", "overflow", "segfault", "exit", "exit at once", "kill", "interrupt", "raise", "memory"]
)
def test_a_verifier_that_dies_is_a_wrong_answer(hostile, deed, caplog):
    assert hostile(deed) == WRONG | {"crashed": 1.0}
    assert "died or raised" in caplog.text
    assert hostile("right") == RIGHT


def test_what_a_verifier_prints_stays_out_of_its_grades(hostile, capfd):
    assert hostile("print") == WRONG
    assert hostile("right") == RIGHT
    assert capfd.readouterr() == ("", "")


def test_a_child_grown_large_or_killed_between_answers_is_replaced(hostile):
    assert hostile("right") == RIGHT
    assert hostile("grow") == WRONG
    assert math_grading._DAPO._process is None
    assert hostile("right") == RIGHT
    first = math_grading._DAPO._process.pid
    os.kill(first, signal.SIGKILL)
    math_grading._DAPO._process.wait(AMPLE)
    assert hostile("right") == RIGHT
    assert math_grading._DAPO._process.pid != first


def test_an_interrupted_answer_does_not_leave_its_grade_to_the_next(hostile):
    assert hostile("wrong") == WRONG

    def interrupt(*_):
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGALRM, interrupt)
    try:
        with pytest.raises(KeyboardInterrupt):
            signal.setitimer(signal.ITIMER_REAL, 0.3)
            hostile("sleep")
    finally:
        signal.signal(signal.SIGALRM, previous)
    assert hostile("right") == RIGHT


def test_threads_share_one_child(hostile):
    deeds = ["right", "wrong", "raise", "right", "exit at once", "right", "sleep", "wrong"] * 3
    with ThreadPoolExecutor(8) as pool:
        outcomes = list(pool.map(lambda deed: (deed, hostile(deed, 0.3 if deed == "sleep" else AMPLE)), deeds))
    expected = {"right": RIGHT, "wrong": WRONG, "sleep": WRONG | {"timed_out": 1.0}}
    for deed, outcome in outcomes:
        assert outcome == expected.get(deed, WRONG | {"crashed": 1.0}), deed
    assert len(_verifiers()) <= 4


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
from cppo_verl.rewards.sandbox import Sandbox
child = Sandbox({HOSTILE!r}, "load")
child.grade("odd", "right", ["right"], 60)
print(child._process.pid, flush=True)
sys.stdin.readline()
threading.Thread(target=child.grade, args=("odd", sys.argv[1], ["right"], 1.0), daemon=True).start()
time.sleep(0.2)
print("at work", flush=True)
sys.stdin.readline()
os._exit(0) if sys.argv[1] == "sleep" else sys.exit()
"""


def test_no_child_outlives_its_parent():
    ends = [(deed, end) for deed in ("right", "sleep") for end in ("exit", "kill")]
    parents = [
        subprocess.Popen([sys.executable, "-c", PARENT, deed], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for deed, _ in ends
    ]
    children = [psutil.Process(int(parent.stdout.readline())) for parent in parents]
    for parent, (_, end) in zip(parents, ends, strict=True):
        print(file=parent.stdin, flush=True)
        assert parent.stdout.readline() == "at work\n"
        if end == "kill":
            parent.kill()
        parent.communicate("\n")
    deadline = time.monotonic() + AMPLE
    while any(_alive(child) for child in children):
        assert time.monotonic() < deadline, children
        time.sleep(0.1)


def test_a_child_that_never_starts_is_an_error():
    with pytest.raises(RuntimeError, match="load_never does not start: exit status 7"):
        Sandbox(HOSTILE, "load_never").grade("odd", "5", ["5"], AMPLE)


def _verifiers():
    """The running verifier processes of this process."""
    return [child for child in psutil.Process().children() if sandbox.__file__ in _command(child)]


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
