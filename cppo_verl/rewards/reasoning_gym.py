"""A reasoning-gym task's own verifier as a verl reward, for data that `cppo_verl.data.reasoning_gym` wrote.

::

    reward.custom_reward_function.path=pkg://cppo_verl.rewards.reasoning_gym
    reward.custom_reward_function.name=compute_score
"""

import functools
import json
from typing import Any

PREFIX = "reasoning_gym/"
"""What a row's ``data_source`` begins with; the task's name follows."""


def compute_score(
    data_source: str, solution_str: str, ground_truth: str, extra_info: dict | None = None, **kwargs: Any
) -> dict[str, float]:
    """Return ``{"score": in [0, 1], "acc": 1.0 or 0.0}`` for one decoded response; verl calls this.

    The answer is what the last ``<answer>...</answer>`` holds, or the whole response if there is none. ``ground_truth``
    is not used: many problems have more than one right answer, and the verifier knows them. Partial credit counts in
    ``score`` only, so that validation logs the share of fully right answers. Raises ValueError for rows that
    `cppo_verl.data.reasoning_gym` did not write.
    """
    from reasoning_gym.utils import extract_answer

    extra_info = extra_info or {}
    if "entry" not in extra_info or "task_kwargs" not in extra_info:
        expected = "'entry' and 'task_kwargs', as `cppo-verl prepare reasoning-gym` writes them"
        raise ValueError(f"extra_info must hold {expected}, got {sorted(extra_info)}")
    dataset = load_task(data_source, extra_info["task_kwargs"])
    tagged = extract_answer(solution_str)
    answer = solution_str.strip() if tagged is None else tagged
    try:
        score = float(dataset.score_answer(answer, json.loads(extra_info["entry"])))
    except Exception:
        # Some verifiers raise on text that they cannot parse. The problem's own answer verified when the row was
        # written, so it is the response that is wrong.
        score = 0.0
    return {"score": score, "acc": float(score >= 1.0)}


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
