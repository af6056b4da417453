"""Rewards for maths answers: verl's own ``math_dapo`` and math-verify, under a time and a memory limit.

::

    reward.custom_reward_function.path=pkg://cppo_verl.rewards.math_grading
    reward.custom_reward_function.name=math_dapo                # or math_verify
    +reward.custom_reward_function.reward_kwargs.time_limit=5   # seconds per answer; 5 is the default

Both return ``{"score", "acc", "timed_out", "crashed"}``, all floats. ``acc`` is 1 for a right answer and 0 for any
other, so that validation reports accuracy. ``timed_out`` and ``crashed`` are 1 for an answer that was given up; it
counts as wrong. See `cppo_verl.rewards.sandbox` for the limits.
"""

import importlib.util
import json
import re
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cppo_verl.rewards.sandbox import Sandbox

ANSWER_CHARACTERS = 2_000
"""How many characters of a response's end are read."""
TRUTH_CHARACTERS = 10_000
"""Longer ground truths are refused."""

Verify = Callable[[str, list[str]], bool]
"""``verify(answer, accepted)``: whether the answer equals one of the accepted ones."""


def math_dapo(
    data_source: str,
    solution_str: str,
    ground_truth: Any,
    extra_info: dict[str, Any] | None = None,
    time_limit: float = 5.0,
    **kwargs: Any,
) -> dict[str, float]:
    """Score a response by verl's ``math_dapo`` rule, +1 or -1.

    The rule reads the last 300 characters: the last "Answer:" line, compared after normalisation, or without one a
    ``\\boxed{}`` in the last 100, compared as it stands.

    ``ground_truth`` is a string, a number, or a list of accepted strings, which may be JSON (``'["34"]'``).
    ``time_limit`` is in seconds of wall clock, without the child's start. Raises ValueError for a ground truth or a
    limit that cannot be used, and RuntimeError if the child process does not start.
    """
    graded = _grade(_DAPO, data_source, solution_str, ground_truth, time_limit)
    return {"score": 2.0 * graded["acc"] - 1.0, **graded}


def math_verify(
    data_source: str,
    solution_str: str,
    ground_truth: Any,
    extra_info: dict[str, Any] | None = None,
    time_limit: float = 5.0,
    **kwargs: Any,
) -> dict[str, float]:
    """Score a response by equality as mathematics, 1 or 0, with math-verify.

    What the answer is, is decided here (`announced_answer`): in the last ``ANSWER_CHARACTERS`` the last ``\\boxed{}``,
    or without one the last "Answer:" line, or the rest of the last sentence with "the answer is". It is one answer as a
    whole, so that "not 6", "at least 6" and "between 6 and 100" are not 6. What nothing announces is no answer: a
    response cut off in the middle of its work earns nothing.

    What it means, and whether it equals the ground truth, is math-verify's decision. It leaves out units and some other
    words after a number ("6 apples"), rounds nothing, and takes "x = 6" for 6, but not "50%" for 50.

    Arguments and errors are those of `math_dapo`; also raises ImportError if math-verify is missing.
    """
    graded = _grade(_VERIFY, data_source, solution_str, ground_truth, time_limit)
    return {"score": graded["acc"], **graded}


def _grade(sandbox: Sandbox, data_source: str, response: str, ground_truth: Any, time_limit: float) -> dict[str, float]:
    return sandbox.grade(data_source, response[-ANSWER_CHARACTERS:], _accepted(ground_truth), time_limit).metrics()


def _accepted(ground_truth: Any) -> list[str]:
    """Return the accepted answers as strings; raise ValueError for a ground truth that cannot be used."""
    values = ground_truth.tolist() if hasattr(ground_truth, "tolist") else ground_truth  # numpy, from parquet
    if isinstance(values, str) and values.lstrip().startswith('["') and len(values) <= TRUTH_CHARACTERS:
        # Some data sets write a list of strings as JSON. Other brackets are mathematics: [0, 1] is an interval.
        try:
            alternatives = json.loads(values)
        except (ValueError, RecursionError):
            alternatives = [values]
        values = alternatives if all(isinstance(value, str) for value in alternatives) else values
    values = values if isinstance(values, list | tuple) else [values]
    missing = any(value != value for value in values)  # NaN, pandas' empty cell
    if not values or missing or not all(isinstance(value, str | int | float) for value in values):
        raise ValueError(f"ground_truth must be a string, a number or a list of them, got {ground_truth!r:.200}")
    # pandas turns a column of integers with gaps into floats.
    values = [str(int(v) if isinstance(v, float) and v.is_integer() else v) for v in values]
    length = sum(map(len, values))
    if not all(value.strip() for value in values) or length > TRUTH_CHARACTERS:
        wanted = f"ground_truth must hold text, at most {TRUTH_CHARACTERS} characters"
        raise ValueError(f"{wanted}, got {length}: {ground_truth!r:.200}")
    return values


_LINE = re.compile(r"(?i)answer\**\s*:\s*([^\n]+)")
_FILLER = r"(?:\s*\b(?:thus|therefore|then|simply|just|exactly|equal to)\b)*"
# A full stop ends a sentence, not a number; an exclamation mark may be a factorial.
_SENTENCE = re.compile(
    rf"(?i)\banswer\b[^.:\n]{{0,99}}?(?:\bis\b|\bequals\b|=):?{_FILLER}\s*((?:[^.!?\n]|\.(?=\d)|!(?!\s+(?-i:[A-Z])))+)"
)
_REASON = re.compile(r"(?i),?\s+(?:because|since|as|which|so)\b.*|,\s+not\b.*")
# The library leaves \text{} out as a unit.
_NO_UNIT = re.compile(
    r"\\text\{([^{}]*\b(?:not|no|more|less|least|most|between|than|about|over|under|except)\b[^{}]*)\}"
)


def announced_answer(response: str) -> str:
    """What a response gives as its answer, see `math_verify`; "" without one."""
    begin = response.rfind(r"\boxed")
    if begin >= 0:
        answer = _braced(response[begin + len(r"\boxed") :].lstrip())
    else:
        text = re.sub(r"(?<!\\)\$|\\[()\[\]]", "", response)
        found = _LINE.findall(text) or _SENTENCE.findall(text) or [""]
        answer = _REASON.sub("", found[-1]).rstrip(" *.")
    return _NO_UNIT.sub(r"\1", answer).strip(" *" if begin < 0 else " ").rstrip(".")


def _braced(text: str) -> str:
    """What stands between the brace that ``text`` begins with and the one that closes it; "" if none does."""
    depth = 0
    for end, character in enumerate(text):
        depth += (character == "{") - (character == "}")
        if not depth:
            return text[1:end]
    return ""


def _load_math_dapo() -> Verify:
    verl = importlib.util.find_spec("verl")
    if verl is None or verl.submodule_search_locations is None:
        raise ImportError("the reward math_dapo needs verl: pip install verl")
    # Run the file alone: importing the package would load torch and Ray.
    path = Path(verl.submodule_search_locations[0], "utils", "reward_score", "math_dapo.py")
    compute_score = runpy.run_path(str(path))["compute_score"]
    return lambda answer, accepted: any(compute_score(answer, truth)["acc"] for truth in accepted)


def _load_math_verify() -> Verify:
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
    pairs = {"−": "-", "×": r"\times ", "·": r"\cdot ", "÷": r"\div ", "∞": r"\infty ", "°": r"^\circ ", "∪": r"\cup "}
    pairs |= {"≤": r"\le ", "≥": r"\ge ", "²": "^2", "³": "^3"}
    pairs |= {"½": r"\frac{1}{2}", "⅓": r"\frac{1}{3}", "⅔": r"\frac{2}{3}", "¼": r"\frac{1}{4}", "¾": r"\frac{3}{4}"}
    signs = str.maketrans(pairs)

    def verify(answer: str, accepted: list[str]) -> bool:
        announced = rf"\boxed{{{announced_answer(answer).translate(signs)}}}"
        # No timeout of its own: that is a signal, which Python handles between bytecodes, too late for a regex.
        found = library.parse(announced, answer_forms, parsing_timeout=None)
        for truth in accepted if found else ():
            # Without a last full stop, as the answer: data sets have some.
            box = rf"\boxed{{{truth.translate(signs).rstrip(' .')}}}"
            gold = library.parse(box, truth_form, parsing_timeout=None)
            if library.verify(gold, found, timeout_seconds=None):
                return True
        return False

    return verify


_DAPO = Sandbox(__file__, "_load_math_dapo")
_VERIFY = Sandbox(__file__, "_load_math_verify")
