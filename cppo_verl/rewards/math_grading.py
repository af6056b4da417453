"""Maths answers as verl rewards: verl's own ``math_dapo`` and math-verify, under a time and a memory limit.

::

    reward.custom_reward_function.path=pkg://cppo_verl.rewards.math_grading
    reward.custom_reward_function.name=math_dapo                # or math_verify
    +reward.custom_reward_function.reward_kwargs.time_limit=5   # seconds per answer; 5 is the default

Both return ``{"score", "acc", "timed_out", "crashed"}``, all floats. ``acc`` is 1 for a right answer and 0
for any other, so that validation reports accuracy; ``timed_out`` and ``crashed`` are 1 for an answer that
was given up and counts as wrong.

A verifier is Python and regular expressions on text that a model wrote: it can loop inside one C call,
exhaust memory or overflow the stack, and nothing inside its own process can stop that. It runs in a child
process, one for each verifier and each process that asks, which is killed at the limit and replaced.
"""

import importlib.util
import json
import logging
import math
import os
import re
import resource
import runpy
import signal
import subprocess
import sys
import threading
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path

ANSWER_CHARACTERS = 2_000  # what is read of a response: its end
TRUTH_CHARACTERS = 10_000  # longer ground truths are refused
MEMORY_BYTES = 1 << 30  # address space of a child; an idle one takes less than a tenth of it
START_SECONDS = 120.0  # for a child's imports, which may come from a slow shared disk

logger = logging.getLogger(__name__)
# Its own level, as verl's modules have: importing verl's vLLM server raises the root's to errors.
logger.setLevel(os.getenv("VERL_LOGGING_LEVEL", "WARN"))


def math_dapo(data_source, solution_str, ground_truth, extra_info=None, time_limit=5.0, **kwargs):
    """Verl reward function: verl's ``math_dapo`` rule, score +1 or -1.

    Reads the last 300 characters of the response: the last "Answer:" line, compared after normalisation,
    or without one a ``\\boxed{}`` in the last 100, compared as it stands. ``ground_truth`` is a string, a
    number, or a list of accepted strings, which may be JSON (``'["34"]'``). ``time_limit`` is in seconds of
    wall clock, without the child's start. Raises ValueError for a ground truth or a limit that cannot be
    used, RuntimeError where the child process does not start.
    """
    right, timed_out, crashed = _judge(_DAPO, data_source, solution_str, ground_truth, time_limit)
    return {"score": 2.0 * right - 1.0, "acc": float(right), "timed_out": timed_out, "crashed": crashed}


def math_verify(data_source, solution_str, ground_truth, extra_info=None, time_limit=5.0, **kwargs):
    """Verl reward function: equality as mathematics, by math-verify, score 1 or 0.

    Reads the last ``ANSWER_CHARACTERS`` of the response: the last ``\\boxed{}``, or without one the
    last "Answer:" line, or what "the answer is" announces. A number or formula that nothing announces is no
    answer: a response cut off in the middle of its work earns nothing. Arguments and errors are those of
    ``math_dapo``; also raises ImportError where math-verify is missing.
    """
    right, timed_out, crashed = _judge(_VERIFY, data_source, solution_str, ground_truth, time_limit)
    return {"score": float(right), "acc": float(right), "timed_out": timed_out, "crashed": crashed}


def _judge(child, data_source, solution_str, ground_truth, time_limit):
    if not 0 < time_limit < math.inf:
        raise ValueError(f"time_limit must be a positive number of seconds, got {time_limit!r}")
    answer = solution_str[-ANSWER_CHARACTERS:]
    right, timed_out, crashed = child.ask(answer, _accepted(ground_truth), time_limit)
    if timed_out or crashed:
        what = f"no verdict within {time_limit} s" if timed_out else "the verifier died or raised"
        logger.warning("%s answer counted as wrong, %s: ...%r", data_source, what, answer[-200:])
    return right, float(timed_out), float(crashed)


def _accepted(ground_truth):
    """The accepted answers as a list of strings."""
    values = ground_truth.tolist() if hasattr(ground_truth, "tolist") else ground_truth  # numpy, from parquet
    if isinstance(values, str) and values.lstrip().startswith('["') and len(values) <= TRUTH_CHARACTERS:
        # Some data sets write a list of strings. Other brackets are mathematics: [0, 1] is an interval.
        try:
            alternatives = json.loads(values)
        except (ValueError, RecursionError):
            alternatives = [values]
        values = alternatives if all(isinstance(value, str) for value in alternatives) else values
    values = values if isinstance(values, list | tuple) else [values]
    missing = any(value != value for value in values)  # an empty cell, as pandas has it
    if not values or missing or not all(isinstance(value, str | int | float) for value in values):
        raise ValueError(f"ground_truth must be a string, a number or a list of them, got {ground_truth!r:.200}")
    # A column of integers with gaps comes from pandas as floats.
    values = [str(int(v) if isinstance(v, float) and v.is_integer() else v) for v in values]
    if not all(value.strip() for value in values) or sum(map(len, values)) > TRUTH_CHARACTERS:
        raise ValueError(
            f"ground_truth must hold text, at most {TRUTH_CHARACTERS} characters, got {sum(map(len, values))}: "
            f"{ground_truth!r:.200}"
        )
    return values


class _Child:
    """A verifier in a process of its own: started at the first answer, replaced after a loss.

    ``file`` and ``loader`` name a function without arguments that returns ``verify(answer, accepted)``.
    """

    def __init__(self, file, loader):
        self._source = file, loader
        self._reset()
        os.register_at_fork(after_in_child=self._reset)  # a fork must not talk over its parent's pipe

    def _reset(self):
        self._lock = threading.Lock()
        self._process = self._pipe = None

    def ask(self, answer, accepted, time_limit):
        """``(right, timed_out, crashed)``. Threads wait for each other; waiting is not in the limit."""
        with self._lock:
            reusable = False
            try:
                if self._process is None or self._process.poll() is not None:
                    self._start()
                self._pipe.send((answer, accepted, time_limit))
                if not self._pipe.poll(time_limit):
                    return False, True, False
                right, crashed, reusable = self._pipe.recv()
                return right, False, crashed
            except (EOFError, OSError):
                return False, False, True
            finally:
                # Also where this thread was interrupted: a late verdict must not meet the next answer.
                if not reusable:
                    self._stop()

    def _start(self):
        for _ in range(3):
            self._stop()
            error = f"no sign of life within {START_SECONDS:.0f} s"
            try:
                self._pipe, theirs = Pipe()
                with theirs:
                    # A new interpreter, not a fork: this process has threads. Not multiprocessing's spawn,
                    # which would import the main module, in a ray worker ray itself. What verifiers print
                    # (ANTLR complains of every odd formula) would fill the log.
                    self._process = subprocess.Popen(
                        [sys.executable, __file__, str(theirs.fileno())],
                        pass_fds=[theirs.fileno()],
                        stdin=subprocess.DEVNULL,
                        stdout=subprocess.DEVNULL,
                        stderr=subprocess.DEVNULL,
                    )
                self._pipe.send((sys.path, *self._source))
                if self._pipe.poll(START_SECONDS):
                    missing = self._pipe.recv()
                    if missing is None:
                        return
                    raise ImportError(missing)
            except (EOFError, OSError) as lost:
                error = f"exit status {self._process.wait()}" if self._process else repr(lost)
        raise RuntimeError(f"the process of the verifier {self._source[1]} does not start: {error}")

    def _stop(self):
        if self._pipe is not None:
            self._pipe.close()
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        self._process = self._pipe = None


def _load_math_dapo():
    verl = importlib.util.find_spec("verl")
    if verl is None:
        raise ImportError("the reward math_dapo needs verl: pip install verl")
    # The file alone: importing the package would load torch and ray.
    path = Path(verl.submodule_search_locations[0], "utils", "reward_score", "math_dapo.py")
    compute_score = runpy.run_path(str(path))["compute_score"]
    return lambda answer, accepted: any(compute_score(answer, truth)["acc"] for truth in accepted)


def _load_math_verify():
    try:
        import math_verify as library
    except ImportError as error:
        raise ImportError(
            "the reward math_verify needs math-verify and the ANTLR runtime: "
            f"pip install math-verify==0.9.0 antlr4-python3-runtime==4.9.3 ({error})"
        ) from error
    truth_form = [library.LatexExtractionConfig()]
    answer_forms = [
        library.LatexExtractionConfig(boxed_match_priority=0, try_extract_without_anchor=False),
        library.ExprExtractionConfig(try_extract_without_anchor=False),
    ]
    signs = {"−": "-", "×": r"\times ", "·": r"\cdot ", "÷": r"\div ", "∞": r"\infty ", "°": r"^\circ ", "∪": r"\cup "}
    signs |= {"≤": r"\le ", "≥": r"\ge ", "²": "^2", "³": "^3"}
    signs |= {"½": r"\frac{1}{2}", "⅓": r"\frac{1}{3}", "⅔": r"\frac{2}{3}", "¼": r"\frac{1}{4}", "¾": r"\frac{3}{4}"}
    signs = str.maketrans(signs)

    def announced(answer):
        # The library joins all boxes into one set, and takes the first number of an "Answer:" line that
        # lists several. A response that boxes its steps means the last, and one answer is the whole line.
        box = answer.rfind(r"\boxed")
        if box >= 0:
            return answer[box:]
        lines = re.findall(r"(?i)answer\**\s*:\s*([^\n]+)", answer)
        line = re.sub(r"(?<!\\)\$|\\[()\[\]]", "", lines[-1]).lstrip(" *").rstrip(" *.") if lines else ""
        return rf"\boxed{{{line}}}" if line else answer

    def verify(answer, accepted):
        answer = announced(answer).translate(signs)
        # None: its own time limits are signals that Python handles between bytecodes, too late for a regex.
        found = library.parse(answer, answer_forms, parsing_timeout=None)
        for truth in accepted if found else ():
            gold = library.parse(rf"\boxed{{{truth.translate(signs)}}}", truth_form, parsing_timeout=None)
            if library.verify(gold, found, timeout_seconds=None):
                return True
        return False

    return verify


def _serve(pipe):
    """A child's life: load the verifier, then one verdict per request until the pipe closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    # The kernel ends a stuck child also where the parent is gone and no one else would.
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGALRM])
    _, most = resource.getrlimit(resource.RLIMIT_AS)
    memory = MEMORY_BYTES if most == resource.RLIM_INFINITY else min(MEMORY_BYTES, most)
    resource.setrlimit(resource.RLIMIT_AS, (memory, most))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))

    sys.path[:], file, loader = pipe.recv()
    try:
        verify = runpy.run_path(file)[loader]()
    except Exception as error:
        pipe.send(str(error) if isinstance(error, ImportError) else repr(error))
        return
    pipe.send(None)
    while True:
        answer, accepted, time_limit = pipe.recv()
        signal.setitimer(signal.ITIMER_REAL, time_limit + 2.0)  # later than any parent that is still there
        try:
            right, crashed = bool(verify(answer, accepted)), False
        except Exception:
            right, crashed = False, True
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        # Caches grow. Near its limit a child would find right answers wrong, so it goes well before.
        in_use = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        pipe.send((right, crashed, in_use < memory / 2))


_DAPO = _Child(__file__, "_load_math_dapo")
_VERIFY = _Child(__file__, "_load_math_verify")

if __name__ == "__main__":
    try:
        _serve(Connection(int(sys.argv[1])))
    except (EOFError, OSError):
        sys.exit()  # the parent is gone, or has let go of this child
