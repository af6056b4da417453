"""A reasoning-gym task's own verifier as a verl reward, for data that `cppo_verl.data.reasoning_gym` wrote.

::

    reward.custom_reward_function.path=pkg://cppo_verl.rewards.reasoning_gym
    reward.custom_reward_function.name=compute_score
    +reward.custom_reward_function.reward_kwargs.time_limit=5   # seconds per answer; 5 is the default

Verifiers compute what an answer says, ``9**9**9`` of a sum for one, and some evaluate it as Python (``eval``, sympy's
``parse_expr``). So they run under the limits of `cppo_verl.rewards.sandbox`.
"""

import functools
import json
from collections.abc import Callable
from typing import Any

from cppo_verl.rewards.sandbox import Sandbox

PREFIX = "reasoning_gym/"
"""What a row's ``data_source`` begins with; the task's name follows."""


def compute_score(
    data_source: str,
    solution_str: str,
    ground_truth: str,
    extra_info: dict | None = None,
    time_limit: float = 5.0,
    **kwargs: Any,
) -> dict[str, float]:
    """Return ``{"score": in [0, 1], "acc", "timed_out", "crashed": 1.0 or 0.0}`` for one decoded response.

    The answer is what the last ``<answer>...</answer>`` holds, or the whole response if there is none. ``ground_truth``
    is not used: many problems have more than one right answer, and the verifier knows them. Partial credit counts in
    ``score`` only, so that validation logs the share of fully right answers. An answer that is ``timed_out`` after
    ``time_limit`` seconds of wall clock, or that ``crashed`` the verifier's process, scores 0. Raises ValueError for
    rows that `cppo_verl.data.reasoning_gym` did not write, and for a limit that is not a positive number; RuntimeError
    if the verifier's process does not start.
    """
    extra_info = extra_info or {}
    if "entry" not in extra_info or "task_kwargs" not in extra_info:
        expected = "'entry' and 'task_kwargs', as `cppo-verl prepare reasoning-gym` writes them"
        raise ValueError(f"extra_info must hold {expected}, got {sorted(extra_info)}")
    load_task(data_source, extra_info["task_kwargs"])  # refuses an unknown task by name
    problem = [data_source, extra_info["task_kwargs"], extra_info["entry"]]
    grade = _VERIFIERS.grade(data_source, solution_str, problem, time_limit)
    return {"score": grade.score, **grade.metrics()}


def score_answer(response: str, problem: list[str]) -> float:
    """Return the verifier's score of ``response``; ``problem`` is a row's data_source, task_kwargs and entry."""
    from reasoning_gym.utils import extract_answer

    data_source, task_kwargs, entry = problem
    dataset = load_task(data_source, task_kwargs)
    tagged = extract_answer(response)
    answer = response.strip() if tagged is None else tagged
    entry = json.loads(entry)
    try:
        return float(dataset.score_answer(answer, entry))
    except Exception:
        # Some verifiers raise on text that they cannot parse. The problem's own answer verified when the row was
        # written, so it is the response that is wrong.
        return 0.0


@functools.cache
def load_task(data_source: str, task_kwargs: str) -> Any:
    """Return the reasoning-gym data set whose verifier scores ``data_source``; ``task_kwargs`` is a JSON object.

    Raises ValueError for a ``data_source`` that names no task.
    """
    import reasoning_gym
    from reasoning_gym.factory import DATASETS

    task = data_source.removeprefix(PREFIX)
    if not data_source.startswith(PREFIX) or task not in DATASETS:
        raise ValueError(f"unknown data_source {data_source!r}: expected {PREFIX}<task> with a reasoning-gym task name")
    return reasoning_gym.create_dataset(task, size=1, seed=0, **json.loads(task_kwargs))


def _load_verifiers() -> Callable[[str, list[str]], float]:
    import reasoning_gym  # noqa: F401  here rather than within the first answer's time

    return score_answer


_VERIFIERS = Sandbox(__file__, "_load_verifiers")
